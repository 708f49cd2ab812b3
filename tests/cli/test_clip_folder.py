"""A folder of clips that somebody touched: a damaged clip, notes, manifest; processes that contradict themselves."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from helpers import cli_stub
from helpers.cli_stub import one_line
from helpers.clip_folders import check_whole, contents, manifest

from skipguide import SkipError
from skipguide.cli import build_parser, main, processes
from skipguide.cli.clip_folder import Clip, ClipFolder
from skipguide.vision.skip_tuning import fit

stub = cli_stub.stub
NAMES = ["00001-a-red-bar.gif", "00002-a-blue-bar.gif"]
COMMAND = ("generate", "--prompts", "prompts.txt", "-o", "clips", "--layers", "1", "--frames", "2", "--zoom", "1")


@pytest.fixture
def clips(stub, capsys):
    """A finished folder of two clips."""
    Path("prompts.txt").write_text("a red bar\na blue bar\n")
    assert main(COMMAND) == 0
    capsys.readouterr()
    stub.pipeline.calls.clear()
    return Path("clips")


def flip(path, place=40):
    """Change one byte, not the length and not the time."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_one_byte_of_a_finished_clip(clips, stub, capsys):
    whole = contents(clips)
    flip(clips / NAMES[1])
    one_line(capsys, 2, f"{NAMES[1]} is not the file that its notes describe", *COMMAND)
    assert stub.pipeline.calls == []
    assert main([*COMMAND, "--keep"]) == 0
    damaged = contents(clips)
    assert damaged[NAMES[1]] != whole[NAMES[1]] and stub.pipeline.calls == []
    check_whole(clips, NAMES)  # each sum of the manifest is that of the file that is there
    assert main([*COMMAND, "--force"]) == 0
    assert contents(clips) == whole and len(stub.pipeline.calls) == 1
    check_whole(clips, NAMES)


def test_each_clip_is_read_once(clips, monkeypatch):
    reads = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: reads.append(file.name) or digest(file, kind))
    notes = [json.loads((clips / f"{name}.json").read_text()) for name in NAMES]
    folder = ClipFolder(clips, [Clip(name, own["made_with"]) for name, own in zip(NAMES, notes, strict=True)])
    for _ in range(3):
        folder.check()
        assert all(folder.done(clip) for clip in folder.clips)
        folder.write_manifest()
    assert len(reads) == len(NAMES)


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"", b"{", b'{"file": "\xed\xa0\x80"}\n'])
def test_a_damaged_manifest_is_written_anew(clips, damage):
    whole = (clips / "manifest.jsonl").read_bytes()
    (clips / "manifest.jsonl").write_bytes(damage)
    assert main(COMMAND) == 0
    assert (clips / "manifest.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "notes",
    ['{"made_with": ["a"]}', '{"made_with": "x"}', "[]", "{", "[" * 3000 + "]" * 3000, "{}", '{"made_with": 1}'],
)
def test_notes_that_are_none(clips, capsys, notes):
    (clips / f"{NAMES[0]}.json").write_text(notes)
    one_line(capsys, 2, f"{NAMES[0]} exists already, without notes on how it was made", *COMMAND)
    assert main([*COMMAND, "--keep"]) == 0
    assert [line["file"] for line in manifest(clips)] == [NAMES[1]]
    assert main([*COMMAND, "--force"]) == 0
    check_whole(clips, NAMES)


def test_a_model_in_the_notes_that_is_none(clips):
    path = clips / f"{NAMES[0]}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": ["a"], "frames": "\ud83d"}))
    assert main(COMMAND) == 0
    assert manifest(clips)[0]["model"].keys() == {"hash"} and manifest(clips)[0]["frames"] == "\ud83d"


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "abc"}, "expected WORLD_SIZE as the number of processes, from 1 on; got 'abc'"),
        ({"WORLD_SIZE": "0"}, "got '0'"),
        ({"WORLD_SIZE": "-2"}, "got '-2'"),
        ({"WORLD_SIZE": "2", "RANK": "7", "LOCAL_RANK": "0"}, "there are 2 processes, but RANK is '7'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "2"}, "there are 2 processes, but LOCAL_RANK is '2'"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"}, "but RANK is 'x'"),
        ({"WORLD_SIZE": "1", "RANK": "7"}, "there is 1 process, but RANK is '7'"),
    ],
)
def test_processes_that_contradict_themselves(stub, capsys, monkeypatch, environment, says):
    Path("prompts.txt").write_text("a red bar\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    one_line(capsys, 2, says, *COMMAND)
    assert stub.loads == 0 and not Path("clips").exists()
    if "RANK" not in environment:
        one_line(capsys, 2, says, "generate", "p", "--layers", "1")
        with pytest.raises(SkipError, match="WORLD_SIZE"):
            fit._launched()


def test_an_empty_number_is_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    assert processes.launched() == 1
    assert fit._launched() is None


def test_bytes_that_are_no_text(stub, capsys):
    """The shell hands bytes of other encodings over as halves of pairs: no prompt, and a name like any other."""
    for argv in (["generate", "a \udcff"], ["generate", "p", "--negative-prompt", "\ud83d"], ["llm", "\udcff"]):
        assert main(argv) == 2
        assert "of which a half (a surrogate) is missing" in capsys.readouterr().err
    assert main(["generate", "p", "--layers", "1", "-o", "a\udcff.gif"]) == 0
    assert Path("a\udcff.gif").is_file()
    assert json.loads(Path("a\udcff.gif.json").read_text())["arguments"]["output"] == "a\udcff.gif"
    assert build_parser().parse_args(["generate", "ein Würfel"]).prompt == "ein Würfel"
