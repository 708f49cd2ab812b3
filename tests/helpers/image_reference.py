"""Skip guidance by hand on image pipelines: predictions that are lists, have cond first, or variances too."""

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from helpers.stg_reference import Reference

COND_FIRST = {"dit", "lumina_next"}
VARIANCES = {"pixart_alpha", "pixart_sigma", "hunyuan_dit", "hunyuan_dit_controlnet", "dit", "lumina_next"}


def with_own_lists(model):
    def called(*args, **kwargs):
        return model(
            *args, **{name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
        )

    return called


class ImageReference(Reference):
    """Also for predictions that are lists, have the order [cond, uncond], or variances that nobody uses.

    Each model has lists of its own, as Hunyuan-DiT empties the one with a ControlNet's residuals.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_without = self.weak
        self.plain, self.weak = with_own_lists(self.plain), with_own_lists(self.weak)

    def __call__(self, *args, **kwargs):
        out = self.guided(*args, **kwargs)
        return out if not kwargs.get("return_dict", True) or self.listed(args) else Transformer2DModelOutput(out[0])

    def guided(self, *args, **kwargs):
        if self.how.get("cond_first") and self.mode == "batched":
            out, weak = self.plain(*args, **kwargs)[0], self.weak(*args, **kwargs)[0]
            (c, u), (weak_c, weak_u) = (each.double().chunk(2) for each in (out, weak))
            u, c = self.branches(u, c, weak_u, weak_c)
            return (torch.cat([c, u]).to(out.dtype),)
        if self.mode != "batched" or not isinstance(args[0] if args else None, list):
            return super().__call__(*args, **kwargs) if not self.listed(args) else self.alone(*args, **kwargs)
        out, weak = self.plain(*args, **kwargs)[0], self.weak(*args, **kwargs)[0]
        (c, u), (weak_c, weak_u) = (torch.stack(each).double().chunk(2) for each in (out, weak))
        u, c = self.branches(u, c, weak_u, weak_c)
        return (list(torch.cat([c, u]).float()),)

    @staticmethod
    def listed(args):
        return bool(args) and isinstance(args[0], list)

    def alone(self, *args, **kwargs):
        out, weak = (torch.stack(model(*args, **kwargs)[0]).double() for model in (self.plain, self.weak))
        return (list(self.finish(out + self.delta(out, weak), out).float()),)

    def finish(self, y, c):
        if not self.how.get("variances"):
            return super().finish(y, c)
        (y, rest), c = y.chunk(2, dim=1), c.chunk(2, dim=1)[0]
        return torch.cat([super().finish(y, c), rest], dim=1)


def reference(pipe, case, w, cfg=True, **how):
    """Guidance by hand on a pipeline, for what is known of the case."""
    how = {"variances": case.name in VARIANCES, "cond_first": case.name in COND_FIRST, **how}
    return ImageReference(pipe, case, w=w, cfg=cfg, **how)
