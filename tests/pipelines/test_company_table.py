"""Every row of the "does not go together" table raises what it says, and pipelines/README.md says the same."""

from pathlib import Path

import pytest
from helpers.company_table import APART, text

from skipguide import SkipError
from skipguide.hosts.diffusers_caches import CACHES
from zoo.pipes import BY_PIPE

README = (Path(__file__).parents[2] / "pipelines" / "README.md").read_text(encoding="utf-8")


def make(name):
    return BY_PIPE[name].build()


def run(name, pipe):
    return BY_PIPE[name].run(pipe, num_inference_steps=2)


@pytest.mark.parametrize("row", APART, ids=lambda row: row.what)
def test_the_error_is_what_the_table_says(row):
    with pytest.raises(SkipError) as caught:
        row.provoke(make, run)
    assert row.error in str(caught.value)


def test_every_refused_cache_has_a_row():
    refused = [cache.refusal for cache in CACHES.values() if cache.refusal]
    assert all(any(row.error in refusal for row in APART) for refusal in refused)


def test_the_readme_has_the_list_and_the_table():
    """`python tests/helpers/company_table.py` prints them."""
    assert text() in README
