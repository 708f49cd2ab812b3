"""PrefixReuse next to what else people do: errors, threads, LoRA, offloading, compilation, caches, low precision."""

import functools
import logging
import threading
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from helpers.cache_cases import CACHE_CASES
from helpers.native_calls import compared, ltx2_pipe, ltx2_row, near
from helpers.residue import no_gates, traces
from torch._dynamo.testing import CompileCounterWithBackend

from skipguide import find_blocks
from skipguide.pipelines import PrefixReuse
from zoo import BY_NAME
from zoo.family import randomise
from zoo.pipes import BY_PIPE, STEPS
from zoo.pipes_video import BY_VIDEO
from zoo.video_av import ltx2_gated, ltx2_inputs

CASE = BY_VIDEO["ltx2_own"]
LAYER = 2
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # for the second adapter
run = functools.partial(CASE.run, spatio_temporal_guidance_blocks=[LAYER])
REUSED = {"STG": STEPS, "modality isolation": STEPS}


class BrokenError(Exception):
    pass


def kept(applied):
    return [call for listener in applied._parts for state in listener._threads.values() for call in state.calls]


# -- nothing is left --------------------------------------------------------------------------------------------------


def test_nothing_is_left_after_it():
    pipe = CASE.build()
    plain, before = run(pipe), traces(pipe.transformer)
    with PrefixReuse().apply(pipe):
        run(pipe)
    assert traces(pipe.transformer) == before
    no_gates(pipe.transformer)
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("call", [0, 1, 2], ids=["plain", "STG", "modality"])
@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_an_error_inside_of_a_pass(call, error):
    pipe = CASE.build()
    plain = run(pipe)
    before, calls = traces(pipe.transformer), []

    def fails(module, args, kwargs):
        calls.append(module)
        if len(calls) == call + 1:
            raise error

    with PrefixReuse().apply(pipe) as applied:
        hook = pipe.transformer.transformer_blocks[LAYER].register_forward_pre_hook(fails, with_kwargs=True)
        with pytest.raises(error):
            run(pipe)
        hook.remove()
        assert not kept(applied)
        near(run(pipe), plain)  # and the next call is right
    assert traces(pipe.transformer) == before
    assert torch.equal(run(pipe), plain)


def test_an_error_between_two_passes_leaves_nothing_that_the_next_call_would_take():
    pipe = CASE.build()
    plain = run(pipe)

    def fails(pipe, step, timestep, given):
        raise BrokenError

    with PrefixReuse().apply(pipe):
        with pytest.raises(BrokenError):
            run(pipe, callback_on_step_end=fails)
        near(run(pipe), plain)


# -- threads, and other pipelines around the same denoiser ------------------------------------------------------------


@torch.no_grad()
def test_threads_that_run_one_denoiser_by_turns():
    model = randomise(ltx2_gated(), 1)
    turns, found = threading.Barrier(2, timeout=30), {}
    calls = {name: ltx2_row(ltx2_inputs(2, seed)) for name, seed in (("one", 0), ("two", 5))}

    @torch.no_grad()
    def work(name):
        for _ in range(2):
            model(**calls[name])
            turns.wait()
            found[name] = model(**calls[name], spatio_temporal_guidance_blocks=[LAYER])[0]
            turns.wait()

    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        threads = [threading.Thread(target=work, args=(name,)) for name in calls]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    for name, call in calls.items():
        near(found[name], model(**call, spatio_temporal_guidance_blocks=[LAYER])[0])
    assert applied.stats.reused == {"STG": 4}


@torch.no_grad()
def test_it_can_be_removed_while_another_thread_is_in_a_pass():
    model = randomise(ltx2_gated(), 1)
    before, row = traces(model), ltx2_row(ltx2_inputs(2))
    inside, removed, found = threading.Event(), threading.Event(), []

    def wait(module, args, kwargs):
        inside.set()
        removed.wait(timeout=30)

    @torch.no_grad()
    def work():
        marks = ({}, {"spatio_temporal_guidance_blocks": [LAYER]})
        found.extend(model(**row, **mark)[0] for mark in marks)

    applied = PrefixReuse().apply(ltx2_pipe(model))
    hook = model.transformer_blocks[LAYER].register_forward_pre_hook(wait, with_kwargs=True)
    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(timeout=30)
    applied.remove()
    removed.set()
    thread.join()
    hook.remove()
    assert traces(model) == before
    near(found[1], model(**row, spatio_temporal_guidance_blocks=[LAYER])[0])


def test_another_pipeline_around_the_same_denoiser_in_a_callback():
    pipe = CASE.build()
    other = CASE.build()
    other.transformer = pipe.transformer
    plain, alone = run(pipe), run(other, generator=torch.Generator().manual_seed(5))

    def inside(pipe, step, timestep, given):
        if step == 1:
            near(run(other, generator=torch.Generator().manual_seed(5)), alone)
        return {}

    with PrefixReuse().apply(pipe):
        near(run(pipe, callback_on_step_end=inside), plain)


