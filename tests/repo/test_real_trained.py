"""The studies that train on their papers' own data, on a handful of made-up pictures in its place."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from demos.real import cifar, nuclei, nuclei_bundled, nuclei_smp, pictures
from demos.real.weights import NotInstalledError
from demos.unetpp import study as unetpp
from demos.unetpp.data import Pictures
from demos.unetpp.train import measure
from skipguide.assets import bundled
from skipguide.errors import SkipError
from skipguide.vision import UNetPlusPlus
from skipguide.vision.unetpp.nuclei import generate_nuclei


def packed(files):
    """Files as the data has them: all bytes in one array, and where each begins."""
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])


def encoded(values, kind):
    out = io.BytesIO()
    Image.fromarray(values).save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue()


@pytest.fixture
def data(monkeypatch, tmp_path):
    """Ten classes of nearly plain colours, and nuclei of two sizes."""
    g = np.random.default_rng(0)
    for folder in ("cifar10", "nuclei"):
        (tmp_path / folder).mkdir()
    for part, count in (("train", 30), ("test", 20)):
        labels = np.arange(count) % 10
        images = np.clip(25 * labels[:, None, None, None] + g.integers(0, 9, (count, 32, 32, 3)), 0, 255)
        jpeg, offsets = packed([encoded(image.astype(np.uint8), "JPEG") for image in images])
        np.savez(tmp_path / "cifar10" / f"{part}.npz", jpeg=jpeg, offsets=offsets, labels=labels)
    pairs = [generate_nuclei(seed, 48 if seed % 2 else 64) for seed in range(10)]
    jpeg, offsets = packed([encoded((255 * i.permute(1, 2, 0).numpy()).astype(np.uint8), "JPEG") for i, _ in pairs])
    mask, mask_offsets = packed([encoded((255 * m[0].numpy()).astype(np.uint8), "PNG") for _, m in pairs])
    np.savez(
        tmp_path / "nuclei" / "nuclei.npz", jpeg=jpeg, offsets=offsets, mask_png=mask, mask_offsets=mask_offsets
    )  # fmt: skip
    monkeypatch.setattr(pictures, "DATA", tmp_path)
    return tmp_path


SMALL = cifar.Settings(epochs=0.05, precision="no", batch=4, widths=(2, 3, 4), train=30, test=20, timed=4, rounds=2)


def test_cifar_is_read_as_it_was_written(data):
    found = cifar.read("train", 12)
    assert found.images.shape == (12, 3, 32, 32) and found.images.dtype == torch.uint8
    assert found.labels.tolist() == [*range(10), 0, 1]
    means = found.images.float().mean((1, 2, 3))
    assert torch.allclose(means, 25.0 * found.labels + 4, atol=2)
    assert abs(float(cifar.normalised(found.images).mean())) < 2


@pytest.mark.slow
def test_runs_start_from_each_other_and_are_done_once(data, tmp_path, monkeypatch, capsys):
    home, out = tmp_path / "home", tmp_path / "cifar.json"
    plan = cifar.Study(SMALL, home, tmp_path / "work")
    assert len(plan.validation.labels) == 6 and len(plan.train.labels) == 24
    with pytest.raises(SystemExit, match="plain-38 is needed first"):
        plan.run(cifar.RUNS[4])
    by_name = {run.name: run for run in cifar.RUNS}
    for name in ("plain-38", "ff1", "ff1-fixed", "budget", "budget-random", "stochastic"):
        plan.run(by_name[name])
        assert plan.finished(name) and not (tmp_path / "work" / name).exists()
    start = plan.build(by_name["ff1"]).backbone.state_dict()
    assert all(torch.equal(start[k], v) for k, v in plan.model("plain-38").backbone.state_dict().items())
    monkeypatch.setattr(cifar, "train", lambda *args, **kwargs: pytest.fail("it is done"))
    plan.run(by_name["ff1"])
    gated, fixed = (json.loads((home / f"{name}.json").read_text()) for name in ("ff1", "ff1-fixed"))
    assert sorted(path.name for path in home.iterdir()) == [
        "budget-random.json", "budget.json", "ff1-fixed.json", "ff1.json", "plain-38.json", "plain-38.npz",
        "stochastic.json",
    ], "networks that no run starts from are not kept"  # fmt: skip
    assert {"sampled", "random_gates", "blocks_with_difficulty", "rates"} <= set(gated)
    assert fixed["hard"]["blocks"] >= gated["hard"]["blocks"] - 1e-9, "the control gets no less"
    table = cifar.report(home, out)
    assert "ff1-fixed" in table and [run["run"]["name"] for run in json.loads(out.read_text())["runs"]] == [
        "plain-38", "ff1", "ff1-fixed", "budget", "budget-random", "stochastic",
    ]  # fmt: skip
    assert "stochastic, best subset" in table and "2 epochs each" in table
    depth = json.loads((home / "stochastic.json").read_text())
    assert depth["hard"]["blocks"] == 18 and depth["subset"]["blocks"] <= 18
    (home / "plain-38.npz").unlink()
    with pytest.raises(SystemExit, match="network of plain-38 is gone"):
        plan.run(by_name["rnn"])
    monkeypatch.undo()
    plan.run(by_name["plain-38"])
    assert plan.model("plain-38") and not plan.misses(by_name["plain-38"])
    with pytest.raises(SystemExit, match="other settings"):
        cifar.Study(replace(SMALL, lr=0.1), home, tmp_path / "work").run(by_name["rnn"])
    assert out.with_suffix(".png").stat().st_size > 5000


def test_controls_of_gates_that_open_every_block_are_not_trained(data, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    shutil.copytree(cifar.HOME / "short", home)
    monkeypatch.setattr(cifar, "train", lambda *args, **kwargs: pytest.fail("it is the plain network"))
    where = ["--home", str(home), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "cifar.json")]
    cifar.main(["--form", "short", "--runs", "ff1-fixed", "rnn-fixed", "ff1-random", *where])
    assert "Not trained: ff1-fixed, ff1-random, rnn-fixed" in capsys.readouterr().out
    gated = json.loads((home / "budget.json").read_text())
    assert not cifar.is_plain(next(run for run in cifar.RUNS if run.name == "budget-fixed"), gated)


def test_a_subset_is_timed_as_the_network_without_the_other_blocks(data, tmp_path):
    plan = cifar.Study(SMALL, tmp_path / "home", tmp_path / "work")
    net = plan.untrained(cifar.RUNS[0]).eval()
    kept = torch.arange(17) % 3 == 0  # both blocks that shrink the maps are left out
    images = torch.randn(2, 3, 32, 32)
    thin = cifar.thinned(net, kept)
    assert torch.allclose(thin(images), net(images, return_routing=True, decisions=kept).logits, atol=1e-5)
    assert sum(1 for _ in thin.modules()) < sum(1 for _ in net.backbone.modules())


def test_blocks_of_stochastic_depth_count_as_often_as_they_ran(data, tmp_path):
    plan = cifar.Study(SMALL, tmp_path / "home", tmp_path / "work")
    run = next(run for run in cifar.RUNS if run.survival)
    shares = plan.decisions(run)
    assert len(shares) == 17 and float(shares[-1]) == 0.5 and torch.allclose(shares.diff(), torch.tensor(-1 / 36))
    net = plan.untrained(run).eval()
    block = net.backbone.groups[0][1]
    x = torch.randn(2, 2, 8, 8)
    left, before = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))), block(x)
    cifar.weaken(net, shares)
    assert torch.allclose(block(x), (x + shares[0] * left).relu(), atol=1e-6) and not torch.equal(block(x), before)


def test_a_run_goes_on_from_what_is_committed(data, tmp_path, monkeypatch):
    """Stopped in the second stage, brought home, and gone on with elsewhere: only the rest is trained."""
    settings, home = replace(SMALL, epochs=1.0), tmp_path / "home"
    run = cifar.Run("ff1", 6, (("dense", 0.2), ("supervised", 0.5)))
    monkeypatch.setattr(cifar, "RUNS", (run,))
    here, elsewhere = (cifar.Study(settings, home, tmp_path / name) for name in ("here", "elsewhere"))
    here.bring()
    assert not home.exists(), "there is nothing to bring"
    net = here.build(run)
    for at, steps in ((0, 1), (1, 2)):
        state = cifar.TrainState(net, here.config(run, at), None, here.folder(run, at), True, True)
        state.optimizer.zero_grad()
        for value in net.parameters():
            value.data.add_(0.01)
        for _ in range(steps):
            state.record({"loss": 1.0, "cross_entropy": 1.0, "accuracy": 0.5, "computation": 1.0})
        state.save()
    here.bring()
    about = json.loads((home / cifar.PROGRESS).read_text())
    assert (about["run"], about["stage"], about["step"], about["steps"]) == ("ff1", "supervised", 2, 3)
    assert (home / cifar.CURRENT).stat().st_size < 60_000
    assert "In training: ff1, supervised" in cifar.report(home, tmp_path / "cifar.json")
    assert here.go_on(run, here.build(run), None) == 0, "its own state is as far, and exact"

    other = elsewhere.build(run)
    assert elsewhere.go_on(run, other, None) == 1 and elsewhere.reached(run) == (1, 2)
    for name, value in net.state_dict().items():
        assert torch.allclose(other.state_dict()[name].float(), value.float(), rtol=2**-8), name
    state = cifar.TrainState(elsewhere.build(run), elsewhere.config(run, 1), None, elsewhere.folder(run, 1), True, True)
    assert state.step == 2 and all(map(torch.equal, state.net.state_dict().values(), other.state_dict().values()))
    plain = cifar.Run("plain", 6, (("dense", 1),))
    assert cifar.kept(plain, other) is other.backbone, "gates that are not trained are not kept"
    with pytest.raises(SkipError, match="another network"):
        cifar.SmallState.read(home / cifar.CURRENT).restore(elsewhere.build(replace(run, blocks=3)))


def test_nuclei_are_brought_to_one_size(data):
    found = nuclei.read(32)
    assert len(found) == 10 and {tuple(i.shape) for i in found.images} == {(3, 32, 32)}
    for seed, (image, mask) in enumerate(zip(found.images, found.masks, strict=True)):
        wanted, inside = generate_nuclei(seed, 48 if seed % 2 else 64)
        small = torch.nn.functional.interpolate(wanted[None], (32, 32), mode="bilinear", antialias=True)[0]
        assert (image - small).abs().mean() < 0.03
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert float(mask.mean()) == pytest.approx(float(inside.mean()), abs=0.03)


def test_the_study_of_nuclei_from_end_to_end(data, tmp_path, monkeypatch, capsys):
    tiny = unetpp.Settings(
        seeds=(0, 1), rates=(3e-3,), steps=2, tuning_steps=1, batch=2, size=16, train=6, validation=2, test=2, rounds=1,
        widths=(2, 3, 4, 5, 6), wide=(2, 3, 4, 5, 7), tolerances=(0.05,),
    )  # fmt: skip
    monkeypatch.setattr(nuclei, "QUICK", tiny)
    out = ["--quick", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "cells")]
    monkeypatch.setattr(nuclei.study, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        nuclei.main([*out, "--seeds", "2"])
    nuclei.main([*out, "--seeds", "1", "--precision", "no"])
    assert "Trained in float32." in (shown := capsys.readouterr().out) and "one seed" in shown
    found = json.loads((tmp_path / "out" / "nuclei.json").read_text())
    assert found["settings"]["seeds"] == [1] and not list(tmp_path.rglob("*-state"))
    with Image.open(tmp_path / "out" / "nuclei.jpg") as picture:
        assert picture.width == 6 * 16 + 5 * 4, "pictures, nuclei, and four models side by side"
    assert set(found["models"]) == set(unetpp.MODELS)
    parts = nuclei.Study(tiny, tmp_path / "cells", tmp_path / "models").pictures()
    assert [len(part) for part in parts] == [6, 2, 2]
    assert len({name for part in parts for name in part.names}) == 10, "no picture is in two parts"
    shutil.rmtree(tmp_path / "runs")

    def untrained(*args):
        pytest.fail("nothing is to be trained")

    with monkeypatch.context() as patch:
        patch.setattr(nuclei.Study, "trained", untrained)
        (tmp_path / "cells" / "times.json").unlink()  # of networks that are trained elsewhere
        nuclei.main([*out, "--seeds", "1", "--force"])
        with pytest.raises(pytest.fail.Exception, match="nothing is to be trained"):
            nuclei.main([*out, "--force"])
    elsewhere = tmp_path / "cells" / "wide-U-Net-1.json"
    elsewhere.write_text(elsewhere.read_text().replace('"no"', '"bf16"'))
    nuclei.main([*out, "--force", "--precision", "no"])
    assert "2 seeds" in (shown := capsys.readouterr().out)
    assert "Trained in float32, wide U-Net (seed 1) in bfloat16." in shown
    assert "Mean IoU of nuclei and background, of the same networks and heads, %: U-Net " in shown


def test_the_network_that_ships_is_trained_on_real_and_made_up_nuclei(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nuclei_bundled, "SCALES", (16, 24))
    monkeypatch.setattr(nuclei_bundled, "CROP", 16)
    monkeypatch.setattr(nuclei_bundled, "fast_precision", lambda: "no")
    shipped = tmp_path / "shipped"
    shutil.copytree(bundled("tiny-unetpp"), shipped)
    monkeypatch.setattr(nuclei_bundled, "bundled", lambda name: shipped)
    nuclei_bundled.main(["--quick", "--work", str(tmp_path), "--out", str(tmp_path / "x.json"), "--ship"])
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["before"]["made-up"]["4"]["iou"] > 0.5 > found["now"]["made-up"]["4"]["iou"]
    now, made = (UNetPlusPlus.from_pretrained(folder).state_dict() for folder in (shipped, tmp_path / "model"))
    assert torch.equal(now["head.4.weight"], made["head.4.weight"])
    assert not list(shipped.glob("README*")), "it has a model card of its own"
    assert "now, nuclei: IoU % by head: 1" in capsys.readouterr().out


def test_the_committed_figures_of_the_network_that_ships():
    found = json.loads(Path(nuclei_bundled.OUT).read_text())
    model = UNetPlusPlus.from_pretrained(bundled("tiny-unetpp")).eval()
    assert found["weights"] == sum(p.numel() for p in model.parameters())
    made_up = measure(model, Pictures.made_up(200_000, 20, 64), heads=[4])
    assert made_up["4"]["iou"] == pytest.approx(found["now"]["made-up"]["4"]["iou"], abs=0.04)
    card = (bundled("tiny-unetpp") / "MODEL_CARD.md").read_text()
    for part in ("nuclei", "made-up"):
        line = " | ".join(f"{100 * value['iou']:.1f}" for value in found["now"][part].values())
        assert line in card


def test_data_that_is_not_there_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "DATA", tmp_path)
    for study, name in ((cifar, "cifar10/train"), (nuclei, "nuclei/nuclei"), (nuclei_smp, "nuclei/nuclei")):
        with pytest.raises(SystemExit, match=name), monkeypatch.context() as patch:
            patch.setattr(study, "HOME", tmp_path, raising=False)
            study.main(["--work", str(tmp_path), "--out", str(tmp_path / "out.json")])
    with pytest.raises(NotInstalledError):
        nuclei.read(32)


@pytest.mark.slow
def test_another_librarys_network_is_trained_alike(data, tmp_path, monkeypatch, capsys):
    """A convolution in its place: one head, the same pictures and steps; and without the library a sentence."""
    monkeypatch.setattr(nuclei_smp, "SHORT", replace(nuclei.SHORT, size=32, batch=2, train=6, validation=2, test=2))
    monkeypatch.setattr(nuclei_smp, "ROUNDS", 2)
    command = ["--steps", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "smp.json")]
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(SystemExit, match="pip install --no-deps segmentation-models-pytorch"):
        nuclei_smp.main(command)
    other = SimpleNamespace(UnetPlusPlus=lambda *args, **kwargs: torch.nn.Conv2d(3, 1, 1))
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", other)
    nuclei_smp.main(command)
    found = json.loads((tmp_path / "smp.json").read_text())
    assert found["models"][nuclei_smp.THEIRS]["weights"] == 4
    assert set(found["models"][nuclei_smp.OURS]["all_heads"]) == {"1", "2", "3", "4", "mean"}
    assert found["ours_over_theirs"]["inference"]["median"] > 1
    assert "UNet++ on resnet18, 1 steps of 2" in capsys.readouterr().out
