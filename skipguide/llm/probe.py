"""Probe: the layers of a language model without a description, found by their shape and proven by running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.arguments import Arguments, argument_names
from skipguide.errors import SkipError, UnknownBlockError
from skipguide.families.language import DecoderLayout
from skipguide.hosts.accelerate import execution_device
from skipguide.hosts.kv_cache import CACHE_NAMES, as_argument, cache_of
from skipguide.llm.passes import evaluating
from skipguide.llm.plan_data import SublayerPlanData
from skipguide.spec import Sublayer

_ATTN = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe", "feedforward")


@dataclass
class _Seen:
    """What one layer did in a pass."""

    entered: Tensor | None = None
    left: Any = None
    attn: Any = None
    mlp: Any = None
    mlp_given: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)


def probe(model: nn.Module) -> tuple[DecoderLayout, str]:
    """The layout of a causal language model that is not described, and the path of its decoder.

    The layers are the largest list of modules that each have an attention and a feed-forward of a usual name, in a
    module that takes a KV cache. A pass over eight random tokens must show that a layer without both is the identity.
    The layout that is returned is for `prove`, which runs it.

    Raises:
        UnknownBlockError: with what was looked for and not found.
    """
    who = type(model).__name__
    path, stack, layers = _find(model)
    attn, mlp = (
        next(name for name in names if isinstance(getattr(layers[0], name, None), nn.Module)) for names in (_ATTN, _MLP)
    )
    if not _takes_cache(model.get_submodule(path)):
        raise UnknownBlockError(f"{who} is not described, and its {path or 'forward'} takes no KV cache")
    seen = [_Seen() for _ in layers]
    try:
        with _watched(layers, attn, mlp, seen):
            _tokens(model)
    except Exception as error:
        raise UnknownBlockError(f"{who} is not described, and a pass over two rows failed with: {error}") from error
    if any(s.attn is None or s.mlp is None for s in seen):
        raise UnknownBlockError(f"{who} is not described, and does not call {attn} and {mlp} in each of its layers")
    parallel = _parallel(model, layers, attn, mlp, seen)
    layout = DecoderLayout(
        {who: path},
        attn=Sublayer(attn, none_outputs=_rest(seen[0].attn), shares="store_full_length_kv"),
        mlp=Sublayer(mlp, outputs=("",), none_outputs=_rest(seen[0].mlp)),
        stack=stack,
        parallel=parallel,
        between="" if parallel else _between(seen, mlp),
        none_outputs=_rest(seen[0].left),
        note="found by a probe",
    )
    with (
        _zeroed(layers, range(len(layers)), attn),
        _zeroed(layers, range(len(layers)), mlp),
        _watched(layers, attn, mlp, seen),
    ):
        _tokens(model)
    for i, s in enumerate(seen):
        if s.entered is None or not torch.equal(_first(s.left), s.entered):
            raise UnknownBlockError(
                f"{who} is not described, and layer {i} without {attn} and {mlp} is not the identity: norms after the "
                f"sum, sublayers that add the residual themselves, or several streams"
            )
    return layout, path


def prove(
    model: nn.Module,
    layout: DecoderLayout,
    layers: int,
    apply: Callable[[SublayerPlanData], AbstractContextManager[Any]],
) -> None:
    """Run a probed layout against the model whose sublayers run, but add zero; bit-equal, or it is refused.

    Args:
        model: the model.
        layout: what the probe found.
        layers: how many layers it has.
        apply: leaves a plan's sublayers out of the model inside a `with` block.

    Raises:
        UnknownBlockError: if a plain pass, or a left-padded cached one, differs.
    """
    stack: Any = model.get_submodule(".".join(filter(None, (layout.models[type(model).__name__], layout.stack))))
    middle = layers // 2
    plan = SublayerPlanData(attn=sorted({0, middle} - {layers - 1}), mlp=sorted({middle, layers - 1}))
    with _zeroed(stack, plan.attn, layout.attn.path), _zeroed(stack, plan.mlp, layout.mlp.path):
        expected = _steps(model)
    plain = _steps(model)
    try:
        with apply(plan):
            got = _steps(model)
    except UnknownBlockError:
        raise
    except Exception as error:
        raise UnknownBlockError(
            f"{type(model).__name__} is not described, and the probe failed with: {error}"
        ) from error
    if not all(map(torch.equal, expected, got)):
        raise UnknownBlockError(
            f"{type(model).__name__} is not described, and leaving sublayers out differs from sublayers that add zero"
        )
    if all(map(torch.equal, expected, plain)):
        raise UnknownBlockError(f"{type(model).__name__} is not described, and its sublayers change nothing")


def _find(model: nn.Module) -> tuple[str, str, list[nn.Module]]:
    def has(layer: nn.Module, names: tuple[str, ...]) -> bool:
        return any(isinstance(getattr(layer, name, None), nn.Module) for name in names)

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    fitting = [(name, list(m)) for name, m in lists if all(has(layer, _ATTN) and has(layer, _MLP) for layer in m)]
    if not fitting:
        found = ", ".join(f"{name} ({len(m)} x {type(m[0]).__name__})" for name, m in lists) or "none"
        raise UnknownBlockError(
            f"{type(model).__name__} is not described, and no list of its modules has layers with an attention "
            f"({', '.join(_ATTN)}) and a feed-forward ({', '.join(_MLP)}). Lists in it: {found}"
        )
    # the images of a model that reads them too go through layers of their own, often more of them
    cached = [item for item in fitting if _takes_cache(model.get_submodule(item[0].rpartition(".")[0]))]
    name, layers = max(cached or fitting, key=lambda item: len(item[1]))
    path, _, stack = name.rpartition(".")
    return path, stack, layers


def _takes_cache(decoder: nn.Module) -> bool:
    return bool(set(CACHE_NAMES) & set(argument_names(decoder)))


# -- running it -------------------------------------------------------------------------------------------------------


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; modes and random numbers are as they were afterwards."""
    with evaluating(model), torch.random.fork_rng():
        yield


