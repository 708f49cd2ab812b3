"""Skip guidance by hand on a UNet, in place of its forward: every branch gets the formula's result.

Whatever CFG the pipeline does arrives at it then. The weak models are deep copies with the edit built in.
"""

import torch
from helpers.residue import no_gates

from skipguide import find_blocks
from skipguide.guidance import rescale
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import BY_NAME
from zoo.all_pipes import UNET_CASES

BY_CASE = {case.name: case for case in UNET_CASES}


class UnetReference:
    """y = u + w (c - u) + sum of s (c - k), in float64.

    Args:
        model: the pipeline's denoiser.
        w: its CFG scale.
        terms: weak models, and the scale of each.
        cfg: whether it has rows [uncond, cond].
        amount: of the rescale towards c.
        variances: whether the second half of the channels are variances: those of c stay.
    """

    def __init__(self, model, w, terms, cfg=True, amount=0.0, variances=False):
        self.cfg, self.w, self.amount, self.variances = cfg, w, amount, variances
        self.terms = terms
        self.plain = model.forward
        model.forward = self

    def __call__(self, *args, **kwargs):
        out = self.plain(*args, **fresh(kwargs))
        u, c = self.parts(out)
        y = u + self.w * (c - u)
        for model, s in self.terms:
            y = y + s * (c - self.parts(model(*args, **fresh(kwargs)))[1])
        if self.amount:
            y = rescale(y, c, self.amount)
        if self.variances:
            y = torch.cat([y, out[0].chunk(2)[-1].double().chunk(2, dim=1)[1] if self.cfg else self.rest(out)], dim=1)
        y = (torch.cat([y, y]) if self.cfg else y).to(out[0].dtype)
        return (y,) if isinstance(out, tuple) else type(out)(sample=y)

    def parts(self, out):
        """The unconditional and the conditional prediction, without variances."""
        first = out[0].double()
        first = first.chunk(2, dim=1)[0] if self.variances else first
        return first.chunk(2) if self.cfg else (first, first)

    def rest(self, out):
        return out[0].double().chunk(2, dim=1)[1]


def fresh(kwargs):
    """The same call with lists of its own: a UNet empties the one that a T2I-Adapter gives it."""
    return {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}


LAYER, S = 1, 1.5
ONE_PROMPT = {"animatediff_control", "animatediff_control_video"}  # diffusers 0.42.1 has conditioning for one alone
SCALES = {"kandinsky2": 4.0, "animatediff": 5.0}  # by family; 7.5 of the others


def scale_of(case):
    return SCALES.get(case.family, 7.5) if not case.name.startswith("if") else 7.5


def prompts_of(case):
    return 1 if case.name in ONE_PROMPT else 2


def run(case, pipe, prompts=None, cfg=True, **call):
    torch.manual_seed(0)  # some encode the picture by chance, with no generator
    return case.run(pipe, prompts or prompts_of(case), cfg, **call)


def weak(case, model, part="block", layer=LAYER):
    """A copy of the denoiser with the block, or a part of it, really taken out."""
    family = BY_NAME[case.family]
    if part == "attn_identity":
        return family.value_identity(model, layer, family.inputs(1))
    return family.identity_block(model, layer) if part == "block" else family.zeroed(model, layer, part)


def by_hand(case, part="block", layer=LAYER, s=S, *, cfg=True, call=None, w=None, **how):
    """The result of the pipeline whose denoiser guides by hand."""
    pipe = case.build()
    how.setdefault("variances", case.family == "kandinsky2")
    w = scale_of(case) if w is None else w
    UnetReference(pipe.unet, w, [(weak(case, pipe.unet, part, layer), s)], cfg and case.cfg_modes[0] != "single", **how)
    return run(case, pipe, cfg=cfg, **(call or {}))


def guided(case, stg, *, cfg=True, call=None):
    pipe = case.build()
    with stg.apply(pipe) as applied:
        out = run(case, pipe, cfg=cfg, **(call or {}))
    return out, applied.stats


def close(out, expected):
    torch.testing.assert_close(out, expected, atol=5e-5 * expected.abs().max().item(), rtol=0)


def check(case):
    """A skipped block on the stock pipeline: equal to the reference, only the suffix runs, and nothing is left."""
    cfg = case.cfg_modes[0] != "single"
    pipe = case.build()
    plain = run(case, pipe)
    with Stg([LAYER], scale=S).apply(pipe) as applied:
        out = run(case, pipe)
    assert torch.equal(run(case, pipe), plain)
    no_gates(pipe.unet)
    assert (out - plain).norm() > 0.005 * (plain - plain.mean()).norm()
    close(out, by_hand(case))
    n, branches, stats = len(find_blocks(pipe.unet)), 2 if cfg else 1, applied.stats
    assert stats.passes == 6 and stats.delivery == "shift"
    assert stats.blocks_run == 3 * (branches * n + n - 1 - LAYER)
