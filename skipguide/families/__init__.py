"""Data only: the blocks of every supported model family, matched by class name."""

from skipguide.families.described import FAMILIES

__all__ = ["FAMILIES"]
