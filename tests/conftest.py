"""One thread: with tiny models on a busy machine, two threads mostly wait for each other; SKIPGUIDE_TEST_THREADS in the
environment asks for more. A seed for every test, and `demos` by name."""

import os
import sys
from pathlib import Path

import pytest
import torch

# helpers with asserts, told as in a test
pytest.register_assert_rewrite("helpers.cli_stub", "helpers.residue", "helpers.stg_reference", "helpers.two_processes")
torch.set_num_threads(int(os.environ.get("SKIPGUIDE_TEST_THREADS", "1")))
torch.backends.cudnn.allow_tf32 = False  # tolerances are of float32, and a GPU rounds convolutions more by default
sys.path.append(str(Path(__file__).resolve().parents[1]))  # demos is not installed; last, so that it shadows nothing


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws without a seed of its own, its fixtures too, is the same in any order of tests."""
    torch.manual_seed(0)
