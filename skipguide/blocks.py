"""Find: a model's residual blocks in execution order, their sublayers, and how streams enter and leave."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from skipguide.errors import SkipError, UnknownBlockError
from skipguide.families.described import FAMILIES
from skipguide.families.language import language_model_spec
from skipguide.families.refused import UNSUPPORTED_MODELS
from skipguide.hosts.wrappers import unwrap
from skipguide.parts import PART_SPECS, PARTS
from skipguide.shown import Row, Shown
from skipguide.spec import BlockSpec, ModelSpec, Sublayer, renamed_reader


@dataclass(frozen=True, eq=False)
class Block:
    """One residual block of a model: where it is, what it is, and how to talk to it."""

    index: int
    name: str
    stack: str
    module: nn.Module
    spec: BlockSpec
    model_spec: ModelSpec | None = None

    @property
    def shortcut(self) -> nn.Module | None:
        """The module on the block's skip path; None is the identity."""
        found = getattr(self.module, self.spec.shortcut, None) if self.spec.shortcut else None
        return None if found is None or isinstance(found, nn.Identity) else found

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts of this block that a plan may leave out."""
        return tuple(part for part in PARTS if not self.lacks(part))

    def lacks(self, part: str) -> str:
        """Why this block does not have a part, in words; empty if it does."""
        if part not in PART_SPECS:
            return f"expected one of {', '.join(PARTS)}"
        words = self.spec.lacks(part) if self.model_spec is None else self.model_spec.lacks(self.spec, part)
        if words or not PART_SPECS[part].sublayers:
            return words
        found = self.sublayers(part)
        if "map" in PART_SPECS[part].needs and any(_is_cross(module) for _, module, _ in found):
            return "its attention is to the text alone, and has no map of the image's tokens"
        return "" if found else "it has no such sublayer"

    def sublayers(self, part: str) -> list[tuple[str, nn.Module, Sublayer]]:
        """Name, module and description of the sublayers that `part` names and this block has."""
        found = [(sublayer, self.submodule(sublayer.path)) for sublayer in self.spec.sublayers(part)]
        return [(f"{self.name}.{s.path}", module, s) for s, module in found if module is not None]

    def helper_modules(self, part: str) -> list[tuple[str, nn.Module]]:
        """Name and module of what works for the sublayers of `part` alone."""
        paths = [path for _, _, sublayer in self.sublayers(part) for path in sublayer.helper_modules]
        found = [(f"{self.name}.{path}", self.submodule(path)) for path in paths]
        return [(name, module) for name, module in found if module is not None]

    servants = renamed_reader("servants", "helper_modules")

    def submodule(self, path: str) -> nn.Module | None:
        """The module at a path from the block, or None."""
        module: Any = self.module
        for step in path.split("."):
            module = getattr(module, step, None)
        return module if isinstance(module, nn.Module) else None


class BlockMap(Shown):
    """A model's residual blocks in execution order, over all its stacks."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self.model = model
        self.spec = spec
        found = [(j, *each) for j, block_spec in enumerate(spec.stacks) for each in _stack(model, block_spec)]
        if not found:
            raise UnknownBlockError(
                f"{type(model).__name__} is described with the stacks {', '.join(each.stack for each in spec.stacks)}, "
                f"of which this instance has none; it has {_candidates(model)}"
            )
        if spec.interleaved:
            found.sort(key=lambda block: (block[1], block[2], block[0]))
        elif spec.nested:
            found.sort(key=lambda block: (block[1], block[0], block[2]))
        self.blocks = tuple(
            Block(n, name, spec.stacks[j].name or spec.stacks[j].stack, module, spec.stacks[j], spec)
            for n, (j, _, _, name, module) in enumerate(found)
        )

    def done_before(self, block: Block) -> dict[str, nn.Module]:
        """Name and module of the stages, and of what is in the block's own stage, that are over when it begins.

        None of them lies in another of them. Empty where the model's description names no stages.
        """
        done: dict[str, nn.Module] = {}
        for _, stage, module in _places(self.model, self.spec.stages) if self.spec.stages else ():
            if not block.name.startswith(f"{stage}."):
                done[stage] = module
                continue
            lists = [getattr(module, name, None) or () for name in self.spec.turns]
            for number in range(max(map(len, lists), default=0)):
                for name, each in zip(self.spec.turns, lists, strict=True):
                    member = f"{stage}.{name}.{number}"
                    if block.name == member or block.name.startswith(f"{member}."):
                        return done
                    if number < len(each):
                        done[member] = each[number]
        return {}

    def _heading(self) -> str:
        return f"BlockMap of {type(self.model).__name__}: {len(self)} blocks"

    def _rows(self) -> list[Row]:
        kinds: dict[tuple[str, str, tuple[str, ...]], list[int]] = {}
        for block in self.blocks:
            kinds.setdefault((block.stack, type(block.module).__name__, block.parts), []).append(block.index)
        return [("layers", "stack", "class", "parts"), *((layers, *kind) for kind, layers in kinds.items())]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Block:
        return self.blocks[index]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def select(self, layers: Sequence[int], part: str = "block", stack: str | None = None) -> list[Block]:
        """The blocks that `layers` name, each checked to exist and to have `part`.

        Raises:
            SkipError: for a stack, a layer or a part that this model does not have.
        """
        pool = self.blocks if stack is None else tuple(b for b in self.blocks if b.stack == stack)
        where = type(self.model).__name__ + (f".{stack}" if stack else "")
        if not pool:
            names = ", ".join(dict.fromkeys(b.stack for b in self.blocks))
            raise SkipError(f"{type(self.model).__name__} has no stack {stack!r}; its stacks are {names}")
        for layer in layers:
            if not 0 <= layer < len(pool):
                raise SkipError(f"layer {layer} is out of range: {where} has {len(pool)} blocks, 0 to {len(pool) - 1}")
            if part not in pool[layer].parts:
                raise SkipError(
                    f"block {layer} of {where} ({pool[layer].name}) has no part {part!r}: "
                    f"{pool[layer].lacks(part)}. It has {', '.join(pool[layer].parts)}"
                )
        return [pool[layer] for layer in layers]

    def named(self, *names: str) -> tuple[int, ...]:
        """The numbers of the blocks that names stand for, such as diffusers' `pag_applied_layers`.

        Args:
            *names: parts of module paths, or regular expressions that are searched in them: `"mid"`,
                `"up_blocks.1"`, `"down_blocks.(1|2).attentions.0"`. A number ends where its digits do.

        Returns:
            Layers, in execution order, each once.

        Raises:
            SkipError: for a name that stands for no block, with the paths there are.

        Example:
            >>> from diffusers import LTXVideoTransformer3DModel
            >>> model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=12, num_attention_heads=2,
            ...     attention_head_dim=8, cross_attention_dim=16, caption_channels=8)
            >>> find_blocks(model).named("blocks.1", "blocks.10")
            (1, 10)
        """
        found: set[int] = set()
        for name in names:
            try:
                pattern = re.compile(rf"(?:{name})(?![0-9])")
            except (re.error, TypeError):
                raise SkipError(f"expected the path of a module, or a regular expression; got {name!r}") from None
            layers = {block.index for block in self.blocks if pattern.search(block.name)}
            if not layers:
                paths = ", ".join(block.name for block in self.blocks)
                raise SkipError(f"{type(self.model).__name__} has no block named {name!r}; its blocks are {paths}")
            found |= layers
        return tuple(sorted(found))

    def describe(self) -> str:
        """A table of the blocks: number, name, class, parts."""
        rows = [(str(b.index), b.name, type(b.module).__name__, ", ".join(b.parts)) for b in self.blocks]
        head = ("layer", "name", "class", "parts")
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in [head, *rows]
        ]
        return "\n".join([f"{type(self.model).__name__}: {len(self)} blocks", *lines])


