"""Many clips: the file of prompts, the folder that several processes fill, whole files whatever is killed."""

import re
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import cli_stub
from helpers.cli_stub import files, interrupt_after, one_line
from helpers.clip_folders import check_whole, contents, manifest

from skipguide import SkipError
from skipguide import files as skip_files
from skipguide.cli import build_parser, main, processes
from skipguide.cli.clip_folder import Clip, ClipFolder
from skipguide.cli.file_locks import FolderLocks, remove_leftovers
from skipguide.cli.prompts import read_prompts

# Many clips: the file of prompts, the folder that several processes fill, and what a kill at any moment leaves.

stub = cli_stub.stub
PROMPTS = ["a red bar", '{"prompt": "a red bar", "seed": 5, "scale": 3}', "", "a blue bar", "a green bar"]
NAMES = ["00001-a-red-bar.gif", "00002-a-red-bar.gif", "00003-a-blue-bar.gif", "00004-a-green-bar.gif"]
COMMAND = ("generate", "--prompts", "prompts.txt", "-o", "clips", "--layers", "1", "--frames", "2", "--zoom", "1")


def write_prompts(*lines):
    Path("prompts.txt").write_text("\n".join(lines or PROMPTS), encoding="utf-8")


# --- the file of prompts


def read(tmp_path, text, *argv):
    path = tmp_path / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return read_prompts(path, build_parser().parse_args(["generate", "--prompts", str(path), *argv]))


def test_a_line_is_a_prompt_or_settings_of_its_own(tmp_path):
    text = '\ufeffa red bar\n\n{"prompt": "-x {", "seed": 5, "layers": [5, "7-8"], "cfg_interval": [0, 0.5]}\n'
    text += '{"prompt": "# five"}\n  # a comment\n'
    text += '{"prompt": "p", "no_guidance": true, "negative_prompt": "-blur"}\n'
    plain, own, third, without = read(tmp_path, text, "--layers", "1", "--scale", "2", "--seed", "3")
    assert (plain.prompt, plain.seed, plain.layers, plain.scale) == ("a red bar", 3, [1], 2)
    assert (own.prompt, own.seed, own.layers, own.scale, own.cfg_interval) == ("-x {", 5, [5, 7, 8], 2, [0, 0.5])
    assert third.prompt == "# five"
    assert (without.no_guidance, without.layers, without.scale, without.negative_prompt) == (True, None, None, "-blur")
    (guided,) = read(tmp_path, '{"prompt": "p", "layers": 2}', "--no-guidance")
    assert (guided.no_guidance, guided.layers) == (False, [2])
    (swap,) = read(tmp_path, '{"prompt": "p", "heads": [1], "part_options": {"over": "space", "ratio": 0.2}}')
    assert (swap.heads, swap.part_options) == ([1], {"over": "space", "ratio": 0.2})


def test_lines_end_where_editors_end_them(tmp_path):
    text = 'one\u2028still one\r\ntwo\x0cstill two\rthree\n{"prompt": "a\u0085b"}\n[not json\n'
    (tmp_path / "bytes.txt").write_bytes(text.encode())
    found = read_prompts(tmp_path / "bytes.txt", build_parser().parse_args(["generate", "--prompts", "x"]))
    assert [each.prompt for each in found] == [
        *("one\u2028still one", "two\x0cstill two", "three", "a\u0085b", "[not json"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no prompts"),
        ("# nothing but a comment", "has no prompts"),
        ('["a", "b"]', "line 1: expected a prompt in words, or a JSON object with one"),
        ('"quoted"', "line 1: expected a prompt in words, or a JSON object with one"),
        ('{"prompt": "half \\ud83d"}', "a surrogate"),
        ("a\n{no json}", "line 2: a line that begins with { is a JSON object"),
        ('{"seed": 1}', "line 1: expected a prompt in words; got None"),
        ('{"prompt": " "}', "expected a prompt in words"),
        ('{"prompt": "p", "sed": 1}', "no setting sed; expected prompt or steps, seed"),
        ('{"prompt": "p", "seed": -1}', "line 1: seed: expected a whole number at least 0"),
        ('{"prompt": "p", "seed": true}', "seed is a text, a number or a list; got True"),
        ('{"prompt": "p", "seed": "5"}', "seed is a number; got '5'"),
        ('{"prompt": "p", "seed": 1e30}', "seed: expected a whole number"),
        ('{"prompt": "p", "cfg_interval": ["0", 1]}', "cfg_interval is a number; got ['0', 1]"),
        ('{"prompt": "p", "negative_prompt": 5}', "negative_prompt is a text; got 5"),
        ('{"prompt": "p", "scale": NaN}', "NaN is not a finite number"),
        ('{"prompt": "p", "layers": ' + "[" * 3000 + "]" * 3000 + "}", "line 1: a line that begins with {"),
        ("[" * 3000 + "]" * 3000, "line 1: expected JSON in the line that is nested at most"),
        ('{"prompt": "p", "part": "head"}', "part: invalid choice: 'head'"),
        ('{"prompt": "p", "no_guidance": 1}', "no_guidance is true or false"),
        ('{"prompt": "p", "no_guidance": true, "scale": 2}', "no_guidance leaves nothing for scale to do"),
    ],
)
def test_lines_that_cannot_be_understood(tmp_path, text, expected):
    with pytest.raises(SkipError, match=re.escape(expected)):
        read(tmp_path, text)


