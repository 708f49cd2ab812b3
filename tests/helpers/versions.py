"""Older libraries: what they cannot do is not tested with them, and the reason is said."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def is_older(name, than):
    """Whether the installed library is older."""
    return Version(version(name)) < Version(than)


def needs(name, least, why):
    """A mark for tests of what came with a version of a library."""
    return pytest.mark.skipif(is_older(name, least), reason=f"needs {name} {least}: {why}")


traced_plans = needs("torch", "2.14", "older ones run the gated part of a compiled model uncompiled")
newest_diffusers = needs("diffusers", "0.42", "the tables are of the newest one")
