"""The files of the command line: their names, whole or not at all, none lost."""

import pytest
from helpers import cli_stub
from helpers.cli_stub import files, one_line
from PIL import Image

from skipguide import SkipError
from skipguide.cli import main, outputs
from skipguide.media import pictures

stub = cli_stub.stub


def test_slug():
    assert outputs.slug("A red circle, moving right!") == "a-red-circle-moving-right"
    assert outputs.slug("../../etc/passwd") == "etc-passwd"
    assert outputs.slug("!?") == "clip"
    assert len(outputs.slug("word " * 100)) <= 60
    assert outputs.slug("ein blauer Würfel") == "ein-blauer-würfel"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, None])
def test_replacing_is_all_or_nothing(tmp_path, error):
    old = tmp_path / "a.gif"
    old.write_text("old")
    new = tmp_path / "deeper" / "b.json"

    def write():
        with outputs.replacing(old, new) as (first, second):
            assert first.suffix == ".gif"
            assert first.parent == tmp_path
            first.write_text("new")
            if error:
                raise error
            second.write_text("new")

    if error:
        with pytest.raises(error):
            write()
        assert files(tmp_path) == ["a.gif"]
        assert old.read_text() == "old"
    else:
        write()
        assert files(tmp_path) == ["a.gif", "b.json"]
        assert old.read_text() == "new"


def test_existing_files_are_kept_and_nothing_is_loaded(stub, capsys):
    for name in ("p.gif", "q.gif.json", "r-compare.gif", "s-sweep.csv", "t.png"):
        (stub.folder / name).write_text("precious")
    one_line(capsys, 2, "p.gif exists already", "generate", "p", "--layers", "1")
    one_line(capsys, 2, "q.gif.json exists already", "generate", "q", "--layers", "1")
    one_line(capsys, 2, "r-compare.gif exists already", "compare", "r", "--layers", "1")
    one_line(capsys, 2, "s-sweep.csv exists already", "sweep", "s")
    one_line(capsys, 2, "t.png exists already", "sweep", "t", "-o", "t.png")
    assert stub.loads == 0
    assert {(stub.folder / name).read_text() for name in files(stub.folder)} == {"precious"}
    assert main(["generate", "p", "--layers", "1", "--force"]) == 0
    assert Image.open("p.gif").n_frames == 16


def test_bad_output_is_refused_before_loading(stub, capsys, monkeypatch):
    (stub.folder / "folder.gif").mkdir()
    (stub.folder / "file").write_text("")
    one_line(capsys, 2, "expected a file name that ends in .gif, .mp4, .png", "generate", "p", "-o", "clip.avi")
    one_line(capsys, 2, "is a folder", "generate", "p", "-o", "folder.gif")
    one_line(capsys, 2, "is not a folder", "generate", "p", "-o", "file/clip.gif")
    one_line(capsys, 2, "ends in .png", "sweep", "p", "-o", "clip.gif")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one_line(capsys, 2, "skipguide[video]", "generate", "p", "-o", "clip.mp4")
    assert stub.loads == 0


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (SkipError("layer 99 is out of range"), 2, "layer 99 is out of range"),
    ],
)
@pytest.mark.parametrize("where", ["sampling", "writing"])
def test_a_failure_leaves_no_file(stub, capsys, monkeypatch, error, status, expected, where):
    def fail(images, path, fps):
        path.write_text("half a fi")
        raise error

    if where == "sampling":
        stub.pipeline.fails = error
    else:
        monkeypatch.setattr(pictures, "save_gif", fail)
    one_line(capsys, status, expected, "generate", "p", "--layers", "1")
    assert files(stub.folder) == []
