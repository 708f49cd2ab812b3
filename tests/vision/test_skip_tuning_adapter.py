"""Skip Tuning: what comes out, as an adapter, interpolated, merged or pushed."""

from pathlib import Path

import pytest
import torch
from helpers.tuning import NAMES, clip, run, same, state, tuner, words
from transformers import CLIPModel

from skipguide.errors import SkipError
from skipguide.vision.skip_tuning import ClassSkip, SkipTuner


def test_adapter_round_trip(tmp_path):
    t, _ = run(tuner(classes=ClassSkip(0.4)))
    t.save_adapter(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.json", "adapter.safetensors"]
    again = SkipTuner.from_adapter(clip(), words, tmp_path / "a")
    assert again.class_skip == t.class_skip and again.classnames == NAMES and again.templates == ["a {}"]
    assert same(state(t.model), state(again.model))
    with pytest.raises(SkipError, match="exists"):
        t.save_adapter(tmp_path / "a")
    with pytest.raises(SkipError, match="another model"):
        tuner(clip(seed=1)).load_adapter(tmp_path / "a")
    with pytest.raises(SkipError, match="pass the same skip_layers"):
        tuner(skip=2).load_adapter(tmp_path / "a")


def test_a_half_written_adapter_replaces_nothing(tmp_path, monkeypatch):
    t, _ = run()
    t.save_adapter(tmp_path)
    good = (tmp_path / "adapter.safetensors").read_bytes()
    from skipguide.vision.skip_tuning import adapter

    def dies(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(adapter, "save_file", dies)
    with pytest.raises(OSError, match="disk full"):
        t.save_adapter(tmp_path, overwrite=True)
    assert (tmp_path / "adapter.safetensors").read_bytes() == good
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "adapter.safetensors").write_bytes(good[:100])
    with pytest.raises(SkipError, match="damaged"):
        tuner().load_adapter(tmp_path)


def test_interpolation_and_merge():
    t, _ = run()
    tuned = state(t.model)
    start = state(t.pretrained)
    assert same(state(t.interpolate(0).model), start)
    half = state(t.interpolate(0.5).model)
    name = t.names[0]
    torch.testing.assert_close(half[name], (tuned[name] + start[name]) / 2)
    assert same(state(t.interpolate(1).model), tuned)
    merged = t.merge()
    assert same(state(merged), tuned) and type(merged) is CLIPModel
    with pytest.raises(SkipError, match="alpha"):
        t.interpolate(1.5)


def test_push_uploads_the_adapter(monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def create_repo(self, repo_id, **more):
            seen["repo"] = repo_id

        def upload_folder(self, repo_id, folder_path, **more):
            seen["files"] = sorted(p.name for p in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    run()[0].push_to_hub("me/adapter")
    assert seen == {"repo": "me/adapter", "files": ["adapter.json", "adapter.safetensors"]}
