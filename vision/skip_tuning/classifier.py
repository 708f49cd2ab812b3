"""Classifies images by comparing them with prompts of the classes, with any weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.vision.skip_tuning.inputs import read_examples
from skipguide.vision.skip_tuning.labels import plain
from skipguide.vision.skip_tuning.preparer import find_preparer
from skipguide.vision.skip_tuning.prompts import DEFAULT_TEMPLATE, check_names, check_templates, fill
from skipguide.vision.skip_tuning.results import BaseNew, Evaluation
from skipguide.vision.skip_tuning.split_model import SplitModel


class PromptClassifier(SplitModel):
    """A split model that tells classes by their prompts; see `SkipTuner` for what it is made of.

    Attributes:
        classnames: the classes.
        templates: prompts with `{}` for the class.
        prepare: makes tensors of images and texts.
    """

    def __init__(
        self,
        model: nn.Module,
        processor_or_tokenizer: Any,
        classnames: Sequence[str],
        skip_layers: int | Mapping[str, int] | None = None,
        *,
        templates: str | Sequence[str] = DEFAULT_TEMPLATE,
        trainable: Callable[[str], bool] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.classnames = check_names(classnames)
        self.templates = check_templates(templates)
        super().__init__(model, skip_layers, trainable, device)
        self.prepare = find_preparer(
            processor_or_tokenizer,
            fixed_length=None if self.towers.text.causal else self.towers.context,
            size=self.towers.image_size,
        )
        self._classifiers: dict[Any, Tensor] = {}

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the trained parameters by name, and forget the class features that others gave."""
        super().load_parameters(tensors)
        self._classifiers.clear()

    def forget_answers(self) -> None:
        """Forget the class features, because the weights are going to be trained."""
        super().forget_answers()
        self._classifiers.clear()

    # texts

    def texts(self, classnames: Sequence[str] | None = None, template: str | None = None) -> list[str]:
        """The prompts of some classes."""
        names = self.classnames if classnames is None else check_names(classnames)
        return fill(template or self.templates[0], names)

    def tokens(self, classnames: Sequence[str] | None = None, template: str | None = None) -> tuple[Tensor, Tensor]:
        """Token ids [C, L] of the prompts, cut behind the last end of a text, and the pooled positions [C].

        Raises:
            SkipError: for prompts that are too long, or two that become the same tokens.
        """
        texts = self.texts(classnames, template)
        tokens = self.prepare.tokens(texts).to(self.device)
        if tokens.shape[1] > self.towers.context:
            raise SkipError(
                f"expected prompts of at most {self.towers.context} tokens; got {tokens.shape[1]}: shorten class "
                "names or template"
            )
        _refuse_equal(tokens.tolist(), texts)
        return self.towers.text.crop(tokens)

    @torch.no_grad()
    def classifier(
        self, classnames: Sequence[str] | None = None, templates: str | Sequence[str] | None = None
    ) -> Tensor:
        """Unit-length class features [C, E], averaged over the templates; computed once until the weights change."""
        used = self.templates if templates is None else check_templates(templates)
        names = self.classnames if classnames is None else check_names(classnames)
        key = (tuple(names), tuple(used))
        if key not in self._classifiers:
            self.prefix_to(self.device)
            total: Tensor | float = 0.0
            for template in used:
                tokens, where = self.tokens(names, template)
                parts = []
                for some, at in zip(tokens.split(256), where.split(256), strict=True):
                    hidden = self.towers.text.prefix(some, self.text_layer).float()
                    parts.append(self.towers.text.suffix(hidden, at, self.text_layer))
                total = total + F.normalize(torch.cat(parts).float(), dim=-1)
            assert isinstance(total, Tensor)
            self._classifiers[key] = F.normalize(total, dim=-1)
        return self._classifiers[key]

    # images

    @torch.no_grad()
    def image_features(self, images: Sequence[Any]) -> Tensor:
        """Unit-length features [N, E] of images."""
        self.prefix_to(self.device)
        pixels = torch.stack([self.prepare.pixels(image) for image in images]).to(self.device)
        hidden = self.towers.image.prefix(self.cast(pixels), self.image_layer)
        first = torch.zeros(len(pixels), dtype=torch.long, device=self.device)
        return F.normalize(self.towers.image.suffix(hidden.float(), first, self.image_layer).float(), dim=-1)

    @torch.no_grad()
    def logits(self, images: Sequence[Any], classnames: Sequence[str] | None = None) -> Tensor:
        """Logits [N, C] of images, in batches of 128."""
        classes = self.classifier(classnames)
        scale, bias = self.towers.scale().float(), self.towers.bias()
        parts = [self.image_features(images[i : i + 128]) for i in range(0, len(images), 128)]
        return scale.to(self.device) * torch.cat(parts) @ classes.T + bias

    def predict(
        self, image: Any, topk: int = 5, classnames: Sequence[str] | None = None
    ) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """The most likely classes with their probabilities, best first.

        Args:
            image: a PIL image, or prepared pixels [3, H, W]; a list of them gives a list of answers.
            topk: how many classes at most.
            classnames: other classes than the tuner's.
        """
        if topk < 1:
            raise SkipError(f"expected topk of at least 1; got {topk}")
        names = self.classnames if classnames is None else list(classnames)
        many = isinstance(image, list | tuple)
        if many and not image:
            raise SkipError("expected at least one image; got an empty list")
        shares = self.logits(image if many else [image], classnames).softmax(1)
        best = shares.topk(min(topk, len(names)), dim=1)
        answers = [
            [(names[i], p) for p, i in zip(ps, places, strict=True)]
            for ps, places in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return answers if many else answers[0]

    def evaluate(self, data: Any, classnames: Sequence[str] | None = None) -> Evaluation:
        """Accuracy on images; see `fit` for what `data` may be.

        Args:
            data: images and labels.
            classnames: the classes to choose among; None is the tuner's. Images of others are left out.
        """
        names = self.classnames if classnames is None else check_names(classnames)
        examples = read_examples(data, names)
        right: list[bool] = []
        for i in range(0, len(examples), 128):
            places = range(i, min(i + 128, len(examples)))
            best = self.logits([examples.load(k) for k in places], names).argmax(1).tolist()
            right += [guess == examples.labels[k] for guess, k in zip(best, places, strict=True)]
        groups: dict[str, list[bool]] = {}
        for label, hit in zip(examples.labels, right, strict=True):
            groups.setdefault(names[label], []).append(hit)
        per_class = {name: sum(hits) / len(hits) for name, hits in groups.items()}
        return Evaluation(sum(right) / len(right), len(right), per_class)

    def evaluate_base_new(
        self, data: Any, new: Sequence[str], base: Sequence[str] | None = None, label: str = "SkipTuner"
    ) -> BaseNew:
        """The base/new protocol: both groups are classified among their own names.

        Args:
            data: images of all these classes, or a pair of data sets as a dict `{"base": ..., "new": ...}`.
            new: classes that were not trained.
            base: classes that were; None is the tuner's.
            label: what the row is called.

        Raises:
            SkipError: if a class is in both groups.
        """
        base = self.classnames if base is None else list(base)
        if both := sorted({plain(n) for n in base} & {plain(n) for n in new}):
            raise SkipError(f"expected new classes that are no base classes; both hold {both[:5]}")
        parts = data if isinstance(data, dict) else {"base": data, "new": data}
        return BaseNew(self.evaluate(parts["base"], base).accuracy, self.evaluate(parts["new"], new).accuracy, label)


def _refuse_equal(tokens: list[list[int]], texts: list[str]) -> None:
    """Refuse two prompts with one feature: no image could be told apart by them."""
    seen: dict[tuple[int, ...], str] = {}
    for row, text in zip(tokens, texts, strict=True):
        if (other := seen.setdefault(tuple(row), text)) is not text:
            raise SkipError(
                f"expected class names that the tokenizer tells apart; {other!r} and {text!r} become the same tokens, "
                "because they differ in case alone, or behind where a long text is cut: change or shorten one"
            )
