"""Skip guidance by hand, by a reference that knows nothing of gates, prefixes or shifts.

The reference replaces the denoiser's forward by plain code: full passes of the model and of a deep copy with the block
taken out, the formula in float64, delivered through the branch weights that the test knows.
"""

import pytest
import torch

from skipguide.guidance import rescale
from zoo.pipes import MODELS, PIPES

LAYER = 1
SCALES = {
    "ltx": 3.0, "ltx_i2v": 3.0, "wan": 5.0, "wan_ti2v": 5.0, "wan22": 5.0, "wan_i2v": 5.0, "cogvideox": 6.0,
    "cogvideox_i2v": 6.0, "mochi": 4.5, "hunyuan_true_cfg": 4.0, "hunyuan15": 6.0, "latte": 7.5, "sd3": 7.0,
    "sd35": 7.0, "flux_true_cfg": 4.0,
}  # fmt: skip
WITH_CFG = [c for c in PIPES if c.cfg_modes[0] != "single"]
SOLVABLE = [c for c in WITH_CFG if c.name != "cogvideox_dynamic"]


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=repr)


def edited(case, model, part, layer=LAYER):
    family = MODELS[case.family]
    if callable(part):  # makes the weak model of the model
        return part(model)
    if part == "block":
        return family.identity_block(model, layer)
    return family.zeroed(model, layer, part)


class Reference:
    """Guidance by hand at one denoiser, installed on the instance for the length of a test."""

    def __init__(self, pipe, case, name="transformer", *, w, cfg=True, part="block", s=1.0, **how):
        self.model = getattr(pipe, name)
        self.weak = edited(case, self.model, part)
        self.mode = case.cfg_modes[0] if cfg else "single"
        self.w, self.s, self.how = w, s, how
        self.calls, self.steps, self.cond = 0, 0, None
        self.plain = self.model.forward
        self.model.forward = self

    def __call__(self, *args, **kwargs):
        out = self.plain(*args, **kwargs)
        if kwargs.get("skip_layers"):  # the pipeline's own skip pass; c is as it was
            return out
        self.calls += 1
        if self.mode == "batched":
            u, c = out[0].double().chunk(2)
            weak = self.weak(*args, **kwargs)[0].double()
            return (torch.cat([*self.branches(u, c, *weak.chunk(2))]).to(out[0].dtype), *out[1:])
        weak = self.weak(*args, **kwargs)[0].double()
        this = out[0].double()
        if self.mode == "single":
            y = self.finish(this + self.delta(this, weak), this)
            return (y.to(out[0].dtype), *out[1:])
        if self.calls % 2:
            self.cond = (this, weak)
            return out
        u, _ = self.branches(this, self.cond[0], weak, self.cond[1])
        return (u.to(out[0].dtype), *out[1:])

    def delta(self, plain, weak):
        self.steps += 1
        on = self.how.get("on")
        return self.s * (plain - weak) * (1.0 if on is None or self.steps - 1 in on else 0.0)

    def finish(self, y, c):
        amount = self.how.get("rescale", 0.0)
        return rescale(y, c, amount, self.how.get("over", "sample")) if amount else y

    def branches(self, u, c, weak_u, weak_c):
        """(u', c) for which the pipeline's CFG gives the formula's result."""
        formula = self.how.get("formula", "stg")
        if formula == "uncond":
            return weak_u, c
        if self.w is None:  # dynamic: the scale is not known at this point, so both branches are moved
            d = self.delta(c, weak_c)
            return u + d, c + d
        y = u + self.w * (c - u)
        y = y + (self.delta(y, weak_u) if formula == "wan" else self.delta(c, weak_c))
        y = self.finish(y, c)
        return (y - self.w * c) / (1 - self.w), c


def expected(case, cfg=True, prompts=2, part="block", call=None, **how):
    pipe = case.build()
    Reference(pipe, case, w=SCALES.get(case.name), cfg=cfg, part=part, **how)
    if getattr(pipe, "transformer_2", None) is not None:
        Reference(pipe, case, "transformer_2", w=3.0, cfg=cfg, part=part, **how)
    return case.run(pipe, prompts, cfg, **(call or {}))


def guided(case, stg, cfg=True, prompts=2, call=None, **how):
    pipe = case.build()
    plain = case.run(pipe, prompts, cfg, **(call or {}))
    with stg.apply(pipe, **how) as applied:
        out = case.run(pipe, prompts, cfg, **(call or {}))
    assert not torch.allclose(out, plain, atol=1e-4), "the guidance did nothing"
    assert torch.equal(case.run(pipe, prompts, cfg, **(call or {})), plain), "something is left on the pipeline"
    return out, applied.stats


def close(out, reference):
    size = reference.abs().max().item()
    torch.testing.assert_close(out, reference, atol=2e-5 * max(size, 1.0), rtol=0)