# -- adapters ---------------------------------------------------------------------------------------------------------


def with_adapters(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "proj_in"], init_lora_weights=False)
    for name in ("one", "two"):
        model.add_adapter(config, adapter_name=name)
    return model.requires_grad_(False)


def switch(model):
    model.set_adapter("two" if model.active_adapters() == ["one"] else "one")


def disable(model):
    model.disable_adapters()


def weaken(model):
    model.set_adapters(["one"], [0.5])


def fuse(model):
    model.fuse_lora(adapter_names=["one"])


@torch.no_grad()
@pytest.mark.parametrize("change", [switch, disable, weaken, fuse], ids=lambda change: change.__name__)
def test_adapters_that_change_between_two_passes(change):
    model = with_adapters(randomise(ltx2_gated(), 1))
    model.set_adapter("one")
    row = ltx2_row(ltx2_inputs(2))
    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        model(**row)
        same = model(**row, spatio_temporal_guidance_blocks=[LAYER])[0]
        model(**row)
        change(model)
        out = model(**row, spatio_temporal_guidance_blocks=[LAYER])[0]
    assert torch.equal(out, model(**row, spatio_temporal_guidance_blocks=[LAYER])[0])
    assert change is fuse or not torch.allclose(out, same, atol=1e-4)
    assert applied.stats.reused == {"STG": 1}
    assert applied.stats.not_reused == {"STG whole: the weights changed in between": 1}


@torch.no_grad()
def test_the_scale_of_adapters_in_the_call():
    model = with_adapters(randomise(ltx2_gated(), 1))
    row = ltx2_row(ltx2_inputs(2))
    half = {"attention_kwargs": {"scale": 0.5}}
    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        for call in (half, {}):
            model(**row, **half)
            out = model(**row, **call, spatio_temporal_guidance_blocks=[LAYER])[0]
    assert torch.equal(out, model(**row, spatio_temporal_guidance_blocks=[LAYER])[0])
    assert applied.stats.reused == {"STG": 1} and sum(applied.stats.not_reused.values()) == 1


def test_a_pipeline_with_an_adapter():
    pipe = CASE.build()
    with_adapters(pipe.transformer)
    plain, out, stats = compared(CASE, pipe, spatio_temporal_guidance_blocks=[LAYER])
    near(out, plain)
    assert stats.reused == REUSED


def test_an_adapter_that_is_loaded_while_it_is_applied():
    pipe = CASE.build()
    with PrefixReuse().apply(pipe) as applied:
        run(pipe)
        with_adapters(pipe.transformer)
        out = run(pipe)
    near(out, run(pipe))
    assert applied.stats.reused == {kind: 2 * count for kind, count in REUSED.items()}


# -- offloading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [("block_level", 1), ("block_level", 2), ("leaf_level", None)], ids=str)
@pytest.mark.parametrize("when", ["before", "during"])
def test_group_offloading(tmp_path, monkeypatch, kind, when):
    """What is released becomes NaN, so that a block that runs unloaded would be seen."""
    pipe = CASE.build()
    plain, cpu = run(pipe), torch.device("cpu")
    offload = ModuleGroup.offload_

    def release(group):
        offload(group)
        for tensor in group.tensor_to_key:
            if tensor.is_floating_point():
                tensor.data.fill_(float("nan"))

    def put_on():
        monkeypatch.setattr(ModuleGroup, "offload_", release)
        apply_group_offloading(
            pipe.transformer,
            onload_device=cpu,
            offload_device=cpu,
            offload_type=kind[0],
            num_blocks_per_group=kind[1],
            offload_to_disk_path=str(tmp_path),
        )

    if when == "before":
        put_on()
    with PrefixReuse().apply(pipe) as applied:
        if when == "during":
            put_on()
        out = run(pipe)
    near(out, plain)
    assert applied.stats.reused == REUSED


def test_layerwise_casting():
    pipe = CASE.build()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain, out, stats = compared(CASE, pipe, spatio_temporal_guidance_blocks=[LAYER])
    near(out, plain)
    assert stats.reused == REUSED


def test_sequential_offloading():
    """Accelerate's: every weight is on no device while its module does not run."""
    accelerate = pytest.importorskip("accelerate")
    pipe = CASE.build()
    plain = run(pipe)
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert next(pipe.transformer.parameters()).is_meta
    with PrefixReuse().apply(pipe) as applied:
        out = run(pipe)
    near(out, plain)
    assert applied.stats.reused == REUSED


@torch.no_grad()
def test_sequential_offloading_sees_a_weight_that_changes_where_it_lies():
    accelerate = pytest.importorskip("accelerate")
    model, row = randomise(ltx2_gated(), 1), ltx2_row(ltx2_inputs(2))
    state = dict(model.state_dict())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), state_dict=state)
    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        model(**row)
        state["transformer_blocks.0.ff.net.0.proj.weight"].mul_(1.5)
        out = model(**row, spatio_temporal_guidance_blocks=[LAYER])[0]
    assert torch.equal(out, model(**row, spatio_temporal_guidance_blocks=[LAYER])[0])
    assert applied.stats.not_reused == {"STG whole: the weights changed in between": 1}


