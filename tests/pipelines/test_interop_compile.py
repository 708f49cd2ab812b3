"""Compiled and wrapped denoisers next to skip guidance: eager results, and no graph more after the first run."""

import logging
import threading

import pytest
import torch
from helpers.residue import agrees
from helpers.versions import traced_plans
from torch._dynamo.testing import CompileCounterWithBackend

from skipguide import find_blocks
from skipguide.pipelines import SkipGroup
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE

# Guidance next to what else people do to a denoiser: compile it, wrap it, call it from another thread.

CASES = [BY_PIPE[name] for name in ("ltx", "wan", "latte", "flux")]
cases = pytest.mark.parametrize("case", CASES, ids=repr)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    logging.disable(logging.DEBUG)  # dynamo's trace log is for people; pytest would collect every line of it
    yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


def guided(case, pipe, **settings):
    with Stg(**({"layers": [1]} | settings)).apply(pipe) as applied:
        out = case.run(pipe)
    return out, applied.stats


@cases
def test_compiled_blocks(case):
    eager = case.build()
    expected, reference = guided(case, eager)
    pipe = case.build()
    for block in find_blocks(pipe.transformer):  # compile_repeated_blocks does this where diffusers lists the classes
        block.module.compile(backend="eager", fullgraph=True)
    plain = case.run(pipe)
    out, stats = guided(case, pipe)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert stats.blocks_run == reference.blocks_run
    assert torch.equal(case.run(pipe), plain)


@traced_plans
@cases
def test_compiled_model(case):
    eager = case.build()
    expected, reference = guided(case, eager)
    pipe = case.build()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    plain = case.run(pipe)
    for _ in range(2):
        out, stats = guided(case, pipe)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        assert stats.blocks_run == reference.blocks_run
    assert torch.equal(case.run(pipe), plain)


def test_guidance_applies_to_calls_from_other_threads():
    """A server applies guidance once and calls the pipeline from its workers."""
    case = BY_PIPE["ltx"]
    pipe = case.build()
    expected, _ = guided(case, pipe)
    found = []
    with Stg([1]).apply(pipe):
        worker = threading.Thread(target=lambda: found.append(case.run(pipe)))
        worker.start()
        worker.join()
    assert agrees(found[0], expected)


def test_guidance_under_accelerate_hooks():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    case = BY_PIPE["wan"]
    expected, _ = guided(case, case.build())
    pipe = case.build()
    seen = []

    class Listener(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return args, kwargs

    for block in find_blocks(pipe.transformer):
        add_hook_to_module(block.module, Listener())
    out, stats = guided(case, pipe)
    assert torch.equal(out, expected)
    assert len(seen) == stats.blocks_run, "a skipped block's hook ran: offloading would have loaded it for nothing"
    for block in find_blocks(pipe.transformer):
        remove_hook_from_module(block.module)


def test_guidance_with_lora():
    from peft import LoraConfig

    case = BY_PIPE["wan"]
    pipe = case.build()
    without, _ = guided(case, pipe)
    with Stg([1]).apply(pipe):
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        inside = case.run(pipe)
    after, _ = guided(case, pipe)
    assert torch.equal(inside, after) and not torch.allclose(inside, without, atol=1e-4)
    pipe.transformer.delete_adapters("default")


def test_a_transformer_exchanged_inside_the_block_is_noticed(caplog):
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Stg([1]).apply(pipe):
        pipe.transformer = case.build().transformer
        case.run(pipe)
    assert "never called" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@cases
def test_on_cuda_in_bfloat16(case):
    pipe = case.build().to("cuda", torch.bfloat16)
    plain = case.run(pipe)
    full, naive = guided(case, pipe, prefix_reuse=False)
    out, stats = guided(case, pipe)
    torch.testing.assert_close(out.float(), full.float(), atol=0.05, rtol=0.05)
    assert stats.blocks_run < naive.blocks_run
    assert torch.equal(case.run(pipe), plain)


# Guidance on compiled denoisers: eager results, and no graph more after the first run.

SETTINGS = {
    "block": Stg([1]),
    "groups": Stg(groups=(SkipGroup([1]), SkipGroup([2], scale=0.5, part="mlp"))),
}


def compiled(pipe, how, backend):
    if how == "repeated":
        pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        pipe.transformer.compile(backend=backend)


@traced_plans
@pytest.mark.parametrize(
    ("name", "how", "backend", "settings"),
    [
        ("wan", "repeated", "eager", ("groups",)),
        ("flux", "repeated", "aot_eager", ("block",)),
        ("ltx", "method", "eager", ("block",)),
    ],
)
def test_guidance_on_a_compiled_denoiser(name, how, backend, settings):
    case = BY_PIPE[name]

    def build():
        pipe = case.build()
        if how != "repeated":
            del pipe.transformer.transformer_blocks[3:]  # quicker to capture
        return pipe

    pipe = build()
    counter = CompileCounterWithBackend(backend)
    compiled(pipe, how, counter)
    plain = case.run(pipe)
    assert counter.frame_count
    for setting in settings:
        stg = SETTINGS[setting]
        with stg.apply(eager := build()) as reference:
            expected = case.run(eager)
        with stg.apply(pipe) as applied:
            torch.testing.assert_close(case.run(pipe), expected, atol=2e-5, rtol=1e-4)
            graphs = counter.frame_count
            torch.testing.assert_close(case.run(pipe), expected, atol=2e-5, rtol=1e-4)
        with stg.apply(pipe):
            torch.testing.assert_close(case.run(pipe), expected, atol=2e-5, rtol=1e-4)
        assert counter.frame_count == graphs, f"{setting}: compiled again"
        assert applied.stats.blocks_run == 2 * reference.stats.blocks_run
        torch.testing.assert_close(case.run(pipe), plain, atol=1e-6, rtol=1e-5)
        assert counter.frame_count <= graphs + 1  # one graph of the model without gates, if there was none
