"""UNet++ (arXiv 1807.10165): nested skip connections with deep supervision, and pruning as a choice of head."""

from skipguide.vision.unetpp.network import GridRun, UNetPlusPlus, mask_disagreement, mean_of_probabilities

__all__ = ["GridRun", "UNetPlusPlus", "mask_disagreement", "mean_of_probabilities"]
