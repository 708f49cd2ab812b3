"""What a plan could leave behind on a model, and a watch that says whether it did."""

import inspect

import pytest
import torch

from skipguide import SkipPlan
from skipguide.active import active_plans
from skipguide.gate import Gate
from zoo import BY_NAME

FAMILIES = [BY_NAME[name] for name in ("ltx", "wan", "hunyuan", "flux")]
PLANS = {
    "empty": SkipPlan(),
    "block": SkipPlan([1, 3]),
    "sublayers": SkipPlan([0], "attn") | SkipPlan([2], "mlp"),
    "identity": SkipPlan([1], "attn_identity"),
    "rows": SkipPlan([1], rows=[0]) | SkipPlan([2], "attn", rows=[1]),
}
families = pytest.mark.parametrize("family", FAMILIES, ids=repr)
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def traces(model):
    """Everything that a plan could leave behind, by identity."""

    def attributes(module):
        skip = ("_modules", "_parameters", "_buffers", "_diffusers_hook")
        return {k: id(v) for k, v in module.__dict__.items() if k not in skip}

    def hooks(module):
        registry = module.__dict__.get("_diffusers_hook")
        references = getattr(registry, "_fn_refs", ())
        return [(_same(r.forward), _same(r.original_forward)) for r in references]

    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return (
        list(model.state_dict()),
        [(name, id(module), attributes(module), hooks(module)) for name, module in model.named_modules()],
        [len(getattr(module, table)) for module in model.modules() for table in tables],
    )


def agrees(a, b):
    """Equal up to rounding, whatever thread computed them: another thread's buffers lie elsewhere in memory, and
    vectorised kernels then group their sums differently. A different plan is off by far more."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def _same(call):
    """Bound methods are made anew at each access: compare what they are bound to."""
    return (id(call.__self__), id(call.__func__)) if inspect.ismethod(call) else id(call)


def no_gates(model):
    for module in model.modules():
        for value in module.__dict__.values():
            assert not isinstance(value, Gate)
        assert not any(isinstance(call, Gate) for call in chain(module)), type(module).__name__


def chain(module):
    """A module's forward and all that it wraps."""
    call = module.forward
    while call is not None:
        yield call
        call = getattr(call, "__wrapped__", None)


class Watch:
    """The model's traces and output before; `.same()` asserts that they are back, `.ungated()` the output alone."""

    def __init__(self, family, batch=2):
        self.family = family
        self.model = family.build()
        self.inputs = family.inputs(batch)
        self.plain = self.run()
        self.before = traces(self.model)
        self.signature = inspect.signature(self.model.forward)

    def run(self, model=None):
        return self.family.run(self.model if model is None else model, self.inputs)

    def ungated(self):
        """No gate is left and the output is back; what others put on the model may stay."""
        no_gates(self.model)
        assert torch.equal(self.run(), self.plain)

    def same(self):
        assert traces(self.model) == self.before
        self.ungated()
        assert inspect.signature(self.model.forward) == self.signature
        assert active_plans() == ()
