"""AdaSkip's settings: through JSON and back, and refused where they mean nothing."""

import json
import math

import pytest

from skipguide.errors import SkipError
from skipguide.llm import AdaSkip


def test_settings_round_trip():
    settings = AdaSkip(target_speedup=1.3, phase="decode", cost_aware=True, part="mlp", window=8)
    assert AdaSkip.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of"),
        ({"count": 1, "skip_ratio": 0.5}, "exactly one of"),
        ({"skip_ratio": 1.0}, "below 1"),
        ({"skip_ratio": math.nan}, "skip_ratio as a finite number"),
        ({"count": -1}, "count as a whole number of at least 0"),
        ({"count": 2.0}, "count as a whole number of at least 0"),
        ({"target_speedup": 0.5}, "at least 1"),
        ({"count": 1, "phase": "all"}, '"prefill", "decode" or "both"'),
        ({"count": 1, "part": "norm"}, '"both", "attn" or "mlp"'),
        ({"count": 1, "window": 0}, "window as a whole number of at least 1"),
        ({"count": 1, "online": "false"}, "online as True or False"),
        ({"count": 1, "reference_compat": True, "cost_aware": True}, "published code"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SkipError, match=message):
        AdaSkip(**settings)
