"""Settings of skip guidance: through a file and back, and refused where they mean nothing."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from skipguide import SkipError, SkipPlan, Timetable
from skipguide.pipelines import SkipGroup
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": []}, "empty"),
        ({"layers": [1.5]}, "whole numbers"),
        ({"layers": [1, 1]}, "twice"),
        ({"layers": [1], "scale": float("nan")}, "finite"),
        ({"layers": [1], "scale": float("inf")}, "finite"),
        ({"layers": [1], "scale": "2"}, "finite"),
        ({"layers": [1], "part": "ffn"}, "unknown part"),
        ({"layers": [1], "formula": "paper"}, "unknown formula"),
        ({"layers": [1], "rescale": 1.5}, "rescale"),
        ({"layers": [1], "rescale_over": "frames"}, "rescale_over"),
        ({"layers": [1], "start": 0.5, "stop": 0.5}, "start"),
        ({"layers": [1], "start": -0.1}, "start"),
        ({"layers": [1], "every": 0}, "every"),
        ({"layers": [1], "formula": "uncond", "scale": 2.0}, "no third pass"),
        ({"layers": torch.tensor([1.5])}, "whole numbers"),
        ({"layers": torch.tensor([False, True])}, "whole numbers"),
        ({"layers": float("nan")}, "whole numbers|one or several"),
        ({"layers": {"transformer": []}}, "empty"),
        ({"layers": [1], "start": None}, "start"),
        ({"layers": [1], "stop": "1"}, "start"),
        ({"layers": [1], "cfg_interval": 0.5}, "pair"),
        ({"layers": [1], "cfg_interval": ("a", "b")}, "fractions"),
        ({"groups": SkipGroup([1])}, "list of SkipGroup"),
        ({"groups": [1]}, "mapping"),
        ({"layers": "stochastic", "seed": torch.Generator()}, "seed"),
    ],
)
def test_settings_that_mean_nothing(settings, words):
    with pytest.raises(SkipError, match=words):
        Stg(**settings)


def test_numbers_of_other_libraries_are_saved_as_pythons(tmp_path):
    table = Timetable([(0, np.array([1, 2])), (np.float32(0.5), torch.tensor([3]))])
    for layers in (np.int64(2), torch.tensor([1, 2]), table, {"transformer": table, "transformer_2": "stochastic"}):
        stg = Stg(layers, start=np.float32(0.25), cfg_interval=np.array([0.0, 0.5]), seed=np.int64(3))
        stg.save_json(tmp_path / "stg.json", overwrite=True)
        assert Stg.load_json(tmp_path / "stg.json") == stg


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "stg.json").write_text("{")
    for kind in (Stg, SkipPlan):
        with pytest.raises(SkipError, match=r"expected JSON in .*stg.json"):
            kind.load_json(tmp_path / "stg.json")


def test_settings_round_trip(tmp_path):
    stg = Stg({"transformer": [1, 2]}, scale=2, part="attn", rescale=0.5, every=2, stop=0.8)
    stg.save_json(tmp_path / "stg.json")
    assert Stg.load_json(tmp_path / "stg.json") == stg
    with pytest.raises(SkipError, match="exists"):
        stg.save_json(tmp_path / "stg.json")
    data = json.loads((tmp_path / "stg.json").read_text())
    with pytest.raises(SkipError, match="colour"):
        Stg.from_dict(data | {"colour": "red"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        stg.scale = 3
