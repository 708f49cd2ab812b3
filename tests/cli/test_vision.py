"""The commands of the vision systems: the files they write, and what they refuse."""

import json

import numpy as np
import pytest
import torch
from helpers.tuning import folder
from PIL import Image
from torch import nn

from demos.skipnet import train as command
from demos.skipnet.data import torchvision_set
from skipguide.assets import bundled
from skipguide.cli import main
from skipguide.errors import SkipError
from skipguide.media.pictures import as_images
from skipguide.vision import FloorPlanNet, SkipNet, UNetPlusPlus
from skipguide.vision.floorplan import MSDFolder, draw_graph, generate_plan, save_submission, write_plan
from skipguide.vision.floorplan.draw_graph import EDGE_COLOURS, ZONE_COLOURS
from skipguide.vision.floorplan.graph import LayoutGraph
from skipguide.vision.unetpp.nuclei import STYLES, generate_nuclei

# `skipguide segment` and `skipguide floorplan`: the files they write, and what they refuse.


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("unet")
    UNetPlusPlus(widths=(4, 6, 8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan_net(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plan")
    FloorPlanNet(widths=(4, 6, 8), hidden=8, features=16).save_pretrained(folder)
    return folder


def segment(*words):
    return main(["segment", "--device", "cpu", *map(str, words)])


def floorplan(*words):
    return main(["floorplan", "--device", "cpu", *map(str, words)])


def complaint(capsys):
    text = capsys.readouterr().err
    assert text.startswith("skipguide: ") and text.count("\n") == 1
    return text


# what ships


def test_bundled_models_are_small_and_load():
    for name, kind, most in (("tiny-unetpp", UNetPlusPlus, 1.0), ("tiny-floorplan", FloorPlanNet, 1.5)):
        folder = bundled(name)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= most * 1e6, name
        assert (folder / "MODEL_CARD.md").is_file()
        assert kind.from_pretrained(folder).training is False


def test_segment_works_out_of_the_box(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert segment("-o", out, "--head", "all") == 0
    notes = json.loads((tmp_path / "sheet.png.json").read_text())
    heads = notes["results"][0]
    assert [entry["head"] for entry in heads] == [1, 2, 3, 4]
    assert [round(15 * entry["nodes"]) for entry in heads] == [3, 6, 10, 15]
    assert heads[-1]["iou"] > 0.7, "the bundled model finds the nuclei of the example"
    assert Image.open(out).width > 1000
    assert "IoU" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png", "sheet.png.json"]


def test_floorplan_works_out_of_the_box(tmp_path, capsys):
    out = tmp_path / "plan.png"
    assert floorplan("-o", out) == 0
    record = json.loads((tmp_path / "plan.png.json").read_text())["plans"][0]
    assert record["accuracy"] > 0.6
    colours = {colour for _, colour in Image.open(out).getcolors(1 << 24)}
    assert ZONE_COLOURS[0] in colours and EDGE_COLOURS[0] in colours
    assert "of the floor right" in capsys.readouterr().out


# segment


def test_segment_your_pictures(tmp_path, unet):
    for at, (width, height) in enumerate(((50, 37), (90, 64))):
        as_images(torch.rand(1, 3, height, width))[0].save(tmp_path / f"in{at}.png")
        Image.fromarray(np.full((height, width), 255 * at, dtype=np.uint8)).save(tmp_path / f"truth{at}.png")
    files = [tmp_path / "in0.png", tmp_path / "in1.png"]
    common = ("--model", unet, "--tile", 48, "--overlap", 8, "-o", tmp_path / "o.png")
    truths = [tmp_path / "truth0.png", tmp_path / "truth1.png"]
    assert segment(*files, *common, "--truth", *truths, "--masks", tmp_path / "m") == 0
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "in0-mask.png", "in0-overlay.png", "in1-mask.png", "in1-overlay.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "m" / "in1-mask.png") as mask:
        assert mask.size == (90, 64) and set(np.unique(np.asarray(mask))) <= {0, 255}
    assert segment(*files, *common) == 2, "nothing is replaced"
    for head in ("1", "L2", "mean", "adaptive", "last"):
        assert segment(*files, *common, "--head", head, "--force") == 0


def test_mask_is_the_models(tmp_path, unet):
    image, _ = generate_nuclei(5, 40)
    as_images(image[None])[0].save(tmp_path / "in.png")
    assert segment(tmp_path / "in.png", "--model", unet, "--masks", tmp_path, "-o", tmp_path / "o.png") == 0
    with Image.open(tmp_path / "in.png") as picture:
        pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = UNetPlusPlus.from_pretrained(unet).eval()(pixels, head=2)[0, 0] > 0
    with Image.open(tmp_path / "in-mask.png") as mask:
        assert np.array_equal(np.asarray(mask) > 0, expected.numpy())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.png",), "not a readable picture"),
        (("--truth", "x.png"), "--truth belongs to pictures"),
        (("a.png", "b.png", "--truth", "x.png"), "one --truth for each of 2"),
        (("--head", "9"), "expected a head out of"),
        (("--head", "deep"), "expected --head out of"),
        (("--tile", "32", "--overlap", "30"), "at most half of --tile"),
        (("--model", "./missing"), "no model './missing'"),
        (("-o", "x.jpg"), ".png"),
        (("--size", "8"), "at least 16"),
    ],
)
def test_segment_refuses(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert segment(*words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_models_of_another_kind_are_refused(tmp_path, capsys, unet, plan_net, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert segment("--model", plan_net) == 2
    assert "not a saved UNetPlusPlus" in complaint(capsys)
    assert floorplan("--model", unet) == 2
    assert "not a saved FloorPlanNet" in complaint(capsys)
    (tmp_path / "half").mkdir()
    assert floorplan("--model", tmp_path / "half") == 2
    assert "has no config.json" in complaint(capsys)
    (tmp_path / "half" / "config.json").write_text("{")
    (tmp_path / "half" / "model.safetensors").write_bytes(b"nonsense")
    assert segment("--model", tmp_path / "half") == 2
    assert "expected JSON in" in complaint(capsys)
    (tmp_path / "half" / "config.json").write_text((unet / "config.json").read_text())
    assert segment("--model", tmp_path / "half") == 2
    assert "model.safetensors; it is damaged" in complaint(capsys)


# floor plans


def test_floorplan_of_data_files(tmp_path, plan_net):
    for seed in (1, 2):
        plan = generate_plan(seed, 48)
        write_plan(plan, tmp_path / "msd")
    ids = MSDFolder(tmp_path / "msd").ids
    words = ("--data", tmp_path / "msd", "--plans", *ids, "--side", 32, "--model", plan_net)
    assert floorplan(*words, "-o", tmp_path / "o.png", "--submission", tmp_path / "sub") == 0
    with Image.open(tmp_path / "sub" / f"{ids[1]}.png") as picture:
        assert picture.mode == "L" and picture.size == (32, 32)
        assert set(np.unique(np.asarray(picture))) <= {*range(10), 13}
    assert floorplan(*words, "-o", tmp_path / "p.png", "--submission", tmp_path / "sub") == 2
    for answer in (tmp_path / "msd" / "full_out").iterdir():
        answer.unlink()
    (tmp_path / "msd" / "full_out").rmdir()
    assert floorplan(*words, "-o", tmp_path / "q.png") == 0, "without truth there is a picture all the same"


def test_values_that_eight_bits_do_not_hold_are_refused(tmp_path, capsys, unet):
    square = np.zeros((32, 32), np.uint16)
    square[8:24, 8:24] = 1
    for name, values in (("deep.png", square * 60_000), ("floats.tif", square.astype(np.float32))):
        Image.fromarray(values).save(tmp_path / name)
        assert segment(tmp_path / name, "--model", unet, "-o", tmp_path / "o.png") == 2
        assert "bring it to 8 bits" in complaint(capsys)
        assert main(["explain", str(tmp_path / name), "-o", str(tmp_path / "o.png")]) == 2
        assert "bring it to 8 bits" in complaint(capsys)
    Image.fromarray(square * 200).save(tmp_path / "shallow.png")  # 16 bits of which 8 are used: nothing is lost
    Image.fromarray(square.astype(np.uint8)).save(tmp_path / "zero-one.png")
    words = (tmp_path / "shallow.png", "--model", unet, "-o", tmp_path / "o.png")
    assert segment(*words, "--truth", tmp_path / "zero-one.png") == 2
    assert "expected 0 outside and 255 inside" in complaint(capsys)
    assert segment(*words, "--truth", tmp_path / "shallow.png") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "."), "struct_in"),
        (("--plans", "1"), "belong to --data"),
        (("--programme", "castle"), "invalid choice"),
        (("-o", "x.gif"), ".png"),
    ],
)
def test_floorplan_refuses(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert floorplan(*words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_and_too_many_plans(tmp_path, capsys, plan_net):
    for seed in range(9):
        write_plan(generate_plan(seed), tmp_path / "msd")
    words = ("--data", tmp_path / "msd", "--model", plan_net, "-o", tmp_path / "o.png")
    assert floorplan(*words, "--plans", "77") == 2
    assert "no plan '77'" in complaint(capsys)
    once = MSDFolder(tmp_path / "msd").ids[0]
    assert floorplan(*words, "--plans", once, once, "--submission", tmp_path / "sub") == 2
    assert "each of --plans once" in complaint(capsys)
    assert not (tmp_path / "o.png").exists()
    assert floorplan(*words, "--plans", *MSDFolder(tmp_path / "msd").ids) == 2
    assert "at most 8" in complaint(capsys)


def test_submission_is_not_replaced_unasked(tmp_path):
    classes = torch.full((4, 4), 10)
    path = save_submission(classes, tmp_path, "7")
    with pytest.raises(SkipError, match="exists already"):
        save_submission(classes, tmp_path, "7")
    assert save_submission(classes, tmp_path, "7", overwrite=True) == path
    assert [p.name for p in tmp_path.iterdir()] == ["7.png"]


def test_graph_pictures_show_zones_and_connections():
    def colours(graph):
        return {colour for _, colour in draw_graph(graph).getcolors(1 << 20)}

    assert {*ZONE_COLOURS[:2], EDGE_COLOURS[2]} <= colours(LayoutGraph([0, 1], [[0], [1]], [2]))
    assert EDGE_COLOURS[2] not in colours(LayoutGraph([0, 1], [[0], [1]], [0]))
    assert draw_graph(LayoutGraph([9]), size=10).width == 200, "a zone without a name"


# made-up nuclei


def test_nuclei_are_repeatable_and_follow_their_arguments():
    for style in STYLES:
        image, mask = generate_nuclei(3, 48, style)
        again, same = generate_nuclei(3, 48, style)
        assert torch.equal(image, again) and torch.equal(mask, same)
        assert image.shape == (3, 48, 48) and mask.shape == (1, 48, 48)
        assert image.min() >= 0 and image.max() <= 1 and set(mask.unique().tolist()) <= {0.0, 1.0}
        inside, around = image[:, mask[0] > 0].mean(), image[:, mask[0] == 0].mean()
        assert (inside > around) == (style == "fluorescence")
    few, many = (generate_nuclei(1, 64, crowd=crowd)[1].mean() for crowd in ((1, 1), (30, 30)))
    assert few < many
    assert not torch.equal(generate_nuclei(1)[0], generate_nuclei(2)[0])


@pytest.mark.parametrize("arguments", [{"size": 8}, {"style": "x-ray"}, {"crowd": (0, 3)}, {"crowd": (5, 3)}])
def test_nuclei_refuse(arguments):
    with pytest.raises(SkipError, match="expected"):
        generate_nuclei(0, **arguments)


# The command that trains SkipNet, and torchvision's sets and their crops for it.


@pytest.fixture
def cifar(monkeypatch):
    """Torchvision's CIFAR-10 and SVHN as they are when they are on disk, but small."""
    import torchvision

    def build(svhn):
        def make(root, download=False, **which):
            if not root.exists():
                raise RuntimeError("Dataset not found or corrupted.")
            ((_, part),) = which.items()
            count = 40 if part in (True, "train") else 10
            pixels = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            found = type("Set", (), {})()
            found.data = pixels.transpose(0, 3, 1, 2) if svhn else pixels
            names = np.arange(count) % 10
            found.labels, found.targets = names, names.tolist()
            return found

        return make

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", build(False))
    monkeypatch.setattr(torchvision.datasets, "SVHN", build(True))


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_torchvision_sets_where_present(name, cifar, tmp_path):
    found = torchvision_set(name, tmp_path)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [36, 4, 10]
    images = torch.cat([found.train.images, found.validation.images])
    pixels = np.random.default_rng(40).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    assert found.test.labels.tolist() == list(range(10))
    with pytest.raises(SkipError, match="is not in"):
        torchvision_set(name, tmp_path / "nowhere")
    with pytest.raises(SkipError, match="unknown set"):
        torchvision_set("imagenet", tmp_path)


def test_crops_are_crops_and_mirrors_are_mirrors():
    images = torch.arange(2 * 6 * 5, dtype=torch.float).view(2, 1, 6, 5) + 1
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for seed in range(40):
        out, labels = command.shift_and_mirror(images, torch.tensor([3, 4]), torch.Generator().manual_seed(seed))
        assert labels.tolist() == [3, 4] and out.shape == images.shape
        for row in range(2):
            fits = [
                (top, left, flip)
                for top in range(9)
                for left in range(9)
                for flip in (False, True)
                if torch.equal(out[row].flip(2) if flip else out[row], padded[row, :, top : top + 6, left : left + 5])
            ]
            assert fits
            seen |= set(fits) if len(fits) == 1 else set()
    assert {flip for *_, flip in seen} == {False, True} and len({top for top, *_ in seen}) > 4


@pytest.mark.slow
def test_the_command_trains_reports_and_goes_on(tmp_path, cifar, capsys):
    from accelerate.state import AcceleratorState

    words = ["--cpu", "--steps", "2", "--batch", "8", "--out", str(tmp_path / "run"), "--seed", "3"]
    for more in (["--data", "wires", "--stages", "budget", "reinforce"],) * 2:
        AcceleratorState._reset_state()
        command.main([*words, *more])
    said = capsys.readouterr().out
    measures = json.loads((tmp_path / "run" / "measures.json").read_text())
    assert {"hard gates", "sampled gates", "random gates of the same rates"} <= set(measures)
    assert len(measures["per_class"]) == 4 and said.count("hard gates") == 2
    assert len((tmp_path / "run" / "1-reinforce" / "history.csv").read_text().splitlines()) == 3
    for name in ("images.png", "0-budget/history.png", "1-reinforce/history.png"):
        assert (tmp_path / "run" / name).stat().st_size > 4000
    net = SkipNet.from_pretrained(tmp_path / "run" / "model").eval()
    assert net(torch.rand(2, 3, 10, 10)).shape == (2, 4)
    with pytest.raises(SystemExit):  # another price is another run
        command.main([*words, "--data", "wires", "--stages", "budget", "--price", "9"])
    assert "other settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*words, "--data", "cifar10", "--root", str(tmp_path / "nowhere")])
    assert "cifar10 is not in" in capsys.readouterr().err
    AcceleratorState._reset_state()


# Skip Tuning: the command, and the examples in the docstrings.


def test_examples_in_docstrings():
    import doctest

    from skipguide.vision.skip_tuning import classes, results, samplers, schedule
    from skipguide.vision.skip_tuning import config as settings_module
    from skipguide.vision.skip_tuning import tuner as tuner_module

    for module in (classes, results, samplers, schedule, settings_module, tuner_module):
        done = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
        assert done.attempted and not done.failed, module.__name__


def test_command(tmp_path, capsys):
    data = folder(tmp_path / "photos")
    out = tmp_path / "adapter"
    assert main(["clip", "tune", str(data), "-o", str(out), "--epochs", "2", "--merge", str(tmp_path / "whole")]) == 0
    assert "parameters trained" in capsys.readouterr().out
    assert main(["clip", "tune", str(data), "-o", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["clip", "eval", str(data), "--adapter", str(out)]) == 0
    assert "of 6 images" in capsys.readouterr().out
    assert main(["clip", "predict", str(data / "blue star" / "0.png"), "--adapter", str(out), "--topk", "1"]) == 0
    assert "%" in capsys.readouterr().out
    assert main(["clip", "eval", str(data), "--model", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    folder(tmp_path / "more", ("pink moon", "red circle"))
    folder(tmp_path / "photos2", ("pink moon", "red circle", "blue star", "green bar"))
    assert main(["clip", "eval", str(tmp_path / "photos2"), "--adapter", str(out), "--base-new"]) == 0
    assert "| Base | New | H |" in capsys.readouterr().out
    assert main(["clip", "predict", str(data / "blue star" / "0.png")]) == 2
    assert "--classes" in capsys.readouterr().err
