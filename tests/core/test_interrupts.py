"""Ctrl-C at every line that installs, removes, opens or closes: nothing is left, and the next use is right."""

import contextlib

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from helpers.interrupts import LineTrace, places
from helpers.native_calls import ltx2_pipe, ltx2_row
from helpers.residue import traces
from helpers.tiny_resnet import resnet
from torch import nn
from torch.overrides import TorchFunctionMode

from skipguide import Skipper, SkipPlan, applied_to, remove_from
from skipguide.active import active_plans
from skipguide.gate import gate_of
from skipguide.hosts import attention_backends
from skipguide.hosts.torch_modes import call_in
from skipguide.router import Router
from zoo import BY_NAME
from zoo.family import randomise


@pytest.fixture(autouse=True)
def same_backend():
    """set_attention_backend sets it for the whole process too."""
    active = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(active)


CORE = ("active.py", "gate.py", "model_pass.py", "skipper.py")


class Scene:
    """A model, what is done on it with a plan, and what it looked like before.

    Attributes:
        files: whose lines are interrupted.
        slow: further ones, where that takes long.
        changes: whether the plan changes what the model says.
    """

    files = CORE
    slow = ()
    changes = True

    def __init__(self):
        self.handle = None
        self.target = self.model = self.build()
        self.plain = self.run()
        self.act()  # whatever is made once is made
        self.acted = self.act()
        assert torch.equal(self.acted, self.plain) != self.changes, "the plan has an effect"
        self.before = self.look()

    def look(self):
        return traces(self.model), [gate_of(module).everywhere for module in self.model.modules()]

    def act(self):
        """Apply, run inside, end; gives what the model said inside."""
        self.handle = self.apply()
        with self.handle:
            return self.run()

    def end(self):
        """What a user does after an interrupt."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
        remove_from(self.target)

    def check(self):
        assert applied_to(self.target) == [] and active_plans() == ()
        assert self.look() == self.before
        assert not attention_backends._OVERRIDES and not torch._C._len_torch_function_stack()
        assert torch.equal(self.run(), self.plain)
        assert torch.equal(self.act(), self.acted), "a new apply works"
        assert self.look() == self.before and active_plans() == ()


class Language(Scene):
    """A tiny language model."""

    def build(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self.ids = torch.arange(6).view(2, 3)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).eval()

    @torch.no_grad()
    def run(self):
        return self.model(self.ids, use_cache=False).logits


class Plain(Language):
    files = (*CORE, "interventions.py")
    plan = SkipPlan([1]) | SkipPlan([2], "attn")

    def apply(self):
        return Skipper(self.model, self.plan)


class Rows(Plain):
    plan = SkipPlan([1], rows=[0]) | SkipPlan([2], "attn", rows=[1])


class JointIdentity(Plain):
    files = (*CORE, "perturbations/attention.py", "hosts/attention_backends.py")
    plan = SkipPlan([1], "attn_identity")

    def build(self):
        self.family = BY_NAME["flux"]
        self.inputs = self.family.inputs(1)
        model = self.family.build()
        model.transformer_blocks = model.transformer_blocks[:2]
        model.single_transformer_blocks = model.single_transformer_blocks[:1]
        model.set_attention_backend("flex")  # one that the identity has to take the place of
        return model

    @torch.no_grad()
    def run(self):
        return self.family.run(self.model, self.inputs)


class Running(Plain):
    """Installed by a driver, entered for one pass."""

    def act(self):
        self.handle = self.apply()
        try:
            self.handle.install()
            with self.handle.running():
                return self.run()
        finally:
            self.handle.remove()


class Routed(Scene):
    files = (*CORE, "router.py", "sequential.py")

    def build(self):
        self.x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return resnet().eval()

    @torch.no_grad()
    def run(self):
        return self.model(self.x)

    def act(self):
        rows = torch.tensor([True, False, True])
        with Router(self.model).running(lambda i, x: rows if i % 2 else None):
            return self.run()


class Masked(Scene):
    files = (*CORE, "vision/layer_masking/layer_mask.py", "hosts/torch_modes.py")

    def build(self):
        torch.manual_seed(0)
        self.x = torch.randn(2, 3, 16, 16)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    @torch.no_grad()
    def run(self):
        return self.model(self.x)

    def apply(self):
        from skipguide.vision import LayerMask

        keep = torch.zeros(1, 16, 16, dtype=torch.bool)
        keep[:, 4:12, 4:12] = True
        return LayerMask(keep).apply(self.model)


class Sublayers(Language):
    files = (*CORE, "llm/applied.py", "llm/decoder_pass.py", "hosts/generation.py")

    def apply(self):
        from skipguide.llm import SublayerPlan

        return SublayerPlan(attn=[1], mlp=[2]).apply(self.model)


class Adaptive(Sublayers):
    files = CORE
    slow = ("llm/applied.py", "llm/adaskip_applied.py", "llm/watch.py")

    def apply(self):
        from skipguide.llm import AdaSkip

        return AdaSkip(skip_ratio=0.34).apply(self.model)

    @torch.no_grad()
    def run(self):
        return self.model.generate(
            self.ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        ).logits[-1]


class Speculating(Adaptive):
    """It stands in for a method of the model, and at no gate between two drafts."""

    files = (*CORE, "llm/speculative/applied.py")
    slow = ()

    def __init__(self):
        from skipguide.llm import SublayerPlan

        self.plan = SublayerPlan(mlp=[1])
        super().__init__()

    def apply(self):
        from skipguide.llm import SelfSpeculative

        return SelfSpeculative(plan=self.plan, max_draft=2, adaptive=False).apply(self.model)

    def act(self):
        """Called `with ...apply(model):`, as in a notebook: the handle is gone after an interrupt."""
        with self.apply():
            return torch.zeros(0)  # what it decodes is what the model decodes: only beginning and ending are looked at


class Watched(Sublayers):
    files = (*CORE, "llm/watch.py")

    def act(self):
        from skipguide.llm import watch

        seen = []
        self.handle = watch(self.model, lambda layer, part, before, after: seen.append(after))
        with self.handle:
            self.run()
        return seen[-1]


class Guided(Scene):
    files = (*CORE, "pipelines/applied.py", "hosts/cache_contexts.py")
    slow = ("pipelines/sampling/interceptor.py", "pipelines/sampling/passes.py")

    def build(self):
        from zoo.pipes import BY_PIPE

        self.case = BY_PIPE["ltx"]
        self.pipe = self.case.build()
        return self.pipe.transformer

    def end(self):
        super().end()
        remove_from(self.pipe)

    def run(self):
        return self.case.run(self.pipe, 1, True)

    def apply(self):
        from skipguide.pipelines import SpatiotemporalSkipGuidance

        return SpatiotemporalSkipGuidance(layers=[1]).apply(self.pipe)


class Reused(Scene):
    files = (*CORE, "pipelines/native/prefix_reuse.py")
    slow = tuple(f"pipelines/native/{name}.py" for name in ("listener", "passes", "proof", "weights"))
    changes = False

    def build(self):
        from zoo.video_av import ltx2_gated, ltx2_inputs

        model = randomise(ltx2_gated(), 1)
        self.call, self.pipe = ltx2_row(ltx2_inputs(2)), ltx2_pipe(model, modality=True)
        return model

    def end(self):
        super().end()
        remove_from(self.pipe)

    @torch.no_grad()
    def run(self):
        """A plain call and two that are variants of it."""
        marks = ({}, {"spatio_temporal_guidance_blocks": [2]}, {"isolate_modalities": True})
        return torch.cat([self.model(**self.call, **mark)[0] for mark in marks])

    def act(self):
        found = super().act()
        assert self.handle.stats.reused == {"STG": 1, "modality isolation": 1}
        return found

    def apply(self):
        from skipguide.pipelines import PrefixReuse

        return PrefixReuse().apply(self.pipe)


SCENES = [
    *(Plain, Rows, JointIdentity, Running, Routed, Masked, Sublayers, Adaptive, Speculating, Watched, Guided, Reused),
]
NAMES = [scene.__name__ for scene in SCENES]


def sweep(scene, files, visits):
    """Interrupt at each line of some files, at the first and, if asked, at the last of its visits."""
    with LineTrace(files) as trace:
        scene.act()
    done = 0
    for place, count in places(trace).items():
        for visit in sorted({1, count}) if visits == "all" else [1]:
            with LineTrace(files, place, visit) as trace, contextlib.suppress(KeyboardInterrupt):
                scene.act()
            assert trace.raised, place
            done += 1
            try:
                scene.end()
                scene.check()
            except BaseException as error:
                raise AssertionError(f"after an interrupt at {place}, visit {visit}: {error!r}") from error
    return done


SWEPT = [
    pytest.param(kind, id=kind.__name__, marks=[pytest.mark.slow] if kind is Guided else [])
    for kind in SCENES
    if kind not in (Running, Adaptive, Reused)
]


@pytest.mark.parametrize("kind", SWEPT)
def test_an_interrupt_at_each_line(kind):
    files = kind.files if kind is Plain else [file for file in kind.files if file not in CORE]
    assert sweep(kind(), files, "first") > 10


@pytest.mark.slow
def test_an_interrupt_at_each_line_of_prefix_reuse():
    assert sweep(Reused(), Reused.files[-1:], "first") > 10


@pytest.mark.every_line
@pytest.mark.parametrize("kind", SCENES, ids=NAMES)
def test_an_interrupt_at_each_line_of_each_driver(kind):
    assert sweep(kind(), (*kind.files, *kind.slow), "all") > 50


@pytest.mark.parametrize("left", [-1, 0, 1, 2])
def test_a_mode_of_torch_that_an_interrupt_lost_or_left(left):
    """Ctrl-C while torch has taken the mode off its stack, or put it there: it is Ctrl-C that is raised."""

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    def call():
        if left < 0:
            torch._C._pop_torch_function_stack()
        for _ in range(left):
            Mode().__enter__()
        raise KeyboardInterrupt

    with Mode():
        before = torch._C._len_torch_function_stack()
        with pytest.raises(KeyboardInterrupt):
            call_in(Mode(), call)
        assert torch._C._len_torch_function_stack() == before
        assert call_in(Mode(), torch.ones, 2).tolist() == [1, 1]
    assert not torch._C._len_torch_function_stack()
