"""Many masks, attributions, captum and lime, the command line, the bundled model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from skipguide.cli import main
from skipguide.errors import SkipError
from skipguide.vision import masked_forward
from skipguide.vision.layer_masking import (
    SENTINEL,
    grid_segments,
    lime,
    lime_classifier,
    many_masks,
    occlusion,
    rise,
    segment_masks,
    slic_segments,
)
from skipguide.vision.layer_masking.attribution import fit_linear
from skipguide.vision.layer_masking.classifiers import load_classifier
from skipguide.vision.layer_masking.explain import draw, explain

ROOT = Path(__file__).resolve().parents[2]
SCENES = ROOT / "demos" / "layer_masking" / "scenes"


@pytest.fixture(scope="module")
def tiny():
    return load_classifier("tiny-cnn")


@pytest.fixture(scope="module")
def star(tiny):
    with Image.open(SCENES / "star.png") as file:
        return tiny.prepare(file.convert("RGB"))


@pytest.fixture
def parts():
    return grid_segments(64, 64, 4)


# --- many masks


@torch.no_grad()
def test_many_masks_are_answered_once_and_in_order(tiny, star, parts):
    g = torch.Generator().manual_seed(0)
    shown = torch.rand(40, 16, generator=g) < 0.4
    shown = torch.cat([shown, shown[:7], torch.eye(16, dtype=torch.bool), torch.ones(1, 16, dtype=torch.bool)])
    forward = masked_forward(tiny.model)
    found = many_masks(forward, star, shown, parts, batch=9)
    assert forward.stats.rows == len(torch.unique(shown, dim=0))
    one = masked_forward(tiny.model, crop=False)
    wanted = torch.cat([one(mask[None], star[None]) for mask in segment_masks(shown, parts)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert forward.stats.computed <= 1
    masks = many_masks(forward, star[None], segment_masks(shown, parts))
    torch.testing.assert_close(masks, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_small_boxes_lie_together(tiny, star):
    """One patch at a time: batches are cut, because neighbours come one after the other."""
    parts = grid_segments(64, 64, 8)
    forward = masked_forward(tiny.model)
    shares = []
    masked_forward(tiny.model)(segment_masks(torch.eye(64, dtype=torch.bool)[:1], parts), star[None])  # traced
    original = type(forward).__call__

    class Watched(type(forward)):
        def __call__(self, keep, images):
            out = original(self, keep, images)
            shares.append(self.stats.computed)
            return out

    forward.__class__ = Watched
    many_masks(forward, star, torch.eye(64, dtype=torch.bool), parts, batch=4)
    assert len(shares) == 16 and sum(shares) / 16 < 0.5


def test_memory_that_does_not_suffice_halves_the_batch(tiny, star, parts):
    forward = masked_forward(tiny.model)
    sizes = []

    class Small:
        masker = forward.masker

        def __call__(self, keep, images):
            sizes.append(len(keep))
            if len(keep) > 3:
                raise torch.OutOfMemoryError("out")
            return forward(keep, images)

    shown = ~torch.eye(16, dtype=torch.bool)
    with torch.no_grad():
        found = many_masks(Small(), star, shown, parts, batch=12)
        torch.testing.assert_close(found, many_masks(forward, star, shown, parts), rtol=1e-4, atol=1e-4)
    assert sizes[:3] == [12, 6, 3] and set(sizes[3:]) <= {3, 1}


def test_bad_masks_and_segments_are_refused(tiny, star, parts):
    forward = masked_forward(tiny.model)
    with pytest.raises(SkipError, match="one image"):
        many_masks(forward, torch.stack([star, star]), torch.ones(2, 16), parts)
    with pytest.raises(SkipError, match="segments of size"):
        many_masks(forward, star, torch.ones(2, 16), parts[:32])
    with pytest.raises(SkipError, match="numbered below S"):
        many_masks(forward, star, torch.ones(2, 15), parts)
    with pytest.raises(SkipError, match="at least one mask"):
        many_masks(forward, star, torch.ones(0, 16), parts)
    with pytest.raises(SkipError, match="cells"):
        grid_segments(8, 8, 9)


# --- attributions


def test_decisions_and_targets_that_are_none_are_refused(tiny, star, parts):
    forward = masked_forward(tiny.model)
    shown = torch.ones(2, 16, dtype=torch.bool)
    for ask, message in (
        (lambda: many_masks(forward, star, 0.3 * shown, parts), "all 0 or 1"),
        (lambda: segment_masks(0.3 * shown, parts), "all 0 or 1"),
        (lambda: many_masks(forward, star, torch.ones(2, 32, 32).bool()), "image's size"),
        (lambda: many_masks(forward, star, shown, parts.float()), "whole numbers"),
        (lambda: many_masks(forward, star, shown, parts, batch=-1), "batch"),
        (lambda: occlusion(forward, star, parts, 99), "0 to 9"),
        (lambda: lime(forward, star, parts, -1, samples=2), "0 to 9"),
        (lambda: lime(forward, star, parts, 0, samples=2, width=0.0), "width"),
        (lambda: rise(forward, star, 10, samples=2), "0 to 9"),
        (lambda: rise(forward, star, 0, samples=0), "samples"),
        (lambda: rise(forward, star, 0, samples=2, cells=0), "cells"),
    ):
        with pytest.raises(SkipError, match=message), torch.no_grad():
            ask()
    with torch.no_grad():
        numbers = many_masks(forward, star, shown.float(), parts.int())
        assert torch.equal(numbers, many_masks(forward, star, shown, parts))


def test_linear_fit_finds_a_linear_model():
    g = torch.Generator().manual_seed(0)
    shown = (torch.rand(400, 12, generator=g) < 0.5).double()
    truth = torch.randn(12, generator=g).double()
    torch.testing.assert_close(fit_linear(shown, shown @ truth + 3, ridge=1e-9), truth, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_occlusion_is_the_drop_of_the_probability(tiny, star, parts):
    forward = masked_forward(tiny.model)
    target = tiny.labels.index("star")
    drops = occlusion(forward, star, parts, target)
    keep = (parts != 5)[None, None]
    plain = tiny.model(star[None]).softmax(1)[0, target]
    gone = forward(keep, star[None]).softmax(1)[0, target]
    torch.testing.assert_close(drops[5], plain - gone, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_explanations_point_at_the_shape(tiny):
    """On scenes where the shape's pixels are known; the three that the notebook takes one of."""
    from demos.layer_masking import data

    scenes = data.make_scenes(48, 11)
    x = data.normalized(scenes.images)
    right = (tiny.model(x).argmax(1) == scenes.labels).nonzero()[:5, 0].tolist()
    parts = grid_segments(64, 64, 8)
    forward = masked_forward(tiny.model)
    on = {"lime": 0.0, "occlusion": 0.0, "rise": 0.0}
    for n in right:
        label, shape = int(scenes.labels[n]), scenes.shapes[n].float()
        heats = {
            "lime": lime(forward, x[n], parts, label, samples=200)[parts],
            "occlusion": occlusion(forward, x[n], parts, label)[parts],
            "rise": rise(forward, x[n], label, samples=250),
        }
        for name, heat in heats.items():
            inside = (heat * shape).sum() / shape.sum()
            outside = (heat * (1 - shape)).sum() / (1 - shape).sum()
            on[name] += float(inside > outside)
    assert all(value >= 4 for value in on.values()), on


