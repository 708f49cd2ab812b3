"""Saved: networks that go to a folder or the hub and come back whole."""

from __future__ import annotations

from typing import Any, Self, cast

from huggingface_hub import PyTorchModelHubMixin

from skipguide.errors import SkipError


class Saved(PyTorchModelHubMixin):
    """`save_pretrained` and `from_pretrained`, with the saved weights and no others."""

    @classmethod
    def _from_pretrained(cls, **settings: Any) -> Self:
        # The saved weights replace those of the backbone's library: nothing to download a second time. Strict, or a
        # part that the file lacks would keep its random start without a word.
        settings = {"strict": True} | settings | {"pretrained": False}
        try:
            return cast(Self, super()._from_pretrained(**settings))
        except RuntimeError as error:
            raise SkipError(
                f"the weights saved in {settings['model_id']} are not those of a {cls.__name__} with these settings: "
                f"{error}"
            ) from error
