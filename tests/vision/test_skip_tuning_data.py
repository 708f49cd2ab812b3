"""Skip Tuning: images, labels and templates, which classes a step leaves out, and caches of features."""

import json
import os

import pytest
import torch
from helpers.tuning import NAMES, clip, folder, images, pairs, run, same, state, tuner, words
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from skipguide.assets import bundled
from skipguide.errors import SkipError
from skipguide.vision.skip_tuning import ClassSkip, SkipTuner, few_shot, split_base_new
from skipguide.vision.skip_tuning.cache import FeatureCache, prune
from skipguide.vision.skip_tuning.classes import choose
from skipguide.vision.skip_tuning.samplers import class_batches
from skipguide.vision.skip_tuning.step import StepModule


def test_a_folder_in_five_lines(tmp_path):
    data = folder(tmp_path / "photos")
    asset = bundled("tiny-clip")
    model, processor = CLIPModel.from_pretrained(asset), CLIPProcessor.from_pretrained(asset)
    t = SkipTuner(model, processor, ["blue star", "red circle"])
    t.fit(data, epochs=3, lr_text=1e-3, lr_image=1e-3, progress=False)
    stock = t.merge()
    assert type(stock) is CLIPModel
    image = Image.open(data / "blue star" / "0.png")
    best = t.predict(image, topk=1)
    inputs = processor(text=t.texts(), images=image, return_tensors="pt", padding=True)
    shares = stock(**inputs).logits_per_image.softmax(1)[0]
    assert best[0][1] == pytest.approx(shares.max().item(), abs=1e-4)
    assert best[0][0] == t.classnames[int(shares.argmax())]


def test_datasets_of_pairs_and_names():
    class Pairs:
        classes = NAMES

        def __len__(self):
            return 8

        def __getitem__(self, i):
            return images()[i], i // 2

    accuracy = tuner().evaluate(pairs()).accuracy
    assert tuner().evaluate(Pairs()).accuracy == accuracy
    named = (images(), [NAMES[i // 2] for i in range(8)])
    assert tuner().evaluate(named).accuracy == accuracy


def test_few_shot_draws_the_same_for_the_same_seed():
    labels = [i % 5 for i in range(40)]
    chosen = few_shot(labels, 3, seed=4)
    assert chosen == few_shot(labels, 3, seed=4) != few_shot(labels, 3, seed=5)
    assert sorted(labels[i] for i in chosen) == sorted([*range(5)] * 3)
    import random

    for batch in class_batches(labels, 3, random.Random(0)):
        assert len({labels[i] for i in batch}) == 1


def test_base_and_new(tmp_path):
    base, new = split_base_new(NAMES)
    t = SkipTuner(clip(), words, base, 1, templates="a {}")
    all_images = (images(), [NAMES[i // 2] for i in range(8)])
    table = t.evaluate_base_new(all_images, new)
    assert table.base == t.evaluate(all_images, base).accuracy
    assert table.h <= max(table.base, table.new)
    table.save(tmp_path / "t.csv")
    table.save(tmp_path / "t.md")
    assert (tmp_path / "t.csv").read_text().startswith("label,base,new,h\n")
    with pytest.raises(SkipError, match="exists"):
        table.save(tmp_path / "t.csv")
    with pytest.raises(SkipError, match="both hold"):
        t.evaluate_base_new(all_images, base)


def test_templates_are_averaged():
    t = tuner()
    one, two = t.classifier(templates="a {}"), t.classifier(templates="the {}")
    both = t.classifier(templates=["a {}", "the {}"])
    torch.testing.assert_close(both, torch.nn.functional.normalize(one + two, dim=-1))


@given(st.integers(1, 200), st.floats(0.05, 1.0), st.integers(1, 60), st.floats(0.01, 2.0))
@settings(max_examples=60, deadline=None)
def test_probabilities_are_probabilities(classes, ratio, most, decay):
    skip = ClassSkip(ratio, most, decay)
    p = skip.probabilities(classes)
    assert torch.isfinite(p).all()
    assert (p >= 0).all() and (p <= 1).all()
    assert (p.diff() <= 1e-12).all()
    assert (p[: skip.certain(classes)] == 1).all()
    assert p[0] == 1


def test_labels_of_the_batch_are_never_dropped():
    order = torch.arange(10).flip(0)
    ranks = torch.zeros(10, dtype=torch.bool)
    assert choose(order, ranks, torch.tensor([7, 0, 7, 3])).tolist() == [0, 3, 7]


def test_a_step_with_every_label_counts_every_label():
    t = tuner(classes=ClassSkip(ratio=1.5, max=1))
    step = StepModule(t.towers, t.text_prefix(), 1, 1, t.class_skip, 1)
    with torch.no_grad():
        hidden = t.towers.image.prefix(torch.stack(images(4)), 1)
        loss, logits = step(hidden, torch.arange(4))
        plain = StepModule(t.towers, t.text_prefix(), 1, 1, None, 1)(hidden, torch.arange(4))
    torch.testing.assert_close(logits, plain[1])
    torch.testing.assert_close(loss, plain[0])


def test_classes_that_are_left_out_are_not_computed():
    t = SkipTuner(clip(), words, [f"c{chr(97 + i)}" for i in range(20)], 1, ClassSkip(ratio=0.2), templates="a {}")
    rows = []
    handle = t.towers.text.blocks[1].register_forward_hook(lambda m, a, out: rows.append(len(out)))
    step = StepModule(t.towers, t.text_prefix(), 1, 1, t.class_skip, 1)
    step(t.towers.image.prefix(torch.stack(images(1)), 1), torch.tensor([3]))
    handle.remove()
    assert rows[-1] == len(step.kept) < 10
    assert 3 in step.kept.tolist()


def test_ranks_are_drawn_once_or_every_step():
    for resample, count in (("run", 1), ("step", 6)):
        t = SkipTuner(
            clip(), words, [f"c{chr(97 + i)}" for i in range(20)], 1, ClassSkip(0.2, decay=2, resample=resample)
        )
        step = StepModule(t.towers, t.text_prefix(), 1, 1, t.class_skip, 1)
        drawn = set()
        for _ in range(12):
            step(t.towers.image.prefix(torch.stack(images(1)), 1), torch.tensor([3]))
            drawn.add(tuple(step.ranks.tolist()))
        assert (len(drawn) == 1) if count == 1 else (len(drawn) >= count)


def test_few_classes_stay_finite():
    for count in (1, 2, 3):
        t = SkipTuner(clip(), words, NAMES[:count], 1, ClassSkip(), templates="a {}")
        report = t.fit((images(count), list(range(count))), epochs=1, progress=False)
        assert all(loss == loss for loss in report.losses)


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
