"""The GPU demo's dry form: every piece runs on the CPU, is written at once and left out the second time."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
command = importlib.import_module("demos.gpu.__main__")
needs = importlib.import_module("demos.gpu.needs")
pieces = importlib.import_module("demos.gpu.pieces")
race = importlib.import_module("demos.gpu.race")
setting = importlib.import_module("demos.gpu.setting")
tables = importlib.import_module("demos.gpu.tables")
device_tests = importlib.import_module("demos.gpu.device_tests")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning"),  # transformers says it of its own output
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


@pytest.fixture
def dry(tmp_path):
    """Runs the command dry in a folder; returns its results."""

    def run(*arguments):
        code = command.main(["--dry", "--out", str(tmp_path), *arguments])
        path = tmp_path / "results_dry.json"
        return code, json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    yield run
    torch._dynamo.reset()


def rows(value):
    """Every mapping in some figures."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from rows(each)


QUICK = {"ltx", "wan", "decode", "skipnet", "masking"}  # one of each kind; the others are the same code in other shapes


@pytest.mark.parametrize(
    "name",
    [
        piece.name if piece.name in QUICK else pytest.param(piece.name, marks=pytest.mark.slow)
        for piece in pieces.PIECES
    ],
)
def test_every_piece_runs_dry(name, dry, tmp_path):
    code, results = dry("--pieces", name)
    record = results["pieces"][name]
    assert code == 0 and set(record) == {"figures", "seconds", "budget", "torch"}, record
    failed = [row["error"] for row in rows(record["figures"]) if "error" in row]
    assert not failed
    for row in rows(record["figures"]):
        if "every" in row:
            assert row["seconds"] > 0 and {"peak_bytes", "total_bytes"} < set(row)
    assert [path.name for path in tmp_path.iterdir()] == ["results_dry.json"]
    text = tables.document(results)
    assert tables.SECTIONS[name.partition("_")[0]][0] in text and "dry form" in text
    for line in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({part.count("|") for part in line.splitlines()}) == 1, line


def test_what_is_there_is_left_out(dry, monkeypatch):
    ran = []
    fake = replace(pieces.BY_NAME["decode"], budget=20, needs=())
    monkeypatch.setattr(type(fake), "run", lambda self, how: ran.append(self.name) or {"runs": len(ran)})
    monkeypatch.setitem(pieces.BY_NAME, "decode", fake)
    assert dry("--pieces", "decode")[1]["pieces"]["decode"]["figures"] == {"runs": 1}
    assert dry("--pieces", "decode")[1]["pieces"]["decode"]["figures"] == {"runs": 1}
    assert dry("--pieces", "decode", "--force")[1]["pieces"]["decode"]["figures"] == {"runs": 2}
    assert ran == ["decode", "decode"]


def test_a_piece_that_fails_ends_nothing_and_is_tried_again(dry, monkeypatch):
    outcomes = iter([ValueError("no\nluck"), {"fine": True}])

    def run(self, how):
        found = next(outcomes)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(pieces.Piece, "run", run)
    monkeypatch.setitem(pieces.BY_NAME, "decode", replace(pieces.BY_NAME["decode"], needs=()))
    code, results = dry("--pieces", "decode")
    assert code == 1 and results["pieces"]["decode"]["error"] == "ValueError: no luck"
    code, results = dry("--pieces", "decode")
    assert code == 0 and results["pieces"]["decode"]["figures"] == {"fine": True}


def test_a_piece_without_its_packages_says_so(dry, monkeypatch):
    monkeypatch.setattr(command, "installed", lambda: {"transformers": "5.17.0"})
    code, results = dry("--pieces", "ltx,decode")
    assert code == 0
    assert results["pieces"]["ltx"]["left_out"].startswith("needs diffusers, transformers 5.23 or newer (here 5.17.0)")
    assert "left_out" in results["pieces"]["decode"]
    assert "left_out" not in tables.document(results) and "needs diffusers" in tables.document(results)


def test_no_piece_starts_that_does_not_fit(dry, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        command.main(["--pieces", "unheard_of"])
    assert "unheard_of" in capsys.readouterr().err
    assert sum(piece.budget for piece in pieces.PIECES) < 900


def test_without_a_gpu_only_the_dry_form_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as leave:
        command.main([])
    assert leave.value.code == 2 and "--dry" in capsys.readouterr().err


def test_wheels_for_another_machine(tmp_path, capsys):
    there = tmp_path / "there.txt"
    there.write_text(
        "Package  Version\n-------- -------\ntorch 2.11.0\ntransformers 5.17.0\ntorchvision 0.26.0\ntimm 1.0.2\n"
    )
    assert command.main(["--wheels", str(there)]) == 0
    names = capsys.readouterr().out.split()
    assert {"transformers>=5.23", "diffusers>=0.41", "importlib_metadata"} <= set(names)
    assert not [name for name in names if name.startswith(("torch", "timm"))]


def test_wheels_of_this_machine_are_none(capsys):
    assert command.main(["--wheels"]) == 0
    assert capsys.readouterr().out.strip() == ""


@pytest.mark.parametrize("line", ["numpy==2.4.6", "numpy  2.4.6", "numpy 2.4.6, torch 2.11.0"])
def test_lists_of_packages_are_read(line):
    assert needs.listed([line])["numpy"] == "2.4.6"


def test_versions_compare_as_numbers():
    assert needs.parts("2.11.0+cu130") == (2, 11, 0)
    assert needs.lacking(["numpy"], {"numpy": "1.3"}) and not needs.lacking(["numpy"], {"numpy": "1.100"})


def test_one_variant_fails_and_the_others_go_on():
    from contextlib import nullcontext

    def fail():
        raise RuntimeError("too large")

    variants = {
        "plain": race.Variant(nullcontext, lambda: None),
        "large": race.Variant(nullcontext, fail),
        "other": race.Variant(nullcontext, lambda: None),
    }
    found = race.race(setting.Setting(dry=True, device="cpu"), variants, rounds=2)
    assert found["large"] == {"error": "RuntimeError: too large"}
    assert len(found["other"]["every"]) == 2 and found["other"]["to_plain"]["median"] > 0
    assert race.ratio(found, "large", "plain") is None


def test_results_of_several_runs_are_put_together(tmp_path, capsys):
    machine = {"versions": {"torch": "2.11.0"}, "gpu": "a GPU", "cpu": "a CPU", "python": "3.12"}
    figures = {"files": 1, "seconds": 2, "timed_out": False, "counts": {"passed": 3}, "failures": []}
    first = {"dry": False, "machine": machine, "pieces": {"tests": {"figures": figures}, "ltx": {"error": "X: y"}}}
    second = {"dry": False, "machine": machine, "pieces": {"tests": {"error": "late"}, "ltx": {"left_out": "needs z"}}}
    for name, data in (("a", first), ("b", second)):
        (tmp_path / name).write_text(json.dumps(data))
    assert tables.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)]) == 0
    both = json.loads((tmp_path / "results.json").read_text())["pieces"]
    assert both == {"tests": {"figures": figures}, "ltx": {"left_out": "needs z"}}
    assert "3 passed" in (tmp_path / "results.md").read_text() == capsys.readouterr().out.removesuffix("\n")


def test_files_with_gpu_tests_are_found():
    found = device_tests.files()
    assert "tests/pipelines/test_tail.py" in found and len(found) > 10


def test_the_command_names_its_pieces():
    done = subprocess.run(
        [sys.executable, "-m", "demos.gpu", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == [piece.name for piece in pieces.PIECES]
