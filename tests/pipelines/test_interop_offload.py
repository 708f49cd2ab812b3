"""Offloading next to skip guidance: equal results, nothing used that was not loaded, nothing loaded to be skipped.

What is offloaded goes to files, and its memory is filled with NaN, so that a block that runs unloaded is seen on a CPU
too. The tests at the end are the same for a real device.
"""

import pytest
import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks.group_offloading import LazyPrefetchGroupOffloadingHook, ModuleGroup
from helpers.residue import no_gates, traces
from helpers.stg_reference import close

from skipguide import Skipper, SkipPlan, find_blocks
from skipguide.hosts.cache_contexts import ContextNames
from skipguide.hosts.diffusers_caches import hook_names
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import BY_NAME
from zoo.pipes import BY_PIPE, STEPS

LAYER = 2
CPU = torch.device("cpu")
cases = pytest.mark.parametrize("case", [BY_PIPE[name] for name in ("ltx", "wan", "flux")], ids=repr)


def guided(case, pipe, **call):
    with Stg([LAYER]).apply(pipe) as applied:
        out = case.run(pipe, **call)
    return out, applied.stats


class Loads:
    """Which modules diffusers' groups load, pass by pass; what they release becomes NaN."""

    def __init__(self, model, monkeypatch):
        self.names = {id(module): name for name, module in model.named_modules()}
        self.model, self.seen = model, []
        onload, offload = ModuleGroup.onload_, ModuleGroup.offload_

        def load(group):
            context = ContextNames.name(model)
            self.seen += [(context, self.names.get(id(module), "")) for module in group.modules]
            onload(group)

        def release(group):
            offload(group)
            for tensor in group.tensor_to_key:
                if tensor.is_floating_point():
                    tensor.data.fill_(float("nan"))

        monkeypatch.setattr(ModuleGroup, "onload_", load)
        monkeypatch.setattr(ModuleGroup, "offload_", release)

    def blocks(self, context):
        """The blocks of which anything was loaded in the passes of that context."""
        names = [block.name for block in find_blocks(self.model)]
        loaded = [name for where, name in self.seen if where == context]
        return {name for name in names if any(f"{got}.".startswith(f"{name}.") for got in loaded)}

    def all_released(self):
        weights = [p for b in find_blocks(self.model) for p in b.module.parameters() if p.is_floating_point()]
        return all(p.isnan().all() for p in weights)


def offloaded(pipe, tmp_path, kind, size, lazy=False):
    apply_group_offloading(
        pipe.transformer,
        onload_device=CPU,
        offload_device=CPU,
        offload_type=kind,
        num_blocks_per_group=size,
        offload_to_disk_path=str(tmp_path),
    )
    if lazy:  # what use_stream=True adds: two kinds of hooks that watch the first pass and take themselves off
        registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        registry.register_hook(LazyPrefetchGroupOffloadingHook(), "lazy_prefetch_group_offloading")


@cases
@pytest.mark.parametrize("kind", [("block_level", 1), ("block_level", 2), ("leaf_level", None)], ids=str)
@pytest.mark.parametrize("when", ["before", "during"])
def test_group_offloading(case, kind, when, tmp_path, monkeypatch):
    expected, reference = guided(case, case.build())
    pipe = case.build()
    plain = case.run(pipe)
    loads = Loads(pipe.transformer, monkeypatch)
    if when == "before":
        offloaded(pipe, tmp_path, *kind)
        before = traces(pipe.transformer)
    with Stg([LAYER]).apply(pipe) as applied:
        if when == "during":
            offloaded(pipe, tmp_path, *kind)
        close(case.run(pipe), expected)
    assert applied.stats.blocks_run == reference.blocks_run
    assert loads.all_released()
    names = [block.name for block in find_blocks(pipe.transformer)]
    stacks = {name.rpartition(".")[0] for name in names}
    run = set(names[LAYER + 1 :])
    if kind[1] == 2:  # a group is loaded whole, if any of its blocks runs
        pairs = [{f"{stack}.{i}", f"{stack}.{i + 1}"} for stack in stacks for i in range(0, len(names), 2)]
        run = {name for pair in pairs if pair & run for name in pair & set(names)}
    assert loads.blocks("skip") == run, "a block was loaded to be skipped"
    if when == "before":
        assert traces(pipe.transformer) == before
    no_gates(pipe.transformer)
    close(case.run(pipe), plain)
    assert loads.all_released()


