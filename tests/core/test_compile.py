"""torch.compile: equal results with a plan on, off and on again, one graph per mode, no graph break.

The backend runs the captured graphs as they are, so that what is tested is what dynamo captures and when it captures
again; one case goes through inductor.
"""

import logging
import os
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from helpers.versions import traced_plans
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from skipguide import BlockSpec, Prefix, Skipper, SkipPlan, Sublayer, capture, register_blocks, resume
from skipguide.gate import Gate
from skipguide.hosts.compiled import NEEDS_TORCH
from zoo import BY_NAME, randomise

PLANS = {
    "block": SkipPlan([1]),
    "attn": SkipPlan([1], "attn"),
    "mlp": SkipPlan([1], "mlp"),
    "attn_identity": SkipPlan([1], "attn_identity"),
    "rows": SkipPlan([1], rows=[0]),
    "scaled": SkipPlan([1], "mlp", strength=0.5),
    "attn_blur": SkipPlan([1], "attn_blur", part_options={"sigma": 1.0}),
    "token_shuffle": SkipPlan([1], "token_shuffle"),
}


@pytest.fixture(autouse=True)
def _quiet():
    """Dynamo's trace log is for people; pytest would collect every line of it."""
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)


class Compiled:
    """A tiny model, how it is compiled, and the number of graphs so far."""

    def __init__(self, name, how, batch=2):
        torch._dynamo.reset()
        counters.clear()
        self.family = BY_NAME[name]
        self.model = self.build()
        self.counter = CompileCounterWithBackend("eager")
        self.inputs = [self.family.inputs(batch, seed) for seed in range(3)]
        self.how = how
        self.target = self.model

    @property
    def stacks(self):
        return {name.rpartition(".")[0] for name in self.family.block_names}

    def build(self):
        """Two blocks of each kind are enough, and quicker to capture."""
        model = self.family.build()
        for stack in self.stacks:
            del model.get_submodule(stack)[2:]
        return model

    def compile(self):
        arguments = {"fullgraph": True, "backend": self.counter}
        if self.how == "outer":
            self.target = torch.compile(self.model, **arguments)
        elif self.how == "method":
            self.model.compile(**arguments)
        elif self.how == "regional":
            self.model.compile_repeated_blocks(**arguments)
        else:
            for stack in self.stacks:
                blocks = self.model.get_submodule(stack)
                for i, block in enumerate(blocks):
                    blocks[i] = torch.compile(block, **arguments)
        return self

    @property
    def graphs(self):
        assert not counters["graph_break"]
        return self.counter.frame_count

    def run(self, i=0):
        return self.family.run(self.target, self.inputs[i])

    def expected(self, plan, i=0):
        """From a model that is not compiled."""
        model = self.build()
        with Skipper(model, plan) if plan is not None else nullcontext():
            return self.family.run(model, self.inputs[i])


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@traced_plans
@pytest.mark.parametrize(
    ("name", "how", "parts"),
    [
        ("ltx", "outer", ("block", "attn", "rows")),
        ("ltx", "method", ("mlp", "scaled")),
        pytest.param("flux", "outer", ("attn_identity",), marks=pytest.mark.slow),
        pytest.param("ltx", "regional", tuple(PLANS), marks=pytest.mark.slow),
        pytest.param("ltx", "outer", ("scaled", "attn_blur", "token_shuffle"), marks=pytest.mark.slow),
        ("flux", "regional", ("block", "attn_identity", "attn_blur")),
        ("cogvideox", "each", ("block", "attn_identity", "token_shuffle")),
    ],
)
def test_on_off_and_on_again(name, how, parts):
    """Compiled before any plan: every plan adds at most one graph, once; off and on again adds none."""
    case = Compiled(name, how).compile()
    plain = case.expected(None)
    close(case.run(), plain)
    before = case.graphs
    for part in parts:
        plan = PLANS[part]
        skipped = case.expected(plan)
        assert not torch.allclose(skipped, plain, atol=1e-3)
        skipper = Skipper(case.model, plan)
        with skipper:
            close(case.run(), skipped)
        graphs = case.graphs
        assert graphs <= before + 1, part
        close(case.run(), plain)
        with skipper:  # the same object, other numbers
            close(case.run(1), case.expected(plan, 1))
        with Skipper(case.target, SkipPlan.from_dict(plan.to_dict())):  # an equal plan on the wrapper
            close(case.run(), skipped)
        close(case.run(1), case.expected(None, 1))
        assert case.graphs == graphs, part
        before = graphs


