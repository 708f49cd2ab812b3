"""The command that trains SkipNet, and torchvision's sets and their crops for it."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from demos.skipnet import train as command
from demos.skipnet.data import torchvision_set
from skipguide import SkipError
from skipguide.vision import SkipNet


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
