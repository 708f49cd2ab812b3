"""Skip Tuning: bad input, each a clear error."""

import pytest
import torch
from helpers.tuning import NAMES, clip, images, run, tuner, words
from PIL import Image

from skipguide.errors import SkipError
from skipguide.vision.skip_tuning import ClassSkip, SkipTuner, TuneConfig


def test_data_that_cannot_be_meant():
    t = tuner()
    for ask, message in (
        (lambda: t.predict([]), "at least one image"),
        (lambda: t.predict(torch.rand(2, 3, 16, 16)), r"\[3, 16, 16\] of one image"),
        (lambda: t.evaluate((images(2), ["pink moon"] * 2), ["purple rain"]), "'purple rain'; the data has none"),
        (lambda: t.evaluate((images(2), [0.5, 1.0])), "whole numbers"),
    ):
        with pytest.raises(SkipError, match=message):
            ask()
    assert t.evaluate((images(2), [0.0, 1.0])).count == 2
    braces = SkipTuner(clip(), words, NAMES, templates="a {} {x}")
    assert braces.texts(["cat"]) == ["a cat {x}"]


@pytest.mark.parametrize("layer", [-1, 3, 99, True, 1.5, {"image": 1}, {"image": 1, "text": 7}])
def test_layers_out_of_range(layer):
    with pytest.raises(SkipError, match="skip_layers"):
        tuner(skip=layer)


@pytest.mark.parametrize("names", [[], "cat", ["cat", ""], ["cat", "cat"], ["a_b", "a b"], ["cat", None], ["cat", "_"]])
def test_bad_class_names(names):
    with pytest.raises(SkipError, match="class"):
        SkipTuner(clip(), words, names, 1)


def test_bad_data(tmp_path):
    with pytest.raises(SkipError, match="'pink moon' has none"):
        tuner().fit((images(6), [0, 0, 1, 1, 2, 2]))
    with pytest.raises(SkipError, match="at least 5 images"):
        run(shots=5)
    with pytest.raises(SkipError, match="labels from 0 to 3"):
        tuner().fit((images(2), [0, 7]))
    with pytest.raises(SkipError, match="as many labels"):
        tuner().fit((images(3), [0]))
    with pytest.raises(SkipError, match="no folder"):
        tuner().fit(tmp_path / "missing")
    with pytest.raises(SkipError, match="one folder of images per class"):
        tuner().fit(tmp_path)
    with pytest.raises(SkipError, match="processor"):
        tuner().predict(Image.new("RGB", (16, 16)))
    with pytest.raises(SkipError, match=r"finite (loss|gradients|weights)"):
        run(lr_text=1e18, lr_image=1e18, epochs=3)


def test_bad_models():
    with pytest.raises(SkipError, match="dropout"):
        tuner(clip(attention_dropout=0.1))
    with pytest.raises(SkipError, match="CLIPModel"):
        tuner(torch.nn.Linear(2, 2))
    broken = clip()
    broken.text_model.encoder.layers[2].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(SkipError, match="finite"):
        run(tuner(broken))


def test_a_model_that_does_something_else_is_noticed():
    model = clip()
    model.vision_model.encoder.layers[2].register_forward_hook(lambda m, a, out: out + torch.arange(16))
    with pytest.raises(SkipError, match="resumed pass"):
        run(tuner(model))


@pytest.mark.parametrize(
    "settings_",
    [{"epochs": 0}, {"lr_text": -1}, {"views": 0}, {"cache": "moon"}, {"precision": "int8"}, {"warmup_epochs": -1}],
)
def test_bad_settings(settings_):
    with pytest.raises(SkipError):
        TuneConfig(**settings_)


@pytest.mark.parametrize("settings_", [{"ratio": 0}, {"max": 0}, {"decay": 0}, {"resample": "never"}])
def test_bad_class_skip(settings_):
    with pytest.raises(SkipError):
        ClassSkip(**settings_)


@pytest.mark.parametrize("template", ["no place", "{} {}", []])
def test_bad_templates(template):
    with pytest.raises(SkipError, match="template"):
        SkipTuner(clip(), words, NAMES, 1, templates=template)


def test_open_clips_towers_of_other_libraries_are_not_sent_to_transformers():
    pytest.importorskip("open_clip")
    from skipguide.vision.skip_tuning.open_clip_towers import open_clip_towers

    eva = torch.nn.Module()
    eva.visual = torch.nn.Identity()
    with pytest.raises(
        SkipError, match=r"SiglipModel of transformers; EVA, .* not supported, choose a ViT-\* of open_clip"
    ):
        open_clip_towers(eva)
