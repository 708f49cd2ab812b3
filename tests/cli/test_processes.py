"""Many clips by several real processes with a real pipeline: SIGKILL at random, and `accelerate launch`."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from helpers.cli_stub import files
from helpers.clip_folders import check_whole, contents, manifest
from helpers.zygote import ENVIRONMENT, Zygote, wait_for

from zoo.saved import save_tiny_latte


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    made = Zygote(tmp_path_factory.mktemp("many"))
    save_tiny_latte(made.folder / "tiny")
    yield made
    made.process.stdin.close()
    assert made.process.wait(600) == 0


CLIPS = 20


@pytest.mark.slow
def test_twenty_clips_over_two_processes_killed_three_times(zygote):
    words = [f"a {color} circle moving {way}" for color in ("red", "blue") for way in ("left", "right")]
    lines = [json.dumps({"prompt": words[n % 4], "seed": n, "scale": 1 + n % 2}) for n in range(CLIPS)]
    (zygote.folder / "prompts.txt").write_text("\n".join(lines))
    flags = ["--model", "tiny", "--device", "cpu", "--layers", "2", "--zoom", "1", "--steps", "1"]
    command = ["generate", "--prompts", "prompts.txt", *flags]

    zygote.start([*command, "-o", "undisturbed"], 1)
    assert zygote.wait() == [0], zygote.log()
    expected = contents(zygote.folder / "undisturbed")
    assert len(expected) == CLIPS

    clips, dice = zygote.folder / "clips", random.Random(8)
    for kill in range(3):
        enough = len(contents(clips)) + dice.randint(1, 3)
        zygote.allow(enough + 1)  # both processes at a clip may then add one each
        pids = zygote.start([*command, "-o", "clips"], 2)
        wait_for(clips, "*.gif", enough)
        time.sleep(dice.uniform(0, 0.1))
        os.killpg(pids[0], signal.SIGKILL)
        assert zygote.wait() == [-signal.SIGKILL] * 2, zygote.log()
        assert enough <= len(contents(clips)) < CLIPS, f"kill {kill + 1} came in the middle"
    # once more, and one of the two processes dies: the other one takes over
    enough = len(contents(clips)) + 1
    zygote.allow(enough)
    pids = zygote.start([*command, "-o", "clips"], 2)
    wait_for(clips, "*.gif", enough)
    os.kill(pids[1], signal.SIGKILL)
    zygote.allow(CLIPS)
    assert zygote.wait() == [0, -signal.SIGKILL], zygote.log()

    check_whole(clips, sorted(expected))
    assert contents(clips) == expected, "to the bit as in one undisturbed process"
    left = manifest(zygote.folder / "undisturbed")
    for line, other in zip(manifest(clips), left, strict=True):
        assert line | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.slow
def test_a_sweep_is_shared_too(zygote):
    flags = ["--model", "tiny", "--device", "cpu", "--layers", "1-4", "--scales", "1", "2", "--steps", "1"]
    command = ["sweep", "a red circle", *flags]
    zygote.start([*command, "-o", "one.png"], 1)
    assert zygote.wait() == [0], zygote.log()
    pids = zygote.start([*command, "-o", "two.png"], 2)
    wait_for(zygote.folder / "two.cells", "*.json", 3)
    os.killpg(pids[0], signal.SIGKILL)
    assert zygote.wait() == [-signal.SIGKILL] * 2
    zygote.start([*command, "-o", "two.png"], 2)
    assert zygote.wait() == [0, 0], zygote.log()
    one, two = (json.loads((zygote.folder / f"{name}.png.json").read_text()) for name in ("one", "two"))
    assert [cell["layer"] for cell in two["stats"]] == [cell["layer"] for cell in one["stats"]]
    tables = [(zygote.folder / f"{name}.csv").read_text().splitlines() for name in ("one", "two")]
    assert [row.rsplit(",", 1)[0] for row in tables[0]] == [row.rsplit(",", 1)[0] for row in tables[1]]
    assert len(tables[0]) == 1 + 1 + 8
    assert [n for n in files(zygote.folder) if n.startswith(".") and not n.endswith(".lock")] == []


LAUNCHED = """
from skipguide.cli import main
flags = ["--model", "tiny", "--device", "cpu", "--layers", "2", "--steps", "1"]
assert main(["generate", "--prompts", "four.txt", "-o", "launched", "--zoom", "1", *flags]) == 0
assert main(["sweep", "a red circle", "--scales", "1", "2", "-o", "launched.png", *flags]) == 0
"""


@pytest.mark.slow
def test_under_accelerate_launch(zygote):
    """The real thing, once: two processes make four clips and a sheet between them."""
    (zygote.folder / "four.txt").write_text("a red circle\na blue circle\na red square\na blue square")
    (zygote.folder / "both.py").write_text(LAUNCHED)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "both.py"]
    done = subprocess.run(
        command, cwd=zygote.folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"launched{what}") for what in (": 4 clips", ".png and ")] == [1, 1], "one process speaks"
    kinds = ("red-circle", "blue-circle", "red-square", "blue-square")
    check_whole(zygote.folder / "launched", [f"0000{n}-a-{kind}.gif" for n, kind in enumerate(kinds, 1)])
    assert len((zygote.folder / "launched.csv").read_text().splitlines()) == 1 + 1 + 2
