"""The gradient of an equilibrium, by the implicit function theorem."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.fixed_point import fixed_point
from skipguide.vision.skip_deq.info import DEQInfo, warn


class Settings(Protocol):
    """What the backward solve reads of a `SkipDEQ`."""

    backward_tol: float
    backward_budget: int
    memory: int
    coupled: bool


class Implicit(torch.autograd.Function):
    """The equilibrium, with the gradient of the implicit function theorem: g = v + J^T g instead of v."""

    @staticmethod
    def forward(ctx: Any, attached: Tensor, leaf: Tensor, z: Tensor, deq: Settings, info: DEQInfo) -> Tensor:
        """Z itself; the graph goes on at f(z, x)."""
        ctx.attached, ctx.leaf, ctx.deq, ctx.info = attached, leaf, deq, info
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """One linear solve with the transposed Jacobian."""
        attached, leaf, deq, info = ctx.attached, ctx.leaf, ctx.deq, ctx.info
        if torch.is_grad_enabled():  # create_graph: the solve has no graph, and the second derivative would be wrong
            raise SkipError("implicit gradients give first derivatives only; use gradient='phantom' or unroll()")

        broken = ~torch.isfinite(grad).reshape(1 if deq.coupled else len(grad), -1).all(1)
        rows = broken.view(-1, *[1] * (grad.ndim - 1))

        def transposed(g: Tensor) -> Tensor:
            (back,) = torch.autograd.grad(attached, leaf, g, retain_graph=True, allow_unused=True)
            value = wanted if back is None else back + wanted
            if not bool(torch.isfinite(value).all()) and torch.equal(g, wanted):
                raise _Overflow(value)
            return value

        # As any layer, it hands on a gradient that is not finite: a GradScaler looks for those, and skips the step.
        wanted = torch.where(rows, 0.0, grad)
        try:
            found = fixed_point(
                transposed, wanted, "anderson", deq.backward_tol, deq.backward_budget, deq.memory, deq.coupled
            )
        except _Overflow as overflow:
            info.backward_evaluations, info.backward_residual, info.backward_converged = 1, float("inf"), False
            return torch.where(rows, grad, overflow.value), None, None, None, None
        if bool(broken.any()):
            info.backward_evaluations, info.backward_residual = found.evaluations, float("inf")
            info.backward_converged = False
            return torch.where(rows, grad, found.z), None, None, None, None
        info.backward_evaluations = found.evaluations
        info.backward_residual = float(found.residuals.max())
        info.backward_converged = found.converged
        if not found.converged:
            warn(
                f"the backward solve did not reach tol={deq.backward_tol:g} within {deq.backward_budget} products; "
                "gradients are approximate"
            )
        return found.z, None, None, None, None


class _Overflow(Exception):  # noqa: N818, it ends a solve and reports nothing wrong
    """The first product of the backward solve is beyond the dtype."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value
