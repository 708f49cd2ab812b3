"""README's pictures: made by one command, from figures that are there, small and as committed."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from demos.bundled_model.classifier import AttributeClassifier
from demos.bundled_model.clips import caption, labels, render
from demos.doors import __main__ as doors
from demos.doors import hero, language, panels, video
from demos.quality.sampling import prompts

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


@pytest.mark.slow
def test_the_clip_of_the_hero_is_read_right_and_changes_most(monkeypatch, capsys):
    full = hero.bundled_pipeline

    def few():
        pipe, call = full()
        return pipe, call | {"num_inference_steps": 1}

    class Judge:
        @staticmethod
        def load():
            return Judge()

        def correct(self, clips, asked):
            return {"shape": torch.tensor([False, True, True, False, True]), "colour": torch.arange(5) != 2}

    monkeypatch.setattr(hero, "bundled_pipeline", few)
    monkeypatch.setattr(hero, "CLIPS", 5)
    monkeypatch.setattr(hero, "AttributeClassifier", Judge)
    sure, seen = iter([torch.tensor([0.0, -2, -1, -4, -1]), torch.tensor([-1.0, -2, -1, -3, -4])]), []
    monkeypatch.setattr(hero, "certainty", lambda *_: next(sure))
    monkeypatch.setattr(hero, "row", lambda drawn, title: seen.append((drawn, title)) or panels.row(drawn, title))
    picture = hero.draw()
    drawn, title = seen[0]
    captions = [caption(spec) for spec in prompts(5, 1)]
    assert title in (captions[1], captions[4]) and "of 2 of 5 clips" in capsys.readouterr().out
    assert [panel.words for panel in drawn] == ["plain", "layer left out", "guided"]
    assert drawn[0].share < drawn[2].share == 1 and picture.width == 3 * panels.SIDE + 20


def test_the_judge_is_sure_of_real_clips_and_of_their_own_words_only():
    specs = prompts(5, 1)
    clips, judge = render(specs, 3), AttributeClassifier.load()
    asked = labels(specs)
    turned = {name: values.roll(1) for name, values in asked.items()}
    assert (hero.certainty(judge, clips, asked) > -1).all()
    assert (hero.certainty(judge, clips, turned) < -1).all()


def test_an_unknown_door_is_refused(capsys):
    with pytest.raises(SystemExit):
        doors.main(["back"])
    assert "expected doors out of region, video, language, vision, hero; got back" in capsys.readouterr().err
