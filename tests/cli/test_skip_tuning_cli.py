"""Skip Tuning: the command, and the examples in the docstrings."""

import torch
from helpers.tuning import folder

from skipguide.cli import main


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
