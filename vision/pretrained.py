"""Networks that are saved to a folder or the hub, and come back with the same settings and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

from huggingface_hub import PyTorchModelHubMixin

from skipguide.config import native
from skipguide.errors import SkipError


class PretrainedMixin(PyTorchModelHubMixin):
    """`save_pretrained` and `from_pretrained`, with the saved weights and no others."""

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Note the settings as plain data: the hub's mixin silently leaves out what is not JSON."""
        return super().__new__(cls, *map(_plain, args), **{name: _plain(value) for name, value in settings.items()})

    @classmethod
    def _from_pretrained(cls, **settings: Any) -> Self:
        # The saved weights replace those of the backbone's library, so those are not downloaded again. Strict, because
        # a part that the file lacks would silently keep its random start.
        settings = {"strict": True} | settings | {"pretrained": False}
        try:
            return cast(Self, super()._from_pretrained(**settings))
        except RuntimeError as error:
            raise SkipError(
                f"the weights saved in {settings['model_id']} are not those of a {cls.__name__} with these settings: "
                f"{error}"
            ) from error


def _plain(value: Any) -> Any:
    """Numbers and sequences of any library as Python's own numbers and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    value = native(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value
