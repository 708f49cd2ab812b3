"""`skipguide bench`: what it refuses, what it writes, and that an interrupted run goes on."""

import csv
import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers.cli_stub import one_line
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from skipguide.cli import bench_requests, main
from skipguide.cli.bench_kinds import CLASSIFIER, CLIPS, LANGUAGE, kind_of
from skipguide.cli.commands import bench
from skipguide.cli.models import Source, few_threads
from zoo.saved import save_tiny_latte

FLAGS = ["--prompts", "prompts.txt", "--seeds", "2", "--steps", "2", "--grid", "2", "4", "--layers", "2", "--quick"]
FLAGS += ["--scorer", "bench_scores:redness"]
COMMAND = ["bench", "./tiny", *FLAGS]
ROWS = ["cfg-2", "cfg-4", "own", "auto", "frugal", "interval", "random-direction", "equal-blocks", "effective-scale"]
SCORES = """
def redness(clips, prompts):
    assert len(clips) == len(prompts) == 1
    return [sum(frame.getpixel((3, 3))[0] for frame in clip) / 255 for clip in clips]
"""


def end_every_text(path):
    """As T5's tokenizer does: an empty text, which the prompt margin is about, has a token too."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a model, prompts, a scorer, and a finished bench `done`."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SKIPGUIDE_CACHE", str(folder / "cache"))
        patch.setattr(sys, "path", list(sys.path))
        save_tiny_latte(folder / "tiny")
        end_every_text(folder / "tiny" / "tokenizer" / "tokenizer.json")
        Path("prompts.txt").write_text("a red circle\n")
        Path("bench_scores.py").write_text(SCORES)
        assert main([*COMMAND, "-o", "done", "--export", "imagereward"]) == 0
        yield folder
    sys.modules.pop("bench_scores", None)


@pytest.fixture
def place(finished, monkeypatch):
    monkeypatch.chdir(finished)
    monkeypatch.setenv("SKIPGUIDE_CACHE", str(finished / "cache"))
    return finished


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


class Rows(HTMLParser):
    """The first cells of every table row, and whether anything is loaded."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.sources, self._cells = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._cells = 0 if tag == "tr" else self._cells + (tag == "td")
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        if self._cells == 1 and self.lasttag == "td":
            self.rows.append(data)


# --- what it makes


