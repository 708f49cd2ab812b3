"""Perturbed models by hand: attention written out token by token, tokens moved before a block, branches scaled.

Nothing here imports skipguide. As in `family`, an edit is built into a deep copy of the model, and is never a hook.
"""

import copy
import itertools
import math
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from zoo import values
from zoo.family import Family
from zoo.values import SelfValues, Values, merge_heads, rotate, split_heads

Grid = tuple[int, int, int]

# frames, height and width of the tokens of the zoo's inputs
GRIDS: dict[str, Grid] = {
    "ltx": (2, 3, 3), "wan": (2, 3, 3), "cogvideox": (2, 3, 3), "mochi": (2, 3, 3), "hunyuan": (2, 3, 3),
    "sd35": (1, 4, 4), "flux": (1, 4, 4), "sd": (1, 4, 4),
}  # fmt: skip
# the blocks that are tried: of every stack, and of every kind
LAYERS = {
    "ltx": (1,), "wan": (2,), "cogvideox": (1,), "mochi": (1,), "hunyuan": (1, 4), "sd35": (0, 2), "flux": (1, 4),
    "sd": (1,),  # in the middle, where the picture is half as large
}  # fmt: skip


# -- self-attention of one stream, written out ------------------------------------------------------------------------


class LtxAttention(Values):
    """One stream; norms and rotation before the heads are split."""

    def forward(self, hidden_states, *args, image_rotary_emb=None, **kwargs):
        a = self.attn
        q, k = a.norm_q(a.to_q(hidden_states)), a.norm_k(a.to_k(hidden_states))
        q, k = (rotate(t, image_rotary_emb) for t in (q, k))
        q, k, v = (split_heads(t, a.heads) for t in (q, k, a.to_v(hidden_states)))
        return a.to_out[0](merge_heads(values.attend(q, k, v, slice(None))))


class WanAttention(Values):
    """One stream; norms before the heads are split, rotation after."""

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        a = self.attn
        cos, sin = (each[0].transpose(0, 1) for each in rotary_emb)  # [1, S, 1, D] -> [1, S, D]
        q, k = a.norm_q(a.to_q(hidden_states)), a.norm_k(a.to_k(hidden_states))
        q, k, v = (split_heads(t, a.heads) for t in (q, k, a.to_v(hidden_states)))
        q, k = (rotate(t, (cos, sin)) for t in (q, k))
        return a.to_out[0](merge_heads(values.attend(q, k, v, slice(None))))


