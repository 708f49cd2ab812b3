"""Unified Layer Skipping: the published rule, the balanced one, and its laws."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide import SkipError
from skipguide.llm.unified import UnifiedSkip, unified_layers

pytestmark = pytest.mark.numerics

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/llm/unified_layer_skipping.json").read_text())["official"]


@pytest.mark.parametrize("case", GOLDEN)
def test_the_reference_rule(case):
    layers, _, speedup = case[1:].partition("_s")
    found = unified_layers(int(layers), float(speedup), mode="reference")
    assert found == GOLDEN[case]["retained"]
    assert sorted({*range(int(layers))} - {*found}) == GOLDEN[case]["skipped"]
    assert UnifiedSkip(float(speedup), "reference").realised_speedup(int(layers)) == pytest.approx(
        GOLDEN[case]["realised_speedup"]
    )


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 130), st.floats(1, 40))
def test_balanced_keeps_the_ends_and_spreads_the_rest(layers, speedup):
    kept = unified_layers(layers, speedup)
    assert kept == sorted(set(kept))
    assert kept[0] == 0 and kept[-1] == layers - 1
    assert len(kept) == min(layers, max(2, round(layers / speedup)))
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert max(gaps) - min(gaps) <= 1


@settings(deadline=None, max_examples=100)
@given(st.integers(4, 130), st.floats(1, 2))
def test_below_two_the_reference_drops_one_block_before_the_last(layers, speedup):
    kept = unified_layers(layers, speedup, mode="reference")
    target = int(layers / speedup)
    if target > layers / 2 + 1:
        assert kept == [*range(target - 1), layers - 1]


def test_speedup_one_keeps_everything():
    for mode in ("balanced", "reference"):
        assert unified_layers(12, 1, mode) == list(range(12))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 2), "num_layers as a whole number of at least 1"),
        ((True, 2), "num_layers as a whole number of at least 1"),
        ((12.0, 2), "num_layers as a whole number of at least 1"),
        ((12, 0.5), "speedup as a finite number of at least 1"),
        ((12, float("nan")), "speedup as a finite number"),
        ((12, "2"), "speedup as a finite number"),
        ((12, 2, "official"), "balanced"),
        ((12, 7, "reference"), "divides by zero"),
    ],
)
def test_bad_input(arguments, expected):
    with pytest.raises(SkipError, match=expected):
        unified_layers(*arguments)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_without_layers_between_is_not_told_to_ask_for_more(layers):
    with pytest.raises(SkipError, match=f"always run: of {layers}"):
        UnifiedSkip(speedup=4).plan(layers)


def test_config_round_trip_and_refusals(tmp_path):
    skip = UnifiedSkip(speedup=1.5, mode="reference", phase="both")
    skip.save_json(tmp_path / "skip.json")
    assert UnifiedSkip.load_json(tmp_path / "skip.json") == skip
    for wrong in ({"speedup": 0}, {"mode": "even"}, {"phase": "prefill"}):
        with pytest.raises(SkipError):
            UnifiedSkip(**wrong)
