"""Finds the towers of a two-tower model, whichever library it comes from."""

from __future__ import annotations

from torch import nn

from skipguide.errors import SkipError, UnknownBlockError
from skipguide.vision.skip_tuning.open_clip_towers import open_clip_towers
from skipguide.vision.skip_tuning.tower import Towers
from skipguide.vision.skip_tuning.transformers_towers import transformers_towers


def find_towers(model: nn.Module) -> Towers:
    """Describe a two-tower model.

    Raises:
        UnknownBlockError: for a model that is none of CLIPModel, MetaClip2Model, SiglipModel of transformers, and
            no `open_clip` CLIP.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if names & {"CLIPModel", "MetaClip2Model", "SiglipModel"}:
        return transformers_towers(model, siglip="SiglipModel" in names)
    if type(model).__module__.startswith("open_clip."):
        return open_clip_towers(model)
    parts = [name for name, _ in model.named_children()]
    raise UnknownBlockError(
        f"expected CLIPModel, MetaClip2Model or SiglipModel of transformers, or a CLIP of open_clip; "
        f"got {type(model).__name__} with {parts}"
    )


def check_no_dropout(model: nn.Module) -> None:
    """Refuse a model whose passes differ from each other: cached features would not be what it computes.

    Raises:
        SkipError: with the first module that drops something.
    """
    for name, module in model.named_modules():
        if name.endswith("lora_dropout") or ".lora_dropout." in name:
            continue
        for attribute in ("p", "dropout", "prob", "drop_prob"):
            value = getattr(module, attribute, None)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                raise SkipError(
                    f"expected a model without dropout, because cached features have to be what the model computes; "
                    f"{name or type(model).__name__} ({type(module).__name__}) has {attribute}={value}: "
                    "set it to 0 (attention_dropout=0.0 in a transformers config)"
                )
