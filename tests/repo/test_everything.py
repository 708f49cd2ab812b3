"""The command that reruns what rests on the bundled video model: what it lists, what it skips, what it remembers."""

import json

import pytest
from PIL import Image

from demos.bundled_model import everything
from demos.bundled_model.everything import ROOT, STEPS, Step, fingerprint, main


def writes(name, text="1"):
    return Step((("-c", f"open({name!r}, 'w').write({text!r})"),), (name,), 0.1, quoted="nowhere")


@pytest.fixture
def run(tmp_path):
    def run(*arguments, **steps):
        return main(arguments, steps, tmp_path / "record.json", tmp_path)

    return run


def test_the_committed_record_is_of_todays_model_or_says_what_to_do(capsys):
    assert main(["--dry"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " about " in line]
    assert [line.removeprefix("to do").removeprefix("done").split()[0] for line in lines] == list(STEPS)
    for step in STEPS.values():
        for name in step.writes:
            assert (ROOT / name).is_file(), name


def test_every_command_of_a_step_is_there():
    for step in STEPS.values():
        for command in step.commands:
            module = (ROOT / command[1].replace(".", "/")).with_suffix("")
            assert command[0] == "-m" and (module.with_suffix(".py").is_file() or (module / "__main__.py").is_file())


def test_a_step_runs_once_for_a_model(run, tmp_path, capsys, monkeypatch):
    assert run(one=writes("a"), two=writes("b")) == 0
    assert (tmp_path / "a").read_text() == "1"
    first = json.loads((tmp_path / "record.json").read_text())
    assert set(first) == {"one", "two"} and len(set(first.values())) == 1
    capsys.readouterr()
    assert run(one=writes("a", "2"), two=writes("b")) == 0
    assert (tmp_path / "a").read_text() == "1"
    assert capsys.readouterr().out.splitlines() == ["one: up to date", "two: up to date"]
    monkeypatch.setattr(everything, "fingerprint", lambda folder: "another")
    assert run("--dry", one=writes("a", "2"), two=writes("b")) == 0
    assert capsys.readouterr().out.count("to do") == 2
    assert run("--only", "one", one=writes("a", "2"), two=writes("b")) == 0
    assert (tmp_path / "a").read_text() == "2"
    assert json.loads((tmp_path / "record.json").read_text()) == first | {"one": "another"}


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Step((("-c", "raise SystemExit(3)"),), (), 0.1), "ended with status 3"),
        (Step((("-c", "pass"),), ("never",), 0.1), "expected the step to write never"),
    ],
)
def test_what_fails_is_not_remembered_and_ends_the_run(run, tmp_path, capsys, step, said):
    assert run(bad=step, after=writes("a")) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists() and not (tmp_path / "a").exists()


def test_a_study_of_another_model_is_not_taken_up_and_its_sheets_become_jpegs(run, tmp_path):
    make = (
        "import sys, pathlib; from PIL import Image; folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True); "
        "Image.new('RGB', (4, 4)).save(folder / 'sheet.png'); (folder / 'results.md').write_text('table')"
    )
    step = Step(
        (("-c", make, "runs/x-{model}"),),
        ("place/results.md", "sheets/sheet.jpg"),
        0.1,
        (("runs/x-{model}/results.*", "place", False), ("runs/x-{model}/*.png", "sheets", True)),
    )
    assert run(study=step) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"x-{fingerprint(everything.bundled('tiny-t2v'))}"]
    assert (tmp_path / "place/results.md").read_text() == "table"
    assert Image.open(tmp_path / "sheets/sheet.jpg").format == "JPEG"


def test_the_card_does_not_count(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/model.safetensors").write_bytes(b"1")
    before = fingerprint(tmp_path)
    (tmp_path / "MODEL_CARD.md").write_text("words")
    assert fingerprint(tmp_path) == before
    (tmp_path / "unet/model.safetensors").write_bytes(b"2")
    assert fingerprint(tmp_path) != before