@pytest.mark.parametrize("part", ["token_shuffle", "attn_blur", "self_swap"])
def test_perturbed_passes_of_an_offloaded_model_are_the_same(part, tmp_path, monkeypatch):
    """What is drawn, and where the tokens lie, does not hang on what is loaded."""
    case = BY_PIPE["wan"]
    pipes = [case.build() for _ in range(2)]
    loads = Loads(pipes[1].transformer, monkeypatch)
    offloaded(pipes[1], tmp_path, "block_level", 1)
    outs = []
    for pipe in pipes:
        with Stg([LAYER], part=part).apply(pipe):
            outs.append(case.run(pipe))
    assert torch.equal(*outs) and loads.all_released()


@pytest.mark.parametrize("layers", [[0], [1], [1, 2], [0, 3]])
@pytest.mark.parametrize("reuse", [True, False])
def test_groups_of_which_only_some_blocks_run(layers, reuse, tmp_path, monkeypatch):
    """First, last, both sides of a border between groups, and groups of three and one."""
    case = BY_PIPE["wan"]
    for size in (2, 3):
        pipe = case.build()
        with Stg(layers, prefix_reuse=reuse).apply(pipe):
            expected = case.run(pipe)
        loads = Loads(pipe.transformer, monkeypatch)
        offloaded(pipe, tmp_path / str(size), "block_level", size)
        with Stg(layers, prefix_reuse=reuse).apply(pipe):
            close(case.run(pipe), expected)
        assert loads.all_released()
        monkeypatch.undo()


def test_a_plan_for_rows_and_an_exception_release_their_groups(tmp_path, monkeypatch):
    family = BY_NAME["ltx"]
    model, inputs = family.build(), family.inputs(2)
    with Skipper(model, SkipPlan([1], rows=[0])):
        expected = family.run(model, inputs)
    loads = Loads(model, monkeypatch)
    offloaded(type("Pipe", (), {"transformer": model}), tmp_path, "block_level", 2)
    with Skipper(model, SkipPlan([1], rows=[0])):
        close(family.run(model, inputs), expected)
    assert loads.all_released()
    handle = find_blocks(model)[2].module.attn1.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), Skipper(model, SkipPlan([3])):
        family.run(model, inputs)
    handle.remove()
    assert loads.all_released()
    with Skipper(model, SkipPlan([1], rows=[0])):
        close(family.run(model, inputs), expected)


@pytest.mark.parametrize("when", ["before", "during"])
def test_the_hooks_that_watch_the_first_pass(when, tmp_path, monkeypatch):
    """They take themselves off in it, and used to take gates with them."""
    case = BY_PIPE["wan"]
    expected, _ = guided(case, case.build())
    pipe = case.build()
    loads = Loads(pipe.transformer, monkeypatch)
    if when == "before":
        offloaded(pipe, tmp_path, "block_level", 1, lazy=True)
    with Stg([LAYER]).apply(pipe):
        if when == "during":
            offloaded(pipe, tmp_path, "block_level", 1, lazy=True)
        for _ in range(2):
            close(case.run(pipe), expected)
    assert {name for _, name in hook_names(pipe.transformer)} == {"group_offloading"}
    no_gates(pipe.transformer)
    assert loads.seen


