"""Skip DEQ: a network in equilibrium, whose iterations are skipped by a learned guess of where they end.

After Pal, Edelman and Rackauckas, "Continuous Deep Equilibrium Models" (arXiv 2201.12240). The state solves
z = f(z, x); the guess z0 is zero (the plain DEQ), a network's answer (Skip DEQ) or f(0, x) (Skip-Reg DEQ). The loss
between z and z0 is not only the guess's teacher: it pulls the equilibrium towards what can be guessed, and so shortens
the solve.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipguide.config import as_flag, as_list, as_number, as_whole, is_one_of
from skipguide.errors import SkipError
from skipguide.vision.fixed_point import check_settings, fixed_point

StateCell = Callable[[Tensor, Tensor], Tensor]
Guess = Callable[[Tensor], Tensor]


class ConvergenceWarning(RuntimeWarning):
    """A solve ended before its tolerance was reached."""


@dataclass
class DEQInfo:
    """How a solve went.

    Attributes:
        guess: z0, `[N, ...]`, with its graph: what `skip_loss` compares with.
        residuals: `[N]` (`[1]` if coupled), of f(z) - z relative to f(z), root mean square; NaN with a budget of 0.
        evaluations: times f ran in the solve; the gradient needs one more, f(0, x) as a guess another.
        converged: whether every residual is within the tolerance.
        backward_evaluations: products with the transposed Jacobian in the backward solve; 0 before it.
        backward_residual: worst relative residual of that solve; NaN before it.
        backward_converged: whether it reached its tolerance; None before it.
    """

    guess: Tensor
    residuals: Tensor
    evaluations: int
    converged: bool
    backward_evaluations: int = 0
    backward_residual: float = float("nan")
    backward_converged: bool | None = None

    @property
    def residual(self) -> float:
        """The worst relative residual of the batch."""
        return float(self.residuals.max())


class SkipDEQ(nn.Module):
    """A deep equilibrium layer with a guess (arXiv 2201.12240, section 3).

    Args:
        f: the cell, called as `f(z, x)`; a module, or a function whose parameters you train yourself.
        init: None starts at zero; a module or function `x -> z0`; "skip_reg" starts at f(0, x).
        solver: "anderson", "picard", "broyden", or "ode", the continuous form.
        tol: largest relative residual of a row.
        budget: evaluations of f per solve. 0 skips the solve and returns the guess.
        gradient: "implicit" solves one linear system with the transposed Jacobian, whatever the solver did; "phantom"
            differentiates through `phantom_steps` damped steps from the equilibrium, cheaper and approximate.
        phantom_steps: how many.
        phantom_damping: weight of f in each of them, in (0, 1].
        backward_tol: tolerance of the linear solve; `tol` by default.
        backward_budget: its products with the transposed Jacobian; `budget` by default.
        memory: differences that Anderson and Broyden keep.
        coupled: the rows of a batch depend on each other in f (a batch norm in training): solve for all of them as one.
        state_shape: shape of one row of z, where it differs from that of x and `init` does not give it.

    Raises:
        SkipError: for settings out of range.

    Example:
        >>> import torch
        >>> from skipguide.vision import SkipDEQ
        >>> layer = torch.nn.Linear(3, 3).double()
        >>> _ = torch.nn.init.orthogonal_(layer.weight, gain=0.5)
        >>> deq = SkipDEQ(lambda z, x: layer(z) + x, init="skip_reg", tol=1e-10)
        >>> x = torch.ones(2, 3, dtype=torch.double)
        >>> z, info = deq(x)
        >>> direct = torch.linalg.solve(torch.eye(3).double() - layer.weight, (x + layer.bias).T).T
        >>> info.converged, torch.allclose(z, direct, atol=1e-8)
        (True, True)
    """

    def __init__(
        self,
        f: StateCell,
        init: Guess | Literal["skip_reg"] | None = None,
        solver: str = "anderson",
        tol: float = 1e-3,
        budget: int = 50,
        *,
        gradient: Literal["implicit", "phantom"] = "implicit",
        phantom_steps: int = 5,
        phantom_damping: float = 0.5,
        backward_tol: float | None = None,
        backward_budget: int | None = None,
        memory: int = 20,
        coupled: bool = False,
        state_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not callable(f):
            raise SkipError(f"expected a cell that is called as f(z, x); got {type(f).__name__}")
        if not (init is None or callable(init) or is_one_of(init, ("skip_reg",))):
            raise SkipError(f"expected init to be None, 'skip_reg', a module or a function of x; got {init!r}")
        tol, budget, memory = check_settings(solver, tol, budget, memory)
        backward_tol = tol if backward_tol is None else backward_tol
        backward_budget = max(budget, 1) if backward_budget is None else backward_budget
        backward_tol, backward_budget, _ = check_settings(solver, backward_tol, backward_budget, memory)
        if backward_budget < 1:
            raise SkipError(f"expected a backward_budget of at least 1; got {backward_budget}")
        if not is_one_of(gradient, ("implicit", "phantom")):
            raise SkipError(f"expected gradient 'implicit' or 'phantom'; got {gradient!r}")
        phantom_steps = as_whole("phantom_steps", phantom_steps)
        phantom_damping = as_number("phantom_damping", phantom_damping)
        coupled = as_flag("coupled", coupled)
        if not 0 < phantom_damping <= 1:
            raise SkipError(f"expected phantom_damping in (0, 1]; got {phantom_damping}")
        if budget == 0 and init is None:
            raise SkipError("a budget of 0 returns the guess, and there is none: pass init, or a budget of at least 1")
        self.f, self.init = f, init
        self.solver, self.tol, self.budget, self.memory = solver, tol, budget, memory
        self.coupled = coupled
        self.gradient, self.phantom_steps, self.phantom_damping = gradient, phantom_steps, phantom_damping
        self.backward_tol, self.backward_budget = backward_tol, backward_budget
        self.state_shape = None if state_shape is None else tuple(as_list("state_shape", state_shape, 0))

    def forward(self, x: Tensor) -> tuple[Tensor, DEQInfo]:
        """Solve z = f(z, x).

        Args:
            x: finite floats `[N, ...]`, one problem per row.

        Returns:
            z and how it went. Without convergence z is the best point found, `info.converged` is False and a
            `ConvergenceWarning` is given.

        Raises:
            SkipError: for NaN in x or in the guess, a guess that the cell cannot take, or a cell that is not finite
                there or changes the shape.
        """
        guess = self.guess(x)
        if self.budget == 0:
            return guess, DEQInfo(guess, torch.full((len(x),), torch.nan, device=x.device), 0, False)
        with torch.no_grad():
            start, settings = guess.detach(), (self.solver, self.tol, self.budget, self.memory, self.coupled)
            found = fixed_point(lambda z: self._cell(z, x), start, *settings)
        info = DEQInfo(guess, found.residuals, found.evaluations, found.converged)
        if not found.converged:
            _warn(
                f"the {self.solver} solve did not reach tol={self.tol:g} within a budget of {self.budget} evaluations"
            )
        if not torch.is_grad_enabled():
            return found.z, info
        if self.gradient == "phantom":
            z = found.z
            for _ in range(self.phantom_steps):
                z = torch.lerp(z, self._cell(z, x), self.phantom_damping)
            return found.z + (z - z.detach()), info
        leaf = found.z.detach().requires_grad_()
        attached = self._cell(leaf, x)
        if not attached.requires_grad:
            return found.z, info
        return _Implicit.apply(attached, leaf, found.z, self, info), info

    def guess(self, x: Any) -> Tensor:
        """z0 for x, with its graph."""
        if not isinstance(x, Tensor) or x.ndim < 1 or 0 in x.shape or not x.is_floating_point():
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise SkipError(f"expected x [N, ...] of floats; got {got}")
        if not bool(torch.isfinite(x).all()):
            raise SkipError("expected finite x; got NaN or infinity")
        guess: Any
        if callable(self.init):
            guess = _called("init", self.init, {"x": x}, "check the width, dtype and device of its weights")
        else:
            guess = x.new_zeros(x.shape if self.state_shape is None else (len(x), *self.state_shape))
            if self.init == "skip_reg":
                guess = self._cell(guess, x)
        if not isinstance(guess, Tensor) or guess.ndim < 1 or len(guess) != len(x):
            shape = tuple(guess.shape) if isinstance(guess, Tensor) else type(guess).__name__
            raise SkipError(f"expected a guess with one row for each of {len(x)} inputs; got {shape}")
        if not guess.is_floating_point() or 0 in guess.shape or guess.device != x.device:
            raise SkipError(f"expected a guess [N, ...] of floats on {x.device}, where x is; got {_kind(guess)}")
        # Autocast makes bfloat16 of a network's answer, and a solve in it does not reach the tolerance.
        guess = guess.to(torch.promote_types(guess.dtype, x.dtype))
        if not bool(torch.isfinite(guess).all()):
            raise SkipError("the guess has NaN or infinity: check the weights of init")
        return guess

    def unroll(self, x: Tensor, steps: int) -> tuple[Tensor, DEQInfo]:
        """`steps` plain iterations from the guess, differentiated through: how such models are pretrained.

        Take enough to come near the equilibrium (`info.residual`). Five from zero train a transient: the cell then
        has unstable equilibria or none nearby, solves do not finish and implicit gradients are huge
        (demos/skip_deq shows it).

        Raises:
            SkipError: for fewer than one step.
        """
        steps = as_whole("steps", steps)
        guess = z = before = self.guess(x)
        for _ in range(steps):
            before, z = z, self._cell(z, x)
        change, size = ((v.detach().flatten(1).square().mean(1).sqrt()) for v in (z - before, z))
        residuals = change / size.clamp(min=torch.finfo(z.dtype).tiny)
        return z, DEQInfo(guess, residuals, steps, bool((residuals <= self.tol).all()))

    def _cell(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z, x), a state like z."""
        hint = "z is as the guess: check init, or pass state_shape where there is none"
        value = _called("the cell", self.f, {"z": z, "x": x}, hint)
        if not isinstance(value, Tensor) or value.shape != z.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise SkipError(f"the cell maps a state of shape {tuple(z.shape)} to {got}; expected the same: {hint}")
        return value.to(z.dtype)

    def extra_repr(self) -> str:
        """The settings."""
        return f"solver={self.solver}, tol={self.tol:g}, budget={self.budget}, gradient={self.gradient}"


