"""Similarity: how much each sublayer of a language model changes the residual stream.

With x the stream before a layer, a = x + attention and m = a + MLP, the similarity of an attention is the mean cosine
of x and a over the tokens, that of an MLP the mean cosine of a and m: the higher, the less it does. The scale is the
factor by which the stream's norm grows; a left-out sublayer can stand for `h * scale`.

Source: AdaSkip (arXiv 2501.02336), section on offline importance learning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skipguide.config import JsonConfig, as_numbers, normalize_fields
from skipguide.errors import SkipError
from skipguide.llm.choose import rank, sublayer_at
from skipguide.shown import Row, Shown, counted

Part = Literal["attn", "mlp"]
COSINE = 1.001  # a mean of cosines in single precision may be above 1 by its rounding


@dataclass(frozen=True, repr=False)
class SublayerStats(Shown, JsonConfig):
    """Similarity and scale of every sublayer, averaged over requests.

    Attributes:
        attn_similarity: mean cosine per layer over the attention's residual branch.
        mlp_similarity: the same over the MLP's.
        attn_scale: growth of the stream's norm over the attention.
        mlp_scale: growth over the MLP.
        block_similarity: mean cosine of a whole layer's input and output; empty where it was not measured.
        requests: how many requests the averages are over.
        tokens: mean length of a request.
        model: class of the model that was measured.

    Raises:
        SkipError: for lists of different lengths, numbers that are not finite, similarities that are no cosines, and
            scales below 0.

    Example:
        >>> stats = SublayerStats((0.9, 0.99), (0.8, 0.95), (1.1, 1.0), (1.2, 1.0))
        >>> stats.ranking()  # attention of layer 0 and 1, MLP of layer 0 and 1 are sublayers 0 to 3
        [1, 3, 0, 2]
        >>> SublayerStats.from_dict(stats.to_dict()) == stats
        True
    """

    attn_similarity: tuple[float, ...]
    mlp_similarity: tuple[float, ...]
    attn_scale: tuple[float, ...]
    mlp_scale: tuple[float, ...]
    block_similarity: tuple[float, ...] = ()
    requests: int = 1
    tokens: float = 0.0
    model: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no measurement."""
        for name in ("attn_similarity", "mlp_similarity", "attn_scale", "mlp_scale", "block_similarity"):
            least, most = (0.0, None) if name.endswith("_scale") else (-COSINE, COSINE)
            given = getattr(self, name)
            for layer, value in enumerate(given if isinstance(given, list | tuple) else ()):
                if isinstance(value, float) and not math.isfinite(value):
                    raise SkipError(
                        f"{name} of layer {layer} is {value}: the model produced NaN or inf on what it was measured "
                        "on; run it in float32 or bfloat16, and look at its outputs first"
                    )
            values = as_numbers(name, given, least, most)
            object.__setattr__(self, name, values)
            if name == "block_similarity" and not values:
                continue
            if not values or len(values) != len(self.attn_similarity):
                raise SkipError(
                    f"expected one value per layer in every list; got {len(values)} in {name} and "
                    f"{len(self.attn_similarity)} in attn_similarity"
                )
        normalize_fields(self, {"requests": 1}, {"tokens": 0}, texts=("model",))

    @property
    def num_layers(self) -> int:
        """How many layers were measured."""
        return len(self.attn_similarity)

    def ranking(self) -> list[int]:
        """All 2L sublayers, most similar (least important) first; 0 to L-1 are attentions, L to 2L-1 MLPs."""
        return rank(self.attn_similarity, self.mlp_similarity)

    def ranked(self) -> list[tuple[int, str, float, float]]:
        """Layer, part, similarity and scale of all sublayers, most similar first."""
        found = []
        for number in self.ranking():
            layer, part = sublayer_at(number, self.num_layers)
            found.append((layer, part, *(getattr(self, f"{part}_{name}")[layer] for name in ("similarity", "scale"))))
        return found

    def _heading(self) -> str:
        of = f" of {self.model}" if self.model else ""
        over = f"{counted(self.requests, 'request')} of {self.tokens:.0f} tokens"
        return f"SublayerStats{of}: {self.num_layers} layers over {over}"

    def _rows(self) -> list[Row]:
        found = [(layer, part, f"{cosine:.4f}", f"{scale:.3f}") for layer, part, cosine, scale in self.ranked()]
        return [("rank", "layer", "part", "similarity", "scale"), *((at, *row) for at, row in enumerate(found, 1))]


