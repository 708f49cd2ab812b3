"""What a model is: a diffusion pipeline, a language model or a classifier. No weights are read."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from skipguide.cli import models
from skipguide.cli.arguments import GUIDANCE_FLAGS
from skipguide.errors import SkipError

CLIPS, LANGUAGE, CLASSIFIER = "a diffusion pipeline", "a language model", "a classifier"
OWN_FLAGS = {
    CLIPS: (
        *("prompts", "grid", "scorer", "judge", "export"),
        *("steps", "negative_prompt", "height", "width", "frames", "image"),
        *GUIDANCE_FLAGS,
    ),
    LANGUAGE: ("text", "counts", "tokens", "pieces"),
    CLASSIFIER: ("images", "checkpoint"),
}


def kind_of(name: str) -> str:
    """Which of the three a model is.

    Raises:
        SkipError: for one that is none of them.
    """
    if Path(name).suffix.lower() == ".gguf":
        return LANGUAGE
    if re.fullmatch(r"[\w.-]+", name) and not Path(name).exists() and not _is_bundled(name) and _is_network(name):
        return CLASSIFIER
    source = models.resolve(name)
    if source.read("model_index.json") is not None:
        return CLIPS
    config: dict[str, Any] = source.read("config.json") or {}
    if "architecture" in config:  # as timm writes it
        return CLASSIFIER
    if any(str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in config.get("architectures") or ()):
        return LANGUAGE
    raise SkipError(
        f"cannot tell what {name} is: expected a diffusers pipeline (model_index.json), a causal language model of "
        f"transformers, a .gguf file, or a classifier of timm or torchvision"
    )


def _is_bundled(name: str) -> bool:
    from skipguide.assets import bundled

    with contextlib.suppress(SkipError):
        bundled(name)
        return True
    return False


def _is_network(name: str) -> bool:
    import timm
    from torchvision import models as networks

    return timm.is_model(name) or name in networks.list_models()
