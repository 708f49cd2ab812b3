"""A classifier with what its training needs: which classes a step compares with, and the class texts' prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from skipguide.hosts.accelerate import execution_device
from skipguide.vision.skip_tuning.classes import ClassSkip
from skipguide.vision.skip_tuning.classifier import PromptClassifier
from skipguide.vision.skip_tuning.prompts import DEFAULT_TEMPLATE
from skipguide.vision.skip_tuning.step import TextPrefix
from skipguide.vision.skip_tuning.towers import find_towers


class TrainableClassifier(PromptClassifier):
    """What the training loop and its parts work on; `SkipTuner` adds `fit` and files, and documents the arguments.

    Attributes:
        class_skip: which classes a step compares with; None is all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        processor_or_tokenizer: Any,
        classnames: Sequence[str],
        skip_layers: int | Mapping[str, int] | None = None,
        class_skip: ClassSkip | None = ClassSkip(),  # noqa: B008 (frozen)
        *,
        templates: str | Sequence[str] = DEFAULT_TEMPLATE,
        trainable: Callable[[str], bool] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(
            model,
            processor_or_tokenizer,
            classnames,
            skip_layers,
            templates=templates,
            trainable=trainable,
            device=device,
        )
        self.class_skip = class_skip

    @torch.no_grad()
    def text_prefix(self) -> TextPrefix:
        """The class texts at the first trained block, and their features before tuning."""
        self.prefix_to(self.device)
        tokens, where = self.tokens()
        hidden = self.towers.text.prefix(tokens, self.text_layer).float()
        frozen = find_towers(self.pretrained)
        at = execution_device(self.pretrained)
        prototypes = F.normalize(frozen.text.full(tokens.to(at)).float(), dim=-1).to(self.device)
        return TextPrefix(hidden, where, prototypes)