def test_what_many_clips_refuse_before_loading(stub, capsys, monkeypatch):
    write_prompts("a", "b", "a")
    one_line(capsys, 2, "clips 1 and 3 of prompts.txt are the same ('a', seed 0)", *COMMAND)
    one_line(capsys, 2, "exactly one of these is required", "generate", "p", "--prompts", "prompts.txt")
    one_line(capsys, 2, "cannot read the prompts in nothing.txt", "generate", "--prompts", "nothing.txt")
    one_line(capsys, 2, "--keep is for many clips", "generate", "p", "--keep")
    one_line(capsys, 2, "give one", *COMMAND, "--force", "--keep")
    one_line(capsys, 2, "--no-guidance leaves nothing for --layers", *COMMAND, "--no-guidance")
    write_prompts('{"prompt": "a", "image": "no.png"}')
    one_line(capsys, 2, "takes no --image", *COMMAND)
    (stub.folder / "file").write_text("")
    write_prompts("a")
    one_line(capsys, 2, "not a folder that can be written to", *COMMAND[:4], "file", *COMMAND[5:])
    monkeypatch.setenv("WORLD_SIZE", "2")
    one_line(capsys, 2, "makes one file, and 2 processes would all make it", "generate", "p", "--layers", "1")
    assert stub.loads == 0
    assert not Path("clips").exists()


# --- the folder, with a stub pipeline


def test_many_clips_and_their_manifest(stub, capsys):
    write_prompts()
    assert main(COMMAND) == 0
    check_whole("clips", NAMES)
    assert stub.loads == 1
    assert "clips: 4 clips, 4 of them made now" in capsys.readouterr().out
    first, second, *_ = manifest("clips")
    assert first["prompt"] == second["prompt"] == "a red bar"
    assert (first["seed"], second["seed"]) == (0, 5)
    assert (first["guidance"], second["guidance"]) == ({"layers": [1]}, {"layers": [1], "scale": 3.0})
    assert first["model"]["pipeline"] == "StubPipeline"
    assert len(first["model"]["hash"]) == 16
    assert first["versions"]["skipguide"]
    assert first["seconds"] >= 0
    assert (first["frames"], first["size"]) == (2, [64, 64])

    stub.pipeline.calls.clear()
    assert (
        main(["generate", "a red bar", "--seed", "5", "--layers", "1", "--scale", "3", *COMMAND[7:], "-o", "x.gif"])
        == 0
    )
    assert Path("x.gif").read_bytes() == contents("clips")[NAMES[1]], "as one at a time"


def test_only_what_is_missing_is_made(stub):
    write_prompts()
    assert main(COMMAND) == 0
    whole = contents("clips")
    stub.pipeline.calls.clear()
    assert main(COMMAND) == 0
    assert stub.pipeline.calls == []
    assert stub.loads == 1, "nothing to make, nothing to load"
    (Path("clips") / NAMES[2]).unlink()
    (Path("clips") / f"{NAMES[0]}.json").unlink()
    (Path("clips") / NAMES[0]).unlink()
    (Path("clips") / "manifest.jsonl").unlink()
    assert main(COMMAND) == 0
    assert len(stub.pipeline.calls) == 2
    write_prompts(*PROMPTS, "one more")
    assert main(COMMAND) == 0
    assert len(stub.pipeline.calls) == 3
    assert contents("clips") == whole | {"00005-one-more.gif": (Path("clips") / "00005-one-more.gif").read_bytes()}
    check_whole("clips", [*NAMES, "00005-one-more.gif"])


def test_a_folder_made_with_other_settings(stub, capsys):
    write_prompts()
    assert main(COMMAND) == 0
    capsys.readouterr()
    before = contents("clips")
    expected = "00001-a-red-bar.gif was made with other settings: seed was 0 and is 1."
    one_line(capsys, 2, expected, *COMMAND, "--seed", "1")
    one_line(capsys, 2, "guidance.scale was not given and is 2.0", *COMMAND, "--scale", "2")
    stub.defaults = {"num_inference_steps": 6}
    one_line(capsys, 2, "and is 6", *COMMAND)
    stub.defaults = {"num_inference_steps": 5, "fps": 10}
    write_prompts("a blue bar")
    one_line(capsys, 2, "clips that are not asked for here (4: 00001-a-red-bar.gif", *COMMAND)
    write_prompts()
    assert contents("clips") == before
    assert stub.loads == 1

    stub.pipeline.calls.clear()
    assert main([*COMMAND, "--seed", "1", "--keep"]) == 0
    assert stub.pipeline.calls == []
    assert contents("clips") == before
    assert main([*COMMAND, "--seed", "1", "--force"]) == 0
    assert len(stub.pipeline.calls) == 3, "the second line has a seed of its own, so its clip is as asked for"
    check_whole("clips", NAMES)
    assert [line["seed"] for line in manifest("clips")] == [1, 5, 1, 1]
    assert main([*COMMAND, "--seed", "1", "--force"]) == 0
    assert len(stub.pipeline.calls) == 3, "what was replaced is not replaced again"