def test_every_row_is_in_the_report_the_json_and_the_csv(place):
    found = results("done")
    assert [row["name"] for row in found["rows"]] == ROWS
    report = Rows(Path("done/report.html").read_text())
    assert report.rows == ROWS
    assert all(source.startswith("data:") for source in report.sources)
    with Path("done/results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(dict.fromkeys(line["setting"] for line in table)) == ROWS
    of_json = {(row["name"], name): own["mean"] for row in found["rows"] for name, own in row["scores"].items()}
    assert {(line["setting"], line["score"]): float(line["mean"]) for line in table} == of_json
    assert set(found["rows"][0]["scores"]) == {
        *(
            "self-consistency error",
            "prompt margin",
            "sharpness",
            "saturation",
            "motion",
            "flicker",
            "diversity",
            "redness",
        ),
    }
    assert "preset" in found["missing"], "this model has none"
    assert Path("done/sheet.png").is_file()


def test_differences_are_paired_over_seeds(place):
    rows = {row["name"]: row for row in results("done")["rows"]}
    base = rows[results("done")["baseline"]]["scores"]["redness"]["values"]
    for name, row in rows.items():
        own = row["scores"]["redness"]
        if name != results("done")["baseline"]:
            gaps = [own["values"][seed] - base[seed] for seed in ("0", "1")]
            assert own["difference"]["mean"] == pytest.approx(sum(gaps) / 2)
            assert own["difference"]["half"] == pytest.approx(12.7062 * abs(gaps[0] - gaps[1]) / 2, abs=1e-9)


def test_the_users_own_score_chooses_the_baseline(place):
    found = results("done")
    plain = {row["name"]: row["scores"]["redness"]["mean"] for row in found["rows"] if row["kind"] == "cfg"}
    assert (found["judge"], found["judge_decides"]) == ("redness", True)
    assert found["baseline"] == max(plain, key=plain.get)
    w = float(found["baseline"].removeprefix("cfg-"))
    named = {row["name"]: row for row in found["rows"]}
    assert named["own"]["w"] == named["auto"]["w"] == named["random-direction"]["w"] == named["equal-blocks"]["w"] == w
    assert named["frugal"]["w"] == named["interval"]["w"] > w
    assert named["equal-blocks"]["steps"] == 3, "of 2: six blocks of twelve more"


def test_pixels_and_the_model_itself_do_not_say_that_it_helps(place, capsys):
    """Without a score of the user's the baseline is chosen, and help is left open; a score that is named decides."""
    plain = [word for word in COMMAND if word not in ("--scorer", "bench_scores:redness")]
    shutil.copytree("done", "unscored", ignore=shutil.ignore_patterns(".claims"))
    assert main([*plain, "-o", "unscored"]) == 0
    found = results("unscored")
    assert (found["judge"], found["judge_decides"]) == ("prompt margin", False)
    assert "Whether skipping helps is left open" in found["conclusion"]
    assert "Whether skipping helps is left open" in capsys.readouterr().out
    assert main([*plain, "-o", "unscored", "--judge", "prompt margin"]) == 0
    assert "left open" not in results("unscored")["conclusion"]
    shutil.rmtree("unscored")


def test_costs_are_counted_in_blocks(place):
    """6 blocks; block 2 left out: 12 of CFG and 3 after it. CFG in none of the 2 steps but the second."""
    costs = {row["name"]: row["cost"] for row in results("done")["rows"]}
    assert costs["cfg-2"] == costs["effective-scale"] == 1
    assert costs["own"] == costs["random-direction"] == pytest.approx((12 + 3) / 12)
    assert costs["interval"] == pytest.approx((6 + 12) / 24)


def test_clips_are_whole_and_described(place):
    for row in ROWS:
        names = [f"00001-a-red-circle-seed{seed}.webp" for seed in (0, 1)]
        folder = Path("done/clips") / row
        assert sorted(path.name for path in folder.glob("*.webp")) == names
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        assert [(line["file"], line["seed"], line["frames"]) for line in lines] == [
            (names[0], 0, 4),
            (names[1], 1000, 4),
        ]
    made = (Path("done/imagereward/generations/own")).iterdir()
    assert sorted(path.name for path in made) == ["00001_0.png", "00001_1.png"]


# --- going on


def test_a_finished_bench_makes_nothing_again(place, monkeypatch):
    before = {path: path.read_bytes() for path in Path("done").rglob("*") if path.is_file() and path.suffix != ".lock"}
    monkeypatch.setattr(bench_requests.BenchMaker, "produce", lambda *args: pytest.fail("made again"))
    assert main([*COMMAND, "-o", "done", "--export", "imagereward"]) == 0
    after = {path: path.read_bytes() for path in Path("done").rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert after == before


@pytest.mark.parametrize("clips", [1, 7])
def test_an_interrupted_bench_goes_on(place, monkeypatch, capsys, clips):
    """Interrupted after some clips: those stay, the others are made, and all is as in one run."""
    shutil.copytree("done", "part", ignore=shutil.ignore_patterns(".claims"))
    made = sorted(Path("part/clips").rglob("*.webp"))
    order = [path for row in ROWS for path in made if path.parent.name == row]
    for path in order[clips:]:
        path.unlink()
    for path in Path("part/cells").glob("scores-*"):
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in order[:clips]}
    produce, left = bench_requests.BenchMaker.produce, [2]

    def interrupted(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return produce(self, *args)

    monkeypatch.setattr(bench_requests.BenchMaker, "produce", interrupted)
    assert main([*COMMAND, "-o", "part"]) == 130
    assert "what is finished is kept in part; run the same command to go on" in capsys.readouterr().err
    assert len(list(Path("part/clips").rglob("[!.]*.webp"))) == clips + 2
    left[0] = 100
    assert main([*COMMAND, "-o", "part"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was there was not made again"

    def means(folder):
        return {row["name"]: {k: v["mean"] for k, v in row["scores"].items()} for row in results(folder)["rows"]}

    assert means("part") == means("done")
    shutil.rmtree("part")


# --- what it refuses


def test_a_folder_of_something_else_is_kept(place, capsys):
    other = [*COMMAND, "-o", "done", "--seeds", "3"]
    one_line(capsys, 2, "has results of other settings: seeds was 2 and is 3", *other)
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    one_line(capsys, 2, "mine is not empty (letter.txt)", *COMMAND, "-o", "mine")
    one_line(capsys, 2, "prompts.txt is a file", *COMMAND, "-o", "prompts.txt")
    assert [path.name for path in Path("mine").iterdir() if path.name != ".claims"] == ["letter.txt"]
    assert results("done")["seeds"] == 2


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--text", "prompts.txt"], "--text is for a language model, and ./tiny is a diffusion pipeline"),
        (["--images", "tiny"], "--images is for a classifier"),
        (["--scorer", "nothing"], "as module:function"),
        (["--judge", "motion"], "--judge motion cannot decide: expected one of self-consistency error, prompt margin"),
        (["--judge", "beauty"], "--judge beauty cannot decide"),
        (["--export", "fid"], "invalid choice: 'fid'"),
        (["--seeds", "1"], "at least 2"),
        (["--grid", "1"], "above 1"),
        (["--image", "no.png"], "takes no --image"),
    ],
)
def test_flags_that_do_not_fit(place, capsys, more, expected):
    assert main([*COMMAND, "-o", "done" if "--judge" in more else "never", *more]) == 2
    assert expected in capsys.readouterr().err
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"prompt": "a red circle", "seed": 3}', "seed is what the table varies"),
        ('{"prompt": "a red circle", "scale": 2}', "scale is what the table varies"),
        ('{"prompt": "a red circle", "no_guidance": true}', "no_guidance is what the table varies"),
        ("a red circle\na blue circle\na red circle", "has the prompt 'a red circle' twice"),
    ],
)
def test_prompts_that_set_what_is_compared(place, capsys, text, expected):
    Path("other.txt").write_text(text)
    assert main(["bench", "./tiny", "--prompts", "other.txt", "-o", "never"]) == 2
    assert expected in capsys.readouterr().err


