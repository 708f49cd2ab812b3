"""`skipguide tune`: a schedule in a file, which the other commands take, on a tiny random pipeline."""

import json

import pytest

from skipguide.cli import main
from skipguide.pipelines import PassSchedule
from zoo import saved

tiny = saved.tiny


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_schedule_is_written_and_taken(tiny, here, capsys):
    search = ["tune", tiny, "--layers", "4", "--prompts", "a red circle", "--steps", "3", "--budget", "0.7"]
    assert main([*search, "-o", "fast.json"]) == 0
    assert names(here) == ["fast.json", "fast.json.json"], "nothing of a temporary name is left"
    said = capsys.readouterr().out
    assert "of the blocks run" in said and "for --schedule fast.json" in said
    schedule = PassSchedule.load_json("fast.json")
    notes = json.loads((here / "fast.json.json").read_text())
    assert len(schedule.steps) == 3 and notes["share"] <= 0.7 and notes["path"][0] == {"share": 1.0, "damage": 0.0}
    assert notes["guidance"] == {"layers": [4]} and notes["prompts"] == ["a red circle"]

    assert main([*search, "-o", "fast.json"]) == 2
    assert "--force" in capsys.readouterr().err
    clip = ["generate", "a red circle", "--model", tiny, "--layers", "4", "-o", "clip.gif"]
    assert main([*clip, "--schedule", "fast.json"]) == 0
    assert "schedule of 3 steps" in capsys.readouterr().out
    made = json.loads((here / "clip.gif.json").read_text())
    assert made["call"]["num_inference_steps"] == 3, "the schedule says how many steps there are"
    assert made["stats"]["blocks_run"] <= 0.7 * made["stats"]["blocks_naive"]
    assert PassSchedule.from_dict(made["guidance"]["schedule"]) == schedule
    assert main([*clip, "--schedule", "fast.json", "--steps", "2", "--force"]) == 2
    assert "is for 3 steps, and the run has 2" in capsys.readouterr().err


def test_passes_only_and_a_preset_with_a_window(tiny, here, capsys):
    search = ["tune", tiny, "--preset", "frugal", "--layers", "4", "--prompts", "a red circle", "--passes-only"]
    assert main([*search, "--budget", "0.8", "--steps", "3", "-o", "s.json"]) == 0
    assert not PassSchedule.load_json("s.json").blocks
    clip = ["generate", "a circle", "--model", tiny, "--preset", "frugal", "--layers", "4", "-o", "clip.gif"]
    assert main([*clip, "--schedule", "s.json"]) == 0, "in place of the preset's window"
    assert "cfg_interval" not in json.loads((here / "clip.gif.json").read_text())["guidance"]
    capsys.readouterr()
    assert main([*clip, "--schedule", "s.json", "--cfg-interval", "0.2", "0.8", "--force"]) == 2
    assert "leave out start, stop, every, cfg_interval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "0.05"], "above 0.05"),
        (["--budget", "nan"], "expected a number"),
        (["--prompts", " "], "one of --prompts is empty"),
        (["-o", "schedule.png"], "ends in .json"),
        (["--schedule", "none.json"], "there is no file"),
    ],
)
def test_what_cannot_be_tuned_is_said_before_the_work(here, capsys, flags, words):
    assert main(["tune", *flags]) == 2
    assert words in capsys.readouterr().err and names(here) == []


def test_damaged_schedules_are_refused(here, capsys):
    for text, words in (("{", "expected JSON"), ("[1]", "mapping"), ('{"version": 1, "steps": [1]}', "mapping")):
        (here / "s.json").write_text(text)
        assert main(["generate", "a circle", "--schedule", "s.json"]) == 2
        assert words in capsys.readouterr().err
