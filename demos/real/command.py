"""Command: what every study on a model of others is asked, and where its results go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from demos.benchmarks.measure import keep_existing, machine, write_json
from demos.real.weights import NotInstalledError

Form = TypeVar("Form")


def run(
    argv: list[str] | None,
    description: str | None,
    *,
    forms: Mapping[str, Form],
    out: Path,
    work: Path,
    study: Callable[[Form, Path, float], Mapping[str, Any]],
    publish: Callable[[Path], str],
    adopt: Callable[[Form, Path, Path], None] | None = None,
    keep: Callable[[Path, Path], None] | None = None,
) -> None:
    """Measure as the command line says, write the JSON, print the tables.

    Args:
        argv: the command line; None is that of the process.
        description: the docstring of the study.
        forms: name -> how much is measured.
        out: the JSON, unless another is named.
        work: folder of what is finished; each form has one in it.
        study: measures in a form, for so many minutes of processor time, and goes on in a folder.
        publish: writes figure and tables beside a JSON, and returns what is printed.
        adopt: puts what stands in or beside a JSON of a form into the folder of what is finished; None cannot.
        keep: writes beside the JSON what `adopt` needs of that folder; None if the JSON is enough.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=forms, default="full", help="how much is measured (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of processor time, then report")
    parser.add_argument("--out", type=Path, default=out, help="the JSON; tables and figure beside it")
    parser.add_argument("--work", type=Path, help=f"folder of what is finished (default: runs/{work.name}/FORM)")
    parser.add_argument("--force", action="store_true", help="replace existing results")
    parser.add_argument("--report", action="store_true", help="only the figure and the tables, from the JSON")
    if adopt is not None:
        parser.add_argument("--go-on", action="store_true", help="measure only what the results do not have yet")
    args = parser.parse_args(argv)
    if not args.report:
        form, folder = forms[args.form], args.work or work / args.form
        if adopt is not None and args.go_on:
            adopt(form, folder, args.out)
        else:
            keep_existing(args.out, args.force)
        try:
            result = study(form, folder, args.minutes)
        except NotInstalledError as error:
            raise SystemExit(str(error)) from error
        write_json(args.out, {"form": args.form, **result, "machine": machine()})
        if keep is not None:
            keep(folder, args.out)
    print(publish(args.out))


def results_of(form: Any, path: Path) -> dict[str, Any]:
    """The results at `path`, if they are there and of the same settings: what `--go-on` goes on from."""
    if not path.exists():
        raise SystemExit(f"there is no {path} to go on from: leave --go-on out")
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    own = json.loads(json.dumps(asdict(form)))
    if other := [key for key, value in data["settings"].items() if own.get(key, value) != value]:
        raise SystemExit(f"{path} is of other settings ({', '.join(other)}): it cannot be gone on from")
    return data
