"""Tiny random models of every supported family, with reference edits that do not use skipguide."""

from zoo.family import BlockKind, Family, randomise, rows
from zoo.joint import JOINT
from zoo.one_stream import ONE_STREAM

FAMILIES = ONE_STREAM + JOINT
BY_NAME = {family.name: family for family in FAMILIES}

__all__ = ["BY_NAME", "FAMILIES", "JOINT", "ONE_STREAM", "BlockKind", "Family", "randomise", "rows"]
