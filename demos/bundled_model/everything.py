"""Rerun every table, preset and picture that rests on `tiny-t2v` and was made with another model than today's.

    python -m demos.bundled_model.everything --dry        # what would run, and what it takes
    python -m demos.bundled_model.everything              # run it; started again it goes on with the next step
    python -m demos.bundled_model.everything --only preset pictures

A step is done when `everything.json` has the fingerprint of today's weights and configurations beside its name. What it
writes is committed with that file. Sentences that quote the figures are not rewritten: each step says where they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from demos.bundled_model.common import atomically
from skipguide.assets import bundled
from skipguide.errors import SkipError

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Step:
    """One thing to rerun.

    Args:
        commands: arguments of python, one tuple each; `{model}` stands for the fingerprint, so that a run that resumes
            from its folder never mixes two models.
        writes: files of the repository that are new afterwards.
        hours: of one processor, roughly.
        copies: from a file or pattern to a folder of the repository; a picture is made a JPEG there when it says so.
        quoted: where sentences quote the figures.
    """

    commands: tuple[tuple[str, ...], ...]
    writes: tuple[str, ...]
    hours: float
    copies: tuple[tuple[str, str, bool], ...] = ()
    quoted: str = ""


QUALITY, CONFIRM, PARTS = "runs/quality-{model}", "runs/quality-confirm-{model}", "runs/quality-parts-{model}"
CONFIRMED = ("interval-mid", "interval-mid-stg")
RESULTS = ("results.json", "results.md")
NOTEBOOKS = ("guidance_on_the_bundled_model", "what_does_block_k_do")
STEPS: dict[str, Step] = {
    "evaluate": Step(
        (
            (
                *("-m", "demos.bundled_model.evaluate", "--model", "skipguide/assets/tiny-t2v"),
                *("--prompts", "256", "--tune", "2", "3", "4", "6"),
            ),
        ),
        ("demos/bundled_model/results.json", "demos/bundled_model/samples.png"),
        0.2,
        quoted="demos/bundled_model/README.md, demos/README.md (The bundled video model), the model's MODEL_CARD.md",
    ),
    "preset": Step(
        (("-m", "demos.bundled_model.preset"),),
        ("demos/bundled_model/preset.json",),
        0.1,
        quoted="pipelines/presets.py has the preset itself; pipelines/SUPPORTED.md by python -m demos.support_table",
    ),
    "quality": Step(
        (("-m", "demos.quality", "--out", QUALITY),),
        tuple(f"demos/quality/{name}" for name in (*RESULTS, "results.csv", "quality_cost.png")),
        2.6,
        (
            (f"{QUALITY}/results.*", "demos/quality", False),
            (f"{QUALITY}/quality_*.png", "demos/quality", False),
            (f"{QUALITY}/[!q]*.png", "demos/quality/sheets", True),
        ),
        quoted="demos/README.md (Does skip guidance help), README.md, pipelines/README.md (presets, rank, limits)",
    ),
    "confirm": Step(
        (
            (
                "-m",
                "demos.quality",
                "--out",
                CONFIRM,
                "--draw",
                "1",
                "--only",
                "cfg-3",
                "interval-mid",
                "interval-mid-stg",
            ),
        ),
        tuple(f"demos/quality/confirm/{name}" for name in RESULTS),
        0.3,
        tuple((f"{CONFIRM}/{name}", "demos/quality/confirm", False) for name in RESULTS),
        quoted="demos/README.md (Does skip guidance help); the settings are the best of the step before",
    ),
    "parts": Step(
        (("-m", "demos.quality", "--out", PARTS, "--tiers", "4", "--prompts", "32", "--seeds", "1"),),
        tuple(f"demos/quality/parts/{name}" for name in RESULTS),
        0.3,
        tuple((f"{PARTS}/{name}", "demos/quality/parts", False) for name in RESULTS),
        quoted="demos/quality/README.md",
    ),
    "scores": Step(
        (("-m", "demos.quality.self_scores"),),
        ("demos/quality/self_scores.json",),
        0.05,
        quoted="pipelines/README.md (does it help on your model)",
    ),
    "tune": Step(
        (("-m", "demos.tune", "--force"),),
        tuple(f"demos/tune/results.{kind}" for kind in ("json", "md", "png")),
        0.6,
        quoted="demos/tune/README.md, pipelines/README.md (a schedule that is searched)",
    ),
    "every": Step(
        (("-m", "demos.benchmarks.stg_every", "--force"),),
        ("demos/benchmarks/stg_every.json", "demos/benchmarks/stg_every.md"),
        0.5,
        quoted="demos/README.md (every=2)",
    ),
    "pictures": Step(
        (("-m", "demos.side_by_side", "--out", "demos/media/side_by_side.gif"), ("-m", "demos.doors", "hero")),
        ("demos/media/side_by_side.gif", "demos/media/door_hero.png"),
        0.1,
        quoted="the caption in pipelines/README.md; does the hero lead README now? demos/README.md says why not",
    ),
    "notebooks": Step(
        (("-m", "demos.notebooks", *NOTEBOOKS),),
        tuple(f"demos/notebooks/{name}.ipynb" for name in NOTEBOOKS),
        0.1,
        quoted="the sentences between the cells",
    ),
}


def fingerprint(folder: Path) -> str:
    """A hash of a model's weights and configurations; its card does not count."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("*.json", "*.safetensors") for path in folder.rglob(kind)):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read_record(path: Path) -> dict[str, str]:
    """The fingerprint that each step was last run with."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def run_step(step: Step, model: str, root: Path = ROOT) -> None:
    """Run a step's commands and bring what they made to its place.

    Raises:
        SkipError: if a command fails, or a file that the step writes is not there or was not written.
    """
    before = {name: _written(root / name) for name in step.writes}
    for command in step.commands:
        words = [word.format(model=model) for word in command]
        if code := subprocess.run([sys.executable, *words], cwd=root, check=False).returncode:
            raise SkipError(f"python {' '.join(words)} ended with status {code}; what it said is above")
    for pattern, folder, as_jpeg in step.copies:
        for source in sorted(root.glob(pattern.format(model=model))):
            _copy(source, root / folder, as_jpeg)
    if stale := [name for name, when in before.items() if _written(root / name) in (None, when)]:
        raise SkipError(f"expected the step to write {', '.join(stale)}; it did not")


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _copy(source: Path, folder: Path, as_jpeg: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if as_jpeg:
        picture = Image.open(source).convert("RGB")
        atomically(folder / f"{source.stem}.jpg", lambda path: picture.save(path, "JPEG", quality=85))
    else:
        atomically(folder / source.name, lambda path: path.write_bytes(source.read_bytes()))


def table(steps: Mapping[str, Step], record: Mapping[str, str], model: str) -> str:
    """What is done and what is to do, one line a step."""
    lines = [f"model {model}"]
    for name, step in steps.items():
        state = "done " if record.get(name) == model else "to do"
        lines.append(
            f"{state}  {name:9s} about {step.hours:g} h  {'; '.join('python ' + ' '.join(c) for c in step.commands)}"
        )
        lines += [f"{'':17s}quoted in {step.quoted}"] if state == "to do" and step.quoted else []
    return "\n".join(lines).format(model=model)


def main(
    arguments: Sequence[str] | None = None, steps: Mapping[str, Step] = STEPS, path: Path = RECORD, root: Path = ROOT
) -> int:
    """Run what is not up to date, or list it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="only list the steps")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=list(steps), help="only these")
    parser.add_argument("--force", action="store_true", help="run steps that are up to date, too")
    args = parser.parse_args(arguments)
    model = fingerprint(bundled("tiny-t2v"))
    chosen = {name: step for name, step in steps.items() if args.only is None or name in args.only}
    if args.dry:
        print(table(chosen, read_record(path), model))
        return 0
    for name, step in chosen.items():
        if read_record(path).get(name) == model and not args.force:
            print(f"{name}: up to date")
            continue
        print(f"{name}: about {step.hours:g} hours of one processor")
        try:
            run_step(step, model, root)
        except SkipError as error:
            print(f"everything: {error}", file=sys.stderr)
            return 2
        text = json.dumps(read_record(path) | {name: model}, indent=1) + "\n"
        atomically(path, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
