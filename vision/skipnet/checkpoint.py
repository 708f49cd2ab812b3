"""Published checkpoints: their keys, translated into those of `SkipNet`.

The gated networks name block i of group g `group{g}_layer{i}`, its projection `group{g}_ds{i}` (the same tensors as the
block's own `downsample`) and the gate that reads its output `group{g}_gate{i}`; a recurrent gate's shared part is
`control`. The gate after the last block decides nothing, and is left out.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.state_dicts import read_state_dict

_GROUP = re.compile(r"group(\d+)_(layer|ds|gate)(\d+)\.(.+)")
_LAYER = re.compile(r"layer(\d+)\.(\d+)\.(.+)")
_RNN = re.compile(r"control\.rnn\.(weight_ih|weight_hh|bias_ih|bias_hh)_l0")
_STEM = re.compile(r"(conv1|bn1|fc)\.")
_FF = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4}  # places in the gate's body, after the max pool of FFGate-I


def read_checkpoint(source: Any, gate: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of a `SkipNet` and its state dict, from a published checkpoint.

    Raises:
        SkipError: if it is not one.
    """
    state = read_state_dict(source)
    layers: dict[tuple[int, int], dict[str, Tensor]] = {}
    projections: dict[tuple[int, int], dict[str, Tensor]] = {}
    gates: dict[tuple[int, int], dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        if found := _GROUP.fullmatch(key):
            where = {"layer": layers, "ds": projections, "gate": gates}[found[2]]
            where.setdefault((int(found[1]), int(found[3])), {})[found[4]] = value
        elif found := _LAYER.fullmatch(key):
            layers.setdefault((int(found[1]), int(found[2])), {})[found[3]] = value
        elif _STEM.match(key):
            weights[f"backbone.{key}"] = value
        elif not key.startswith("control."):
            unknown.append(key)
    if unknown or not layers or "backbone.conv1.weight" not in weights or "backbone.fc.weight" not in weights:
        raise SkipError(
            f"expected the keys of a SkipNet checkpoint (conv1, bn1, group1_layer0 ... or layer1.0 ..., fc); got "
            f"{(unknown or sorted(state))[:5]}"
        )
    _check_projections(layers, projections)
    order = sorted(layers)
    counts = [sum(g == group for g, _ in order) for group in range(1, order[-1][0] + 1)]
    if order != [(g + 1, i) for g, count in enumerate(counts) for i in range(count)]:
        raise SkipError(f"expected blocks numbered without gaps in every group; got {order}")
    config, path = _config(layers, weights, counts)
    for g, i in order:
        prefix = f"backbone.{path.format(g=g, j=g - 1)}.{i}"
        weights |= {f"{prefix}.{name}": value for name, value in layers[g, i].items()}
    if not gates:
        return config | {"gate": gate or "rnn"}, weights
    if odd := sorted(set(order[:-1]) - set(gates) | set(gates) - set(order)):
        raise SkipError(f"expected a gate after every block; in (group, block) {odd[:5]} one lacks the other")
    kind = _gate_kind(gates[order[0]])
    if gate not in (None, kind):
        raise SkipError(f"the checkpoint has gates of kind {kind!r}; got gate={gate!r}")
    for place, spot in enumerate(order[:-1]):
        weights |= _gate_weights(kind, place, gates[spot])
    if kind == "rnn":
        weights |= _control(state)
        try:
            config |= {"embed": len(weights["gates.embed.0.bias"]), "hidden": weights["gates.rnn.weight_hh"].shape[1]}
        except (KeyError, IndexError, TypeError) as error:
            raise SkipError(f"expected the biases of the gates' embeddings and a matrix weight_hh; {error}") from error
    return config | {"gate": kind}, weights


def _check_projections(
    layers: dict[tuple[int, int], dict[str, Tensor]], projections: dict[tuple[int, int], dict[str, Tensor]]
) -> None:
    """The two copies of a projection are one module in training: copies that differ mean a damaged file."""
    for where, values in projections.items():
        block = layers.get(where, {})
        for name, value in values.items():
            twin = block.setdefault(f"downsample.{name}", value)
            if twin.shape != value.shape or not torch.equal(twin, value):
                g, i = where
                raise SkipError(f"group{g}_ds{i}.{name} differs from the same projection inside group{g}_layer{i}")


def _config(
    layers: dict[tuple[int, int], dict[str, Tensor]], weights: dict[str, Tensor], counts: list[int]
) -> tuple[dict[str, Any], str]:
    """Arguments for the backbone, and where its groups are."""
    stem, head = weights["backbone.conv1.weight"], weights["backbone.fc.weight"]
    if stem.ndim != 4 or head.ndim != 2:
        raise SkipError(
            f"expected conv1.weight with four sides and fc.weight with two; got {list(stem.shape)}, {list(head.shape)}"
        )
    classes = len(head)
    if stem.shape[-1] == 3:
        try:
            widths = [layers[g + 1, 0]["conv2.weight"].shape[0] for g in range(len(counts))]
        except (KeyError, IndexError) as error:
            raise SkipError(f"the first block of a group has no conv2.weight with sides: {error}") from error
        backbone = {"blocks": counts, "widths": widths, "num_classes": classes, "in_channels": stem.shape[1]}
        return {"backbone": backbone}, "groups.{j}"
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    block = Bottleneck if "conv3.weight" in layers[1, 0] else BasicBlock
    if len(counts) != 4 or stem.shape[-1] != 7:
        raise SkipError(f"expected a 3x3 stem (CIFAR), or a 7x7 stem and 4 groups; got {list(stem.shape)}, {counts}")
    named: dict[tuple[int, ...], str] = {
        (2, 2, 2, 2): "resnet18",
        (3, 4, 6, 3): "resnet50" if block is Bottleneck else "resnet34",
    }
    named |= {(3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
    if (name := named.get(tuple(counts))) and (block is Bottleneck) == (name not in ("resnet18", "resnet34")):
        return {"backbone": f"imagenet_{name}", "num_classes": classes}, "layer{g}"
    return {"backbone": ResNet(block, counts, num_classes=classes)}, "layer{g}"


def _gate_kind(gate: dict[str, Tensor]) -> str:
    if "conv2.weight" in gate:
        return "ff1"
    if "conv1.weight" in gate:
        return "ff2"
    if "1.weight" in gate:
        return "rnn"
    raise SkipError(f"expected the keys of FFGate-I, FFGate-II or a recurrent gate's embedding; got {sorted(gate)[:5]}")


def _gate_weights(kind: str, place: int, gate: dict[str, Tensor]) -> dict[str, Tensor]:
    if kind == "rnn":
        found = {name.removeprefix("1."): value for name, value in gate.items()}
        return {f"gates.embed.{place}.{name}": v.flatten(1) if v.ndim == 4 else v for name, v in found.items()}
    out = {}
    for name, value in gate.items():
        layer, _, leaf = name.partition(".")
        if layer == "linear_layer":
            out[f"gates.gates.{place}.head.{leaf}"] = value.flatten(1) if value.ndim == 4 else value
        elif layer in _FF:
            out[f"gates.gates.{place}.body.{_FF[layer] + (kind == 'ff1')}.{leaf}"] = value
        else:
            raise SkipError(f"unknown key {name!r} in a gate; expected conv1, bn1, conv2, bn2, linear_layer")
    return out


def _control(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        if found := _RNN.fullmatch(key):
            out[f"gates.rnn.{found[1]}"] = value
        elif key.startswith("control.proj."):
            out[f"gates.proj.{key.rpartition('.')[2]}"] = value.flatten(1) if value.ndim == 4 else value
    if len(out) != 6:
        raise SkipError(
            f"expected control.rnn.*_l0 and control.proj.*; got {[k for k in state if k.startswith('control.')][:7]}"
        )
    return out
