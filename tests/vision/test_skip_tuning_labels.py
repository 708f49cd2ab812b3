"""Skip Tuning: a label never means another class, and a picture never other pixels, whatever holds them."""

import warnings

import numpy as np
import pytest
import torch
from helpers.tuning import NAMES, clip, folder, images, pairs, run, tuner, words
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, random_split
from torchvision.datasets import ImageFolder
from transformers import CLIPModel, CLIPProcessor

from skipguide.assets import bundled
from skipguide.errors import SkipError
from skipguide.vision.skip_tuning import SkipTuner
from skipguide.vision.skip_tuning.inputs import read_examples, read_folder

SHAPES = ["red circle", "blue star"]  # not in the order of the alphabet, which ImageFolder counts


@pytest.fixture(scope="module")
def stock():
    asset = bundled("tiny-clip")
    return CLIPModel.from_pretrained(asset), CLIPProcessor.from_pretrained(asset)


def test_parts_and_chains_of_a_data_set_keep_its_classes(tmp_path):
    whole = ImageFolder(folder(tmp_path, ("red_circle", "blue star", "zebra")))
    part, rest = random_split(whole, [5, 4], torch.Generator().manual_seed(0))
    for data in (
        whole,
        Subset(whole, range(9)),
        ConcatDataset([part, rest]),
        Subset(ConcatDataset([part, rest]), range(9)),
    ):
        found = read_examples(data, SHAPES)
        assert found.names == SHAPES and sorted(found.labels) == [0, 0, 0, 1, 1, 1]
        for place, label in enumerate(found.labels):
            assert found.load(place).getpixel((0, 0))[1] == (0, 100)[label], "green says which folder it came from"
    other = ImageFolder(folder(tmp_path / "more", ("red_circle", "cat")))
    with pytest.raises(SkipError, match=r"same classes.*'cat'"):
        read_examples(ConcatDataset([whole, other]), SHAPES)


def test_labels_behind_a_target_transform_are_those_of_the_items(tmp_path):
    data = ImageFolder(folder(tmp_path), target_transform=lambda label: 1 - label)
    assert read_examples(data, SHAPES).labels == [1 - label for label in data.targets]


def test_the_root_of_a_data_set_is_no_folder_of_classes(tmp_path):
    for part in ("train", "test"):
        folder(tmp_path / part)
    with pytest.raises(SkipError, match=r"'test', 'train', which are parts.*give one of them, such as .*train"):
        read_folder(tmp_path)
    assert read_folder(tmp_path / "train").names == ["blue star", "red circle"]


def test_names_that_are_one_in_a_prompt_do_not_merge(tmp_path):
    folder(tmp_path, ("red_circle", "red circle"))
    with pytest.raises(SkipError, match="'red circle' and 'red_circle' are one in a prompt"):
        read_folder(tmp_path)
    with pytest.raises(SkipError, match="'red circle' and 'red_circle' are one in a prompt"):
        read_examples(ImageFolder(tmp_path), SHAPES[:1])
    with pytest.raises(SkipError, match="are one in a prompt"):
        tuner().evaluate((images(2), ["pink moon", "pink_moon"]))


def test_names_that_the_tokenizer_does_not_tell_apart_are_named(stock):
    long = "circle " * 90
    for names in (["Red circle", "red circle"], [long + "red", long + "blue"]):
        t = SkipTuner(*stock, names, 2)
        for ask in (t.classifier, lambda t=t: t.fit((images(2), [0, 1]), progress=False)):
            with pytest.raises(SkipError, match=f"{names[0][:9]}.*' and '.*same tokens"):
                ask()


def test_labels_that_are_none(tmp_path):
    ones = torch.eye(4).repeat_interleave(2, 0)
    for labels, message in (
        (ones, r"argmax\(1\)"),
        ([None] * 8, "drop images without a label"),
        ([[0]] * 8, "image 0 has"),
        (["a"] * 4 + [3] * 4, "got both"),
    ):
        with pytest.raises(SkipError, match=message):
            tuner().fit((images(8), labels))
    expected = tuner().evaluate(pairs())
    pictures, labels = pairs()
    assert tuner().evaluate([pictures, labels]) == expected
    assert tuner().evaluate([pictures, torch.tensor(labels)]) == expected
    assert tuner().evaluate((pictures, np.array(labels))) == expected
    assert tuner().evaluate(list(zip(pictures, labels, strict=True))[:2]).count == 2

    class ImageNet:
        classes = [("red circle", "disc"), ("blue star",), ("green cross",), ("pink moon", "moon")]  # noqa: RUF012
        targets = labels

        def __len__(self):
            return 8

        def __getitem__(self, i):
            return pictures[i], labels[i]

    assert tuner().evaluate(ImageNet()) == expected


def test_a_picture_is_the_same_in_every_form(stock, tmp_path):
    t = SkipTuner(*stock, SHAPES, 2)
    colours = torch.randint(0, 256, (40, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    picture = Image.fromarray(colours.numpy())
    picture.save(tmp_path / "a.png")
    expected = t.logits([picture])
    floats = colours.numpy() / np.float32(255)
    for form in (colours.numpy(), floats, floats.transpose(2, 0, 1), colours.permute(2, 0, 1), tmp_path / "a.png"):
        torch.testing.assert_close(t.logits([form]), expected)
    grey = colours.numpy()[..., 0]
    torch.testing.assert_close(t.logits([grey]), t.logits([Image.fromarray(grey)]))
    for wrong, message in (
        (floats * 255, "floats in 0..1"),
        (colours.long().permute(2, 0, 1), "bytes"),
        (torch.zeros(3, 24, 24), r"\[3, 32, 32\] of one image"),
        (torch.zeros(1, 32, 32), r"\[3, 32, 32\] of one image"),
        (np.zeros((2, 4, 4, 3), np.uint8), "one picture"),
        (3, "got int"),
        (tmp_path / "b.png", "b.png is not a readable picture"),
    ):
        with pytest.raises(SkipError, match=message):
            t.predict(wrong)


def test_a_transform_that_makes_no_pixels_is_named():
    picture = Image.new("RGB", (16, 16))
    for transform, got in (
        (lambda x: x, "Image"),
        (np.asarray, "ndarray"),
        (lambda x: torch.zeros(3, 16, 16).byte(), "uint8"),
    ):
        with pytest.raises(SkipError, match=f"normalised pixels.*got .*{got}"):
            SkipTuner(clip(), (transform, words), NAMES, 1).predict(picture)
    with pytest.raises(SkipError, match="picture of bytes"):
        tuner().predict(torch.zeros(3, 16, 16, dtype=torch.int32))


def test_merging_into_half_precision_says_what_is_lost():
    done, _ = run(tuner(clip().half()), lr_text=1e-5, lr_image=1e-5, warmup_lr=1e-6)
    with pytest.warns(RuntimeWarning, match=r"\d+ % are lost by rounding to torch\.float16.*float32"):
        merged = done.merge()
    assert next(merged.parameters()).dtype is torch.float16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = done.merge(dtype=torch.float32)
    state = merged.state_dict()
    assert all(torch.equal(state[name], p) for name, p in done.parameters().items())
