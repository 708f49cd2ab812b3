"""Numbers and flags in the settings of guidance: of any library, kept as Python's own; anything else is refused."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from skipguide.errors import SkipError
from skipguide.pipelines import SkipGroup, SkipGuider, SpatiotemporalSkipGuidance
from skipguide.plan import SkipPlan
from skipguide.schedule import Schedule, Timetable

NUMBERS = {
    "scale": 1,
    "rescale": 1,
    "apg": 0,
    "apg_norm": 2,
    "drop": 0.25,
    "seed": 3,
    "every": 2,
    "start": 0,
    "stop": 1,
}
WHOLE = ("seed", "every")
FLAGS = ("prefix_reuse", "zero_star", "prefer_cheap")


def forms(name: str) -> list[Any]:
    """A setting's number as other libraries hold it."""
    value = NUMBERS[name]
    kinds = [np.float32, np.float64, torch.tensor, np.array]
    if name in WHOLE:
        kinds = [np.int64, np.int32, torch.tensor, np.array]
    return [kind(value) for kind in kinds]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NUMBERS for value in forms(name)])
def test_a_number_of_another_library_is_the_same_setting(name: str, value: Any):
    made = SpatiotemporalSkipGuidance(layers=[1], **{name: value})
    assert made == SpatiotemporalSkipGuidance(layers=[1], **{name: NUMBERS[name]})
    assert type(getattr(made, name)) in (int, float)
    assert SpatiotemporalSkipGuidance.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, "1", [1], float("nan"), np.array([1.0]), np.bool_(True)])
def test_what_is_not_a_number_is_refused(name: str, value: Any):
    with pytest.raises(SkipError, match=name if name != "stop" else "start and stop"):
        SpatiotemporalSkipGuidance(layers=[1], **{name: value})


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false(name: str):
    made = SpatiotemporalSkipGuidance(layers=[1], **{name: np.bool_(True)})
    assert getattr(made, name) is True
    for value in ("no", 1, None):
        with pytest.raises(SkipError, match=f"expected {name} as True or False"):
            SpatiotemporalSkipGuidance(layers=[1], **{name: value})


def test_groups_and_timetables_take_numbers_of_other_libraries():
    assert SkipGroup([1], scale=np.float32(0.5)).scale == 0.5
    table = Timetable([(np.float32(0.5), np.int64(2)), (0, torch.tensor(1.0))])
    assert table == Timetable([(0.0, 1.0), (0.5, 2)])
    assert Timetable([(0.0, np.array([1, 2]))]).values == ((1, 2),)
    json.dumps(table.to_dict())
    for places in ([("0.5", 1)], [(True, 1)], [(None, 1)]):
        with pytest.raises(SkipError, match="finite places"):
            Timetable(places)


def test_a_guider_takes_them_too_and_its_config_is_plain():
    guider = SkipGuider([1], scale=np.float32(0.5), guidance_scale=np.float32(4.0), guidance_rescale=torch.tensor(0.5))
    assert json.loads(guider.to_json_string())["guidance_scale"] == 4.0
    again = SkipGuider.from_config(guider.config)
    assert (again.settings, again.guidance_scale, again.guidance_rescale) == (guider.settings, 4.0, 0.5)
    with pytest.raises(SkipError, match="enabled as True or False"):
        SkipGuider([1], enabled="no")


def test_a_fraction_in_single_precision_is_the_same_window():
    assert float(np.float32(0.1)) > 0.1  # so that the last bits would leave step 1 of 10 out
    for start in (0.1, 0.2, 0.3, 0.6, 0.7):
        single = Schedule(np.float32(start), every=2)
        for steps in (10, 30, 50, 1000):
            same = Schedule(start, every=2)
            assert [single.fresh(i, steps) for i in range(steps)] == [same.fresh(i, steps) for i in range(steps)]
        until = Schedule(0.0, np.float32(start))
        assert [i for i in range(10) if until.active(i, 10)] == list(range(round(start * 10)))


@pytest.mark.parametrize("layers", [b"12", {}, {1: [2]}, 1.0, np.float32(1)])
def test_layers_that_name_nothing_are_refused(layers: Any):
    with pytest.raises(SkipError, match=r"block numbers|names denoisers"):
        SpatiotemporalSkipGuidance(layers=layers)


def test_words_that_are_none_are_refused():
    with pytest.raises(SkipError, match="stack is the name"):
        SpatiotemporalSkipGuidance(layers=[1], stack=["blocks"])
    with pytest.raises(SkipError, match="stack is the name"):
        SkipGroup([1], stack=3)
    with pytest.raises(SkipError, match="finite number"):
        SkipGroup([1], scale=10**400)
    with pytest.raises(SkipError, match="unknown score"):
        SpatiotemporalSkipGuidance(layers=[1], score=[])
    with pytest.raises(SkipError, match="got start='0'"):
        SkipPlan([1], start="0")