class RequestMeter:
    """Sums of one request (or a batch of them), on the model's device; nothing here waits for the device.

    Args:
        num_layers: layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._sums: dict[tuple[int, str], Tensor] = {}

    def add(self, layer: int, part: str, before: Tensor, after: Tensor, mask: Tensor | None = None) -> None:
        """Enter the stream before and after one sublayer.

        Args:
            layer: which layer.
            part: `"attn"`, `"mlp"` or `"block"`.
            before: [B, T, D].
            after: [B, T, D].
            mask: [B, T] bool, False at padding; None counts every token.
        """
        before, after = before.detach().float(), after.detach().float()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=2, eps=1e-8)
        squares = torch.stack([before.square().sum(2), after.square().sum(2)])
        tokens = torch.ones_like(cosine) if mask is None else mask.to(cosine)
        # where, not a product: padding rows may hold NaN, which must not count
        kept = tokens > 0
        rows = torch.stack([torch.where(kept, value, 0.0).sum(1) for value in (cosine, *squares, tokens)])
        key = (layer, part)
        if (seen := self._sums.get(key)) is not None and seen.shape == rows.shape:
            rows = rows + seen.to(rows.device)
        self._sums[key] = rows

    def entering(self, mask: Tensor | None = None) -> Callable[[int, str, Tensor, Tensor], None]:
        """A listener for `watch` that enters every sublayer that is reported, and whole layers.

        Args:
            mask: [B, T], 0 at padding.
        """
        kept = None if mask is None else mask.bool()
        starts: dict[int, Tensor] = {}

        def enter(layer: int, part: str, before: Tensor, after: Tensor) -> None:
            self.add(layer, part, before, after, kept)
            if part == "attn":
                starts[layer] = before
            elif (start := starts.pop(layer, None)) is not None:
                self.add(layer, "block", start, after, kept)

        return enter

    def similarity(self, part: str) -> Tensor:
        """Mean cosine [L, B], NaN where nothing was measured."""
        return self._of(part, lambda sums: sums[0] / sums[3])

    def scale(self, part: str) -> Tensor:
        """Growth of the norm over all tokens of a request [L, B], NaN where nothing was measured."""
        return self._of(part, lambda sums: (sums[2] / sums[1]).sqrt())

    @property
    def tokens(self) -> Tensor:
        """How many tokens were entered of each row [B]."""
        return self._any()[3]

    def measured(self, part: str) -> list[int]:
        """The layers of which something was entered."""
        return sorted(layer for layer, name in self._sums if name == part)

    def _any(self) -> Tensor:
        if not self._sums:
            raise SkipError("nothing was measured: run the model on a prompt first")
        return next(iter(self._sums.values()))

    def _of(self, part: str, value: Callable[[Tensor], Tensor]) -> Tensor:
        found = self._any()
        nothing = found.new_full(found.shape[1:], math.nan)
        rows = [
            value(self._sums[key]).to(nothing.device) if (key := (layer, part)) in self._sums else nothing
            for layer in range(self.num_layers)
        ]
        return torch.stack(rows)


class StatsMeter:
    """Averages over requests, each request with the same weight, whatever its length.

    Attributes:
        requests: rows that were entered.
    """

    def __init__(self, num_layers: int, model: str = "") -> None:
        self.num_layers = num_layers
        self.model = model
        self._total: Tensor | None = None
        self._tokens: Tensor | float = 0.0
        self._measured: Tensor | int = 0
        self.requests = 0

    def add(self, request: RequestMeter) -> None:
        """Enter a request, or a batch of them as that many; a row of nothing but padding is none."""
        both = [*(request.similarity(part) for part in ("attn", "mlp", "block"))]
        values = torch.stack([*both, request.scale("attn"), request.scale("mlp")])  # [5, L, B]
        real = request.tokens > 0
        total = torch.where(real, values, 0.0).sum(2)
        self._total = total if self._total is None else self._total + total.to(self._total.device)
        self._tokens = self._tokens + request.tokens.sum()
        self._measured = self._measured + real.sum()
        self.requests += values.shape[2]

    def result(self) -> SublayerStats:
        """The averages, copied to the host at once.

        Raises:
            SkipError: if nothing was measured, or a number is not finite.
        """
        measured = int(self._measured)
        if self._total is None or not measured:
            raise SkipError(
                "no request was measured: give at least one batch of token ids with two tokens or more, not all of "
                "them masked as padding"
            )
        attn, mlp, block, attn_scale, mlp_scale = _lists(self._total / measured)
        return SublayerStats(
            attn, mlp, attn_scale, mlp_scale, block, measured, float(self._tokens) / measured, self.model
        )


def _lists(values: Tensor) -> Sequence[tuple[float, ...]]:
    return [tuple(row) for row in values.double().cpu().tolist()]