def test_slic_follows_colours():
    image = torch.zeros(3, 32, 32)
    image[0, :, 16:] = 1
    parts = slic_segments(image, 8)
    assert parts.shape == (32, 32) and not set(parts[:, :16].unique().tolist()) & set(parts[:, 16:].unique().tolist())


# --- captum and lime


@pytest.fixture
def captum_case(tiny, star, parts):
    torch.manual_seed(0)
    return (
        masked_forward(tiny.model),
        torch.ones(1, 1, 64, 64),
        star[None],
        parts[None, None],
        tiny.labels.index("star"),
    )


@pytest.mark.filterwarnings("ignore")
def test_captum_feature_ablation(captum_case):
    from captum.attr import FeatureAblation

    forward, keep, x, parts, target = captum_case
    call = {"baselines": 0, "target": target, "additional_forward_args": (x,), "feature_mask": parts}
    with torch.no_grad():
        single = FeatureAblation(forward).attribute(keep, perturbations_per_eval=1, **call)
        batched = FeatureAblation(forward).attribute(keep, perturbations_per_eval=8, **call)
        torch.testing.assert_close(single, batched, rtol=1e-4, atol=1e-4)
        plain = forward.model(x)[0, target]
        for part in (0, 6, 10):
            gone = forward((parts != part)[0], x)[0, target]
            value = single[0, 0][parts[0, 0] == part][0]
            torch.testing.assert_close(value, plain - gone, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_captum_occlusion_is_ablation_of_a_grid(captum_case):
    from captum.attr import FeatureAblation, Occlusion

    forward, keep, x, parts, target = captum_case
    with torch.no_grad():
        slid = Occlusion(forward).attribute(
            keep, sliding_window_shapes=(1, 16, 16), strides=(1, 16, 16), baselines=0, target=target,
            additional_forward_args=(x,), perturbations_per_eval=4,
        )  # fmt: skip
        ablated = FeatureAblation(forward).attribute(
            keep, baselines=0, target=target, additional_forward_args=(x,), feature_mask=parts, perturbations_per_eval=4
        )
    torch.testing.assert_close(slid.float(), ablated, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_captum_kernel_shap_is_complete_and_lime_runs(captum_case):
    from captum.attr import KernelShap, Lime

    forward, keep, x, parts, target = captum_case
    call = {
        "baselines": 0, "target": target, "additional_forward_args": (x,), "feature_mask": parts,
        "perturbations_per_eval": 16, "return_input_shape": False,
    }  # fmt: skip
    with torch.no_grad():
        values = KernelShap(forward).attribute(keep, n_samples=120, **call)
        everything = forward(torch.ones(1, 64, 64), x)[0, target]
        nothing = forward(torch.zeros(1, 64, 64), x)[0, target]
        torch.testing.assert_close(values.sum(), everything - nothing, rtol=0.02, atol=0.02)
        weights = Lime(forward).attribute(keep, n_samples=60, **call)
    assert weights.shape == (1, 16) and bool(torch.isfinite(weights).all())


@pytest.mark.filterwarnings("ignore")
def test_lime_itself(tiny, star, parts):
    from lime.lime_image import LimeImageExplainer

    forward = masked_forward(tiny.model)
    target = tiny.labels.index("star")
    image = tiny.picture(star)
    pixels = np.array(image, dtype=np.float64) / 255
    seen = []
    classify = lime_classifier(forward, star)

    def watched(images):
        answers = classify(images)
        seen.append((images, answers))
        return answers

    found = LimeImageExplainer(random_state=0).explain_instance(
        pixels, watched, labels=(target,), hide_color=SENTINEL, num_samples=40, batch_size=20, top_labels=None,
        segmentation_fn=lambda _: parts.numpy(),
    )  # fmt: skip
    assert len(found.local_exp[target]) == 16
    images, answers = seen[0]
    keep = torch.tensor((images[3] > SENTINEL / 2).all(2))
    wanted = forward(keep[None], star[None]).softmax(1)[0]
    torch.testing.assert_close(torch.tensor(answers[3]), wanted.detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(SkipError, match="expected images"):
        classify(pixels[None, :32])


# --- the bundled model and the command


def test_the_bundled_model_is_small_and_right():
    from demos.layer_masking import data, train
    from skipguide.assets import bundled

    folder = bundled("tiny-cnn")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    model = train.load(folder)
    assert train.accuracy(model, data.make_scenes(200, 5)) > record["accuracy"] - 0.08 and record["accuracy"] > 0.9


def test_explain_writes_a_picture_and_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["explain", str(SCENES / "star.png"), "--samples", "60", "--segments", "grid:4"]
    assert main(command) == 0
    assert "star-explained.png: star" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["star-explained.png", "star-explained.png.json"]
    numbers = json.loads(Path("star-explained.png.json").read_text(encoding="utf-8"))
    assert numbers["target"]["label"] == "star" and len(numbers["weights"]) == 16
    assert set(numbers["tests"]) == {"neighbours", "black", "grey", "mean", "blur", "noise"}
    assert numbers["predictions"][0]["probability"] > 0.5
    with Image.open("star-explained.png") as sheet:
        assert sheet.width > 1000
    assert main(command) == 2 and "exists already" in capsys.readouterr().err
    for extra in (["--method", "rise"], ["--method", "occlusion", "--fill", "zeros", "--segments", "slic:12"]):
        assert main([*command, *extra, "--force"]) == 0


def test_explain_of_other_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["explain", str(SCENES / "ring.png"), "--random-weights", "--segments", "grid:2", "--samples", "8"]
    for model in ("mobilenetv3_small_050", "mnasnet0_5"):  # timm, torchvision
        assert main([*command, "--model", model, "-o", f"{model}.png"]) == 0
        numbers = json.loads(Path(f"{model}.png.json").read_text(encoding="utf-8"))
        assert numbers["model"] == model and len(numbers["predictions"]) == 5


def test_explain_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = str(SCENES / "star.png")
    Path("text.png").write_text("no picture")
    cases = {
        "no file": ["nowhere.png"],
        "not a readable picture": ["text.png"],
        "no model 'resnet51'": [image, "--model", "resnet51"],
        "grid:N": [image, "--segments", "grid"],
        "ends in .png": [image, "-o", "out.jpg"],
        "class below 10": [image, "--target", "10"],
    }
    for words, arguments in cases.items():
        assert main(["explain", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.png"]


def test_explanation_of_another_class(tiny, star):
    found = explain(tiny, star, target=0, method="occlusion", segments="grid:4", fill="grey")
    assert found.target == 0 and found.heat.shape == (64, 64)
    assert draw(found, tiny, height=80).width > 400
    with pytest.raises(SkipError, match="method"):
        explain(tiny, star, method="guess")


def test_an_image_without_an_answer_is_not_explained(tiny, star):
    with pytest.raises(SkipError, match="answers NaN"):
        explain(tiny, star * float("nan"), samples=4)


# --- the committed results


def test_results_of_the_study():
    results = json.loads((ROOT / "demos" / "layer_masking" / "results.json").read_text(encoding="utf-8"))
    assert {f"{kind}-{seed}" for kind in ("plain", "erasing") for seed in range(3)} == set(results["models"])
    from demos.layer_masking import report

    assert (ROOT / "demos/layer_masking/results.md").read_text(encoding="utf-8").strip() == report.tables(
        results
    ).strip()
    for kind in ("plain", "erasing"):
        for model in report.models_of(results, kind):
            leak = {row["fill"]: row["right_without_the_shape"] for row in model["leakage"]}
            assert leak["neighbours"] < leak["black"]
