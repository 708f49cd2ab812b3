"""Check: the self-test a user runs on a model before trusting a skip on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.arguments import Arguments
from skipguide.blocks import Block, find_blocks
from skipguide.errors import NoEffectError, SkipError
from skipguide.hosts.wrappers import unwrap
from skipguide.plan import SkipPlan
from skipguide.prefix import Prefix
from skipguide.skipper import Skipper, capture, resume


@dataclass(frozen=True)
class CheckReport:
    """What `check` found: one line per law, all of them passed."""

    model: str
    blocks: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.model}: {self.blocks} blocks, all checks passed", *(f"  {line}" for line in self.lines)]
        )


def check(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> CheckReport:
    """Prove the core's laws on this very model: run it before trusting a new or third-party block description.

    Empty plan bit-equal; the first, a middle and the last block of every stack skipped, bit-equal to the model with
    that block really replaced by an identity; resume from a middle block bit-equal to the full pass; no residue.

    Args:
        model: the model, in eval mode.
        inputs: keyword arguments of one forward call. None draws random ones for the families that ship.

    Returns:
        A `CheckReport`; `print` it.

    Raises:
        SkipError: naming the law that failed, or saying that `inputs` are needed.

    Example:
        >>> from diffusers import LTXVideoTransformer3DModel
        >>> model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        ...     attention_head_dim=8, cross_attention_dim=16, caption_channels=8)
        >>> check(model.eval()).blocks
        3
    """
    blocks = find_blocks(model)
    if inputs is None:
        from skipguide.families.samples.inputs import sample_inputs

        inputs = sample_inputs(unwrap(model))
    if not isinstance(inputs, Mapping):
        raise SkipError(
            f"expected inputs as a mapping of the keyword arguments of one call, dict(hidden_states=...); got "
            f"{type(inputs).__name__}"
        )
    before = _residue(model)

    def run() -> Tensor:
        with torch.no_grad():
            return _tensor(model(**inputs))

    plain = run()
    if not torch.equal(plain, run()):
        raise SkipError("the model gives different outputs for equal inputs: call model.eval() first")
    lines = []
    with Skipper(model, SkipPlan()) as skipper:
        _expect(torch.equal(run(), plain), "an empty plan changed the output")
    missed = [block.name for block in blocks if block.name not in skipper.stats.calls]
    _expect(not missed, f"blocks that did not run in a plain pass: {missed}")
    lines.append("empty plan: bit-equal")

    for block in _samples(blocks.blocks):
        handle = block.module.register_forward_hook(_StreamsFit(block), with_kwargs=True)
        try:
            run()
        finally:
            handle.remove()
        with Skipper(model, SkipPlan([block.index])):
            skipped = run()
        with _TakenOut(block):
            reference = run()
        _expect(torch.equal(skipped, reference), f"skipping {block.name} differs from the block taken out")
        if torch.equal(skipped, plain):
            raise NoEffectError(f"skipping {block.name} changed nothing: is the block's residual branch zero?")
        lines.append(f"skip {block.name}: equal to the block taken out")

    prefix = Prefix(len(blocks) // 2)
    with capture(model, prefix):
        _expect(torch.equal(run(), plain), "capturing changed the output")
    with resume(model, prefix) as skipper:
        _expect(torch.equal(run(), plain), f"resuming from block {prefix.layer} differs from the full pass")
    _expect(len(skipper.stats.calls) == len(blocks) - prefix.layer, "resuming ran blocks before its start")
    lines.append(
        f"resume from block {prefix.layer}: bit-equal, {len(blocks) - prefix.layer} of {len(blocks)} blocks ran"
    )

    _expect(_residue(model) == before, "something was left on the model")
    _expect(torch.equal(run(), plain), "the model's output is not what it was before")
    lines.append("residue: none")
    return CheckReport(type(unwrap(model)).__name__, len(blocks), tuple(lines))


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise SkipError(f"check failed: {message}. The block description of this model does not fit it")


def _tensor(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    first: Any = out[0]
    whole: Tensor = torch.stack(first) if isinstance(first, list) else first
    return whole


def _samples(blocks: tuple[Block, ...]) -> list[Block]:
    stacks: dict[str, list[Block]] = {}
    for block in blocks:
        stacks.setdefault(block.stack, []).append(block)
    picks = [stack[i] for stack in stacks.values() for i in sorted({0, len(stack) // 2, len(stack) - 1})]
    return sorted(picks, key=lambda block: block.index)


class _StreamsFit:
    """A forward hook that compares the shapes a block returns with the streams that its description names.

    The laws are stated in the description's own terms: streams named in the wrong order would pass every one of them.
    """

    def __init__(self, block: Block) -> None:
        self.block = block

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        names = self.block.spec.returns or self.block.spec.streams
        arguments = Arguments(module)
        came = [arguments.get(name, args, kwargs) for name in names]
        if self.block.shortcut is not None and isinstance(came[0], Tensor):
            came[0] = self.block.shortcut(came[0])
        left = [out] if isinstance(out, Tensor) else list(out)
        added, left = left[: len(self.block.spec.adds)], left[len(self.block.spec.adds) :]
        left = left[: len(left) - self.block.spec.none_outputs]
        came = [*(arguments.get(name, args, kwargs) for name in self.block.spec.adds), *came]
        left, names = [*added, *left], (*self.block.spec.adds, *names)
        # None: the last block of some models has no text output
        fits = len(left) == len(came) and all(
            now is None or (isinstance(before, Tensor) and now.shape == before.shape)
            for now, before in zip(left, came, strict=True)
        )
        shapes = [tuple(now.shape) if isinstance(now, Tensor) else now for now in left]
        _expect(fits, f"{self.block.name} returns {shapes}, and is described as returning {', '.join(names)}")


class _TakenOut:
    """Replaces one block's forward by an identity, without the gates: the reference of the check."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def __enter__(self) -> None:
        arguments = Arguments(self.block.module)
        returns = self.block.spec.returns or self.block.spec.streams

        def identity(*args: Any, **kwargs: Any) -> Any:
            out = tuple(arguments.get(name, args, kwargs) for name in returns)
            if self.block.shortcut is not None:
                out = (self.block.shortcut(out[0]), *out[1:])
            out += (None,) * self.block.spec.none_outputs
            added = (arguments.get(name, args, kwargs) for name in self.block.spec.adds)
            out = (*(torch.zeros_like(like) for like in added), *out)
            return out if len(out) > 1 else out[0]

        self.before = self.block.module.__dict__.get("forward")
        self.block.module.__dict__["forward"] = identity

    def __exit__(self, *exc: object) -> None:
        if self.before is None:
            del self.block.module.__dict__["forward"]
        else:
            self.block.module.__dict__["forward"] = self.before


def _residue(model: nn.Module) -> list[tuple[str, list[str], int]]:
    return [
        (name, sorted(module.__dict__), len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
