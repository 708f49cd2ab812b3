"""Pixels and token ids from images and texts, by whatever processor was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.media.frames import as_images, as_rgb, open_picture


def as_picture(item: Any) -> Any:
    """One image as a PIL image, or as prepared pixels: a float tensor [3, H, W].

    Arrays are pictures: bytes, or floats in 0..1, `[H, W]`, `[H, W, C]` or `[C, H, W]`; so is a tensor of bytes. A
    processor takes floats for bytes and scales them again, and bytes are no prepared pixels, so both become PIL images.

    Raises:
        SkipError: for a file that is no picture, or values and shapes that no picture has.
    """
    if isinstance(item, str | Path):
        return open_picture(item)
    if hasattr(item, "convert"):
        return item
    if isinstance(item, Tensor) and item.is_floating_point():
        return item
    if not isinstance(item, Tensor) and not hasattr(item, "__array__"):
        raise SkipError(
            f"expected an image (PIL, a path, an array, or prepared pixels [3, H, W]); got {type(item).__name__}"
        )
    values = item.numpy(force=True) if isinstance(item, Tensor) else item.__array__()
    if values.dtype.kind not in "uif" or (values.dtype.kind in "ui" and values.dtype.itemsize > 1):
        raise SkipError(f"expected a picture of bytes, or of floats in 0..1; got {values.dtype}: bring it to 8 bits")
    try:
        pictures = as_images(values[..., None] if values.ndim == 2 else values)
    except SkipError as error:
        raise SkipError(f"expected one picture [H, W], [H, W, 3] or [3, H, W]: {error}") from error
    if len(pictures) != 1:
        raise SkipError(f"expected one picture [H, W], [H, W, 3] or [3, H, W]; got {list(values.shape)}")
    return pictures[0]


@dataclass
class Preparer:
    """Pixels and token ids from images and texts, by whatever processor was given.

    Attributes:
        image: PIL image -> pixels [3, H, W]; None if only prepared pixels can be taken.
        text: texts -> token ids [N, L]; None if no tokenizer was given.
        name: what identifies the preprocessing, for the key of a cache.
        size: height and width that the model takes; None is any.
    """

    image: Callable[[Any], Tensor] | None
    text: Callable[[list[str]], Tensor] | None
    name: str
    size: int | None = None

    def pixels(self, item: Any) -> Tensor:
        """Pixels [3, H, W] of one image."""
        item = as_picture(item)
        if isinstance(item, Tensor):
            return self._checked(item, "prepared pixels")
        if self.image is None:
            raise SkipError(
                "expected prepared pixels [3, H, W] as floats, because only a tokenizer was given: "
                "give SkipTuner a processor (CLIPProcessor), which prepares pictures too"
            )
        made: Any = self.image(as_rgb(item, "the image"))
        if not isinstance(made, Tensor) or not made.is_floating_point():
            got = made.dtype if isinstance(made, Tensor) else type(made).__name__
            raise SkipError(
                f"expected the image transform to return normalised pixels [3, H, W] as floats; got {got}: end it "
                "with ToImage, ToDtype(torch.float32, scale=True) and Normalize"
            )
        return self._checked(made, "the transform to return pixels")

    def _checked(self, pixels: Tensor, what: str) -> Tensor:
        sides = "H, W" if self.size is None else f"{self.size}, {self.size}"
        wrong = pixels.ndim != 3 or pixels.shape[0] != 3
        if wrong or (self.size is not None and tuple(pixels.shape[1:]) != (self.size, self.size)):
            raise SkipError(f"expected {what} [3, {sides}] of one image; got {list(pixels.shape)}")
        if not bool(torch.isfinite(pixels).all()):
            raise SkipError("expected finite pixels; an image has NaN or infinity: clean or drop it first")
        return pixels

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids [N, L] of texts."""
        if self.text is None:
            raise SkipError("expected a tokenizer, because texts have to be encoded; only images can be prepared here")
        return self.text(texts)


def find_preparer(given: Any, *, fixed_length: int | None, size: int | None = None) -> Preparer:
    """What prepares images and texts.

    Args:
        given: a transformers processor (CLIPProcessor, SiglipProcessor) or tokenizer; a pair
            `(image_transform, tokenizer)` as open_clip gives them; or a function texts -> ids.
        fixed_length: pad every text to this length (SigLIP pools the last position); None pads to the longest.
        size: height and width that the model takes.

    Raises:
        SkipError: for anything else.
    """
    if isinstance(given, tuple) and len(given) == 2:
        transform, tokenizer = given
        inner = find_preparer(tokenizer, fixed_length=fixed_length)
        return Preparer(transform, inner.text, repr(transform), size)
    if hasattr(given, "tokenizer") and hasattr(given, "image_processor"):
        images = given.image_processor

        def image(item: Any) -> Tensor:
            pixels: Tensor = images(images=item, return_tensors="pt")["pixel_values"][0]
            return pixels

        inner = find_preparer(given.tokenizer, fixed_length=fixed_length)
        return Preparer(image, inner.text, repr(images.to_dict()), size)
    if callable(given):
        return Preparer(None, _text_encoder(given, fixed_length), "", size)
    if given is None:
        return Preparer(None, None, "", size)
    raise SkipError(
        "expected a transformers processor or tokenizer, a pair (image_transform, tokenizer), or a function of texts; "
        f"got {type(given).__name__}"
    )


def _text_encoder(tokenizer: Any, fixed_length: int | None) -> Callable[[list[str]], Tensor]:
    def encode(texts: list[str]) -> Tensor:
        if hasattr(tokenizer, "convert_tokens_to_ids") and hasattr(tokenizer, "pad_token"):
            more = {"padding": True} if fixed_length is None else {"padding": "max_length", "max_length": fixed_length}
            out = tokenizer(texts, truncation=True, return_tensors="pt", **more)
        else:
            out = tokenizer(texts)
        if isinstance(out, Mapping) or hasattr(out, "input_ids"):
            out = out["input_ids"]
        return torch.as_tensor(out).long()

    return encode