def test_what_a_model_is(place):
    Path("llm").mkdir(exist_ok=True)
    Path("llm/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    expected = {"tiny-t2v": CLIPS, "./tiny": CLIPS, "tiny-lm": LANGUAGE, "./llm": LANGUAGE, "x.gguf": LANGUAGE}
    expected |= {"tiny-cnn": CLASSIFIER, "resnet18": CLASSIFIER}
    assert {name: kind_of(name) for name in expected} == expected


def test_what_is_none_of_them(place, capsys):
    Path("bert").mkdir(exist_ok=True)
    Path("bert/config.json").write_text('{"architectures": ["BertModel"]}')
    one_line(capsys, 2, "cannot tell what ./bert is", "bench", "./bert")
    one_line(capsys, 2, "no model 'nothing'", "bench", "nothing")
    assert bench.QUICK_SEEDS >= 2, "one seed has no interval"


@pytest.mark.parametrize(
    ("bundled", "device", "asked", "expected"),
    [(True, "cpu", None, 1), (True, "cpu", "3", 3), (False, "cpu", None, 3), (True, "cuda", None, 3)],
)
def test_a_small_model_takes_one_thread(bundled, device, asked, expected, monkeypatch):
    now = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    with pytest.raises(KeyboardInterrupt), few_threads(Source("a", Path(), bundled=bundled), device):
        assert torch.get_num_threads() == expected
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 3
