"""Training, evaluation and data of SkipNet: resumed to the bit, frozen where it says so, refused where it must."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from demos.skipnet import train as command
from demos.skipnet.data import torchvision_set
from skipguide import SkipError
from skipguide.vision import SkipNet
from skipguide.vision.skipnet.evaluate import best_subset, evaluate, fixed_gates, random_gates
from skipguide.vision.skipnet.pictures import draw_blocks_against, draw_by_blocks, draw_history, saliency, spearman
from skipguide.vision.skipnet.train import TrainConfig, train
from skipguide.vision.skipnet.wires import COLOURS, WIRE, make_wires, turn_and_recolour

TINY = {"blocks": [2, 2], "widths": [6, 8], "num_classes": 4}


def tiny(seed=0):
    torch.manual_seed(seed)
    return SkipNet(TINY, gate="rnn", image_size=(3, 10, 10)).eval()


def data(count=40, seed=0):
    wires = make_wires(count, 10, 4, seed)
    return TensorDataset(wires.images, wires.labels)


def state(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


STAGES = {
    "dense": {},
    "supervised": {},
    "budget": {"budget_weight": 0.5, "budget_target": 0.1},
    "reinforce": {"alpha": 0.5, "rl_weight": 0.5, "sharpen": 2.0},
    "fixed": {},
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_stopped_goes_on_to_the_bit(stage, tmp_path):
    config = TrainConfig(stage=stage, steps=5, batch_size=16, save_every=3, **STAGES[stage])
    decisions = torch.tensor([True, False, True]) if stage == "fixed" else None

    def run(net, out, augment=turn_and_recolour):
        return train(net, data(), config, out=out, decisions=decisions, augment=augment)

    whole = tiny()
    history = run(whole, tmp_path / "whole")

    calls = []

    def stops(images, labels, random):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return turn_and_recolour(images, labels, random)

    stopped = tiny()
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "part", stops)
    assert not stopped.training
    again = tiny()
    resumed = run(again, tmp_path / "part")
    assert same(state(whole), state(again)) and history == resumed
    lines = (tmp_path / "part" / "history.csv").read_text().splitlines()
    assert lines[0] == "step,loss,cross_entropy,accuracy,computation" and len(lines) == 6
    assert not list((tmp_path / "part").glob(".*")), "no temporary files are left"
    # a finished run is read back, not trained again
    third = tiny()
    run(third, tmp_path / "part", stops)
    assert same(state(whole), state(third))


def test_statistics_are_frozen_in_reinforcement_only():
    before = tiny()
    for stage, frozen in (("reinforce", True), ("budget", False)):
        net = tiny()
        train(net, data(), TrainConfig(stage=stage, steps=2, batch_size=8))
        moved = [
            name
            for name, value in net.named_buffers()
            if name.endswith("running_mean") and not torch.equal(value, dict(before.named_buffers())[name])
        ]
        assert (not moved) == frozen
        assert not same(state(net), state(before))


def test_projections_count_a_step_once():
    net = tiny()
    train(net, data(), TrainConfig(stage="budget", steps=3, batch_size=8))
    assert int(net.backbone.groups[1][0].downsample[1].num_batches_tracked) == 3
    assert int(net.backbone.groups[1][0].bn1.num_batches_tracked) == 3


def test_the_price_closes_gates():
    images, found = data().tensors[0], {}
    for price in (0.0, 5.0):
        net = tiny()
        net.gates.open_by(1.0)
        train(net, data(), TrainConfig(steps=25, batch_size=16, budget_weight=price, gate_lr=10.0, lr=5e-3))
        with torch.no_grad():
            found[price] = float(net(images, return_routing=True).probabilities.mean())
    assert found[5.0] < 0.4 and found[5.0] < found[0.0] - 0.1, found


def test_mixed_precision_and_the_gates_own_rate():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        net, before = tiny(), state(tiny())
        config = TrainConfig(steps=2, batch_size=8, gate_lr=1e-6, optimizer="sgd")
        accelerator, attributes = Accelerator(mixed_precision="bf16"), set(net.__dict__)
        history = train(net, data(), config, accelerator=accelerator)
        moved = state(net)
        assert set(net.__dict__) == attributes, "the precision of the training does not stay on the network"
        with torch.no_grad():
            assert net(data().tensors[0], return_routing=True).logits.dtype is torch.float32
        train(net, data(), TrainConfig(stage="reinforce", steps=2, batch_size=8), accelerator=accelerator)
        assert set(net.__dict__) == attributes and not same(state(net), moved)
        net.load_state_dict(moved)
    finally:
        AcceleratorState._reset_state()
    assert all(torch.isfinite(v).all() for v in net.state_dict().values())
    assert history[-1]["loss"] > 0
    moves = {k: float((v - before[k]).abs().max()) for k, v in net.state_dict().items() if v.is_floating_point()}
    assert moves["gates.proj.weight"] < 1e-6 < moves["backbone.fc.weight"]


class Lazy(Dataset):
    """A data set that is no TensorDataset."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, place):
        image, label = self.inner[place]
        return image, int(label)