@traced_plans
@pytest.mark.parametrize("how", ["outer", "regional"])
def test_compiled_while_a_plan_is_on(how):
    case = Compiled("ltx", how)
    plan = PLANS["attn"]
    skipped, plain = case.expected(plan), case.expected(None)
    with Skipper(case.model, plan) as skipper:
        close(case.run(), skipped)
        case.compile()
        close(case.run(), skipped)
    close(case.run(), plain)
    graphs = case.graphs
    assert graphs <= 2
    with skipper:
        close(case.run(), skipped)
    close(case.run(), plain)
    with Skipper(case.model, plan):
        close(case.run(), skipped)
    # compile() while the gate stood at forward: from now on it stands at the compiled call, which is one mode more
    assert case.graphs <= graphs + (how != "outer")


@traced_plans
@pytest.mark.parametrize("how", ["outer", "regional"])
def test_capture_and_resume_over_several_steps(how):
    """New tensors in every step: one graph for the capturing pass, one for the resumed one."""
    case = Compiled("ltx", how).compile()
    prefix, plan = Prefix(1), SkipPlan([1])
    capturing, resuming = capture(case.model, prefix), None
    for i in range(3):
        with capturing:
            close(case.run(i), case.expected(None, i))
        resuming = resuming or Skipper(case.model, plan, resume=prefix)
        with resuming:
            close(case.run(i), case.expected(plan, i))
        if i == 0:
            graphs = case.graphs
    assert graphs <= 2 and case.graphs == graphs
    with resume(case.model, prefix):
        close(case.run(2), case.expected(None, 2))
    assert case.graphs <= graphs + 1


@traced_plans
def test_a_window_of_steps_does_not_compile_step_by_step():
    case = Compiled("ltx", "outer").compile()
    plan = SkipPlan([1], start=0.3, stop=0.7)
    plain, skipped = case.expected(None), case.expected(SkipPlan([1]))
    with Skipper(case.model, plan) as skipper:
        for step in range(10):
            skipper.progress = step / 10
            close(case.run(), skipped if 3 <= step < 7 else plain)
    assert case.graphs == 2


@traced_plans
def test_a_skipped_block_is_not_in_the_graph():
    """The work is saved inside a compiled model too."""
    sizes = []

    def backend(graph, example):
        sizes.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    case = Compiled("ltx", "outer")
    case.target = torch.compile(case.model, fullgraph=True, backend=backend)
    for layers in ([], [1], [0, 1]):
        with Skipper(case.model, SkipPlan(layers)):
            case.run()
    block = sizes[0] - sizes[1]
    assert block > 20 and sizes[0] - sizes[2] == 2 * block


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, hidden_states):
        return hidden_states + self.mlp(hidden_states)


class TinyResidualNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Residual() for _ in range(3)])

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@traced_plans
@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="inductor's own code does not compile then"
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_through_inductor(tmp_path, monkeypatch):
    # a cache of its own: in one that runs of other versions share, a graph was found whose results were others
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    register_blocks(TinyResidualNet, BlockSpec("blocks", mlp=(Sublayer("mlp", outputs=("input",)),)))
    model = randomise(TinyResidualNet())
    x = torch.randn(2, 8)
    compiled = torch.compile(model, fullgraph=True)
    for plan in (SkipPlan([1]), SkipPlan([0], "mlp", rows=[1])):
        with Skipper(model, plan):
            expected = model(x)
        for _ in range(2):
            close(compiled(x), model(x))
            with Skipper(model, plan):
                close(compiled(x), expected)
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


def test_with_an_older_torch_the_gated_part_runs_uncompiled(monkeypatch):
    """Before 2.14 dynamo cannot read which plans hold: the results and the ledger are those of an eager model."""
    disabled = torch.compiler.disable(Gate.__call__, reason=NEEDS_TORCH)
    monkeypatch.setattr(Gate, "__call__", disabled)
    case = Compiled("ltx", "outer")
    plan = SkipPlan([1]) | SkipPlan([0], "attn")
    expected, plain = case.expected(plan), case.expected(None)
    case.target = torch.compile(case.model, backend=case.counter)
    for _ in range(2):
        with Skipper(case.target, plan) as skipper:
            close(case.run(), expected)
        assert skipper.stats.skips == {"transformer_blocks.1": 1, "transformer_blocks.0.attn1": 1}
        assert skipper.stats.calls["transformer_blocks.0"] == 1
        close(case.run(), plain)
    torch._dynamo.reset()
    case.target = torch.compile(case.model, backend=case.counter, fullgraph=True)
    said = ""
    with Skipper(case.target, plan):
        try:
            close(case.run(), expected)  # torch 2.11 runs it uncompiled all the same
        except RuntimeError as error:
            said = str(error)
    assert not said or re.search(r"torch 2\.14 or newer|no compiled frames", said)
