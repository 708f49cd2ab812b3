"""What a pipeline's loop takes from a denoiser in half precision, found by giving it float32 and looking."""

import contextlib
import functools

from torch import Tensor, nn

from zoo.all_pipes import CASES
from zoo.pipes_unet import UNET_PIPES

DENOISERS = ("transformer", "transformer_2", "unet")


def cases():
    """name -> (how to build a pipeline, how to run it, whether the denoiser has CFG in one call)."""
    found = {case.name: (case.build, case.run) for case in CASES}
    return found | {case.name: (case.make, functools.partial(run_unet, case)) for case in UNET_PIPES}


def run_unet(case, pipe):
    return case.run(pipe)


def lowered(pipe, dtype):
    """The pipeline with every component in that dtype."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(dtype)
            kept = getattr(part, "_keep_in_fp32_modules", None) or ()  # as `from_pretrained` leaves them
            for name, module in part.named_modules():
                if set(kept) & set(name.split(".")):
                    module.float()
    return pipe


def mapped(change, out):
    """A denoiser's output with every floating tensor changed."""
    if isinstance(out, Tensor):
        return change(out) if out.is_floating_point() else out
    if isinstance(out, list):
        return [mapped(change, each) for each in out]
    if isinstance(out, tuple):
        return tuple(mapped(change, each) for each in out)
    return type(out)(**{name: mapped(change, value) for name, value in out.items()}) if isinstance(out, dict) else out


class Watched:
    """Stands in for a denoiser's forward: notes what dtype it is given, and may answer in float32."""

    def __init__(self, model: nn.Module, widen: bool, seen: list) -> None:
        self.forward, self.widen, self.seen = model.forward, widen, seen
        model.forward = self

    def __call__(self, *args, **kwargs):
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        self.seen.append([each.dtype for each in tensors if each.is_floating_point()])
        out = self.forward(*args, **kwargs)
        return mapped(lambda x: x.float(), out) if self.widen else out


def outcome(build, run, dtype, widen):
    """Dtypes of the denoiser's inputs and of the result; the error where it fails."""
    pipe, seen = lowered(build(), dtype), []
    for name in DENOISERS:
        if isinstance(model := getattr(pipe, name, None), nn.Module):
            Watched(model, widen, seen)
    with contextlib.redirect_stdout(None):
        try:
            result = run(pipe).dtype
        except (RuntimeError, TypeError, ValueError) as error:
            return error
    return seen, result


def takes_float32(build, run, dtype):
    """Whether the loop takes float32 predictions, with the denoiser's inputs and the result as they were."""
    plain = outcome(build, run, dtype, False)
    if isinstance(plain, Exception):
        raise plain
    return outcome(build, run, dtype, True) == plain


def relative(out, exact):
    """How far a result is from the exact one, relative to it."""
    return float((out.double() - exact.double()).norm() / exact.double().norm())