# -- accelerate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "where"),
    [(BY_PIPE[name], "memory") for name in ("ltx", "wan", "flux")] + [(BY_PIPE["wan"], "disk")],
    ids=str,
)
def test_sequential_offload(case, where, tmp_path, monkeypatch):
    """`enable_sequential_cpu_offload` is this with another execution device: every weight is on "meta" between uses."""
    from accelerate import cpu_offload, disk_offload
    from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules

    call = {"num_inference_steps": 1} if where == "disk" else {}  # numpy opens a file per weight and use
    expected, reference = guided(case, case.build(), **call)
    pipe = case.build()
    plain = case.run(pipe, **call)
    if where == "memory":
        cpu_offload(pipe.transformer, execution_device=CPU)
    else:
        disk_offload(pipe.transformer, str(tmp_path), execution_device=CPU)
    assert all(p.is_meta for p in pipe.transformer.parameters())
    names = {id(module): name for name, module in pipe.transformer.named_modules()}
    seen = []
    load = AlignDevicesHook.pre_forward

    def listening(hook, module, *args, **kwargs):
        seen.append((ContextNames.name(pipe.transformer), names[id(module)]))
        return load(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", listening)
    out, stats = guided(case, pipe, **call)
    close(out, expected)
    assert stats.blocks_run == reference.blocks_run
    prefix = [block.name for block in find_blocks(pipe.transformer)][: LAYER + 1]
    loaded = {name for context, name in seen if context == "skip"}
    assert loaded
    assert not [name for name in loaded if any(f"{name}.".startswith(f"{block}.") for block in prefix)]
    assert all(p.is_meta for p in pipe.transformer.parameters())
    with Stg([LAYER], part="attn").apply(pipe):
        assert torch.isfinite(case.run(pipe, **call)).all()
    remove_hook_from_submodules(pipe.transformer)
    no_gates(pipe.transformer)
    close(case.run(pipe, **call), plain)


@cases
@pytest.mark.parametrize("when", ["before", "during"])
def test_model_offload(case, when, monkeypatch):
    """`enable_model_cpu_offload`, which takes its hooks off and puts them back at the end of every call."""
    from accelerate.hooks import CpuOffload

    expected, _ = guided(case, case.build())
    pipe = case.build()
    plain, loaded = case.run(pipe), []
    move = CpuOffload.pre_forward

    def listening(hook, module, *args, **kwargs):
        loaded.append(module)
        return move(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", listening)
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    with Stg([LAYER]).apply(pipe) as applied:
        if when == "during":
            assert torch.equal(case.run(pipe), expected)
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            before = applied.stats.passes
            loaded.clear()
            assert torch.equal(case.run(pipe), expected)
            assert len(loaded) == applied.stats.passes - before - STEPS, "a hook for each call of the pipeline's own"
    pipe.remove_all_hooks()
    no_gates(pipe.transformer)
    assert torch.equal(case.run(pipe), plain)


# -- the real ones ----------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@gpu
@needs_cuda
@cases
@pytest.mark.parametrize("how", ["model", "sequential"])
def test_pipeline_offload_on_cuda(case, how):
    pipe = case.build().to("cuda")
    expected, _ = guided(case, pipe)
    pipe = case.build()
    {"model": pipe.enable_model_cpu_offload, "sequential": pipe.enable_sequential_cpu_offload}[how]()
    with Stg([LAYER]).apply(pipe):
        for _ in range(2):
            torch.testing.assert_close(case.run(pipe).cpu(), expected.cpu(), atol=1e-4, rtol=1e-4)
    no_gates(pipe.transformer)


@gpu
@needs_cuda
@cases
@pytest.mark.parametrize("kind", [("block_level", 1, True), ("block_level", 2, False), ("leaf_level", None, True)])
def test_group_offloading_on_cuda(case, kind, monkeypatch):
    level, size, stream = kind
    pipe = case.build().to("cuda")
    expected, _ = guided(case, pipe)
    pipe = case.build()
    seen = []
    load = ModuleGroup.onload_
    names = {id(module): name for name, module in pipe.transformer.named_modules()}

    def listening(group):
        seen.extend((ContextNames.name(pipe.transformer), names.get(id(module), "")) for module in group.modules)
        load(group)

    monkeypatch.setattr(ModuleGroup, "onload_", listening)
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cuda"),
        offload_device=CPU,
        offload_type=level,
        num_blocks_per_group=size,
        use_stream=stream,
    )
    call = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.call_kwargs().items()}
    with Stg([LAYER]).apply(pipe):
        for _ in range(2):
            call["generator"] = torch.Generator().manual_seed(11)
            torch.testing.assert_close(pipe(**call)[0].cpu(), expected.cpu(), atol=1e-4, rtol=1e-4)
    first = find_blocks(pipe.transformer)[1].name
    assert not [name for context, name in seen if context == "skip" and f"{name}.".startswith(f"{first}.")]
