"""Guidance on compiled denoisers: eager results, and no graph more after the first run.

`test_compile.py` looks at plans on compiled models graph by graph, `test_stg_company.py` at wrapped denoisers; here are
the other ways that people compile one.
"""

import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from skipguide.pipelines import SkipGroup
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE

SETTINGS = {
    "block": Stg([1]),
    "groups": Stg(groups=(SkipGroup([1]), SkipGroup([2], scale=0.5, part="mlp"))),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    logging.disable(logging.DEBUG)  # dynamo's trace log is for people; pytest would collect every line of it
    yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


def compiled(pipe, how, backend):
    if how == "repeated":
        pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        pipe.transformer.compile(backend=backend)


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