class _Implicit(torch.autograd.Function):
    """The equilibrium, with the gradient of the implicit function theorem: g = v + J^T g instead of v."""

    @staticmethod
    def forward(ctx: Any, attached: Tensor, leaf: Tensor, z: Tensor, deq: SkipDEQ, info: DEQInfo) -> Tensor:
        """Z itself; the graph goes on at f(z, x)."""
        ctx.attached, ctx.leaf, ctx.deq, ctx.info = attached, leaf, deq, info
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """One linear solve with the transposed Jacobian."""
        attached, leaf, deq, info = ctx.attached, ctx.leaf, ctx.deq, ctx.info
        if torch.is_grad_enabled():  # create_graph: the solve has no graph, and the second derivative would be wrong
            raise SkipError("implicit gradients give first derivatives only; use gradient='phantom' or unroll()")

        def transposed(g: Tensor) -> Tensor:
            (back,) = torch.autograd.grad(attached, leaf, g, retain_graph=True, allow_unused=True)
            return grad if back is None else back + grad

        found = fixed_point(
            transposed, grad, "anderson", deq.backward_tol, deq.backward_budget, deq.memory, deq.coupled
        )
        info.backward_evaluations = found.evaluations
        info.backward_residual = float(found.residuals.max())
        info.backward_converged = found.converged
        if not found.converged:
            _warn(
                f"the backward solve did not reach tol={deq.backward_tol:g} within {deq.backward_budget} products; "
                "gradients are approximate"
            )
        return found.z, None, None, None, None


def _called(name: str, function: Callable[..., Any], given: dict[str, Tensor], hint: str) -> Any:
    """The function's answer; when torch cannot compute it, its complaint with what was given and what to do."""
    try:
        return function(*given.values())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        taken = " and ".join(f"{key} {_kind(value)}" for key, value in given.items())
        raise SkipError(f"{name} cannot take {taken}: {error}; {hint}") from error


def _kind(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}"


def _warn(message: str) -> None:
    # No figures of this solve in the text: Python then shows it once, not once per training step.
    warnings.warn(f"{message}: see info.residual and info.converged", ConvergenceWarning, stacklevel=3)
