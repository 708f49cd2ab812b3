"""Training of SkipNet: objectives by hand, resumed to the bit, the same in two processes, wrong settings refused."""

import dataclasses
import json

import pytest
import torch
from helpers.tiny_skipnet import TINY
from helpers.two_processes import run_in_two
from helpers.wired_skipnet import data, same, state, tiny
from torch.utils.data import Dataset, TensorDataset

from demos.skipnet.wires import turn_and_recolour
from skipguide import SkipError
from skipguide.vision import SkipNet
from skipguide.vision.skipnet.evaluate import evaluate
from skipguide.vision.skipnet.objectives import Reinforce, budget_loss, cumulative_rewards, reinforce_loss
from skipguide.vision.skipnet.train import TrainConfig, train

STAGES = {
    "dense": {},
    "supervised": {},
    "budget": {"budget_weight": 0.5, "budget_target": 0.1},
    "reinforce": {"alpha": 0.5, "rl_weight": 0.5, "sharpen": 2.0},
    "fixed": {},
    "random": {},
}
DECISIONS = {"fixed": torch.tensor([True, False, True]), "random": torch.tensor([1.0, 0.0, 0.5])}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_stopped_goes_on_to_the_bit(stage, tmp_path):
    config = TrainConfig(stage=stage, steps=5, batch_size=16, save_every=3, **STAGES[stage])
    decisions = DECISIONS.get(stage)

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
from demos.skipnet.wires import make_wires
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
    run_in_two(tmp_path / "run.py", tmp_path)
    totals = [torch.load(tmp_path / f"total{rank}.pt") for rank in range(2)]
    assert torch.equal(*totals)
    assert json.loads((tmp_path / "budget" / "config.json").read_text())["stage"] == "budget"


def test_bad_training_is_refused(tmp_path):
    positive = r"expected positive lr, .* and warmup in \[0, 1\); got .*"
    whole = "as a whole number of at least 1; got 0"
    for wrong, message in (
        ({"stage": "rl"}, r"unknown stage 'rl'; expected one of dense, "),
        ({"steps": 0}, f"steps {whole}"),
        ({"batch_size": 0}, f"batch_size {whole}"),
        ({"save_every": 0}, f"save_every {whole}"),
        ({"lr": 0}, positive + r"\blr=0\b"),
        ({"lr": float("nan")}, "lr as a finite number of at least 0; got nan"),
        ({"gate_lr": 0}, positive + "gate_lr=0"),
        ({"warmup": 1}, positive + "warmup=1"),
        ({"optimizer": "lbfgs"}, "optimizer 'adamw' or 'sgd'; got 'lbfgs'"),
        ({"budget_target": 1}, r"target in \[0, 1\); got 1"),
        ({"gamma": 3}, r"gamma in \[0, 1\] .*gamma=3"),
        ({"reduction": "max"}, "reduction 'mean' or 'sum' .*got 'max'"),
    ):
        with pytest.raises(SkipError, match=message):
            TrainConfig(**wrong)
    net = tiny()
    before = state(net)
    with pytest.raises(SkipError, match="fixed"):
        train(net, data(), TrainConfig(stage="fixed"))
    with pytest.raises(SkipError, match="fixed"):
        train(net, data(), TrainConfig(), decisions=torch.ones(3, dtype=torch.bool))
    for wrong in (torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1, 0, 1])):
        with pytest.raises(SkipError, match=f"expected decisions as a bool tensor .*got {wrong.dtype}"):
            train(net, data(), TrainConfig("fixed", steps=1, batch_size=4), decisions=wrong)
    half = TrainConfig("random", steps=1)
    for wrong, message in (
        (None, "fixed and random"),
        (torch.ones(3, dtype=torch.bool), r"floats \[3\] .* got torch.bool \[3\]"),
        (torch.ones(4), r"got torch.float32 \[4\]"),
        ([0.5] * 3, "got list"),
        (torch.tensor([0.5, 2.0, 0.5]), "shares in 0..1"),
        (torch.tensor([0.5, torch.nan, 0.5]), "shares in 0..1"),
    ):
        with pytest.raises(SkipError, match=message):
            train(net, data(), half, decisions=wrong)
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


