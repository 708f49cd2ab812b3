"""Sublayer map: the attention and feed-forward of every layer of a causal language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from skipguide.blocks import Block, BlockMap
from skipguide.errors import SkipError
from skipguide.families.language import DECODER_LAYOUTS, DecoderLayout, submodule
from skipguide.shown import Row, Shown
from skipguide.spec import Sublayer, renamed, renamed_reader

Part = Literal["attn", "mlp"]
PARTS: tuple[Part, Part] = ("attn", "mlp")


@renamed(serves="helper_modules")
@dataclass(frozen=True, eq=False, repr=False)
class SublayerSite(Shown):
    """One sublayer of one layer.

    Attributes:
        layer: number of its layer.
        part: `"attn"` or `"mlp"`.
        name: dotted name in the model.
        module: the module whose output is added to the residual stream.
        spec: its description.
        helper_modules: the norms (and the like) that work for it alone.
        cache_index: its layer in a KV cache.
    """

    layer: int
    part: Part
    name: str
    module: nn.Module
    spec: Sublayer
    helper_modules: tuple[nn.Module, ...]
    cache_index: int

    def _heading(self) -> str:
        return f"SublayerSite: {self.part} of layer {self.layer}, {self.name} ({type(self.module).__name__})"


class SublayerMap(Shown):
    """The sublayers of a causal language model, layer by layer.

    Attributes:
        model: the model inside its wrappers.
        decoder: the module that runs the layers.
        blocks: the layers as blocks of the core.
        layers: the layers.
        family: class of the layers.
        layout: their description.
        none_outputs: how many outputs of a layer follow the hidden states.
        producers: layers whose attention makes keys and values that later layers read too.
    """

    def __init__(self, model: nn.Module, layout: DecoderLayout, path: str, blocks: BlockMap) -> None:
        self.model = model
        self.layout = layout
        decoder = submodule(model, path)
        assert decoder is not None
        self.decoder = decoder
        self.blocks = blocks
        self.none_outputs = blocks[0].spec.none_outputs
        self.layers: tuple[nn.Module, ...] = tuple(block.module for block in blocks)
        self.family = type(self.layers[0]).__name__
        self._sites = {(block.index, part): _site(block, part) for block in blocks for part in PARTS}
        self.producers = _producers(self)

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    nothings = renamed_reader("nothings", "none_outputs")

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def parallel(self) -> bool:
        """Whether attention and feed-forward of a layer both read the layer's input."""
        return self.layout.parallel

    @property
    def scalable(self) -> bool:
        """Whether `h * scale` can stand for a single sublayer: layers that add one sublayer after the other."""
        return self.layout.prenorm and not self.layout.parallel

    @property
    def watchable(self) -> bool:
        """Whether there is a single residual stream between the sublayers, to be measured."""
        return bool(self.layout.between or self.parallel)

    def site(self, layer: int, part: Part) -> SublayerSite:
        """One sublayer.

        Raises:
            SkipError: for a layer that is out of range, or without that part.
        """
        if not 0 <= layer < self.num_layers:
            raise SkipError(
                f"{part} of layer {layer} is out of range: {type(self.model).__name__} has {self.num_layers} layers, "
                f"0 to {self.num_layers - 1}"
            )
        if (found := self._sites[layer, part]) is None:
            raise SkipError(f"layer {layer} of {type(self.model).__name__} has no {part}")
        return found

    def attn(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        return self.site(layer, "attn").module

    def mlp(self, layer: int) -> nn.Module:
        """The feed-forward module of a layer."""
        return self.site(layer, "mlp").module

    def name(self, layer: int, part: Part) -> str:
        """The dotted name of a sublayer, as in the statistics."""
        return self.site(layer, part).name

    @property
    def sites(self) -> tuple[SublayerSite, ...]:
        """All sublayers in execution order."""
        return tuple(site for site in self._sites.values() if site is not None)

    def _heading(self) -> str:
        form = "parallel" if self.parallel else "serial"
        return f"{type(self.model).__name__}: {self.num_layers} x {self.family}, {form}" + (
            "" if self.scalable else ", no scale per sublayer"
        )

    def _rows(self) -> list[Row]:
        kinds: dict[tuple[str, ...], list[int]] = {}
        for i in range(self.num_layers):
            sites = [self._sites[i, part] for part in PARTS]
            kinds.setdefault(tuple(type(site.module).__name__ if site else "-" for site in sites), []).append(i)
        return [("layers", *PARTS), *((layers, *kind) for kind, layers in kinds.items())]

    def describe(self) -> str:
        """A table of the sublayers: layer, attention, feed-forward."""
        rows = [("layer", "attn", "mlp")]
        for i in range(self.num_layers):
            found = [self._sites[i, part] for part in PARTS]
            names = [f"{s.name} ({type(s.module).__name__})" if s else "-" for s in found]
            rows.append((str(i), names[0] + (" shares its keys" if i in self.producers else ""), names[1]))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join([self._heading(), *(f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in rows)])


def _site(block: Block, part: Part) -> SublayerSite | None:
    sublayers = block.sublayers(part)
    if not sublayers:
        return None
    name, module, spec = sublayers[0]
    index: Any = getattr(module, "layer_idx", None)
    helpers = tuple(module for _, module in block.helper_modules(part))
    return SublayerSite(block.index, part, name, module, spec, helpers, block.index if index is None else int(index))


def _producers(found: SublayerMap) -> frozenset[int]:
    """Layers whose keys and values are read by later layers too (Gemma 3n)."""
    attention = (site for site in found.sites if site.spec.shares)
    return frozenset(site.layer for site in attention if getattr(site.module, site.spec.shares, False))


def families_table() -> str:
    """The families that are described (and tested), as a table in Markdown, for llm/README.md.

    Example:
        >>> families_table().splitlines()[2].startswith("| Llama, Mistral, Qwen2, Qwen3")
        True
    """
    lines = ["| models | layers | scale per sublayer | remarks |", "|---|---|---|---|"]
    for layout in DECODER_LAYOUTS:
        heads = [name for name in layout.models if name.endswith(("ForCausalLM", "LMHeadModel"))]
        names = ", ".join(name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for name in heads)
        if layout.when:
            names += f" ({', '.join(f'`{name}={value}`' for name, value in layout.when)})"
        elif any(other is not layout and set(heads) & set(other.models) for other in DECODER_LAYOUTS):
            names += " (otherwise)"
        form = "parallel" if layout.parallel else "serial"
        scale = "yes" if layout.prenorm and not layout.parallel else "no"
        lines.append(f"| {names} | {form} | {scale} | {layout.note} |")
    return "\n".join(lines)
