"""Skip Tuning: caches of features, reused, checked and bounded."""

import json
import os

import pytest
import torch
from helpers.tuning import clip, run, same, state, tuner

from skipguide.errors import SkipError
from skipguide.vision.skip_tuning.cache import FeatureCache, prune


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_every_cache_gives_the_same_weights(place, tmp_path):
    assert same(state(run()[0].model), state(run(cache=place, cache_dir=tmp_path)[0].model))


def test_cache_on_disk_is_reused_and_checked(tmp_path):
    run(cache="disk", cache_dir=tmp_path)
    (home,) = tmp_path.glob("features-*")
    stamp = (home / "features-00000.safetensors").stat().st_mtime_ns
    run(cache="disk", cache_dir=tmp_path)
    assert (home / "features-00000.safetensors").stat().st_mtime_ns == stamp
    run(tuner(clip(seed=1)), cache="disk", cache_dir=tmp_path)
    assert len(list(tmp_path.glob("features-*"))) == 2
    file = home / "features-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 255
    file.write_bytes(bytes(data))
    with pytest.raises(SkipError, match="was changed"):
        run(cache="disk", cache_dir=tmp_path)
    run(cache="disk", cache_dir=tmp_path, cache_refresh=True)
    index = json.loads((home / "index.json").read_text())
    index["parts"]["model"] = "another"
    (home / "index.json").write_text(json.dumps(index))
    with pytest.raises(SkipError, match="stale"):
        run(cache="disk", cache_dir=tmp_path)
    (home / "index.json").write_text("{")
    with pytest.raises(SkipError, match="damaged"):
        run(cache="disk", cache_dir=tmp_path)
    assert not list(tmp_path.glob(".partial*"))


def test_cache_with_other_features_is_stale(tmp_path):
    def build_with(value):
        return FeatureCache.build(
            lambda places: torch.full((len(places), 2, 3), value),
            5,
            place="disk",
            device=torch.device("cpu"),
            batch=2,
            folder=tmp_path,
            parts={"row_bytes": 24},
            progress=False,
        )

    assert not build_with(1.0).reused
    assert build_with(1.0).reused
    with pytest.raises(SkipError, match="stale"):
        build_with(2.0)


def test_caches_are_bounded(tmp_path):
    with pytest.raises(SkipError, match="cache_limit"):
        run(cache_limit=100)
    with pytest.raises(SkipError, match="cache_dir"):
        run(cache="disk")
    for i in range(3):
        home = tmp_path / f"features-{i}"
        home.mkdir()
        (home / "x").write_bytes(b"0" * 100)
        os.utime(home, (i, i))
    prune(tmp_path, 200)
    assert sorted(h.name for h in tmp_path.iterdir()) == ["features-1", "features-2"]