def test_random_blocks_run_as_often_as_they_should():
    """Never, always and half of the time, drawn for every image; a block that never runs is not trained."""
    net = tiny()
    before = state(net)
    shares = torch.tensor([1.0, 0.0, 0.5])
    history = train(net, data(), TrainConfig("random", steps=30, batch_size=16, weight_decay=0.0), decisions=shares)
    assert sum(row["computation"] for row in history) / 30 == pytest.approx(0.5, abs=0.03)
    assert all(row["computation"] <= 2 / 3 for row in history)
    moved = {
        name: any(not torch.equal(before[key], value) for key, value in state(net).items() if f".{name}.conv" in key)
        for name in net.block_names
    }
    assert list(moved.values()) == [True, True, False, True], "gate 1 is of block 2"


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


def test_objectives_refuse_nonsense():
    for bad in ({"reduction": "max"}, {"baseline": "ema"}, {"gamma": 2}, {"alpha": -1}):
        with pytest.raises(SkipError):
            Reinforce(**bad)
    with pytest.raises(SkipError, match=r"\[B, G\]"):
        cumulative_rewards(torch.ones(3), torch.ones(3), Reinforce())
    with pytest.raises(SkipError, match="target"):
        budget_loss(torch.ones(1, 2), 1.0)
    assert Reinforce.from_dict(Reinforce.cifar().to_dict()) == Reinforce.cifar()


def test_rewards_and_their_gradient():
    """gamma, baseline, detach and the gradient of the surrogate, by hand."""
    actions, ce = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), torch.tensor([0.5, 2.0], requires_grad=True)
    terms = Reinforce(alpha=0.3, gamma=0.5, baseline="none", weight=1.0)
    # r = 0.1 for a skip; the final reward comes a step after the last decision and is discounted too, as published
    last = [0.1 + 0.5 * -0.5, 0.0 + 0.5 * -2.0]
    second = [0.1 + 0.5 * last[0], 0.0 + 0.5 * last[1]]
    first = [0.0 + 0.5 * second[0], 0.1 + 0.5 * second[1]]
    wanted = torch.tensor([first, second, last]).T
    assert torch.allclose(cumulative_rewards(actions, ce, terms), wanted)
    logits = torch.zeros(2, 3, requires_grad=True)
    reinforce_loss(logits, actions, ce, terms).backward()
    # d log p(a) / d logit = a - p
    assert torch.allclose(logits.grad, -(actions - 0.5) * wanted / 2)
    assert ce.grad is None
    reinforce_loss(logits, actions, ce, dataclasses.replace(terms, detach=False)).backward()
    assert ce.grad is not None
    centred = dataclasses.replace(terms, baseline="batch_mean")
    logits.grad = None
    reinforce_loss(logits, actions, ce.detach(), centred).backward()
    assert torch.allclose(logits.grad, -(actions - 0.5) * (wanted - wanted.mean(0)) / 2)


def test_the_budget_counts_what_is_above_its_target():
    gates = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert budget_loss(gates).item() == 0.75
    assert budget_loss(gates, 0.5).item() == 0.25
    assert budget_loss(gates, 0.8).item() == 0.0
    assert budget_loss(gates, 0.0, torch.tensor([3.0, 1.0])).item() == pytest.approx((1 + 0.25) / 2)


def test_labels_that_are_no_classes_train_nothing_and_say_so():
    images, labels = data().tensors
    config = TrainConfig(steps=2, batch_size=8)
    expected = train(tiny(), data(), config)
    for dtype in (torch.int32, torch.uint8):
        assert train(tiny(), TensorDataset(images, labels.to(dtype)), config) == expected
    classes = tiny()(images[:1]).shape[1]
    for wrong, message in (
        (torch.full_like(labels, -100), f"labels 0 to {classes - 1}.*got -100"),
        (labels + classes, f"labels 0 to {classes - 1}"),
        (labels.float(), "whole numbers, one for each image; got torch.float32"),
        (torch.nn.functional.one_hot(labels), "whole numbers, one for each image"),
    ):
        with pytest.raises(SkipError, match=message):
            train(tiny(), TensorDataset(images, wrong), config)
    with pytest.raises(SkipError, match="whole numbers"):
        evaluate(tiny().eval(), images, labels.float())
