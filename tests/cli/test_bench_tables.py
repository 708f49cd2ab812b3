"""`skipguide bench` on the bundled language model and the bundled classifier: the tables, and what is refused."""

import csv
import json
import math
from pathlib import Path

import pytest
from helpers.cli_stub import one_line

from skipguide.bench import masking
from skipguide.bench.language import METHODS
from skipguide.cli import bench_language, bench_masking, main

SCENES = Path(__file__).resolve().parents[2] / "demos" / "layer_masking" / "scenes"
LANGUAGE = ["bench", "tiny-lm", "--quick", "--tokens", "24", "--pieces", "3", "--counts", "2", "5", "-o", "lm"]
CLASSIFIER = ["bench", "tiny-cnn", "--quick", "--images", str(SCENES), "-o", "cnn"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(LANGUAGE) == 0
        assert main(CLASSIFIER) == 0
        yield folder


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def test_every_method_is_in_the_table_or_says_why_not(place):
    found = results("lm")
    quick = [method.name for method in METHODS if not method.searched]
    there = {(row["method"], row["sublayers"]) for row in found["rows"]}
    missing = {tuple(name.rsplit(", ", 1)) for name in found["missing"]}
    assert there | {(name, int(count)) for name, count in missing} == {(name, n) for name in quick for n in (2, 5)}
    assert ("late layers", "5") in missing, "half a layer is none"
    page = Path("lm/report.html").read_text()
    assert all(name in page for name in quick)
    for row in found["rows"]:
        assert row["of"] == 24
        assert row["pieces"] == 3
        assert 0 < row["agreement"] <= 1
    with Path("lm/results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"])


def test_perplexities_are_those_of_the_losses(place):
    whole = json.loads(Path("lm/cells/whole.json").read_text())["result"]["losses"]
    cell = json.loads(Path("lm/cells/adaskip-scaled-2.json").read_text())["result"]
    row = next(row for row in results("lm")["rows"] if (row["method"], row["sublayers"]) == ("AdaSkip, scaled", 2))
    assert row["perplexity"] == pytest.approx(math.exp(sum(cell["losses"]) / 3))
    assert row["loss_rise"] == pytest.approx(sum(cell["losses"]) / 3 - sum(whole) / 3)


def test_pictures_and_fills(place):
    found = results("cnn")
    keys = {(row["protocol"], row["fill"], row["hidden"]) for row in found["rows"]}
    assert keys == {
        (protocol, masking.NAMES[fill], share)
        for protocol in masking.PROTOCOLS
        for fill in masking.FILLS
        for share in masking.QUICK_SHARES
    }
    pictures = len(list(SCENES.glob("*.png")))
    assert all(row["pictures"] == pictures and 0 <= row["kept_percent"] <= 100 for row in found["rows"])
    ours = {(r["protocol"], r["hidden"]): r["kept_percent"] for r in found["rows"] if r["fill"] == "layer masking"}
    for row in found["rows"]:
        if row["fill"] != "layer masking":
            gap = row["kept_percent"] - ours[row["protocol"], row["hidden"]]
            assert row["difference_to_layer_masking"] == pytest.approx(gap)


def test_finished_tables_are_not_measured_again(place, monkeypatch):
    monkeypatch.setattr("skipguide.bench.language.measure", lambda *args: pytest.fail("measured again"))
    monkeypatch.setattr("skipguide.bench.masking.kept", lambda *args: pytest.fail("measured again"))
    before = [Path(name, "results.csv").read_text() for name in ("lm", "cnn")]
    assert main(LANGUAGE) == main(CLASSIFIER) == 0
    assert [Path(name, "results.csv").read_text() for name in ("lm", "cnn")] == before


def test_what_is_refused(place, capsys):
    one_line(
        capsys, 2, "has results of other settings: counts was [2, 5] and is [2, 4]", *LANGUAGE[:-3], "4", "-o", "lm"
    )
    Path("short.txt").write_text("one two three")
    one_line(capsys, 2, "expected at least 4, two to choose on", "bench", "tiny-lm", "--text", "short.txt", "-o", "x")
    one_line(capsys, 2, "cannot read nothing.txt as text", "bench", "tiny-lm", "--text", "nothing.txt", "-o", "y")
    one_line(capsys, 2, "give a folder of them with --images", "bench", "tiny-cnn", "-o", "z")
    one_line(capsys, 2, "expected --images as a folder", "bench", "tiny-cnn", "--images", "short.txt", "-o", "z")
    Path("empty").mkdir()
    one_line(capsys, 2, "has 0 pictures", "bench", "tiny-cnn", "--images", "empty", "-o", "z")
    one_line(capsys, 2, "--grid is for a diffusion pipeline", "bench", "tiny-lm", "--grid", "2")
    one_line(capsys, 2, "does nothing for a classifier", *CLASSIFIER[:-1], "z", "--dtype", "float16")
    assert not Path("z").exists()


def test_defaults_are_enough_for_an_interval():
    assert min(bench_language.QUICK_PIECES, bench_masking.QUICK_PICTURES) >= 2
