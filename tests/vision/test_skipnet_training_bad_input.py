"""Training of SkipNet: wrong settings and a folder of something else are refused, and left alone."""

import pytest
import torch
from helpers.tiny_skipnet import TINY
from helpers.wired_skipnet import data, same, state, tiny
from torch.utils.data import TensorDataset

from skipguide import SkipError
from skipguide.vision import SkipNet
from skipguide.vision.skipnet.train import TrainConfig, train


def test_bad_training_is_refused(tmp_path):
    positive = r"expected positive lr, .* and warmup in \[0, 1\); got .*"
    whole = "as a whole number of at least 1; got 0"
    for wrong, message in (
        ({"stage": "rl"}, r"unknown stage 'rl'; expected one of dense, "),
        ({"steps": 0}, f"steps {whole}"),
        ({"batch_size": 0}, f"batch_size {whole}"),
        ({"save_every": 0}, f"save_every {whole}"),
        ({"lr": 0}, positive + r"\blr=0,"),
        ({"lr": float("nan")}, "lr as a finite number of at least 0; got nan"),
        ({"gate_lr": 0}, positive + "gate_lr=0,"),
        ({"warmup": 1}, positive + "warmup=1,"),
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