# -- compilation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    logging.disable(logging.DEBUG)  # dynamo's trace log is for people; pytest would collect every line of it
    yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


def compile_blocks(pipe, backend, fullgraph):
    for block in find_blocks(pipe.transformer):
        block.module.compile(backend=backend, fullgraph=fullgraph)


@pytest.mark.parametrize("when", ["before", "during"])
def test_compiled_blocks_need_no_graph_more(compiler, when):
    case, counter = BY_PIPE["sd3"], CompileCounterWithBackend("eager")
    call = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -0.1, "skip_layer_guidance_stop": 1.0}
    pipe = case.build()
    plain = case.run(pipe, **call)
    with PrefixReuse().apply(pipe) as applied:
        if when == "during":
            case.run(pipe, **call)
        compile_blocks(pipe, counter, fullgraph=True)
        near(case.run(pipe, **call), plain)
        graphs = counter.frame_count
        near(case.run(pipe, **call), plain)
    stats = applied.stats
    assert graphs and counter.frame_count == graphs
    assert stats.blocks_plain - stats.blocks_run == stats.reused["skipped layers"] == (3 if when == "during" else 2) * 3


@pytest.mark.slow
def test_compiled_blocks_of_ltx2(compiler):
    """Its perturbed blocks branch on a tensor, which no full graph does, whoever calls them."""
    pipe = CASE.build()
    plain = run(pipe, num_inference_steps=1)
    compile_blocks(pipe, "eager", fullgraph=False)
    with PrefixReuse().apply(pipe) as applied:
        out = run(pipe, num_inference_steps=1)
    near(out, plain)
    assert applied.stats.blocks_run == CASE.clips * (4 * 3 - LAYER)


@pytest.mark.slow
def test_a_model_that_is_compiled_as_a_whole_runs_whole(compiler):
    pipe = CASE.build()
    plain = run(pipe, num_inference_steps=1)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with PrefixReuse().apply(pipe) as applied:
        out = run(pipe, num_inference_steps=1)
    near(out, plain)
    assert not applied.stats.reused
    assert all("inside one compiled graph" in why for why in applied.stats.not_reused)
    assert applied.stats.blocks_run == applied.stats.blocks_plain == CASE.clips * 4 * 3


# -- caches -----------------------------------------------------------------------------------------------------------


def cached_steps(model, inputs, steps=8):
    """What a pipeline with a skip-layer guider does: a plain pass and one without block 2, each in its context."""
    outs = []
    for step in range(steps):
        inputs = {**inputs, "hidden_states": inputs["hidden_states"] * 0.95}
        where = {"step_index": step, "num_inference_steps": steps, "sigma": 1 - (step + 0.5) / steps}
        with model.cache_context("cond", **where):
            model(**inputs)
        _apply_layer_skip_hook(model, diffusers.LayerSkipConfig([2], fqn="blocks"), name="weak")
        with model.cache_context("skip", **where):
            outs.append(model(**inputs)[0])
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("weak", recurse=True)
    return torch.stack(outs)


@torch.no_grad()
@pytest.mark.parametrize("how", ["never", "hits"])
@pytest.mark.parametrize("cache", [*CACHE_CASES][:-1])
def test_a_pass_with_a_cache_is_what_it_is_without_reuse(cache, how):
    """Those that answer for all blocks share the beginning all the same; with the others each pass runs whole."""
    family, clock, outs = BY_NAME["wan"], SimpleNamespace(current_timestep=500.0), []
    for reuse in (False, True):
        model, inputs = family.build(), {**family.inputs(1), "return_dict": False}
        made = CACHE_CASES[cache].make("Wan", clock, how, True)
        if cache == "FasterCache":
            made.spatial_attention_timestep_skip_range = (-1, -1)  # it cannot begin in its range without a batch of two
        model.enable_cache(made)
        if not reuse:
            outs.append(cached_steps(model, inputs))
            continue
        with PrefixReuse().apply(SimpleNamespace(transformer=model)) as applied:
            outs.append(cached_steps(model, inputs))
    assert torch.equal(*outs)
    stats = applied.stats
    assert stats.blocks_run + stats.blocks_cached + stats.blocks_shared == stats.blocks_plain
    if not CACHE_CASES[cache].blocks:
        assert not stats.reused and all(cache in why for why in stats.not_reused)
        assert stats.blocks_run == stats.blocks_plain
        return
    assert stats.reused
    if how == "never":  # the first step has nothing that was kept
        assert (stats.blocks_cached, stats.blocks_shared) == (0, 7 * 2)
    else:
        assert stats.blocks_cached > 0
