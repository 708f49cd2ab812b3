"""Files: JSON from whomever is read in one place, with types, bounds and a depth; what is not of ours is refused."""

import copy
import importlib
import json
from pathlib import Path

import pytest

from skipguide import SkipError, SkipPlan
from skipguide.files import DEEPEST, parse_json, read_json
from skipguide.llm import SublayerPlan
from skipguide.llm.lm_eval import load_policy
from skipguide.llm.similarity import SublayerStats
from skipguide.pipelines import SpatiotemporalSkipGuidance
from skipguide.pipelines.settings import DEFAULTS
from skipguide.vision import LayerMask

VERSION_1 = sorted((Path(__file__).parents[1] / "golden" / "json_version_1").glob("*.json"))


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "expected JSON in a plan; got something else"),
        ("[NaN]", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("[1e999]", "1e999 is not a finite number"),
        ("[" + "1" * 5000 + "]", "expected JSON in a plan"),
        (nested(DEEPEST + 1), f"nested at most {DEEPEST} deep"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested at most"),
        (nested(100_000), "nested at most"),
    ],
)
def test_what_is_no_json_of_ours(text, says):
    with pytest.raises(SkipError, match=says):
        parse_json(text, "a plan")


def test_what_is(tmp_path):
    assert parse_json(nested(DEEPEST), "a plan")
    assert parse_json("[Infinity]", "a config", finite=False) == [float("inf")]
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "marked.json") == [1]
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(SkipError, match=r"expected JSON in .*bytes\.json"):
        read_json(tmp_path / "bytes.json")


def test_deep_nesting_is_one_sentence_wherever_json_is_read(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text('{"version": 1, "terms": ' + nested(3000) + "}")
    for read in (SkipPlan.load_json, SublayerPlan.load_json, SpatiotemporalSkipGuidance.load_json):
        with pytest.raises(SkipError, match="nested at most"):
            read(path)
    with pytest.raises(SkipError, match="nested at most"):
        load_policy("plan", path)
    with pytest.raises(SkipError, match="nested at most"):
        load_policy("plan", path.read_text())
    deep = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(SkipError, match="nested at most"):
        SkipPlan.from_dict({"version": 1, "terms": deep})


STATS = {"attn_similarity": [0.9], "mlp_similarity": [0.9], "attn_scale": [1.0], "mlp_scale": [1.0]}


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        (SkipPlan, {"terms": [{"layers": [1], "stack": ["a"]}]}, r"stack is the name .*got \['a'\]"),
        (SkipPlan, {"version": True, "terms": [{"layers": [1]}]}, "of version 1; got version True"),
        (SkipPlan, {"version": 1.0, "terms": [{"layers": [1]}]}, "of version 1; got version 1.0"),
        (SkipPlan, {"terms": [{}]}, "expected the layers of every term"),
        (SkipPlan, {"terms": [{"layers": {}}]}, "expected block numbers"),
        (SkipPlan, {"terms": [{"layers": [10**30]}]}, "layers are block numbers"),
        (
            SublayerStats,
            STATS | {"attn_similarity": [5]},
            "attn_similarity as a list of numbers, .*at most 1.001; number 0 is 5",
        ),
        (SublayerStats, STATS | {"mlp_scale": [-1.0]}, "mlp_scale .* at least 0; number 0 is -1.0"),
        (SublayerStats, STATS | {"mlp_scale": ["1.0"]}, "number 0 is '1.0'"),
        (SublayerStats, STATS | {"mlp_scale": [True]}, "number 0 is True"),
        (SublayerStats, STATS | {"mlp_scale": "1"}, "expected mlp_scale as a list of numbers"),
        (SublayerStats, STATS | {"requests": 0}, "requests as a whole number of at least 1"),
        (SublayerPlan, {"attn": [1], "attn_scale": [[1, "1.5"]]}, "attn_scale of layer 1 is '1.5'"),
        (SublayerPlan, {"attn": [1], "attn_scale": [[1, True]]}, "attn_scale of layer 1 is True"),
        (SublayerPlan, {"attn": [1], "attn_scale": [[1, 1.0], [1, 2.0]]}, "attn_scale as a mapping"),
        (SpatiotemporalSkipGuidance, {"layers": [1], "seed": 1e30}, r"seed as a whole number; got 1e\+30"),
        (SpatiotemporalSkipGuidance, {"layers": [1], "seed": 10**30}, "seed as a whole number that 64 bits hold"),
        (LayerMask, {"shape": [8.0], "keep": "/w==", "fill": None, "crop": True}, "each of shape as a whole number"),
        (LayerMask, {"shape": [8], "keep": "/*w==", "fill": None, "crop": True}, "it is damaged"),
    ],
)
def test_types_and_bounds(kind, data, says):
    with pytest.raises(SkipError, match=says):
        kind.from_dict({"version": 1, **data})


DEEP: list = []
for _ in range(100):
    DEEP = [DEEP]
WRONG = [True, "text", "1", ["a"], [], {"a": 1}, {}, None, 1e30, 10**30, -7, 5.5, [[1]], [True], DEEP]


def places(data, at=()):
    yield at
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def with_value(data, at, value):
    if not at:
        return value
    made = inner = copy.deepcopy(data)
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return made


def same(one, other):
    """Equal, and a truth is no number."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return float(one) == float(other) if numbers else one == other


def in_normal_form(value):
    """Other ways to write the same: one block number alone, no scales as a mapping."""
    if isinstance(value, dict):
        return {name: in_normal_form(each) for name, each in value.items()} or []
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


@pytest.mark.parametrize("path", VERSION_1, ids=lambda path: path.stem)
def test_each_value_of_each_file_is_kept_or_refused(path):
    """Every value is replaced by each wrong one: never a raw error, never another value than the one that was given."""
    held = json.loads(path.read_text(encoding="utf-8"))
    kind = getattr(importlib.import_module(held["package"]), held["class"])
    for at in places(held["data"]):
        for wrong in WRONG:
            try:
                found = kind.from_dict(with_value(held["data"], at, wrong))
            except SkipError:
                continue
            kept = json.loads(json.dumps(found.to_dict()))
            if "points" in at or at[-1] in ("attn", "mlp") or at[-2:-1] in (("attn",), ("mlp",)):
                continue  # these are sorted
            for key in at:
                kept = kept[key]
            given = held["data"].get("formula") == "segmented" and at == ("cfg_interval",) and wrong is None
            # with layers of one's own, None says what holds then
            given |= wrong is None and len(at) == 1 and kept == DEFAULTS.get(at[0], object())
            assert given or same(kept, wrong) or same(kept, in_normal_form(wrong)), (at, wrong, kept)
