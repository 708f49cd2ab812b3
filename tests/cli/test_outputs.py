"""The files of the command line: their names, whole or not at all, none lost."""

from pathlib import Path

import pytest
import torch
from helpers import cli_stub
from helpers.cli_stub import files, one_line
from helpers.tuning import run
from PIL import Image

from skipguide import SkipError, SkipPlan
from skipguide.cli import main, outputs
from skipguide.cli.file_locks import remove_leftovers
from skipguide.media import pictures
from skipguide.vision import SkipNet, UNetPlusPlus
from skipguide.vision.skipnet.train import TrainConfig, train

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


# names of up to 255 bytes, and symbolic links


@pytest.mark.parametrize("length", [240, 244, 251, 255])
@pytest.mark.parametrize("letter", ["a", "ü"])
def test_long_names(stub, length, letter):
    size = len(letter.encode())
    name = letter * ((length - 4) // size) + "b" * ((length - 4) % size) + ".gif"
    assert len(name.encode()) == length
    assert main(["generate", "p", "--layers", "1", "-o", name]) == 0
    assert Image.open(name).n_frames == 16
    notes = outputs.sidecar(Path(name))
    assert outputs.read_json(notes)["prompt"] == "p" and len(notes.name.encode()) <= 255
    assert files(stub.folder) == sorted([name, notes.name])


def test_a_name_that_no_file_system_holds(stub, capsys):
    one_line(capsys, 2, "its name has 256 bytes", "generate", "p", "--layers", "1", "-o", "a" * 252 + ".gif")
    assert stub.loads == 0


@pytest.mark.parametrize("name", ["a" * 250 + ".json", "a" * 255, "a." + "b" * 253, ".".join("a" * 128)])
def test_long_names_of_settings(tmp_path, name):
    SkipPlan([1]).save_json(tmp_path / name)
    SkipPlan([2]).save_json(tmp_path / name, overwrite=True)
    assert SkipPlan.load_json(tmp_path / name) == SkipPlan([2])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_sweeps_of_long_names(stub):
    name = "a" * 251 + ".png"
    assert main(["sweep", "p", "--layers", "1", "--scales", "1", "--frames", "2", "-o", name]) == 0
    assert Image.open(name).width > 64
    assert not any(path.name.startswith(".a") for path in stub.folder.iterdir())


def test_leftovers_of_a_long_name(tmp_path):
    with outputs.replacing(tmp_path / ("a" * 251 + ".png")) as (partial,):
        partial.write_text("half")
        other = tmp_path / ("." + "a" * 10 + ".0123abcd.png")
        other.write_text("of another")
        remove_leftovers(tmp_path, "a" * 251)
        assert not partial.exists() and other.exists()
        partial.write_text("whole")


@pytest.mark.parametrize("live", [False, True])
def test_a_link_as_the_output(stub, capsys, live):
    there = stub.folder.parent / "there"
    for name in ("a.gif", "a.gif.json"):
        (stub.folder / name).symlink_to(there / name)
    if live:
        there.mkdir()
        for name in ("a.gif", "a.gif.json"):
            (there / name).write_text("old")
        one_line(capsys, 2, "a.gif exists already", "generate", "p", "--layers", "1", "-o", "a.gif")
    assert main(["generate", "p", "--layers", "1", "-o", "a.gif", *(["--force"] if live else [])]) == 0
    assert (stub.folder / "a.gif").is_symlink() and (stub.folder / "a.gif.json").is_symlink()
    assert files(there) == ["a.gif", "a.gif.json"]
    assert Image.open(there / "a.gif").n_frames == 16


def test_a_link_that_leads_round(stub, capsys):
    (stub.folder / "a.gif").symlink_to("b.gif")
    (stub.folder / "b.gif").symlink_to("a.gif")
    one_line(capsys, 2, "a symbolic link that leads back to itself", "generate", "p", "--layers", "1", "-o", "a.gif")
    with pytest.raises(SkipError, match="back to itself"), outputs.replacing(stub.folder / "b.gif"):
        pass
    assert stub.loads == 0 and (stub.folder / "a.gif").is_symlink()


def test_folders_that_are_links(stub, tmp_path):
    """Clips, cells, adapters, checkpoints, states of training and saved networks: all go where a link points."""
    links = tmp_path / "links"
    links.mkdir()
    for name in ("clips", "saved", "state", "adapter", "checkpoint", "cache"):
        (links / name).symlink_to(tmp_path / "there" / name)
    Path("prompts.txt").write_text("a red bar\n")
    again = ["generate", "--prompts", "prompts.txt", "-o", str(links / "clips"), "--layers", "1"]
    assert main(again) == 0 and main(again) == 0
    UNetPlusPlus(widths=(4, 6)).save_pretrained(links / "saved")
    assert UNetPlusPlus.from_pretrained(links / "saved").depth == 1
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4) % 3)
    net = SkipNet({"blocks": [1, 2], "widths": [4, 8], "num_classes": 3})
    train(net, data, TrainConfig(stage="budget", steps=1, batch_size=4), out=links / "state")
    folders = {"checkpoint_dir": links / "checkpoint", "cache_dir": links / "cache", "cache": "disk"}
    run(epochs=1, **folders)[0].save_adapter(links / "adapter")
    assert all(path.is_symlink() for path in links.iterdir())
    assert all(any(path.iterdir()) for path in (tmp_path / "there").iterdir())
    assert len(list((tmp_path / "there").iterdir())) == 6


def test_a_clip_that_is_a_link_is_made_anew_where_it_points(stub, tmp_path):
    Path("prompts.txt").write_text("a red bar\n")
    again = ["generate", "--prompts", "prompts.txt", "-o", "clips", "--layers", "1"]
    assert main(again) == 0
    clip, there = Path("clips") / "00001-a-red-bar.gif", tmp_path / "there.gif"
    content = clip.read_bytes()
    clip.rename(there)
    clip.symlink_to(there)
    assert main(again) == 0 and len(stub.pipeline.calls) == 1
    assert main([*again, "--force", "--seed", "1"]) == 0
    assert clip.is_symlink() and there.read_bytes() != content
