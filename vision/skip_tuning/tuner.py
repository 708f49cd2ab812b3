"""Skip Tuning: few-shot adaptation of CLIP that trains only what comes after a cached prefix (arXiv 2412.11509)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.files import versions
from skipguide.vision.skip_tuning.adapter import fingerprint, read_adapter, write_adapter
from skipguide.vision.skip_tuning.classes import ClassSkip
from skipguide.vision.skip_tuning.config import TuneConfig
from skipguide.vision.skip_tuning.inputs import find_preparer, plain, read_examples
from skipguide.vision.skip_tuning.results import BaseNew, Evaluation, TuneReport
from skipguide.vision.skip_tuning.step import TextPrefix
from skipguide.vision.skip_tuning.towers import check_no_dropout, find_towers

log = logging.getLogger(__name__)
DEFAULT_TEMPLATE = "a photo of a {}."


class SkipTuner:
    """Adapts a CLIP to a few images of some classes. The given model itself is never changed.

    Layers before `skip_layers` are frozen and run once per image; class skipping compares every batch with the
    classes that look like it. `skip_layers=0` and `class_skip=None` is full fine-tuning in the same harness.

    Args:
        model: CLIPModel, MetaClip2Model or SiglipModel of transformers, or a CLIP of open_clip.
        processor_or_tokenizer: a processor (prepares PIL images too), a tokenizer (images are prepared pixels
            [3, H, W]), a pair `(image_transform, tokenizer)`, or a function texts -> ids.
        classnames: the classes; `_` is read as a blank.
        skip_layers: how many blocks of each tower are skipped by the gradient; None is half of them;
            `{"image": 6, "text": 6}` sets them apart.
        class_skip: which classes a step compares with; None is all of them.
        templates: prompts with `{}` for the class. Training uses the first; the classifier averages all.
        trainable: narrows what is trained by parameter name; None trains all blocks from `skip_layers` on, the final
            norms and the projections.
        device: where to work; None is the model's own device.

    Raises:
        SkipError: for class names that are missing, empty or repeated, layers out of range, a model with dropout.
        UnknownBlockError: for another kind of model.

    Example:
        >>> from transformers import CLIPModel, CLIPProcessor
        >>> from skipguide.assets import bundled
        >>> clip = bundled("tiny-clip")
        >>> tuner = SkipTuner(CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip),
        ...                   ["red circle", "blue star"], skip_layers=3)
        >>> from PIL import Image
        >>> [name for name, _ in tuner.predict(Image.new("RGB", (32, 32), "red"))]
        ['red circle', 'blue star']
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
        self.classnames = _check_names(classnames)
        self.templates = _check_templates(templates)
        given = find_towers(model)
        check_no_dropout(model)
        self.image_layer, self.text_layer = _layers(skip_layers, len(given.image.blocks), len(given.text.blocks))
        self.class_skip = class_skip
        self.pretrained = model
        at = next(model.parameters()).device
        self.device = at if device is None else torch.device(device)
        self.names = [n for n in given.trained(self.image_layer, self.text_layer) if trainable is None or trainable(n)]
        if not self.names:
            raise SkipError("expected parameters to train; `trainable` refused all of them")
        # Frozen tensors are shared with the given model unless the work happens on another device.
        suffix = set(given.trained(self.image_layer, self.text_layer))
        self.offload = self.device != at
        frozen = set() if self.offload else {n for n, _ in model.named_parameters()} - suffix
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.data, requires_grad=False) for n, p in model.named_parameters() if n in frozen
        }
        self.model = copy.deepcopy(model, shared)
        self.model.requires_grad_(False)
        self.model.eval()
        parameters = dict(self.model.named_parameters())
        for name in suffix:  # fp32 master weights, and beside them what `trainable` leaves out
            parameters[name].data = parameters[name].data.to(self.device, torch.float32)
            parameters[name].requires_grad_(name in self.names)
        self._frozen = [] if not self.offload else [p for n, p in parameters.items() if n not in suffix]
        self.towers = find_towers(self.model)
        self.prepare = find_preparer(
            processor_or_tokenizer, fixed_length=None if self.towers.text.causal else self.towers.context
        )
        self.report: TuneReport | None = None
        self._tuned: dict[str, Tensor] | None = None
        self._classifiers: dict[Any, Tensor] = {}
        self._fingerprint: str | None = None

    # what is trained

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        wanted = set(self.names)
        return {name: p for name, p in self.model.named_parameters() if name in wanted}

    @property
    def fingerprint(self) -> str:
        """Identifies the pretrained model."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.pretrained)
        return self._fingerprint

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters().items():
            parameter.data.copy_(tensors[name])
        self._classifiers.clear()

    def _changed(self) -> None:
        """The weights are going to be trained: forget what was computed with the old ones."""
        self._tuned = None
        self._classifiers.clear()

    def prefix_to(self, device: torch.device) -> None:
        """Bring the frozen tensors to a device, if this tuner has its own."""
        for parameter in self._frozen:
            parameter.data = parameter.data.to(device)
        if self._frozen:
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(self.device))

    # texts

    def texts(self, classnames: Sequence[str] | None = None, template: str | None = None) -> list[str]:
        """The prompts of some classes."""
        names = self.classnames if classnames is None else _check_names(classnames)
        return [(template or self.templates[0]).replace("{}", plain(name)) for name in names]

    def tokens(self, classnames: Sequence[str] | None = None, template: str | None = None) -> tuple[Tensor, Tensor]:
        """Token ids [C, L] of the prompts, cut behind the last end of a text, and the pooled positions [C]."""
        tokens = self.prepare.tokens(self.texts(classnames, template)).to(self.device)
        if tokens.shape[1] > self.towers.context:
            raise SkipError(
                f"expected prompts of at most {self.towers.context} tokens; got {tokens.shape[1]}: shorten class "
                "names or template"
            )
        return self.towers.text.crop(tokens)

    @torch.no_grad()
    def text_prefix(self) -> TextPrefix:
        """The class texts at the first trained block, and their features before tuning."""
        self.prefix_to(self.device)
        tokens, where = self.tokens()
        hidden = self.towers.text.prefix(tokens, self.text_layer).float()
        frozen = find_towers(self.pretrained)
        at = next(self.pretrained.parameters()).device
        prototypes = F.normalize(frozen.text.full(tokens.to(at)).float(), dim=-1).to(self.device)
        return TextPrefix(hidden, where, prototypes)

    @torch.no_grad()
    def classifier(
        self, classnames: Sequence[str] | None = None, templates: str | Sequence[str] | None = None
    ) -> Tensor:
        """Unit-length class features [C, E], averaged over the templates; computed once until the weights change."""
        used = self.templates if templates is None else _check_templates(templates)
        names = self.classnames if classnames is None else _check_names(classnames)
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

    def cast(self, pixels: Tensor) -> Tensor:
        """Pixels in the dtype of the first layer."""
        return pixels.to(next(self.pretrained.parameters()).dtype)

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
        names = self.classnames if classnames is None else _check_names(classnames)
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

    # training

    def fit(self, data: Any, config: TuneConfig | None = None, **changes: Any) -> TuneReport:
        """Train on images.

        Args:
            data: a folder with one folder per class, a dataset of `(image, label)` pairs (torchvision's, Hugging
                Face's), or a pair `(images, labels)`; PIL images, or prepared pixels [3, H, W].
            config: the settings; None is the defaults.
            **changes: fields of `TuneConfig` to set, and `cache_dir`, `cache_refresh`, `checkpoint_dir` (a killed
                run goes on after its last whole epoch), `accelerator`, `progress`, `augment` as a function of an image.

        Returns:
            What it cost; also kept as `tuner.report`.

        Raises:
            SkipError: for a class without images, too few of them, a loss that is not finite, a damaged or stale cache
                or checkpoint.
        """
        from skipguide.vision.skip_tuning.fit import RunOptions, run

        options = {k: changes.pop(k) for k in tuple(changes) if k in RunOptions.__dataclass_fields__}
        if callable(changes.get("augment")):
            options["transform"] = changes.pop("augment")
        settings = replace(config or TuneConfig(), **changes)
        self.report = run(self, read_examples(data, self.classnames), settings, RunOptions(**options))
        return self.report

    # results

    def interpolate(self, alpha: float) -> Self:
        """Move the weights between the pretrained (0) and the tuned ones (1), as WiSE-FT does.

        Calls do not add up: `interpolate(1)` brings the tuned weights back. What is saved is what is set here.
        """
        if not 0 <= alpha <= 1:
            raise SkipError(f"expected alpha from 0 (pretrained) to 1 (tuned); got {alpha}")
        if self._tuned is None:
            self._tuned = {name: p.detach().clone() for name, p in self.parameters().items()}
        start = dict(self.pretrained.named_parameters())
        self._load(
            {
                name: torch.lerp(start[name].detach().float().to(t.device), t, alpha) if alpha < 1 else t
                for name, t in self._tuned.items()
            }
        )
        return self

    def save_adapter(self, folder: str | Path, *, overwrite: bool = False, dtype: torch.dtype = torch.float32) -> None:
        """Write what differs from the pretrained model: `adapter.safetensors`, with notes; `adapter.json` is a copy.

        Raises:
            SkipError: if the folder holds an adapter and `overwrite` is False.
        """
        start = dict(self.pretrained.named_parameters())
        tensors = {
            name: p.detach().to(dtype)
            for name, p in self.parameters().items()
            if not torch.equal(p.detach().cpu(), start[name].detach().float().cpu())
        }
        write_adapter(Path(folder), tensors, self._notes(), overwrite=overwrite)

    def _notes(self) -> dict[str, Any]:
        return {
            "version": 1,
            "model": type(self.pretrained).__name__,
            "name": getattr(getattr(self.pretrained, "config", None), "_name_or_path", ""),
            "fingerprint": self.fingerprint,
            "skip_layers": {"image": self.image_layer, "text": self.text_layer},
            "class_skip": None if self.class_skip is None else self.class_skip.to_dict(),
            "classnames": self.classnames,
            "templates": self.templates,
            "report": None if self.report is None else self.report.to_dict(),
            "versions": versions(),
        }

    def load_adapter(self, folder: str | Path) -> Self:
        """Set the weights that `save_adapter` wrote.

        Raises:
            SkipError: if the adapter is damaged, or belongs to another model or other layers.
        """
        tensors, notes = read_adapter(Path(folder))
        if notes["fingerprint"] != self.fingerprint:
            raise SkipError(
                f"expected an adapter of this {type(self.pretrained).__name__} ({self.fingerprint[:8]}); {folder} is "
                f"of another model ({notes['model']} {notes['name']!r}, {notes['fingerprint'][:8]}): load that one"
            )
        own = self.parameters()
        if outside := sorted(set(tensors) - set(own)):
            raise SkipError(
                f"expected an adapter of layers {self.image_layer} (image) and {self.text_layer} (text) on; {folder} "
                f"was trained with {notes['skip_layers']} and changes {outside[0]}: pass the same skip_layers"
            )
        start = dict(self.pretrained.named_parameters())
        self._tuned = None
        self._load({name: tensors[name] if name in tensors else start[name] for name in own})
        return self

    @classmethod
    def from_adapter(cls, model: nn.Module, processor_or_tokenizer: Any, folder: str | Path, **more: Any) -> SkipTuner:
        """A tuner with the classes, layers and weights of an adapter."""
        _, notes = read_adapter(Path(folder))
        skip = notes["class_skip"]
        more = {
            "templates": notes["templates"],
            "skip_layers": notes["skip_layers"],
            "class_skip": skip and ClassSkip.from_dict(skip),
        } | more
        return cls(model, processor_or_tokenizer, notes["classnames"], **more).load_adapter(folder)

    def merge(self) -> nn.Module:
        """A stock model with the tuned weights, of the pretrained model's class, dtype and device."""
        if any("lora_" in name for name in self.names):
            raise SkipError("expected tuned layers; these are peft's: merge them with peft's merge_and_unload")
        merged = copy.deepcopy(self.pretrained)
        tuned = self.parameters()
        for name, parameter in merged.named_parameters():
            if name in tuned:
                parameter.data.copy_(tuned[name].detach())
        return merged

    def push_to_hub(self, repo_id: str, *, merged: bool = False, private: bool | None = None, **more: Any) -> Any:
        """Upload the adapter, or with `merged` the whole stock model, to the Hugging Face Hub."""
        if merged:
            return self.merge().push_to_hub(repo_id, private=private, **more)  # type: ignore[operator]
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_adapter(folder)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **more)