def _is_cross(attention: nn.Module) -> bool:
    """Whether an attention of diffusers has the text's keys in this instance (`only_cross_attention`)."""
    return bool(getattr(attention, "is_cross_attention", False))


Place = tuple[int, ...]  # which of a stack's paths, then which child each star of it stands for


def _stack(model: nn.Module, spec: BlockSpec) -> list[tuple[Place, int, str, nn.Module]]:
    """The stack's residual blocks: where their list is, their number in it, their name and module."""
    found = _places(model, spec.stack)
    blocks = [
        (place, n, f"{name}.{child}", module)
        for place, name, parent in found
        for n, (child, module) in enumerate(parent._modules.items())  # named_children lists a shared block once
        if module is not None
    ]
    if spec.classes:
        blocks = [block for block in blocks if type(block[-1]).__name__ in spec.classes]
    if spec.residual:
        blocks = [block for block in blocks if getattr(block[-1], spec.residual, None)]
    if not blocks and not spec.optional:
        raise UnknownBlockError(
            f"{type(model).__name__} is described with a stack {spec.stack!r}, which this instance does not have; "
            f"it has {_candidates(model)}"
        )
    return blocks


def _places(model: nn.Module, paths: str) -> list[tuple[Place, str, nn.Module]]:
    """The modules at some paths: which path and which child each star of it stands for, name and module."""
    found: list[tuple[Place, str, nn.Module]] = []
    for number, path in enumerate(paths.split("|")):
        here: list[tuple[Place, str, nn.Module]] = [((number,), "", model)]
        for step in path.split("."):
            here = [
                ((*place, n) if step == "*" else place, f"{name}.{child}".lstrip("."), module)
                for place, name, parent in here
                for n, (child, module) in enumerate(
                    parent._modules.items() if step == "*" else [(step, getattr(parent, step, None))]
                )
                if isinstance(module, nn.Module)
            ]
        found += here
    return found


