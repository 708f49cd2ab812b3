"""Skip guidance by hand on a UNet, in place of its forward: every branch gets the formula's result.

Whatever CFG the pipeline does arrives at it then. The weak models are deep copies with the edit built in.
"""

import torch

from skipguide.guidance import rescale


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
        out = self.plain(*args, **kwargs)
        u, c = self.parts(out)
        y = u + self.w * (c - u)
        for model, s in self.terms:
            y = y + s * (c - self.parts(model(*args, **kwargs))[1])
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