def _ids(model: nn.Module, padded: int) -> dict[str, Tensor]:
    config: Any = model.config
    size = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size
    ids = torch.randint(size, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    device = execution_device(model)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _tokens(model: nn.Module) -> Tensor:
    with _still(model):
        logits: Tensor = model(**_ids(model, 0), use_cache=False)[0]
    return logits


def _steps(model: nn.Module) -> list[Tensor]:
    """Logits of a plain pass, of a left-padded one that fills a cache, and of a step on it."""
    given = _ids(model, 3)
    with _still(model):
        first = model(**given, use_cache=True)
        mask = torch.cat([given["attention_mask"], torch.ones_like(given["attention_mask"][:, :1])], 1)
        cache = as_argument(model, cache_of(first))
        step = model(input_ids=given["input_ids"][:, :1], attention_mask=mask, **cache)
    return [_tokens(model), first[0], step[0]]


@contextmanager
def _watched(layers: list[nn.Module], attn: str, mlp: str, seen: list[_Seen]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer, s in zip(layers, seen, strict=True):
            arguments = Arguments(layer)

            def enter(_: Any, args: Any, kwargs: Any, s: _Seen = s, arguments: Arguments = arguments) -> None:
                s.entered = arguments.get("hidden_states", args, kwargs)

            def leave(_: Any, args: Any, out: Any, s: _Seen = s) -> None:
                s.left = out

            def inside(
                module: nn.Module, args: Any, kwargs: Any, out: Any, s: _Seen = s, layer: nn.Module = layer
            ) -> None:
                given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
                name = next(n for n, child in layer.named_children() if child is module)
                if given is not None:
                    s.inputs[name] = given
                if name == attn:
                    s.attn = out
                elif name == mlp:
                    s.mlp, s.mlp_given = out, given

            handles = [
                layer.register_forward_pre_hook(enter, with_kwargs=True),
                layer.register_forward_hook(leave),
                *(c.register_forward_hook(inside, with_kwargs=True, prepend=True) for c in layer.children()),
            ]
            for handle in handles:
                stack.callback(handle.remove)
        yield


@contextmanager
def _zeroed(layers: Any, which: Any, path: str) -> Iterator[None]:
    """The sublayers run, and what they add is zero."""

    def zero(_: nn.Module, args: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    with ExitStack() as stack:
        for i in which:
            stack.callback(getattr(layers[i], path).register_forward_hook(zero).remove)
        yield


def _parallel(model: nn.Module, layers: list[nn.Module], attn: str, mlp: str, seen: list[_Seen]) -> bool:
    """Whether the feed-forward of the first layer is given the same when the attention adds zero."""
    before = seen[0].mlp_given
    again = [_Seen() for _ in layers]
    with _zeroed(layers, [0], attn), _watched(layers, attn, mlp, again):
        _tokens(model)
    after = again[0].mlp_given
    if before is None or after is None:
        raise SkipError(f"{type(model).__name__}: the feed-forward is called without a tensor")
    return torch.equal(before, after)


def _between(seen: list[_Seen], mlp: str) -> str:
    """The module of a layer that is given the stream between its sublayers, if there is one."""
    s = seen[0]
    assert s.entered is not None
    stream = s.entered + _first(s.attn)
    for name, given in s.inputs.items():
        if given.shape == stream.shape and torch.equal(given, stream):
            return name
    return ""


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return found


def _rest(out: Any) -> int:
    return len(out) - 1 if isinstance(out, (tuple, list)) else 0
