"""`skipguide compare` on a stub pipeline that draws."""

import json

import numpy as np
from helpers import cli_stub
from PIL import Image

from skipguide.cli import main

stub = cli_stub.stub


def test_compare_puts_the_same_seed_side_by_side(stub, capsys):
    assert main(["compare", "p", "--layers", "1", "--scale", "9", "--frames", "4", "--seed", "5"]) == 0
    with Image.open("p-compare.gif") as gif:
        assert gif.n_frames == 4
        assert gif.width == 2 * 256 + 8
        assert gif.height > 256 + 20, "title and labels above the clips"
        frame = np.asarray(gif.convert("RGB")).astype(int)[-256:]
    left, right = frame[:, :256], frame[:, 264:]
    assert abs(left[:, 128:] - right[:, 128:]).mean() < 8, "same seed, same ground"
    assert (right[:, :56, 0] - left[:, :56, 0]).mean() > 20, "the guidance shows on the right"
    notes = json.loads((stub.folder / "p-compare.gif.json").read_text())
    assert set(notes["seconds"]) == {"plain", "guided"}
    assert 0 < notes["difference"] < 0.1
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_compare_png_has_a_row_each(stub):
    assert main(["compare", "p", "--layers", "1", "-o", "c.png"]) == 0
    assert Image.open("c.png").height > 2 * 128
    assert Image.open("c.png").width > 6 * 128
