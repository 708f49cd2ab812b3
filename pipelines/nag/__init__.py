"""Normalized attention guidance: a negative prompt in attention space, without CFG (arXiv 2505.21179)."""
