"""Skip Tuning: few-shot adaptation of CLIP that trains only what comes after a cached prefix (arXiv 2412.11509)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from skipguide.errors import SkipError
from skipguide.files import versions
from skipguide.vision.skip_tuning.adapter import read_adapter, write_adapter
from skipguide.vision.skip_tuning.classes import ClassSkip
from skipguide.vision.skip_tuning.config import TuneConfig
from skipguide.vision.skip_tuning.fit import train
from skipguide.vision.skip_tuning.inputs import read_examples
from skipguide.vision.skip_tuning.options import RunOptions
from skipguide.vision.skip_tuning.results import TuneReport
from skipguide.vision.skip_tuning.trainable_classifier import TrainableClassifier
from skipguide.vision.weights import check_weights


class SkipTuner(TrainableClassifier):
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

    report: TuneReport | None = None

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
        options = {k: changes.pop(k) for k in tuple(changes) if k in RunOptions.__dataclass_fields__}
        if callable(changes.get("augment")):
            options["transform"] = changes.pop("augment")
        settings = replace(config or TuneConfig(), **changes)
        self.report = train(self, read_examples(data, self.classnames), settings, RunOptions(**options))
        return self.report

    # results

    def save_adapter(self, folder: str | Path, *, overwrite: bool = False, dtype: torch.dtype = torch.float32) -> None:
        """Write what differs from the pretrained model: `adapter.safetensors`, with notes; `adapter.json` is a copy.

        Raises:
            SkipError: if the folder holds an adapter and `overwrite` is False.
        """
        tensors = {name: tensor.to(dtype) for name, tensor in self.changed_tensors().items()}
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
            SkipError: if the adapter is damaged, belongs to another model or other layers, or has tensors of other
                shapes or kinds than the model's. The weights are as they were.
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
        check_weights(tensors, own, str(folder), "save the adapter anew")
        start = dict(self.pretrained.named_parameters())
        self._tuned = None
        self.load_parameters({name: tensors[name] if name in tensors else start[name] for name in own})
        return self

    @classmethod
    def from_adapter(cls, model: nn.Module, processor_or_tokenizer: Any, folder: str | Path, **more: Any) -> SkipTuner:
        """A tuner with the classes, layers and weights of an adapter.

        Raises:
            SkipError: as `load_adapter` does, and for classes or layers that the model cannot have.
        """
        _, notes = read_adapter(Path(folder))
        skip = notes["class_skip"]
        more = {
            "templates": notes["templates"],
            "skip_layers": notes["skip_layers"],
            "class_skip": skip and ClassSkip.from_dict(skip),
        } | more
        return cls(model, processor_or_tokenizer, notes["classnames"], **more).load_adapter(folder)

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