class SD35Attention(Values):
    """The second attention of the image alone."""

    def forward(self, hidden_states, *args, **kwargs):
        a = self.attn
        q, k, v = (split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        return a.to_out[0](merge_heads(values.attend(a.norm_q(q), a.norm_k(k), v, slice(None))))


class PlainAttention(Values):
    """A UNet's: no norms, no rotation."""

    def forward(self, hidden_states, *args, **kwargs):
        a = self.attn
        q, k, v = (split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        return a.to_out[0](merge_heads(values.attend(q, k, v, slice(None))))


WHOLE = {"sd": PlainAttention, "ltx": LtxAttention, "wan": WanAttention, "sd35": SD35Attention}


class Attends(nn.Module):
    """A module of the zoo that attends in another way."""

    def __init__(self, module: nn.Module, attend: Callable[..., Tensor]):
        super().__init__()
        self.module = module
        self.attend = attend

    def forward(self, *args, **kwargs):
        with mock.patch.object(values, "attend", self.attend):
            return self.module(*args, **kwargs)


def written_out(
    family: Family, model: nn.Module, i: int, inputs: dict[str, object], attend: Callable[..., Tensor]
) -> nn.Module:
    """A copy whose self-attention in block i is written out, with `attend` as what attention does."""
    edited = copy.deepcopy(model)
    name, kind = family.blocks[i]
    block = edited.get_submodule(name)
    for path, made in kind.values.items():
        if (attention := getattr(block, path, None)) is not None:
            made = WHOLE[family.name] if made is SelfValues else made
            setattr(block, path, Attends(made(attention, family.text_length(inputs)), attend))
    return edited


# -- what attention may do ------------------------------------------------------------------------------------------


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def masked(made: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return made
    return made.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else made + mask


def plain(q, k, v, video, mask=None):
    """As it is: a row of which everything is masked gets zero."""
    return torch.nan_to_num(masked(scores(q, k), mask).softmax(dim=-1)) @ v


def towards_identity(strength: float, heads: tuple[int, ...]):
    """Attention maps of some heads between their own and the identity (SoftPAG)."""

    def attend(q, k, v, video, mask=None):
        out = plain(q, k, v, video, mask)
        for head in heads:
            out[:, head, video] = (1 - strength) * out[:, head, video] + strength * v[:, head, video]
        return out

    return attend


def reflected(place: int, length: int) -> int:
    place = abs(place)
    return place if place < length else 2 * (length - 1) - place


def line(sigma: float, length: int) -> dict[int, float]:
    """Offset -> weight of a Gaussian over one axis; as wide as six sigma, and no wider than the axis can reflect."""
    if length == 1:
        return {0: 1.0}
    size = math.ceil(6 * sigma)
    size += 1 if size % 2 == 0 else 0
    size = min(size, length if length % 2 else length + 1)
    found = {d: math.exp(-d * d / (2 * sigma * sigma)) for d in range(-(size // 2), size // 2 + 1)}
    return {d: weight / sum(found.values()) for d, weight in found.items()}


def blurred(grid: Grid, sigma: float | None):
    """The scores, not the queries, are blurred over the places of their queries (SEG)."""
    places = list(itertools.product(*map(range, grid)))

    def attend(q, k, v, video, mask=None):
        made = scores(q, k)
        own = made[:, :, video]
        if sigma is None:
            smooth = own.mean(dim=2, keepdim=True).expand_as(own)
        else:
            smooth = torch.zeros_like(own)
            kernels = [line(sigma, length) for length in grid]
            for row, place in enumerate(places):
                for offsets in itertools.product(*kernels):
                    there = tuple(reflected(p + d, n) for p, d, n in zip(place, offsets, grid, strict=True))
                    weight = math.prod(kernel[d] for kernel, d in zip(kernels, offsets, strict=True))
                    smooth[:, :, row] += weight * own[:, :, places.index(there)]
        made = made.clone()
        made[:, :, video] = smooth
        return torch.nan_to_num(masked(made, mask).softmax(dim=-1)) @ v

    return attend


def windowed(grid: Grid, windows: list[tuple[range, range, range]]):
    """Each token sees the tokens of its window, and all text; where it is in several windows it gets their mean."""
    places = list(itertools.product(*map(range, grid)))

    def attend(q, k, v, video, mask=None):
        out = plain(q, k, v, video, mask)
        first = video.start or 0
        total, count = torch.zeros_like(out), torch.zeros(out.shape[2], 1)
        for window in windows:
            inside = [all(p in axis for p, axis in zip(place, window, strict=True)) for place in places]
            seen = torch.ones(k.shape[2], dtype=torch.bool)
            seen[first : first + len(places)] = torch.tensor(inside)
            made = masked(scores(q, k), mask).masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v
            for row in (first + n for n, there in enumerate(inside) if there):
                total[:, :, row] += made[:, :, row]
                count[row] += 1
        return torch.where(count > 0, total / count.clamp(min=1), out)

    return attend


# -- tokens that change places, and branches that are scaled ----------------------------------------------------------


class Moved(nn.Module):
    """A block that gets its first stream moved."""

    def __init__(self, block: nn.Module, move: Callable[[Tensor], Tensor]):
        super().__init__()
        self.block = block
        self.move = move

    def forward(self, *args, **kwargs):
        if args:
            return self.block(self.move(args[0]), *args[1:], **kwargs)
        return self.block(**{**kwargs, "hidden_states": self.move(kwargs["hidden_states"])})


def moved(family: Family, model: nn.Module, i: int, move: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy in which block i gets its first stream moved."""
    edited = copy.deepcopy(model)
    name = family.block_names[i]
    edited.set_submodule(name, Moved(edited.get_submodule(name), move))
    return edited


def mixed(number: int) -> int:
    """SplitMix64's finaliser, on whole numbers below 2 ** 64."""
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % 2**64
    return number ^ (number >> 31)


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def shuffle(seed: int, layer: int) -> Callable[[Tensor], Tensor]:
    """One order for all rows: of the numbers that a generator begun by seed and layer gives."""
    start = mixed((mixed(seed) + layer) % 2**64)

    def move(x):
        numbers = [signed(mixed((start + n * 0x9E3779B97F4A7C15) % 2**64)) for n in range(1, x.shape[1] + 1)]
        return x[:, sorted(range(x.shape[1]), key=numbers.__getitem__)]

    return move


def swap(x: Tensor, ratio: float) -> Tensor:
    """Pairs of rows of `[things, features]`, the most unlike first, change places; each takes part once."""
    pairs = [(a, b) for a in range(len(x)) for b in range(a + 1, len(x))]
    pairs.sort(key=lambda pair: torch.cosine_similarity(x[pair[0]], x[pair[1]], dim=0).item())
    out, done = x.clone(), set()
    for a, b in pairs[: max(1, int(ratio * len(x)))]:
        if not {a, b} & done:
            out[a], out[b] = x[b], x[a]
            done |= {a, b}
    return out


def swap_both(x: Tensor, ratio: float = 0.1, over: str = "both") -> Tensor:
    """SSG: tokens first, then channels, row by row."""
    rows = []
    for row in x:
        row = swap(row, ratio) if over != "channels" else row
        rows.append(swap(row.T, ratio).T if over != "space" else row)
    return torch.stack(rows)


class Scaled(nn.Module):
    """A module whose result is multiplied."""

    def __init__(self, module: nn.Module, factor: float):
        super().__init__()
        self.module = module
        self.factor = factor

    def forward(self, *args, **kwargs):
        out = self.module(*args, **kwargs)
        return tuple(self.factor * each for each in out) if isinstance(out, tuple) else self.factor * out


class Mixed(nn.Module):
    """A block whose streams go part of the way from its results to what it was given."""

    def __init__(self, block: nn.Module, out: nn.Module, strength: float):
        super().__init__()
        self.block = block
        self.out = out  # the block taken out
        self.strength = strength
        # DiT reads the first block's norm, Qwen-Image 2.1 all blocks' attentions
        self.norm1, self.attn = getattr(block, "norm1", None), getattr(block, "attn", None)

    def forward(self, *args, **kwargs):
        weak, made = self.out(*args, **kwargs), self.block(*args, **kwargs)
        if isinstance(made, Tensor):
            return self.mix(made, weak)
        return tuple(self.mix(a, b) for a, b in zip(made, weak, strict=True))

    def mix(self, made, weak):
        return made if made is None or weak is None else (1 - self.strength) * made + self.strength * weak
