"""Skip DEQ (arXiv 2201.12240): a network in equilibrium, whose iterations are skipped by a learned guess."""

from skipguide.vision.skip_deq.losses import jacobian_penalty, skip_loss
from skipguide.vision.skip_deq.network import ConvergenceWarning, DEQInfo, SkipDEQ

__all__ = ["ConvergenceWarning", "DEQInfo", "SkipDEQ", "jacobian_penalty", "skip_loss"]