def _candidates(model: nn.Module) -> str:
    lists = [
        f"{name} ({len(module)} x {type(module[0]).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    return ", ".join(lists) or "no ModuleList of blocks"


_REGISTERED: dict[str, ModelSpec] = {}
_GROUP = "skipguide.blocks"


def register_blocks(model_class: type[nn.Module] | str, spec: ModelSpec | BlockSpec | Sequence[BlockSpec]) -> None:
    """Describe the blocks of a model class of your own, or of a third party.

    A package can also name a function in the entry-point group `skipguide.blocks`; it is called with no arguments
    when a model is not known, and registers what it knows.

    Args:
        model_class: the class, or its name; subclasses are covered.
        spec: one stack, several in execution order, or a whole `ModelSpec`.

    Raises:
        SkipError: if `spec` is nothing of the kind, or `model_class` no class (of a model: `type(model)`).
    """
    stacks: Any = (spec,) if isinstance(spec, BlockSpec) else spec.stacks if isinstance(spec, ModelSpec) else spec
    if not isinstance(stacks, (tuple, list)) or not stacks or not all(isinstance(s, BlockSpec) for s in stacks):
        raise SkipError(f"register_blocks expects a BlockSpec, several, or a ModelSpec; got {spec!r}")
    if not isinstance(model_class, (type, str)):
        raise SkipError(f"register_blocks expects a class or its name; got a {type(model_class).__name__}")
    if not isinstance(spec, ModelSpec):
        spec = ModelSpec(tuple(stacks))
    _REGISTERED[model_class if isinstance(model_class, str) else model_class.__name__] = spec


def find_blocks(model: nn.Module) -> BlockMap:
    """List a model's residual blocks in execution order.

    Args:
        model: a model of a known family, or one described with `register_blocks`; wrappers are looked through.

    Returns:
        The `BlockMap`: `len(m)`, `m[i].name`, `m[i].parts`, `m.describe()`.

    Raises:
        UnknownBlockError: if the model's class is not described, with the lists of blocks that were seen.

    Example:
        >>> from diffusers import LTXVideoTransformer3DModel
        >>> model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        ...     attention_head_dim=8, cross_attention_dim=16, caption_channels=8)
        >>> find_blocks(model)[1].name
        'transformer_blocks.1'
    """
    if not isinstance(model, nn.Module):
        raise SkipError(f"expected a torch.nn.Module (of a pipeline: pipe.transformer); got {type(model).__name__}")
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise SkipError(
            "nn.DataParallel makes replicas of the model at each call, which no plan reaches: use "
            "DistributedDataParallel, or pass one model per device"
        )
    model = unwrap(model)
    if (spec := _lookup(model)) is None:
        for entry in entry_points(group=_GROUP):
            entry.load()()
        spec = _lookup(model)
    if spec is None:
        raise UnknownBlockError(
            f"the blocks of {type(model).__name__} are not described{_reason(model)}. Lists of blocks in it: "
            f"{_candidates(model)}. "
            f"Describe them with skipguide.register_blocks({type(model).__name__}, BlockSpec(stack=...)) and run "
            f"skipguide.check(model) on it."
        )
    return BlockMap(model, spec)


def _reason(model: nn.Module) -> str:
    """Why a model of a known library has no description, if that is known."""
    known = (UNSUPPORTED_MODELS.get(cls.__name__) for cls in type(model).__mro__)
    return next((f" ({reason})" for reason in known if reason is not None), "")


def _lookup(model: nn.Module) -> ModelSpec | None:
    for cls in type(model).__mro__:
        # two libraries have a RegNet: theirs are found by "timm.RegNet" first
        for name in (f"{cls.__module__.partition('.')[0]}.{cls.__name__}", cls.__name__):
            if (spec := _REGISTERED.get(name) or FAMILIES.get(name)) is not None:
                return spec
    return language_model_spec(model)