def test_any_data_set_gives_the_same_batches():
    nets = [tiny(), tiny()]
    config = TrainConfig(steps=3, batch_size=8)
    for net, found in zip(nets, (data(), Lazy(data())), strict=True):
        train(net, found, config)
    assert same(*(state(net) for net in nets))


SCRIPT = """
import sys, torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from skipguide.vision import SkipNet
from skipguide.vision.skipnet.train import TrainConfig, train
from skipguide.vision.skipnet.wires import make_wires
from torch.utils.data import TensorDataset
torch.set_num_threads(1)
torch.manual_seed(0)
net = SkipNet({"blocks": [2, 2], "widths": [6, 8], "num_classes": 4}, image_size=(3, 10, 10))
wires = make_wires(40, 10, 4, 0)
accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
assert accelerator.num_processes == 2
for stage in ("budget", "reinforce"):
    train(net, TensorDataset(wires.images, wires.labels), TrainConfig(stage=stage, steps=3, batch_size=4),
          out=sys.argv[1] + "/" + stage, accelerator=accelerator)
total = sum(p.detach().double().sum() for p in net.parameters())
torch.save(total, f"{sys.argv[1]}/total{accelerator.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    root = Path(__file__).parent.parent
    env = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "ACCELERATE_USE_CPU": "true"}
    jobs = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), str(tmp_path)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    totals = [torch.load(tmp_path / f"total{rank}.pt") for rank in range(2)]
    assert torch.equal(*totals)
    assert json.loads((tmp_path / "budget" / "config.json").read_text())["stage"] == "budget"


def test_bad_training_is_refused(tmp_path):
    for wrong in (
        {"stage": "rl"},
        {"steps": 0},
        {"lr": 0},
        {"optimizer": "lbfgs"},
        {"warmup": 1},
        {"budget_target": 1},
        {"gamma": 3},
        {"gate_lr": 0},
    ):
        with pytest.raises(SkipError):
            TrainConfig(**wrong)
    net = tiny()
    before = state(net)
    with pytest.raises(SkipError, match="fixed"):
        train(net, data(), TrainConfig(stage="fixed"))
    with pytest.raises(SkipError, match="fixed"):
        train(net, data(), TrainConfig(), decisions=torch.ones(3, dtype=torch.bool))
    with pytest.raises(SkipError, match="empty"):
        train(net, TensorDataset(torch.empty(0, 3, 10, 10), torch.empty(0)), TrainConfig())
    assert same(before, state(net))
    train(net, data(), TrainConfig(steps=1, batch_size=4), out=tmp_path)
    with pytest.raises(SkipError, match=r"other settings \(lr\)"):
        train(tiny(), data(), TrainConfig(steps=1, batch_size=4, lr=1.0), out=tmp_path)
    with pytest.raises(SkipError, match="exists"):
        train(tiny(), data(), TrainConfig(steps=1, batch_size=4), out=tmp_path, resume=False)
    assert TrainConfig.load_json(tmp_path / "config.json") == TrainConfig(steps=1, batch_size=4)
    broken = tiny()
    with torch.no_grad():
        broken.backbone.fc.weight.fill_(torch.inf)
    with pytest.raises(SkipError, match="the loss is"):
        train(broken, data(), TrainConfig(steps=1, batch_size=4))
    assert not broken.training


# -- evaluation -----------------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    few = TrainConfig("fixed", steps=2, batch_size=4, save_every=1)
    first = torch.tensor([True, False, True])
    train(tiny(), data(), few, out=tmp_path / "run", decisions=first)
    with pytest.raises(SkipError, match="other decisions"):
        train(tiny(), data(), few, out=tmp_path / "run", decisions=~first)
    other = SkipNet(TINY, gate="ff2")
    with pytest.raises(SkipError, match="another network"):
        train(other, data(), few, out=tmp_path / "run", decisions=first)
    (tmp_path / "run" / "state.pt").write_bytes(b"half")
    with pytest.raises(SkipError, match="is damaged"):
        train(tiny(), data(), few, out=tmp_path / "run", decisions=first)
    net = tiny()
    net.save_pretrained(tmp_path / "model")
    with pytest.raises(SkipError, match="belongs to something else"):
        train(net, data(), few, out=tmp_path / "model", decisions=first)
    assert same(state(SkipNet.from_pretrained(tmp_path / "model")), state(net))
    (tmp_path / "run" / "state.pt").unlink()  # stopped before its first state: the settings may change
    train(tiny(), data(), TrainConfig("budget", steps=1, batch_size=4), out=tmp_path / "run")


def test_controls_are_measured_in_eval_mode():
    found = data()
    with pytest.raises(SkipError, match=r"net\.eval"):
        best_subset(tiny().train(), *found.tensors, 1)
    with pytest.raises(SkipError, match="batch_size"):
        evaluate(tiny().eval(), *found.tensors, batch_size=0)


def test_evaluation_counts_what_ran():
    net, found = tiny(), make_wires(30, 10, 4, 3)
    with torch.no_grad():
        net.gates.sharpen(30.0)
    hard = evaluate(net, found.images, found.labels, batch_size=7)
    whole = net(found.images, return_routing=True)
    assert torch.equal(hard.gates, whole.gates > 0.5) and hard.block_rows == int(whole.gates.sum())
    assert torch.equal(hard.correct, whole.logits.argmax(1) == found.labels)
    assert hard.macs_fraction == pytest.approx(whole.macs_fraction)
    rows = hard.per_class(found.labels)
    assert sum(row["images"] for row in rows) == 30
    assert sum(row["images"] * row["accuracy"] for row in rows) == pytest.approx(30 * hard.accuracy)
    assert sum(row["images"] * row["blocks"] for row in rows) == pytest.approx(30 * hard.mean_blocks)


def test_controls_have_the_compute_they_are_given():
    net, found = tiny(), make_wires(60, 10, 4, 3)
    rates = torch.tensor([1.0, 0.5, 0.0])
    drawn = evaluate(net, found.images, found.labels, decide=random_gates(rates, 1)).gates.double().mean(0)
    assert drawn[0] == 1 and drawn[2] == 0 and abs(float(drawn[1]) - 0.5) < 0.2
    subset = best_subset(net, found.images, found.labels, 1, rates)
    assert int(subset.sum()) == 1
    fixed = evaluate(net, found.images, found.labels, decide=fixed_gates(subset))
    assert bool((fixed.gates == subset).all()) and fixed.mean_blocks == 2
    # the best single block of all three
    losses = {}
    for place in range(3):
        one = torch.zeros(3, dtype=torch.bool)
        one[place] = True
        with torch.no_grad():
            logits = net(found.images, return_routing=True, decisions=one).logits
        losses[place] = float(nn.functional.cross_entropy(logits, found.labels))
    often = losses[0]
    assert losses[int(subset.nonzero())] <= often
    for wrong in (-1, 4):
        with pytest.raises(SkipError, match="between"):
            best_subset(net, found.images, found.labels, wrong)
    with pytest.raises(SkipError, match="eval"):
        evaluate(tiny().train(), found.images, found.labels)
    with pytest.raises(SkipError, match="labels"):
        evaluate(net, found.images, found.labels[:3])


# -- wires ----------------------------------------------------------------------------------------------------------


def follow(image):
    """Walk along the wire from the white cell, without looking at anything else: the colour and the steps."""
    lit = image.sum(0) > 0
    (place,) = (image == 1).all(0).nonzero().tolist()
    here, before, steps = tuple(place), None, 0
    while True:
        around = [(here[0] + dy, here[1] + dx) for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        ahead = [p for p in around if p != before and min(p) >= 0 and max(p) < len(lit) and lit[p]]
        if not ahead:
            break
        assert len(ahead) == 1, "a wire has no branches and touches no other"
        before, here, steps = here, ahead[0], steps + 1
    return int((image[:, here[0], here[1]] == COLOURS).all(1).nonzero()), steps


def test_wires_lead_where_the_label_says():
    wires = make_wires(60, 10, 9, seed=4)
    for image, label, length in zip(wires.images, wires.labels, wires.lengths, strict=True):
        assert follow(image) == (int(label), int(length))
        for colour in COLOURS:  # all four colours are in every image: nothing short of the wire tells them apart
            assert int((image == colour[:, None, None]).all(0).sum()) == 1
        plain = (image == WIRE).all(0)
        assert int((image.sum(0) > 0).sum()) == int(plain.sum()) + 5
    assert torch.equal(make_wires(60, 10, 9, seed=4).images, wires.images)
    assert not torch.equal(make_wires(60, 10, 9, seed=5).images, wires.images)
    assert set(wires.labels.tolist()) == {0, 1, 2, 3} and int(wires.lengths.max()) > 5


def test_augmentation_keeps_the_task():
    wires = make_wires(40, 10, 6, seed=4)
    for seed in range(4):
        images, labels = turn_and_recolour(wires.images, wires.labels, torch.Generator().manual_seed(seed))
        assert [follow(image) for image in images] == list(zip(labels.tolist(), wires.lengths.tolist(), strict=True))
        assert not torch.equal(labels, wires.labels)
    for wrong in ({"count": 0}, {"count": 1, "size": 4}, {"count": 1, "longest": 0}):
        with pytest.raises(SkipError):
            make_wires(**wrong)


# -- the command, and torchvision's sets ----------------------------------------------------------------------------


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


# -- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_are_in_order():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 5)
    blocks = torch.tensor([3, 1, 2, 5, 4, 4])
    draw_by_blocks(axes, torch.rand(6, 1, 8, 8), blocks, [str(n) for n in range(6)])
    shown = [int(axis.get_title().split()[0]) for axis in axes]
    assert shown == sorted(shown) and shown[0] == 1 and shown[-1] == 5
    assert draw_blocks_against(axes[0], blocks.float() ** 2, blocks, "value", bins=3) == pytest.approx(1.0)
    draw_history(axes[:3], [{"step": 1, "cross_entropy": 1.0, "accuracy": 0.5, "computation": 1.0}] * 2)
    plt.close(figure)
    assert spearman(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([3.0, 1.0, 1.0])) == pytest.approx(-1.0)
    net, images = tiny(), torch.rand(3, 3, 10, 10)
    assert saliency(net, images).shape == (3,) and all(p.grad is None for p in net.parameters())
    with pytest.raises(SkipError, match="differentiable"):
        saliency(lambda x: torch.ones(3, 2, requires_grad=True), images)  # type: ignore[arg-type]
