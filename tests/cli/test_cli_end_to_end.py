"""The command line end to end: a stock pipeline with random weights, saved and loaded."""

import csv
import json

import pytest
from helpers.cli_stub import files

from skipguide.cli import main
from zoo import saved

tiny = saved.tiny


def test_scale_zero_needs_no_layers(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "p", "--model", tiny, "--scale", "0", "-o", "a.gif"]) == 0
    assert "skip guidance: scale 0; " in capsys.readouterr().out


def test_generate_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a red circle", "--model", tiny, "--layers", "2", "--seed", "1"]
    assert main([*command, "-o", "a.gif"]) == 0
    assert main([*command, "-o", "b.gif"]) == 0
    assert main([*command, "-o", "c.gif", "--scale", "0"]) == 0
    assert main([*command[:4], "-o", "plain.gif", "--no-guidance", "--seed", "1"]) == 0
    a, b, c, plain = ((tmp_path / f"{name}.gif").read_bytes() for name in ("a", "b", "c", "plain"))
    assert a == b, "the seed repeats"
    assert a != plain, "the guidance does something"
    assert c == plain, "scale 0 is the plain pipeline"
    stats = json.loads((tmp_path / "a.gif.json").read_text())["stats"]
    assert stats["blocks_run"] < stats["blocks_naive"]
    assert "skip guidance: layer 2, scale 1" in capsys.readouterr().out


def test_compare_and_sweep_end_to_end(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", tiny, "--steps", "1"]
    assert main(["compare", "a red circle", "--layers", "4", *flags]) == 0
    assert json.loads((tmp_path / "a-red-circle-compare.gif.json").read_text())["difference"] > 0
    assert main(["sweep", "a red circle", "--layers", "1", "4", "--scales", "1", *flags]) == 0
    with open("a-red-circle-sweep.csv", newline="") as file:
        plain, early, late = csv.DictReader(file)
    assert float(plain["difference"]) == 0
    assert float(early["relative_cost"]) == pytest.approx(1 + 4 / 12, abs=1e-3)
    assert float(late["relative_cost"]) == pytest.approx(1 + 1 / 12, abs=1e-3)
    assert float(early["difference"]) > 0


def test_what_a_real_pipeline_refuses(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for expected, *more in [
        ("layer 6 is out of range", "--layers", "6"),
        ("has no part 'cross_attn'", "--layers", "1", "--part", "cross_attn"),
        ("skipguide sweep", "--steps", "1"),  # no preset for a model of this size
        ("divisible by 8", "--height", "15", "--layers", "1"),
        ("LattePipeline failed", "--frames", "3", "--layers", "1", "--steps", "1"),
    ]:
        assert main(["generate", "a red circle", "--model", tiny, *more]) == 2
        error = capsys.readouterr().err
        assert expected in error.splitlines()[-1]
    assert files(tmp_path) == []
