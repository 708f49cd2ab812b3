"""Skip guidance by hand with a cache: one plain model per branch, each with a cache of its own.

Nothing of skipguide is in it but what a block is: the models are deep copies, and what is skipped is taken out of the
copy.
"""

import copy
from contextlib import ExitStack, contextmanager

import torch
from helpers.cache_cases import LAYER

from zoo.pipes import MODELS as IMAGE_MODELS
from zoo.video_case import MODELS as VIDEO_MODELS


def weakened(case, model, part, layer=LAYER):
    """A copy of the model without that block, or with the identity as its attention map.

    Caches look for modules by their class, so each keeps its own and only gets another forward.
    """
    family = (VIDEO_MODELS | IMAGE_MODELS)[case.family]
    name, kind = family.block_names[layer], family.blocks[layer][1]
    if part == "block":
        edited, changed = family.identity_block(model, layer), [name]
    else:
        edited = family.value_identity(model, layer, family.inputs(1))
        changed = [f"{name}.{path}" for path in kind.values]
    for path in changed:
        own = copy.deepcopy(model.get_submodule(path))
        own.forward = edited.get_submodule(path).forward
        edited.set_submodule(path, own)
    return edited


class ByHand:
    """Stands in for a pipeline's denoiser.

    Args:
        pipe: the pipeline.
        case: the zoo's.
        part: what is skipped of the block.
        enable: (model, whether its calls have no unconditional rows) -> puts the cache on it.
        formula: `"stg"` moves every branch by c - k; `"uncond"` has k in place of u, for calls branch by branch.
    """

    def __init__(self, pipe, case, part, enable, formula="stg", layer=LAYER):
        stock = pipe.transformer
        self.two_calls = "batched" not in getattr(case, "cfg_modes", (getattr(case, "mode", ""),))[0]
        self.formula, self.calls, self.context, self.delta = formula, 0, {}, None
        self.models = {"cond": copy.deepcopy(stock), "skip": weakened(case, stock, part, layer)}
        if self.two_calls:
            self.models["uncond"] = copy.deepcopy(stock)
        for name, model in self.models.items():
            enable(model, self.two_calls or name == "skip")
        stock.forward, stock.cache_context = self, self.enter

    @contextmanager
    def enter(self, name, **where):
        """What the pipeline says of the pass holds for every branch of it."""
        self.context = where
        yield

    def run(self, branch, kwargs):
        model = self.models[branch]
        with ExitStack() as stack:
            if hasattr(type(model), "cache_context"):
                stack.enter_context(model.cache_context(branch, **self.context))
            return model(**kwargs)

    def __call__(self, *args, **kwargs):
        assert not args
        self.calls += 1
        if self.two_calls and self.calls % 2 == 0:
            out = self.run("skip" if self.formula == "uncond" else "uncond", kwargs)
            return out if self.formula == "uncond" else moved(out, self.delta)
        out = self.run("cond", kwargs)
        if self.formula == "uncond":
            return out
        given = kwargs if self.two_calls else {name: second_half(value, len(out[0])) for name, value in kwargs.items()}
        c = out if self.two_calls else [second_half(each, len(out[0])) for each in out]
        k = self.run("skip", given)
        self.delta = [a - b if isinstance(a, torch.Tensor) else None for a, b in zip(c, k, strict=True)]
        if self.two_calls:
            return moved(out, self.delta)
        return moved(out, [None if each is None else torch.cat([each] * 2) for each in self.delta])


def second_half(value, batch):
    """The conditional rows of what has rows."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch:
        return value[batch // 2 :]
    return value


def moved(out, delta):
    return tuple(a if d is None else a + d for a, d in zip(out, delta, strict=True))
