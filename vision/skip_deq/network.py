"""Skip DEQ: a network in equilibrium, whose iterations are skipped by a learned guess of where they end.

After Pal, Edelman and Rackauckas, "Continuous Deep Equilibrium Models" (arXiv 2201.12240). The state solves
z = f(z, x); the guess z0 is zero (the plain DEQ), a network's answer (Skip DEQ) or f(0, x) (Skip-Reg DEQ). The loss
between z and z0 is not only the guess's teacher: it pulls the equilibrium towards what can be guessed, and so shortens
the solve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipguide.config import as_flag, as_list, as_number, as_whole, is_one_of
from skipguide.errors import SkipError
from skipguide.vision.fixed_point import check_settings, fixed_point
from skipguide.vision.fixed_point_search import FixedPoint, relative_residual
from skipguide.vision.recording import is_exported, is_traced
from skipguide.vision.skip_deq.implicit import Implicit
from skipguide.vision.skip_deq.info import ConvergenceWarning, DEQInfo, warn

__all__ = ["ConvergenceWarning", "DEQInfo", "SkipDEQ"]

StateCell = Callable[[Tensor, Tensor], Tensor]
Guess = Callable[[Tensor], Tensor]


class SkipDEQ(nn.Module):
    """A deep equilibrium layer with a guess (arXiv 2201.12240, section 3).

    Args:
        f: the cell, called as `f(z, x)`; a module, or a function whose parameters you train yourself.
        init: None starts at zero; a module or function `x -> z0`; "skip_reg" starts at f(0, x).
        solver: "anderson", "picard", "broyden", or "ode", the continuous form.
        tol: largest relative residual of a row. It means the same in every dtype; half precision may not reach it.
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

    Two things to know. The cell runs at every evaluation: batch norm in training updates its statistics each time, 51
    times a forward with a budget of 50 (freeze it, or use group or layer norm). And the solve ends when all rows have
    converged, so a row may be iterated further beside others than alone: it moves with its batch, within the tolerance.

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
            SkipError: for NaN in x or in the guess, a guess that the cell cannot take, a cell that is not finite there
                or changes the shape; while tracing or exporting, and inside `torch.func`'s transforms.
        """
        _refuse_tracing()
        guess = self.guess(x)
        if self.budget == 0:
            return guess, DEQInfo(guess, torch.full((len(x),), torch.nan, device=x.device), 0, False)
        with torch.no_grad():
            start, settings = guess.detach(), (self.solver, self.tol, self.budget, self.memory, self.coupled)
            found = fixed_point(lambda z: self._cell(z, x), start, *settings)
            solved, residuals = (found.z, found.residuals) if found.converged else self._measured(found, x)
        info = DEQInfo(guess, residuals, found.evaluations, found.converged)
        if not found.converged:
            warn(f"the {self.solver} solve did not reach tol={self.tol:g} within a budget of {self.budget} evaluations")
        if not torch.is_grad_enabled():
            return solved, info
        if self.gradient == "phantom":
            z = solved
            for _ in range(self.phantom_steps):
                z = torch.lerp(z, self._cell(z, x), self.phantom_damping)
            return solved + (z - z.detach()), info
        leaf = solved.detach().requires_grad_()
        attached = self._cell(leaf, x)
        if not attached.requires_grad:
            return solved, info
        return Implicit.apply(attached, leaf, solved, self, info), info

    def _measured(self, found: FixedPoint, x: Tensor) -> tuple[Tensor, Tensor]:
        """The better of the last point and the correction after it, row by row, with its residual."""
        rows = len(found.residuals)
        corrected = (found.z != found.measured).reshape(rows, -1).any(1)
        if self.budget == 1:
            return found.z, torch.where(corrected, torch.nan, found.residuals)
        if not bool(corrected.any()):
            return found.z, found.residuals
        now = relative_residual(self._cell(found.z, x), found.z, self.coupled)
        better = now <= found.residuals
        chosen = better.view(-1, *[1] * (found.z.ndim - 1))
        residuals = torch.where(corrected & better, now, found.residuals)
        return torch.where(chosen, found.z, found.measured), residuals

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
        _refuse_transforms()
        guess = z = before = self.guess(x)
        for _ in range(steps):
            before, z = z, self._cell(z, x)
        residuals = relative_residual(z, before)
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


def _refuse_tracing() -> None:
    """A trace keeps the number of iterations that its example took, and is wrong for a harder input."""
    if is_traced() or is_exported():
        raise SkipError(
            "a SkipDEQ iterates until its input is solved, and a trace or export would keep the number of iterations "
            "of its example: export the cell (and init, the guess) alone, and iterate it where it runs"
        )
    _refuse_transforms()


def _refuse_transforms() -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise SkipError(
            "a SkipDEQ does not go through the transforms of torch.func (vmap, grad, jvp, jacrev): its solve reads "
            "values. Rows of a batch are separate problems already; for gradients use backward() or "
            "torch.autograd.grad, and torch.autograd.functional for Jacobians"
        )


def _called(name: str, function: Callable[..., Any], given: dict[str, Tensor], hint: str) -> Any:
    """The function's answer; when torch cannot compute it, its complaint with what was given and what to do."""
    try:
        return function(*given.values())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        taken = " and ".join(f"{key} {_kind(value)}" for key, value in given.items())
        if "type" in str(error):
            hint = "its weights and x differ in their dtype: convert one of them, x.float() or the module's .double()"
        raise SkipError(f"{name} cannot take {taken}: {error}; {hint}") from error


def _kind(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}"
