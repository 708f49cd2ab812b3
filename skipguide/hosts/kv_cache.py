"""KV caches of language models in which the layers of left-out attention hold nothing.

A transformers cache asks its first attention layer how long it is: if that one is left out, every later step would
be told the length 0, without an error. So a left-out layer is replaced in the cache by a layer that holds nothing and
is passed over, and its memory is freed. Nothing here imports transformers before a cache of it is given.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from skipguide.arguments import Arguments, argument_names
from skipguide.errors import SkipError

# What transformers calls a cache, in arguments and in outputs: `cache` since 5.24, `past_key_values` before. In both,
# some attentions say `layer_past`.
CACHE_NAMES = ("cache", "past_key_values", "layer_past")


def cache_argument(taker: nn.Module | Callable[..., Any]) -> str:
    """What a model, or a function or class of transformers, calls the cache that it is given.

    Args:
        taker: of a module whose forward does not say (wrappers hand everything on), the modules in it are asked.

    Raises:
        SkipError: if it takes none.
    """
    signatures: Iterable[Collection[str]]
    if isinstance(taker, nn.Module):
        who, signatures = type(taker).__name__, map(argument_names, taker.modules())
    else:
        who, signatures = taker.__name__, (inspect.signature(taker).parameters,)
    for names in signatures:
        if found := [name for name in CACHE_NAMES if name in names]:
            return found[0]
    raise SkipError(f"expected something that takes a KV cache ({', '.join(CACHE_NAMES)}); got {who}, which does not")


def as_argument(taker: nn.Module | Callable[..., Any], cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument that `taker` wants it as: `model(ids, **as_argument(model, cache))`."""
    return {cache_argument(taker): cache}


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def given_cache(arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The KV cache that a call is given, by whichever name, or None."""
    for name in CACHE_NAMES:
        if (found := arguments.get(name, args, kwargs)) is not None:
            return found
    return None


def cache_of(output: Any) -> Any:
    """The cache that a pass has returned, or None."""
    # transformers logs a warning where the old name is asked for
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)


def check_kind(cache: Any) -> None:
    """Refuse caches that are no list of layers.

    Raises:
        SkipError: for encoder-decoder caches and whatever is not a transformers `Cache`.
    """
    if not isinstance(getattr(cache, "layers", None), list) or hasattr(cache, "self_attention_cache"):
        raise SkipError(
            f"expected a transformers Cache with one list of layers (DynamicCache, StaticCache, ...); got "
            f"{type(cache).__name__}"
        )


def length(cache: Any) -> int:
    """Tokens in a cache. A static cache on a GPU is waited for."""
    return int(cache.get_seq_length())


def empty(cache: Any, *, wait: bool = True) -> bool:
    """Whether a cache holds no token. A static cache on a GPU is waited for; without `wait` it counts as filled."""
    found = cache.get_seq_length()
    if not wait and isinstance(found, Tensor) and found.device.type != "cpu":
        return False
    return int(found) == 0


def grow(cache: Any, layers: int) -> None:
    """Make the layers of a cache that adds them at their first use."""
    if (make := getattr(cache, "layer_class_to_replicate", None)) is not None:
        while len(cache.layers) < layers:
            cache.layers.append(make())


# where cache layers keep keys and values: as they are, and quantised
_HELD = ("keys", "values", "_quantized_keys", "_quantized_values")


def layer_bytes(layer: Any) -> int:
    """Bytes of the keys and values that a cache layer holds, quantised ones with their scales; 0 for none."""
    held = layer.__dict__
    keys, values = held.get("keys"), held.get("values")
    if type(keys) is type(values) is Tensor and held.keys().isdisjoint(_HELD[2:]):
        return keys.nbytes + values.nbytes  # what every decoded token asks for
    return sum(_bytes(getattr(layer, name, None)) for name in _HELD)


def _bytes(held: Any) -> int:
    """Of a tensor, of the tensors that a quantised one is made of, or of several."""
    if isinstance(held, Tensor):
        inner = getattr(held, "__tensor_flatten__", None)  # what holds a subclass's memory
        return held.nbytes if inner is None else sum(_bytes(getattr(held, name)) for name in inner()[0])
    if isinstance(held, Mapping):
        return sum(map(_bytes, held.values()))
    return sum(map(_bytes, held)) if isinstance(held, (tuple, list)) else 0


def is_left_out(layer: Any) -> bool:
    """Whether a cache layer stands for left-out attention."""
    return getattr(type(layer), "_skipguide_left_out", False)


def hide(cache: Any, indices: Sequence[int], layers: int) -> dict[int, Any]:
    """Take layers out of a cache: their keys and values are freed, and what it says of its length stays true.

    Args:
        cache: a transformers cache, empty or in use.
        indices: the layers of left-out attention.
        layers: how many layers the model has.

    Returns:
        index -> the layer that stood there; layers that are out already are passed over.

    Raises:
        SkipError: if no layer that holds keys would be left.
    """
    check_kind(cache)
    grow(cache, layers)
    # early exit makes a cache of the first layers only
    gone = {i: cache.layers[i] for i in indices if i < len(cache.layers) and not is_left_out(cache.layers[i])}
    kept = [layer for i, layer in enumerate(cache.layers) if i not in gone and hasattr(layer, "get_seq_length")]
    if gone and not kept:
        raise SkipError("every attention is left out, and a KV cache needs one that is kept: pass use_cache=False")
    for i in gone:
        cache.layers[i] = stand_in(kept[0])
    return gone


def stand_in(kept: Any) -> Any:
    """A cache layer that holds nothing; a layer of the same cache that does hold keys answers for its length."""
    from transformers import cache_utils

    if (dummy := getattr(cache_utils, "DummyLayer", None)) is not None:
        return _class("LeftOut", dummy)()
    layer = _class("LeftOutByLength", cache_utils.CacheLayerMixin, _BY_LENGTH)()
    layer.kept = kept
    return layer


_REFUSAL = (
    "this KV cache was filled while the attention of this layer was left out: its keys do not exist. Go on under the "
    "plan that the cache was made under, or start a new sequence"
)


def _refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
    if args and args[0] is None:  # how DDP puts a gathered cache together again
        return None, None
    raise SkipError(_REFUSAL)


def _nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    """What every method of a layer without keys does: nothing."""


# What transformers without a DummyLayer needs: a layer that answers as one that is kept does.
_BY_LENGTH: dict[str, Any] = {
    "is_sliding": False,
    "is_compileable": True,
    "is_croppable": True,
    "lazy_initialization": _nothing,
    "get_seq_length": lambda self: self.kept.get_seq_length(),
    "get_mask_sizes": lambda self, query_length: self.kept.get_mask_sizes(query_length),
    "get_max_cache_shape": lambda self: self.kept.get_max_cache_shape(),
    "get_max_length": lambda self: self.kept.get_max_length(),
    **dict.fromkeys(
        ("offload", "prefetch", "reset", "crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"),
        _nothing,
    ),
}


def _class(name: str, base: type, members: dict[str, Any] | None = None) -> Any:
    """The class of that name in this module, made when transformers is there, so that caches can be copied."""
    module = sys.modules[__name__]
    found = getattr(module, name, None)
    if found is None or not issubclass(found, base):
        body = {"__module__": __name__, "__qualname__": name, "_skipguide_left_out": True, "update": _refuse}
        found = type(name, (base,), body | (members or {}))
        setattr(module, name, found)
    return found


def refuse_older_windows(kinds: Iterable[str]) -> None:
    """Refuse to take drafts back from sliding windows that show them again: those of transformers before 5.23.

    Args:
        kinds: the classes of a cache's layers.

    Raises:
        SkipError: if there is such a window.
    """
    import transformers

    version = transformers.__version__
    old = tuple(int(part) for part in version.split(".")[:2]) < (5, 23)
    if old and any("Sliding" in kind for kind in kinds):
        raise SkipError(
            f"self-speculation with sliding windows needs transformers 5.23 or newer (here {version}): the windows of "
            f"older ones cannot take drafts back"
        )
