"""The commands of the vision systems: what they say of files and flags that cannot be meant."""

import argparse
import contextlib
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from helpers.tuning import folder
from PIL import Image

from skipguide.cli import main, pipeline_calls
from skipguide.cli.commands import rank, segment
from skipguide.errors import SkipError
from skipguide.pipelines import stg
from skipguide.vision.floorplan import generate_plan, write_plan
from skipguide.vision.layer_masking.classifiers import load_classifier
from zoo.pipes import BY_PIPE


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
    return tmp_path / "bomb.png"


@pytest.mark.parametrize(
    "words",
    [
        ("segment", "{}"),
        ("explain", "{}", "--random-weights"),
        ("clip", "predict", "{}", "--classes", "cat,dog"),
    ],
    ids=lambda words: words[0],
)
def test_a_picture_too_large_to_open_is_one_sentence(words, bomb, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(bomb) for word in words]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert "bomb.png is larger than Pillow opens" in complaint and "reduce it" in complaint


def test_a_folder_with_a_picture_too_large_to_open(tmp_path, capsys, monkeypatch):
    folder(tmp_path / "photos")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert main(["clip", "eval", str(tmp_path / "photos")]) == 2
    assert "larger than Pillow opens" in capsys.readouterr().err


def test_pictures_under_the_bundled_model_come_with_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "navy").save("cells.png")
    assert main(["segment", "cells.png", "--device", "cpu"]) == 0
    assert "has learned cell nuclei and nothing else" in capsys.readouterr().err
    assert main(["segment", "--size", "32", "--device", "cpu", "-o", "made-up.png"]) == 0
    assert not capsys.readouterr().err


def test_seeds_and_programmes_of_plans_that_are_given(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_plan(generate_plan(3), "msd")
    for extra in (["--seed", "3"], ["--seed", "200000"], ["--programme", "office"]):
        assert main(["floorplan", "--data", "msd", *extra]) == 2
        assert "--seed and --programme belong to a made-up plan" in capsys.readouterr().err
    assert main(["floorplan", "--device", "cpu"]) == 0
    assert json.loads(Path("floorplan.png.json").read_text())["arguments"]["seed"] == 200_000


def test_layers_that_were_chosen_are_noted_by_their_numbers(monkeypatch):
    def chosen(pipe, name, part, *_):
        return (5, 7) if part == "attn" else (1,) if name == "transformer" else (2,)

    monkeypatch.setattr(stg, "auto_layers", chosen)
    asked = argparse.Namespace(layers="auto", part="attn", scale=1.0)
    assert pipeline_calls.guidance_arguments(asked, BY_PIPE["ltx"].build())["layers"] == [5, 7]
    found = pipeline_calls.guidance_arguments(argparse.Namespace(layers="auto", scale=1.0), BY_PIPE["wan22"].build())
    assert found["layers"] == {"transformer": [1], "transformer_2": [2]}
    assert pipeline_calls.make_guidance(found).layers == {"transformer": (1,), "transformer_2": (2,)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rank", "--levels", "9", "--steps", "2"], "at most the 2 --steps"),
        (["rank", "--levels", "4", "--steps", "2"], "at most the 2 --steps"),
        (["rank", "--prompts", "a circle", " "], "one of --prompts is empty"),
        (["generate", ""], "expected a prompt in words"),
        (["compare", " "], "expected a prompt in words"),
        (["sweep", ""], "expected a prompt in words"),
        (["explain", "x.png", "--checkpoint", "w.pth", "--random-weights"], "give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_cannot_be_meant(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_weights_of_ones_own_are_explained(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    Image.new("RGB", (64, 64), "olive").save("a.png")
    name = "mobilenetv3_small_050" if kind == "timm" else "mnasnet0_5"
    make = timm.create_model if kind == "timm" else torchvision.models.get_model
    model = make(name, num_classes=3).eval()
    torch.save({"epoch": 1, "model": torch.nn.ModuleDict({"module": model}).state_dict()}, "w.pth")
    words = ["explain", "a.png", "--model", name, "--segments", "grid:2", "--samples", "4", "--device", "cpu"]
    assert main([*words, "--checkpoint", "w.pth"]) == 0
    numbers = json.loads(Path("a-explained.png.json").read_text())
    made = load_classifier(name, checkpoint="w.pth")
    with torch.no_grad():
        expected = model(made.prepare(Image.open("a.png").convert("RGB"))[None]).softmax(1)[0]
    assert [row["label"] for row in numbers["predictions"]] == [
        f"class {int(c)}" for c in expected.argsort(descending=True)
    ]
    assert numbers["predictions"][0]["probability"] == pytest.approx(float(expected.max()), abs=1e-4)
    with pytest.raises(SkipError, match=r"w\.pth does not hold the weights of resnet18: .*Missing"):
        load_classifier("resnet18", checkpoint="w.pth")


@pytest.mark.parametrize("action", ["tune", "eval", "predict"])
def test_every_action_of_clip_has_a_description_and_an_example(action, capsys):
    with contextlib.suppress(SystemExit):
        main(["clip", action, "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text and f"skipguide clip {action} " in text.split("examples:")[1]
    assert text.split("\n\n")[1].strip().endswith("."), "what it does, in a sentence"


def test_a_prediction_of_nothing_is_no_copy_of_the_input():
    picture = Image.new("RGB", (16, 16), "navy")
    results = [
        [{"name": "head L1", "mask": torch.zeros(16, 16, dtype=torch.bool), "share": 0.0, "nodes": 1.0}],
        [{"name": "head L1", "mask": torch.ones(16, 16, dtype=torch.bool), "share": 1.0, "nodes": 1.0}],
    ]
    _, rows, captions = segment._sheet([("a", picture, None), ("b", picture, None)], results, None)
    assert captions[0][1].startswith("nothing found") and captions[1][1].startswith("100.0 % of the picture found")
    assert rows[0][0].tobytes() != rows[0][1].tobytes()


def test_the_plot_of_a_ranking_names_every_sign(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from skipguide.select import LayerScore, LayerScores

    def row(layer, effect, alignment):
        return LayerScore(layer, f"blocks.{layer}", "blocks", "block", effect, alignment, *(None,) * 4, 0.5, 1)

    scores = LayerScores((row(0, 0.1, 0.2), row(1, 0.6, 0.1), row(2, 0.2, 0.25)), "Toy", 3, "", {})
    kept = []
    close = pyplot.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", kept.append)
        rank._plot(pyplot, scores, "apart", tmp_path / "rank.png")
    (figure,) = kept
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any("effect 0.3" in each for each in words) and any("ranked last" in each for each in words)
    assert any(each.startswith("taken first: 2 block") for each in words) and words.count("block") == 1
    assert "c: with the prompt, u: without it" in figure.get_suptitle()
    assert not any(axes.get_legend() for axes in figure.axes), "none lies over a point"
    close(figure)


def test_a_sweep_says_how_many_steps_it_took():
    class Pipeline:
        def __call__(self, prompt, num_inference_steps=50):
            """As a pipeline's."""

    job = argparse.Namespace(call={}, pipeline_class=Pipeline)
    assert pipeline_calls.steps_of(job) == 50
    job.call["num_inference_steps"] = 8
    assert pipeline_calls.steps_of(job) == 8
