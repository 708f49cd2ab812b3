"""`skipguide bench` by real processes with a real pipeline: SIGKILL in the middle, and two that share the work."""

import json
import os
import signal

import pytest
from helpers.zygote import Zygote, wait_for

from zoo.saved import save_tiny_latte

COMMAND = ["bench", "./tiny", "--prompts", "prompts.txt", "--seeds", "2", "--steps", "1", "--grid", "2", "--quick"]
COMMAND += ["--layers", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("bench")
        patch.setenv("SKIPGUIDE_CACHE", str(folder / "cache"))
        made = Zygote(folder)
        save_tiny_latte(folder / "tiny")
        (folder / "prompts.txt").write_text("a red circle\n")
        yield made
        made.process.stdin.close()
        assert made.process.wait(600) == 0


def clips(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("[!.]*.webp"))}


def scores(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["name"]: {name: own["mean"] for name, own in row["scores"].items()} for row in rows}


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_and_gone_on(zygote):
    """One undisturbed process; two that are killed, started again, one of which dies: the same clips and scores."""
    zygote.allow(1000)
    zygote.start([*COMMAND, "-o", "alone"], 1)
    assert zygote.wait() == [0], zygote.log()
    expected, folder = clips(zygote.folder / "alone"), zygote.folder / "clips"
    assert len(expected) >= 12

    zygote.allow(3)
    pids = zygote.start([*COMMAND, "-o", "clips"], 2)
    wait_for(folder, "clips/*/[!.]*.webp", 3)
    os.killpg(pids[0], signal.SIGKILL)
    assert zygote.wait() == [-signal.SIGKILL] * 2, zygote.log()
    assert 3 <= len(clips(folder)) < len(expected)
    kept = {path: (folder / path).stat().st_mtime_ns for path in clips(folder)}

    enough = len(kept) + 2
    zygote.allow(enough)
    pids = zygote.start([*COMMAND, "-o", "clips"], 2)
    wait_for(folder, "clips/*/[!.]*.webp", enough)
    os.kill(pids[1], signal.SIGKILL)
    zygote.allow(1000)
    assert zygote.wait() == [0, -signal.SIGKILL], zygote.log()
    assert clips(folder) == expected, "to the bit as in one undisturbed process"
    assert {path: (folder / path).stat().st_mtime_ns for path in kept} == kept, "nothing was made twice"
    assert scores(folder) == scores(zygote.folder / "alone")

    zygote.start([*COMMAND, "-o", "shared"], 2)
    assert zygote.wait() == [0, 0], zygote.log()
    assert clips(zygote.folder / "shared") == expected
    assert scores(zygote.folder / "shared") == scores(zygote.folder / "alone")
    assert not [path for path in zygote.folder.rglob(".*") if path.is_file() and path.suffix != ".lock"]
