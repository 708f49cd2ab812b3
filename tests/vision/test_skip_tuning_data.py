"""Skip Tuning: folders, pairs, shots, base and new classes, templates."""

import pytest
import torch
from helpers.tuning import NAMES, clip, folder, images, pairs, tuner, words
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from skipguide.assets import bundled
from skipguide.errors import SkipError
from skipguide.vision.skip_tuning import SkipTuner, few_shot, split_base_new
from skipguide.vision.skip_tuning.samplers import class_batches


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
