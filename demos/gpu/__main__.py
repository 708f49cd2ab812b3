"""What skipguide costs and saves on a GPU, piece by piece.

    python -m demos.gpu --out OUT                        # what fits into 8 minutes, in order
    python -m demos.gpu --out OUT --limit 170            # as many pieces as fit; again for the rest
    python -m demos.gpu --out OUT --pieces ltx,wan
    python -m demos.gpu --dry --out OUT                  # tiny shapes on the CPU: every line, no figures that mean much
    python -m demos.gpu --wheels [LIST]                  # what to bring to a machine that cannot download

Each finished piece is in OUT/results.json at once. `python -m demos.gpu.tables` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demos.gpu.needs import installed, lacking, listed, missing

HOME = Path(__file__).parent


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, default=HOME, help="folder of results.json (default: demos/gpu)")
    found.add_argument("--pieces", help="names, separated by commas (default: all, in their order)")
    found.add_argument("--limit", type=float, default=480, help="seconds: no piece starts whose budget does not fit")
    found.add_argument("--force", action="store_true", help="do pieces again that are there")
    found.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, written to results_dry.json")
    found.add_argument("--list", action="store_true", help="name the pieces and their budgets, and stop")
    found.add_argument(
        "--wheels", nargs="?", const="", metavar="LIST",
        help="name the packages to bring, and stop; LIST is the machine's `pip list` (default: this machine)",
    )  # fmt: skip
    return found


def wheels(path: str) -> str:
    """The packages as arguments of `pip download`."""
    have = listed(Path(path).read_text(encoding="utf-8").splitlines()) if path else installed()
    if "torchvision" not in have:
        print("no torchvision there: the pieces skipnet, masking and tuning will be left out", file=sys.stderr)
    return " ".join(missing(have))


def run(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The pieces one after the other; returns all results."""
    import torch

    from demos.benchmarks.measure import machine, write_json
    from demos.gpu.pieces import BY_NAME
    from demos.gpu.race import clear, describe, tell
    from demos.gpu.setting import Setting

    if args.dry:
        torch.set_num_threads(1)
    path = args.out / ("results_dry.json" if args.dry else "results.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"pieces": {}}
    began, have = time.monotonic(), installed()
    for name in names:
        piece, before = BY_NAME[name], results["pieces"].get(name, {})
        if before.get("figures") and not args.force:
            tell(f"{name}: there already")
            continue
        left = args.limit - (time.monotonic() - began)
        if piece.budget > left and not args.dry:
            tell(f"{name}: needs {piece.budget:g} s, {left:.0f} s are left; not started")
            continue
        tell(f"{name}: up to {piece.budget:g} s, {left:.0f} s left")
        start = time.monotonic()
        record: dict[str, Any]
        if absent := lacking(piece.needs, have):
            record = {"left_out": f"needs {', '.join(absent)}"}
        else:
            device = "cpu" if args.dry else "cuda"
            try:
                record = {"figures": piece.run(Setting(args.dry, device, start + piece.budget))}
            except Exception as error:  # a piece must not end the others
                record = {"error": describe(error)}
        record |= {"seconds": round(time.monotonic() - start, 2), "budget": piece.budget, "torch": torch.__version__}
        clear()
        tell(f"{name}: {record.get('left_out') or record.get('error') or 'done'} ({record['seconds']} s)")
        results["pieces"][name] = record
        write_json(path, {"dry": args.dry, "machine": machine(), "pieces": results["pieces"]})
    return results


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.wheels is not None:
        print(wheels(args.wheels))
        return 0
    from demos.gpu.pieces import BY_NAME

    if args.list:
        print("\n".join(f"{piece.name:14} {piece.budget:5g} s" for piece in BY_NAME.values()))
        return 0
    names = [name.strip() for name in args.pieces.split(",")] if args.pieces else list(BY_NAME)
    if unknown := [name for name in names if name not in BY_NAME]:
        arguments.error(f"unknown pieces {', '.join(unknown)}; these are: {', '.join(BY_NAME)}")
    import torch

    if not args.dry and not torch.cuda.is_available():
        arguments.error("no CUDA device: --dry runs tiny shapes on the CPU")
    results = run(args, names)
    return int(any("error" in results["pieces"].get(name, {}) for name in names))


if __name__ == "__main__":
    sys.exit(main())