@pytest.mark.parametrize("with_notes", [False, True])
def test_a_file_of_the_users_own_is_not_replaced(stub, capsys, with_notes):
    write_prompts()
    if with_notes:
        assert main(COMMAND) == 0
        capsys.readouterr()
    Path("clips").mkdir(exist_ok=True)
    (Path("clips") / NAMES[1]).write_bytes(b"mine")
    expected = "is not the file that its notes describe" if with_notes else "exists already, without notes"
    one_line(capsys, 2, expected, *COMMAND)
    assert (Path("clips") / NAMES[1]).read_bytes() == b"mine"
    assert main([*COMMAND, "--force"]) == 0
    check_whole("clips", NAMES)


def test_ctrl_c_leaves_a_manifest_and_goes_on(stub, capsys, monkeypatch):
    left = interrupt_after(2, monkeypatch)
    write_prompts()
    assert main(COMMAND) == 130
    assert "interrupted: 2 of 4 clips are in clips; run the same command to go on" in capsys.readouterr().err
    check_whole("clips", NAMES[:2])
    left[0] = 99
    assert main(COMMAND) == 0
    assert left[0] == 97
    check_whole("clips", NAMES)


def test_a_clip_that_fails_is_named(stub, capsys):
    stub.pipeline.fails = ValueError("too long")
    write_prompts()
    assert main(COMMAND) == 2
    assert "00001-a-red-bar.gif: StubPipeline failed: too long" in capsys.readouterr().err.splitlines()[-1]
    stub.pipeline.fails = None
    assert main(COMMAND) == 0
    check_whole("clips", NAMES)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(5))
def test_killed_between_any_two_steps(stub, monkeypatch, step):
    """Renames of notes, clip, notes, clip, manifest: the run ends before one of them, and nothing tidies up."""
    write_prompts(*PROMPTS[:2])
    assert main([*COMMAND[:4], "whole", *COMMAND[5:]]) == 0
    renames = [0]

    def replace(source, target):
        if renames[0] == step:
            raise Killed
        renames[0] += 1
        Path(source).rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(skip_files.os, "replace", replace)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(Killed):
            main(COMMAND)
    left = files(Path("clips"))
    assert any(name.startswith(".") and not name.endswith(".lock") for name in left), "a temporary file is left"
    assert main(COMMAND) == 0
    check_whole("clips", NAMES[:2])
    assert contents("clips") == contents("whole")


def test_leftovers_of_others_stay(tmp_path):
    stay = [".00001-a.0123abcd.gif.bak", ".00001-ab.0123abcd.gif", ".00001-a.gif", "00001-a.0123abcd.gif", ".0123abcd"]
    go = [".00001-a.0123abcd.gif", ".00001-a.gif.0123abcd.json"]
    for name in stay + go:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, "00001-a")
    assert files(tmp_path) == sorted(stay)


def test_a_manifest_of_several_writers_has_no_line_twice(tmp_path):
    clips = [Clip(f"{n:05d}-x.gif", {"prompt": f"x {n}", "seed": n}) for n in range(6)]
    folders = [ClipFolder(tmp_path, clips) for _ in range(2)]

    def fill(folder, mine):
        for clip in mine:
            folder.write(clip, lambda path: path.write_bytes(b"gif"), {})
            folder.write_manifest()

    threads = [threading.Thread(target=fill, args=(folders[i], clips[i::2])) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert [line["seed"] for line in manifest(tmp_path)] == list(range(6))


def test_a_claim_is_held_once(tmp_path):
    made, together = [], threading.Barrier(3, timeout=600)

    def work():
        together.wait()
        FolderLocks(tmp_path).share(range(12), str, lambda n: n in made, lambda n: (time.sleep(0.002), made.append(n)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert sorted(made) == list(range(12))
    with FolderLocks(tmp_path).hold("x") as mine, FolderLocks(tmp_path).hold("x") as other:
        assert (mine, other) == (True, False)


def test_a_process_is_told_which_one_it_is(monkeypatch, caplog):
    assert processes.this_process("cpu") == processes.Process(0, 1, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SkipError, match="there are 3 processes, but RANK is ''"):
        processes.this_process("cpu")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.this_process("cpu") == processes.Process(2, 3, "cpu", shows=False)
    monkeypatch.setattr("skipguide.cli.models.choose_device", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes.this_process("auto").device == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert processes.this_process("cpu").world == 1
    assert "starts one process" in caplog.text


def test_each_process_begins_elsewhere():
    work = list(range(7))
    orders = [processes.Process(rank, 3, "cpu").order(work) for rank in range(3)]
    assert [order[0] for order in orders] == [0, 2, 4]
    assert all(sorted(order) == work for order in orders)
