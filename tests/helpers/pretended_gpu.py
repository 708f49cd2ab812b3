"""A pretended GPU: a pytest plugin that shows, on a machine without one, where tensors of two devices meet.

    PYTHONPATH=tests pytest -p helpers.pretended_gpu -m gpu tests/vision/test_skipnet.py

Its tensors say `gpu:0` and hold their numbers on the CPU; where a call says cuda, it is meant. An operation that CUDA
would refuse raises: tensors, indices or a generator from elsewhere, `.numpy()`. Gradients work, and loops that train.
At the end come the lines of the library that waited for the device, with the operation.

It shows no speed, memory, streams, rounding, kernels or autocast, and none of the branches on `device.type == "cuda"`:
tests of those fail here, as do those of offloading with streams or one parameter after the other. Other threads than
the first see no GPU. It leans on internals of torch, which may break it: a tool for development, no part of CI.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

TORCH = str(Path(torch.__file__).parent)
ROOT = Path(__file__).resolve().parents[2]
OURS = (("skipguide",), ("pipelines",), ("vision",))  # the library's folders
GPU = "gpu:0"
aten = torch.ops.aten
waits: collections.Counter[tuple[str, str]] = collections.Counter()  # (line of the library, operation) → times

COPIES = {aten.copy_.default, aten._copy_from.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WITH_NUMBERS = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}  # of the CPU, with pointwise ones
WAITING = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


class Pretended(torch.Tensor):
    """A tensor that says it is on the GPU; `held` are its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, requires_grad: bool = False, **_: Any) -> Pretended:
        held = numbers.held if isinstance(numbers, Pretended) else numbers.detach()
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), layout=held.layout,
            dtype=held.dtype, device=GPU,
        )  # fmt: skip
        made.held = held
        return made.requires_grad_() if requires_grad else made

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.held})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = Pretended(self.held.clone(), self.requires_grad)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def tolist(self) -> Any:
        _note("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator that says its device. Operations get another object: they look at that of the call above them."""

    on_gpu = False
    place: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made.place = torch.device(_meant(str(device)))
        return made

    @property
    def device(self) -> torch.device:
        return self.place


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: refused where a GPU would refuse it, else done on the CPU."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [t for t in tensors if isinstance(t, Pretended)]
    device = kwargs.get("device")
    to_gpu = bool(here) if device is None else torch.device(device).type == "gpu"
    if func in COPIES and device is None:
        to_gpu = isinstance(args[func is aten._copy_from.default], Pretended)
    if kwargs.get("generator") is not None and to_gpu != Generator.on_gpu:
        raise RuntimeError(f"{func}: expected a generator of the {'GPU' if to_gpu else 'CPU'}")
    if func not in COPIES and here:
        _refuse(func, args, tensors, here)
    _watch(func, args, kwargs, here, to_gpu)
    if func is aten.histc.default and not args[0].is_floating_point():
        args = (args[0].float(), *args[1:])  # the CPU has it for floats alone
    given = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if device is not None and to_gpu:
        given["device"] = torch.device("cpu")
    out = func(*tree_map(_held, args), **tree_map(_held, given))
    if not to_gpu:
        return out
    out = tree_map(lambda t: Pretended(t) if type(t) is torch.Tensor else t, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


def _refuse(func: Any, args: Any, tensors: list[Any], here: list[Any]) -> None:
    if func in INDEXED:
        if not isinstance(args[0], Pretended):
            raise RuntimeError(f"{func}: a CPU tensor is indexed by a GPU tensor")
        return
    numbers = torch.Tag.pointwise in func.tags or func in WITH_NUMBERS
    strange = [t for t in tensors if not isinstance(t, Pretended) and (t.dim() or not numbers)]
    if strange:
        gpu, cpu = ([tuple(t.shape) for t in group] for group in (here, strange))
        raise RuntimeError(f"{func}: expected all tensors on one device; got shapes {gpu} on the GPU, {cpu} on the CPU")


def _watch(func: Any, args: Any, kwargs: Any, here: list[Any], to_gpu: bool) -> None:
    if here and func in WAITING:
        _note(func.overloadpacket.__name__)
    elif here and func in INDEXED and any(i is not None and i.dtype is torch.bool for i in args[1]):
        _note("index by a mask")
    elif func in COPIES and isinstance(args[func is aten.copy_.default], Pretended) != to_gpu:
        unseen = torch.device(kwargs.get("device") or "cpu").type == "meta"
        if not unseen and not (to_gpu and kwargs.get("non_blocking")):
            _note("to the GPU" if to_gpu else "to the CPU")


def _note(what: str) -> None:
    """Count a wait that a line of the library asked torch for, not one of the models or of another library."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    place = Path(frame.f_code.co_filename) if frame is not None else ROOT
    if place.is_relative_to(ROOT) and place.relative_to(ROOT).parts[:1] in OURS:
        waits[f"{place.relative_to(ROOT)}:{frame.f_lineno}", what] += 1


class Operations(TorchDispatchMode):
    """What makes tensors on the GPU out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Calls that say cuda, and those that torch answers before any operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0].to(GPU)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.tolist and isinstance(args[0], Pretended):
            return args[0].tolist()
        if func is torch.lstm_cell and isinstance(args[0], Pretended):
            return _lstm_cell(*args)
        if func == torch.Tensor.data.__set__:
            here = [isinstance(t, Pretended) for t in args]
            if any(here) and not all(here):  # torch lets no tensor take another class
                return torch.utils.swap_tensors(args[0], nn.Parameter(args[1], args[0].requires_grad))
            if all(here):
                args[0].held = args[1].held
        args, kwargs = tuple(map(_meant, args)), {key: _meant(value) for key, value in (kwargs or {}).items()}
        if (generator := kwargs.get("generator")) is not None:
            Generator.on_gpu = generator.device.type == "gpu"
        return func(*args, **kwargs)


def _meant(value: Any) -> Any:
    """`value`, with the pretended GPU where it says cuda."""
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return GPU
    return torch.device(GPU) if isinstance(value, torch.device) and value.type == "cuda" else value


def _lstm_cell(x: Any, state: Any, weight: Any, recurrent: Any, bias: Any, recurrent_bias: Any) -> tuple[Any, Any]:
    """In plain operations: on a GPU torch takes a kernel that the CPU has not."""
    linear = nn.functional.linear
    gates = linear(x, weight, bias) + linear(state[0], recurrent, recurrent_bias)
    enter, forget, value, leave = gates.chunk(4, 1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * value.tanh()
    return leave.sigmoid() * cell.tanh(), cell


class _Device(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    def synchronize(self, *_: Any) -> None:
        pass

    empty_cache = synchronize


def _register() -> list[torch.library.Library]:
    backend_registration._setup_privateuseone_for_python_backend("gpu", _Device())
    kernels, rest = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    # where torch runs operations from C++, out of the modes' sight
    for name in ("empty.memory_format", "empty_strided", "_copy_from", "_local_scalar_dense", "_to_copy", "copy_"):
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        kernels.impl(name, lambda *args, _func=func, **kwargs: run(_func, args, kwargs), "PrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    to = nn.Module.to
    nn.Module.to = lambda self, *args, **kwargs: to(self, *map(_meant, args), **{k: _meant(kwargs[k]) for k in kwargs})
    nn.Module.cuda = lambda self, *_: self.to(GPU)
    torch.Generator = Generator
    torch.inference_mode = lambda mode=True: torch.set_grad_enabled(not mode)  # torch has none for wrappers
    torch.cuda.synchronize = lambda *_: None
    return [kernels, rest]


_KERNELS = _register()  # they go with their libraries
_is_available = torch.cuda.is_available


def pytest_configure() -> None:
    """Tests that need a GPU are not skipped, and nobody else is told of one."""
    torch.cuda.is_available = lambda: True


def pytest_collection_finish() -> None:
    torch.cuda.is_available = _is_available


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    with Calls(), Operations():
        return (yield)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("waits for the GPU")
    for (line, what), times in waits.most_common():
        terminalreporter.write_line(f"{times:6} {line} {what}")
