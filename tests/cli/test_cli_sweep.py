"""`skipguide sweep` on a stub pipeline that draws."""

import csv
import json

from helpers import cli_stub
from helpers.cli_stub import BLOCKS, files, interrupt_after, one_line
from PIL import Image

from skipguide.cli import main

stub = cli_stub.stub

SWEEP = ("sweep", "p", "--layers", "1-2", "0+3", "--scales", "0.5", "2", "--frames", "4")


def test_sweep_writes_a_sheet_a_table_and_notes(stub, capsys):
    assert main(SWEEP) == 0
    assert [name for name in files(stub.folder) if name.startswith("p-sweep.")] == [
        "p-sweep.csv",
        "p-sweep.png",
        "p-sweep.png.json",
    ]
    assert len(stub.pipeline.calls) == 7
    with open("p-sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["layer"], float(row["scale"])) for row in table] == [
        ("plain", 0),
        *((layer, scale) for layer in ("1", "2", "0+3") for scale in (0.5, 2)),
    ]
    assert [float(row["relative_cost"]) for row in table[1::2]] == [1.25, 1.125, 1.375]
    changes = [float(row["difference"]) for row in table]
    assert changes[0] == 0
    assert 0 < changes[1] < changes[2]
    sheet = Image.open("p-sweep.png")
    cell = 3 * 128 + 2 * 2
    assert sheet.width > 3 * cell, "plain and two scales"
    assert 3 * 128 < sheet.height < 4 * 128 + 150
    notes = json.loads((stub.folder / "p-sweep.png.json").read_text())
    assert notes["layers"] == [[1], [2], [0, 3]]
    assert len(notes["stats"]) == 7
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_sweep_takes_all_layers_by_default(stub):
    assert main(["sweep", "p", "--scales", "1", "--frames", "2"]) == 0
    assert len(stub.pipeline.calls) == 1 + BLOCKS


def test_sweep_has_one_scale_where_there_is_no_third_pass(stub):
    assert main(["sweep", "p", "--layers", "1", "--formula", "uncond", "--frames", "2"]) == 0
    with open(stub.folder / "p-sweep.csv", newline="") as file:
        assert [row["scale"] for row in csv.DictReader(file) if row["layer"] == "1"] == ["1.0"]


def test_an_interrupted_sweep_goes_on(stub, capsys, monkeypatch):
    left = interrupt_after(4, monkeypatch)
    assert main(SWEEP) == 130
    error = capsys.readouterr().err
    assert "4 cells are kept in" in error.splitlines()[-1]
    assert not (stub.folder / "p-sweep.png").exists()
    assert not (stub.folder / "p-sweep.csv").exists()

    left[0] = 99
    stub.pipeline.calls.clear()
    assert main(SWEEP) == 0
    assert len(stub.pipeline.calls) == 3, "four of seven were there"
    whole = (stub.folder / "p-sweep.png").read_bytes()
    table = (stub.folder / "p-sweep.csv").read_text()

    stub.pipeline.calls.clear()
    assert main([*SWEEP, "--force"]) == 0
    assert stub.pipeline.calls == []
    assert (stub.folder / "p-sweep.png").read_bytes() == whole
    assert (stub.folder / "p-sweep.csv").read_text() == table
    assert main([*SWEEP, "--force", "--seed", "1"]) == 0
    assert len(stub.pipeline.calls) == 7, "another seed is another sweep"
    stub.pipeline.calls.clear()
    assert main([*SWEEP, "--force", "--fresh"]) == 0
    assert len(stub.pipeline.calls) == 7


def test_a_damaged_cell_is_made_again(stub):
    assert main(SWEEP) == 0
    for path in (stub.folder / "p-sweep.cells").glob("1-*.png"):
        path.write_bytes(b"not a picture")
    stub.pipeline.calls.clear()
    assert main([*SWEEP, "--force"]) == 0
    assert len(stub.pipeline.calls) == 2


def test_sweep_refuses_a_layer_that_is_not_there_before_it_starts(stub, capsys):
    one_line(capsys, 2, "layer 9 is out of range", "sweep", "p", "--layers", "1", "9")
    assert stub.pipeline.calls == []
    assert files(stub.folder) == []
