"""README's pictures: made by one command, from figures that are there, small and as committed."""

import re
from pathlib import Path

import pytest
from PIL import Image

from demos.doors import __main__ as doors
from demos.doors import hero, language, panels, video

ROOT = Path(__file__).resolve().parents[2]


def test_the_bars_of_the_language_door_are_the_tables():
    found = {language.WAYS[way]: round(100 * share) for way, share in language.shares().items()}
    assert {*found} == {*language.WAYS.values()}
    table = (ROOT / "demos" / "real" / "llm.md").read_text().split("Python source")[0]
    for name, words in (
        ("MeasuredSkip (search)", "found by a search"),
        ("AdaSkip + scales", "chosen by AdaSkip"),
        ("random, ends kept", "at random"),
        ("late layers", "the last ones"),
        ("Unified, balanced", "evenly spread"),
    ):
        eighth = re.search(rf"^\| {re.escape(name)} \|[^|]*\|[^|]*\|[^|]*/ (\d+)% \|", table, re.M)
        assert eighth and int(eighth[1]) == found[words], name


def test_the_bars_of_the_video_door_are_the_tables():
    table = (ROOT / "demos" / "benchmarks" / "stg_cost.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| LTX-Video |"))
    cells = [cell.strip(" *") for cell in row.split("|")]
    found = video.times()
    said = [f"{found[way]:.2f}" for way in ("plain", "naive", "one_batch", "diffusers", "ours")]
    assert cells[4:9] == said


@pytest.mark.parametrize("name", ["region", "video", "language", "vision"])
def test_a_door_is_drawn_as_it_is_committed(name, tmp_path, capsys):
    doors.main([name, "--out", str(tmp_path)])
    made, kept = (Image.open(folder / f"door_{name}.png") for folder in (tmp_path, ROOT / "demos" / "media"))
    assert abs(made.width - kept.width) < 20 and abs(made.height - kept.height) < 20
    assert (tmp_path / f"door_{name}.png").stat().st_size < 100_000


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler, numpy 2
def test_the_clip_of_the_hero_is_the_one_that_changes_most(monkeypatch, capsys):
    full = hero.bundled_pipeline

    def few():
        pipe, call = full()
        return pipe, call | {"num_inference_steps": 1}

    monkeypatch.setattr(hero, "bundled_pipeline", few)
    monkeypatch.setattr(hero, "PROMPTS", hero.PROMPTS[:2])
    seen = []
    monkeypatch.setattr(hero, "row", lambda drawn, title: seen.append((drawn, title)) or panels.row(drawn, title))
    picture = hero.draw()
    said = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines())
    changes = {prompt: float(words.split()[0]) for prompt, words in said.items()}
    drawn, title = seen[0]
    assert changes[title] == max(changes.values()) and len(changes) == 2
    assert [panel.words for panel in drawn] == ["plain", "layer left out", "guided"]
    assert drawn[0].share < drawn[2].share == 1 and picture.width == 3 * panels.SIDE + 20


def test_an_unknown_door_is_refused(capsys):
    with pytest.raises(SystemExit):
        doors.main(["back"])
    assert "expected doors out of region, video, language, vision, hero; got back" in capsys.readouterr().err
