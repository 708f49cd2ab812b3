"""The report: HTML that parses, holds what it was given, and loads nothing; charts; the suites' folders."""

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from skipguide import SkipError
from skipguide.bench.charts import forest, lines
from skipguide.bench.export import Exported, export, file_words
from skipguide.bench.intervals import Interval
from skipguide.bench.report import Cell, Report, compared, difference, shown
from skipguide.media.frames import as_images

VOID = {"meta", "img", "circle", "line", "rect", "polyline", "br"}


class Reader(HTMLParser):
    """What a file holds; every tag has to be closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.sources, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_a_report_holds_everything_and_loads_nothing():
    report = Report("Does <it> help?", "Yes & no.")
    report.heading("A table")
    report.table(["row", "score"], [[Cell("plain"), Cell("1")], [Cell("<b>"), Cell("2", "+1 ± 0.5", "better")]], 0)
    report.note("a note")
    report.terms({"plain": "what it is"})
    report.chart(forest("score", [("<b>", Interval(1.0, 0.5, 3), "better")], "difference"))
    report.picture(Image.new("RGB", (8, 8), "red"), 'a "red" picture')
    report.code("skipguide bench 'a b'")
    found = Reader(report.html())
    for words in ("Does <it> help?", "Yes & no.", "<b>", "+1 ± 0.5", "a note", "what it is", "skipguide bench 'a b'"):
        assert words in found.text
    assert "script" not in found.tags
    assert [source[:22] for source in found.sources] == ["data:image/jpeg;base64"]
    assert 'class="baseline"' in report.html()


def test_numbers_as_they_are_shown():
    assert [shown(x) for x in (0.0, 0.14875, 1.63643, 12345.6, 1e-5)] == ["0", "0.149", "1.636", "1.235e+04", "1e-05"]
    assert difference(Interval(0.0315670, 0.000937, 3)) == "+0.0316 ± 0.0009"
    assert difference(Interval(-0.27404, 0.653599, 3)) == "−0.27 ± 0.65"
    assert difference(Interval(12.4, 3.1, 3)) == "+12.4 ± 3.1"
    assert difference(Interval(2.0, None, 1)) == "+2"
    assert difference(Interval(0.5, 0.0, 2)) == "+0.5 ± 0"
    cell = compared(1.0, Interval(0.5, 0.1, 3), "lower")
    assert (cell.text, cell.below, cell.mark) == ("1", "+0.50 ± 0.10", "worse")
    assert compared(1.0, None, "lower") == Cell("1")


def marks(svg, tag):
    return ElementTree.fromstring(svg).findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def test_an_interval_chart_is_to_scale():
    rows = [("a", Interval(1.0, 1.0, 3), "tie"), ("b", Interval(-1.0, None, 1), ""), ("c", Interval(2.0, 0.5, 3), "")]
    svg = forest("title", rows, "axis")
    a, b, c = (float(mark.get("cx")) for mark in marks(svg, "circle"))
    assert c - a == pytest.approx((a - b) / 2, abs=0.2)
    whiskers = [mark for mark in marks(svg, "line") if mark.get("stroke-width")]
    assert len(whiskers) == 2, "one value has no interval"
    assert float(whiskers[0].get("x2")) - a == pytest.approx(a - float(whiskers[0].get("x1")), abs=0.2)
    with pytest.raises(SkipError, match="at least one row"):
        forest("title", [], "axis")


def test_an_interval_of_two_seeds_does_not_crush_the_others():
    rows = [("a", Interval(1.0, 0.1, 3), ""), ("b", Interval(1.0, 500.0, 2), "")]
    (a, _), right = (float(mark.get("cx")) for mark in marks(forest("t", rows, "x"), "circle")), 610
    assert a > 150 + 460 / 2 + 40
    assert max(float(mark.get("x2")) for mark in marks(forest("t", rows, "x"), "line")) <= right


def test_lines_are_to_scale():
    svg = lines("t", {"a": [(1, 1.0), (2, 10.0), (3, 100.0)]}, ("x", "y"), logarithmic=True)
    points = [(float(mark.get("cx")), float(mark.get("cy"))) for mark in marks(svg, "circle")]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.2)
    lines("flat", {"a": [(1, 5.0)]}, ("x", "y"))
    with pytest.raises(SkipError, match="at least one point"):
        lines("t", {"a": []}, ("x", "y"))


# --- export


def clips():
    frames = as_images((np.random.default_rng(0).random((3, 16, 16, 3)) * 255).astype(np.uint8))
    for setting in ("cfg-3", "preset"):
        for number, prompt in ((1, "a cat / a dog"), (2, "a tram")):
            for seed in (0, 1):
                yield Exported(setting, prompt, number, seed, frames, 8.0)


def test_the_folders_of_imagereward(tmp_path):
    """As its test-benchmark.py reads them: a folder per model, ID_NUMBER.png and nothing else in it."""
    assert export("imagereward", tmp_path, clips()) == 8
    items = json.loads((tmp_path / "prompts.json").read_text())
    assert [item["prompt"] for item in items] == ["a cat / a dog", "a tram"]
    for model in ("cfg-3", "preset"):
        folder = tmp_path / "generations" / model
        expected = {f"{item['id']}_{x}.png" for item in items for x in range(2)}
        assert {path.name for path in folder.iterdir()} == expected
    with Image.open(tmp_path / "generations" / "preset" / "00002_1.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(next(clips()).frames[1])), "the middle frame, exactly"


def test_the_folders_of_vbench(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    assert export("vbench", tmp_path, clips()) == 8
    names = sorted(path.name for path in (tmp_path / "preset").iterdir())
    assert names == ["a cat _ a dog-0.mp4", "a cat _ a dog-1.mp4", "a tram-0.mp4", "a tram-1.mp4"]
    assert json.loads((tmp_path / "preset-prompts.json").read_text())["a cat _ a dog-1.mp4"] == "a cat / a dog"


def test_what_is_not_exported(tmp_path):
    with pytest.raises(SkipError, match="unknown suite 'fid'; expected one of vbench, imagereward"):
        export("fid", tmp_path, clips())
    assert file_words("a\\b/c\nd") == "a_b_c_d"
    assert file_words("  ") == "_"
