"""What Skip Tuning is compared with, in the same harness: linear probe, full fine-tuning, LoRA, each skip alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.vision.skip_tuning.classes import ClassSkip
from skipguide.vision.skip_tuning.tuner import SkipTuner


@dataclass(frozen=True)
class Method:
    """One way of adapting.

    Attributes:
        layers: whether the prefix is skipped.
        classes: whether classes are skipped.
        recipe: Skip Tuning's batches of one class and its learning rates (image tower at a quarter of the text's).
        lora: train low-rank adapters in the attention of every block instead of the weights.
    """

    layers: bool
    classes: bool
    recipe: bool
    lora: bool = False


METHODS: dict[str, Method] = {
    "full fine-tuning": Method(False, False, False),
    "full fine-tuning, our recipe": Method(False, False, True),
    "LoRA": Method(False, False, False, lora=True),
    "class skipping only": Method(False, True, True),
    "layer skipping only": Method(True, False, True),
    "skip tuning": Method(True, True, True),
}


def build(
    name: str,
    model: nn.Module,
    processor: Any,
    classnames: Sequence[str],
    *,
    skip_layers: int | None = None,
    class_skip: ClassSkip | None = None,
    rank: int = 4,
    **more: Any,
) -> SkipTuner:
    """A tuner for one of `METHODS`.

    Args:
        name: a key of `METHODS`.
        model: the pretrained model; stays as it is.
        processor: as for `SkipTuner`.
        classnames: the classes.
        skip_layers: where methods that skip layers start; None is half of the blocks.
        class_skip: how methods that skip classes do; None is the defaults.
        rank: of LoRA.
        **more: for `SkipTuner`.
    """
    if name not in METHODS:
        raise SkipError(f"expected one of {', '.join(METHODS)}; got {name!r}")
    method = METHODS[name]
    skip = (class_skip or ClassSkip()) if method.classes else None
    if method.lora:
        return SkipTuner(
            with_lora(model, rank), processor, classnames, 0, skip, trainable=lambda n: "lora_" in n, **more
        )
    return SkipTuner(model, processor, classnames, skip_layers if method.layers else 0, skip, **more)


def with_lora(model: nn.Module, rank: int = 4) -> nn.Module:
    """A copy of a transformers model with low-rank adapters on the queries and values of every block.

    Raises:
        SkipError: if peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SkipError("expected peft for the LoRA baseline: pip install 'skipguide[clip]'") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    adapted: nn.Module = inject_adapter_in_model(config, copy.deepcopy(model))
    return adapted


@torch.no_grad()
def probe_features(tuner: SkipTuner, images: Sequence[Any]) -> Tensor:
    """Image features for `linear_probe`, [N, E]."""
    return torch.cat([tuner.image_features(images[i : i + 128]) for i in range(0, len(images), 128)])


def linear_probe(features: Tensor, labels: Tensor, classes: int, l2: float, steps: int = 100) -> nn.Linear:
    """Logistic regression on frozen features; it knows nothing of classes it has not seen.

    Args:
        features: unit-length [N, E].
        labels: [N].
        classes: how many.
        l2: strength of the penalty on the weights.
        steps: of L-BFGS.
    """
    probe = nn.Linear(features.shape[1], classes).to(features.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(features), labels) + l2 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe
