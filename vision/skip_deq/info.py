"""How the solves of a Skip DEQ went, and the warning of one that did not end."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from skipguide.shown import Shown


class ConvergenceWarning(RuntimeWarning):
    """A solve ended before its tolerance was reached."""


@dataclass(repr=False)
class DEQInfo(Shown):
    """How a solve went.

    Attributes:
        guess: z0, `[N, ...]`, with its graph: what `skip_loss` compares with.
        residuals: `[N]` (`[1]` if coupled), of f(z) - z relative to f(z), root mean square, in float32 at least, at
            the z that is returned; NaN where it was not measured: with a budget of 0, and of 1 for rows whose guess
            was not within the tolerance.
        evaluations: times f ran in the solve; the gradient needs one more, f(0, x) as a guess another, and so does a
            solve that did not converge, to measure what it returns.
        converged: whether every residual is within the tolerance.
        backward_evaluations: products with the transposed Jacobian in the backward solve; 0 before it.
        backward_residual: worst relative residual of that solve; NaN before it, infinite for a gradient that is not
            finite, which is handed on as it came.
        backward_converged: whether it reached its tolerance; None before it.
    """

    guess: Tensor
    residuals: Tensor
    evaluations: int
    converged: bool
    backward_evaluations: int = 0
    backward_residual: float = float("nan")
    backward_converged: bool | None = None

    def _heading(self) -> str:
        how = "converged" if self.converged else "not converged"
        said = f"DEQInfo: {how} after {self.evaluations} evaluations, worst residual {self.residual:.2g}"
        if self.backward_converged is None:
            return said
        how = "converged" if self.backward_converged else "not converged"
        return f"{said}; backward {how} after {self.backward_evaluations}, residual {self.backward_residual:.2g}"

    @property
    def residual(self) -> float:
        """The worst relative residual of the batch."""
        return float(self.residuals.max())


def warn(message: str) -> None:
    """Warn of a solve that did not end, on the line that called the layer."""
    # No figures of this solve in the text: Python then shows it once, not once per training step.
    warnings.warn(f"{message}: see info.residual and info.converged", ConvergenceWarning, stacklevel=3)
