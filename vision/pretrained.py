"""Networks that are saved to a folder or the hub, and come back with the same settings and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError

from skipguide.assets import bundled
from skipguide.config import native
from skipguide.errors import SkipError
from skipguide.files import landing, read_settings
from skipguide.vision.weights import check_file, check_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What the hub's mixin is told beside the settings of a network.
_DOWNLOAD = ("revision", "cache_dir", "force_download", "proxies", "resume_download", "local_files_only", "token")
_OF_THE_HUB = ("model_id", *_DOWNLOAD, "map_location", "strict")


class PretrainedMixin(PyTorchModelHubMixin):
    """`save_pretrained` and `from_pretrained`, with the saved weights and no others."""

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Note the settings as plain data: the hub's mixin silently leaves out what is not JSON."""
        return super().__new__(cls, *map(_plain, args), **{name: _plain(value) for name, value in settings.items()})

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> str | None:
        """Write `config.json` and `model.safetensors` into a folder, or into what a link to one points to.

        Args:
            save_directory: the folder; made if it is missing.
            **settings: as of the hub's mixin, such as `push_to_hub`.
        """
        return super().save_pretrained(landing(Path(save_directory)), **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **settings: Any) -> Self:
        """The network that `save_pretrained` wrote, in eval mode.

        Args:
            pretrained_model_name_or_path: the folder, or an id on the Hugging Face Hub.
            **settings: arguments of the class in place of the saved ones, and those of the hub's download (`revision`,
                `cache_dir`, `local_files_only`, `token`, `force_download`).

        Raises:
            SkipError: for a folder without `config.json` or `model.safetensors`, settings that are none, or weights
                that are not those of such a network.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            for name in (CONFIG, WEIGHTS):
                if not (folder / name).is_file():
                    raise SkipError(f"{folder} has no {name}: expected what {cls.__name__}.save_pretrained wrote")
            read_settings(folder / CONFIG)  # for its error: the hub's mixin reads them again
        elif folder.exists():
            raise SkipError(f"{folder} is a file; expected the folder that {cls.__name__}.save_pretrained wrote")
        elif str(folder).startswith("tiny-"):  # ids of the hub have an owner
            name = bundled(str(folder)).name  # or the error with the names that there are
            raise SkipError(
                f"no folder {folder}: of a model that ships it is skipguide.assets.bundled({name!r}), so "
                f"{cls.__name__}.from_pretrained(bundled({name!r}))"
            )
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **settings)
        except HFValidationError as error:
            raise SkipError(f"no folder {folder}, and no id on the hub: {error}") from error

    @classmethod
    def _from_pretrained(cls, **settings: Any) -> Self:
        # The saved weights replace those of the backbone's library, so those are not downloaded again. Strict, because
        # a part that the file lacks would silently keep its random start.
        settings = {"strict": True} | settings | {"pretrained": False}
        folder = Path(settings["model_id"])
        try:
            if folder.is_dir():  # what the hub's mixin does, without the line that it prints
                own = {name: value for name, value in settings.items() if name not in _OF_THE_HUB}
                device = settings.get("map_location", "cpu")
                return cast(
                    Self, cls._load_as_safetensor(cls(**own), str(folder / WEIGHTS), device, settings["strict"])
                )
            return cast(Self, super()._from_pretrained(**settings))
        except RuntimeError as error:
            raise SkipError(
                f"the weights saved in {settings['model_id']} are not those of a {cls.__name__} with these settings: "
                f"{error}"
            ) from error

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        advice = f"they are not those of a {cls.__name__} with these settings"
        check_file(Path(model_file), model.state_dict(), advice)
        return super()._load_as_safetensor(model, model_file, map_location, strict)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        advice = f"they are not those of a {cls.__name__} with these settings"
        try:
            found = torch.load(model_file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            raise SkipError(f"expected weights in {model_file}; it is damaged ({error}): {advice}") from error
        check_weights(found, model.state_dict(), model_file, advice, complete=strict)
        return super()._load_as_pickle(model, model_file, map_location, strict)


def _plain(value: Any) -> Any:
    """Numbers and sequences of any library as Python's own numbers and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    value = native(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value
