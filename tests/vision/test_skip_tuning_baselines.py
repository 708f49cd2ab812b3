"""Skip Tuning: the methods that it is compared with, and the committed comparison."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tuning import NAMES, clip, pairs, same, state, words

from demos.skip_tuning.baselines import METHODS, build, linear_probe


@pytest.mark.parametrize("name", METHODS)
def test_baselines_train_what_they_say(name):
    model = clip()
    before = state(model)
    t = build(name, model, words, NAMES, templates="a {}")
    t.fit(pairs(), epochs=1, lr_text=1e-2, lr_image=1e-2, progress=False)
    assert same(before, state(model))
    if METHODS[name].lora:
        assert all("lora_" in n for n in t.names)
        assert len(t.names) == 2 * 3 * 4
    else:
        first = any("layers.0." in n for n in t.names)
        assert first is not METHODS[name].layers
    assert (t.class_skip is not None) is METHODS[name].classes


def test_linear_probe_separates():
    x = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    y = (x[:, 0] > 0).long()
    assert (linear_probe(x, y, 2, 1e-5)(x).argmax(1) == y).float().mean() > 0.95


def test_committed_benchmark():
    """Bars follow from the measurements; no clock is looked at here."""
    path = Path(__file__).parents[2] / "demos" / "benchmarks" / "skip_tuning.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["settings"]["size"] == "b16"
    rows = found["classes"]["100"]["rows"]
    assert (
        found["bars"]["time_to_reference_100"]["value"] == found["classes"]["100"]["time_to_reference"]["median"] <= 0.5
    )
    memory = rows["ours"]["peak_bytes"] / rows["full"]["peak_bytes"]
    assert found["bars"]["memory_to_full_100"]["value"] == round(memory, 4) <= 1 / 3
    assert "extrapolated" in found["classes"]["1000"]["rows"]["full"]
