"""Spec: what a model's residual blocks are called and how they are used, as pure data."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from skipguide.parts import NEEDS, PART_SPECS
from skipguide.shown import brief

C = TypeVar("C", bound=type)


def renamed_reader(old: str, new: str) -> property:
    """A property that reads what was renamed, with a FutureWarning."""

    def read(self: Any) -> Any:
        _warn(old, new)
        return getattr(self, new)

    return property(read, doc=f"The old name of `{new}`.")


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now called {new}", FutureWarning, stacklevel=3)


def renamed(**names: str) -> Callable[[C], C]:
    """A decorator for data classes whose fields were renamed: the old names still work, with a FutureWarning.

    Args:
        **names: old name -> new name.
    """

    def decorate(cls: C) -> C:
        original: Any = cls.__dict__["__init__"]

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in [name for name in names if name in kwargs]:
                _warn(old, names[old])
                kwargs[names[old]] = kwargs.pop(old)
            original(self, *args, **kwargs)

        setattr(cls, "__init__", init)  # noqa: B010  (a type checker refuses the assignment)
        for old in names:
            setattr(cls, old, renamed_reader(old, names[old]))
        return cls

    return decorate


@renamed(nothings="none_outputs", serves="helper_modules")
@dataclass(frozen=True, repr=False)
class Sublayer:
    """One residual branch inside a block.

    Args:
        path: attribute path from the block, such as `"attn1"`.
        outputs: arguments of the sublayer whose shapes its outputs have, in output order; an argument that is not
            given in a call has no output; an empty name is the first argument. One output is a tensor, several are
            a tuple.
        width: attribute of the sublayer that holds the size of the output's last dimension, where that differs
            from the input's (`"out_features"` of a Linear).
        none_outputs: how many outputs follow that are None when nothing was computed (attention weights).
        inside: the sublayer adds the residual itself: without it, it returns the argument named in `outputs`.
        helper_modules: modules of the block (paths from it) that work for this sublayer alone, such as the norm before
            it; they return what they are given while it is left out. Those that an instance lacks are passed over.
        shares: attribute of the sublayer that is true where later blocks read what it computes (shared keys): such a
            sublayer cannot be left out.
        calls: how often the block runs it in one pass (a feed-forward that image and text share, one after the other).
        scaled_at: modules of the block (paths from it) whose outputs are this branch's contribution up to a factor,
            where the sublayer's own output is not: a norm or an activation follows. Those that an instance lacks are
            passed over.
        image: whether it sees the image's tokens (and not a sound's).
    """

    __repr__ = brief

    path: str
    outputs: tuple[str, ...] = ("hidden_states",)
    width: str | None = None
    none_outputs: int = 0
    inside: bool = False
    helper_modules: tuple[str, ...] = ()
    shares: str = ""
    calls: int = 1
    scaled_at: tuple[str, ...] = ()
    image: bool = True


Axes = Literal["thw", "hw", "t"]
Layout = Literal["bcfhw", "bfchw", "bfhwc", "bchw", "sizes", "places", "shapes"]


@dataclass(frozen=True, repr=False)
class TokenGrid:
    """How a model's call says where the tokens of its first stream lie: frames, height and width, in that order.

    Args:
        layout: how the argument's dimensions lie (`"bcfhw"`, …), so that the grid is its size over the patch size; or
            `"sizes"` (the call has `num_frames`, `height` and `width`), `"places"` (`[tokens, 3]`, frame, row and
            column of each token), `"shapes"` (per row a list of one triple).
        argument: which argument.
        patch: fields of the config that hold the patch size, of the frames and of a frame; one field may hold all
            three, or two. Empty where no patches are made. A field that a model lacks is 1.
        frames: whether there can be more than one.
        halved: whether the model halves height and width on its way down (a UNet): blocks have fewer tokens.
    """

    __repr__ = brief

    layout: Layout
    argument: str = "hidden_states"
    patch: tuple[str, ...] = ("patch_size_t", "patch_size")
    frames: bool = True
    halved: bool = False


Joint = Literal["", "video_first", "text_first"]


@renamed(nothings="none_outputs")
@dataclass(frozen=True, repr=False)
class BlockSpec:
    """One stack of residual blocks, as data.

    Args:
        stack: dotted path of the `ModuleList` (or of any module whose children are the blocks, in order); `*` stands
            for every child, `"stages.*.blocks"`, and `|` is between paths, in execution order.
        streams: the block's arguments that carry state (positional or keyword), such as
            `("hidden_states", "encoder_hidden_states")`.
        returns: the streams in output order, `()` for the same order; one is a tensor, several are a tuple.
        attn: self-attention (joint attention where text and video share one).
        cross_attn: attention to the text.
        mlp: feed-forward, of every stream that has one.
        joint: order of the tokens inside joint attention; empty if self-attention sees one stream.
        shared: the block's arguments that have no batch dimension, such as rotary tables.
        shortcut: attribute of the block that holds the module on its skip path (a projection, where the shape
            changes); a block whose attribute is None or missing has the identity there.
        residual: attribute that must be true for a module of the stack to be a residual block at all, such as
            `"use_res_connect"`; the others are not listed.
        classes: class names of the stack's residual blocks, where it holds other modules too.
        none_outputs: how many outputs follow the streams that are None when nothing was computed.
        identity: whether `"attn_identity"` is a part of these blocks.
        cached: whether their attention keeps keys and values in a cache of transformers.
        adds: arguments that are shaped like what the block returns before its streams, for the model to add to
            another stream (the hints of control blocks): a block that is left out adds zeros.
        kept: whether the model reads what these blocks return later than in the next block (hints, a text that all
            blocks of the next stack see, long skip connections): a pass that resumes behind them gets it again.
        padded: whether the stream is padded, at its end, to the longest row of the batch: a pass for fewer rows may be
            shorter than the one it resumes from.
        name: what the stack is called, where its path is no good name.
        folded: the block's arguments that fold more into the batch than its first one does.
        followed: the block's arguments that have one row more than the batch, the last, which goes with any rows.
        image: whether the tokens of the first stream are the image's (or video's) alone, `[B, tokens, channels]`.
        axes: along what the tokens of one row lie: time, height and width, or some of them (the others are folded into
            the batch).
        why: why these blocks have no attention map, or no tokens of the image alone, for errors.
        optional: whether instances of the model may lack this stack, as long as they have one.
    """

    __repr__ = brief

    stack: str
    streams: tuple[str, ...] = ("hidden_states",)
    returns: tuple[str, ...] = ()
    attn: tuple[Sublayer, ...] = ()
    cross_attn: tuple[Sublayer, ...] = ()
    mlp: tuple[Sublayer, ...] = ()
    joint: Joint = ""
    shared: tuple[str, ...] = ()
    shortcut: str = ""
    residual: str = ""
    classes: tuple[str, ...] = ()
    none_outputs: int = 0
    identity: bool = True
    cached: bool = False
    adds: tuple[str, ...] = ()
    kept: bool = False
    padded: bool = False
    name: str = ""
    folded: tuple[str, ...] = ()
    image: bool = True
    axes: Axes = "thw"
    why: str = ""
    optional: bool = False
    followed: tuple[str, ...] = ()

    def sublayers(self, part: str) -> tuple[Sublayer, ...]:
        """The sublayers that a part consists of; none for `"block"`, and for something that is no part."""
        kinds = PART_SPECS[part].sublayers if part in PART_SPECS else ()
        return tuple(sublayer for kind in kinds for sublayer in getattr(self, kind))

    def lacks(self, part: str) -> str:
        """Why blocks of this stack cannot have a part, whatever the model is; empty if they can."""
        wanted = PART_SPECS[part]
        if wanted.sublayers and not self.sublayers(part):
            return f"it has no {' or '.join(wanted.sublayers)}"
        there = {"map": self.identity, "image": self.image, "time": "t" in self.axes, "space": "w" in self.axes}
        missing = next((need for need in wanted.needs if not there.get(need, True)), None)
        return "" if missing is None else (self.why if missing in ("map", "image") and self.why else NEEDS[missing])

    def has(self, part: str) -> bool:
        """Whether blocks of this stack can have a part: the sublayers it consists of, and what else it needs."""
        return not self.lacks(part)


@dataclass(frozen=True, repr=False)
class ModelSpec:
    """All stacks of one model class, in execution order.

    Args:
        stacks: one `BlockSpec` per stack.
        interleaved: True if block 0 of every stack runs before block 1 of any (Latte's spatial and temporal pairs);
            with paths of several stars, at each place that they stand for.
        nested: True if at each place that the stars stand for all stacks run, one after the other (AnimateDiff's
            motion modules behind the spatial ones).
        shared: the model's arguments that have no batch dimension.
        listed: the model's arguments that are lists with one entry per row of the batch; its prediction is one too.
        folded: the model's arguments that fold more into the batch (a text per frame).
        layered: the model's arguments whose second dimension is the batch (a text per layer).
        cache: the model's argument with keys and values of its first call (`kv_cache_mode` says whether they are kept
            or read), of which each pass has its own.
        grid: how a call says where the tokens of the first stream lie; None where that is not known.
        stages: paths of the modules in which blocks and what runs between them lie (a UNet's way down, middle and way
            up), as in `BlockSpec.stack`; each child of the last star is one. A pass that resumes does not run those
            before it.
        turns: lists in a stage whose members run by turns: the first of each, then the second of each.
        consumed: the model's arguments that are lists which it empties, maybe adding what it takes to what a module
            gave: every pass gets a list of its own, and copies of such results where another pass left them.
    """

    __repr__ = brief

    stacks: tuple[BlockSpec, ...]
    interleaved: bool = False
    shared: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    nested: bool = False
    folded: tuple[str, ...] = ()
    layered: tuple[str, ...] = ()
    grid: TokenGrid | None = None
    stages: str = ""
    turns: tuple[str, ...] = ()
    consumed: tuple[str, ...] = ()
    cache: str = ""

    def lacks(self, stack: BlockSpec, part: str) -> str:
        """Why blocks of one of its stacks cannot have a part; empty if they can."""
        if words := stack.lacks(part):
            return words
        needs = PART_SPECS[part].needs
        if self.grid is None and {"grid", "image"} & set(needs):
            return NEEDS["grid"]
        return "it makes pictures of one frame" if "time" in needs and self.flat else ""

    @property
    def flat(self) -> bool:
        """Whether the model makes pictures, with no frames to tell apart."""
        return self.grid is not None and not self.grid.frames