def _check_names(classnames: Sequence[Any]) -> list[str]:
    if isinstance(classnames, str) or not len(classnames):
        raise SkipError(f"expected a list of class names; got {classnames!r}")
    seen: dict[str, int] = {}
    for place, name in enumerate(classnames):
        if not isinstance(name, str) or not plain(name):
            raise SkipError(f"expected class names with words in them; class {place} is {name!r}")
        if plain(name) in seen:
            raise SkipError(
                f"expected different class names; classes {seen[plain(name)]} and {place} are both {name!r}"
            )
        seen[plain(name)] = place
    return list(classnames)


def _check_templates(templates: str | Sequence[str]) -> list[str]:
    found = [templates] if isinstance(templates, str) else list(templates)
    if not found:
        raise SkipError("expected at least one template")
    for template in found:
        if template.count("{}") != 1:
            raise SkipError(f"expected a template with one {{}} for the class name; got {template!r}")
    return found


def _layers(given: int | Mapping[str, int] | None, image: int, text: int) -> tuple[int, int]:
    if given is None:
        return image // 2, text // 2
    wanted: tuple[Any, Any]
    if isinstance(given, Mapping):
        if set(given) != {"image", "text"}:
            raise SkipError(f'expected skip_layers with "image" and "text"; got {sorted(given)}')
        wanted = given["image"], given["text"]
    else:
        wanted = given, given
    layer: Any  # what a user or a JSON file gives
    for tower, layer, blocks in (("image", wanted[0], image), ("text", wanted[1], text)):
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < blocks:
            raise SkipError(
                f"expected skip_layers from 0 to {blocks - 1}, because the {tower} tower has {blocks} blocks and one "
                f"has to be trained; got {layer!r}"
            )
    return wanted
