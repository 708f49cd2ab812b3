"""Does skip guidance help on the bundled model, with which layers, at what cost?

    python -m demos.quality --out runs/quality              # 576 clips per setting; resumes; see README.md
    python -m demos.quality --out runs/quality-quick --quick    # a taste, under 10 minutes on two cores

Every setting and seed has a file of its own. Stop it and start the same command again, in as many processes and
sessions as you like; the table is of what is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from demos.quality.settings import LAYER, QUICK, Setting, W, catalogue
from demos.quality.work import REAL, Plan, done, fix_plan, items, work


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="8 settings, 48 clips, 2 seeds")
    parser.add_argument("--prompts", type=int, default=96, help="captions (default: %(default)s)")
    parser.add_argument("--each", type=int, default=2, help="clips per caption and seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--tiers", type=int, nargs="+", default=[1, 2, 3], help="1 decides, 2 single layers, 3 the rest, 4 other parts"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these settings")
    parser.add_argument("--layer", type=int, default=LAYER, help="that the scale grids skip (default: %(default)s)")
    parser.add_argument("--draw", type=int, default=0, help="of captions and noise; another one confirms a finding")
    parser.add_argument("--weak", type=Path, help="folder of an early checkpoint, for autoguidance")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop the workers after this time and report what is there")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--list", action="store_true", help="list the settings and stop")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.prompts, args.each, args.seeds = 24, 2, 2
    if args.prompts < 5 or args.each < 2 or args.seeds < 1:
        parser.error("at least 5 captions (one in five is held out), 2 clips of each (for diversity) and 1 seed")
    return args


def chosen(args: argparse.Namespace) -> list[Setting]:
    """The settings that are asked for."""
    every = catalogue(args.layer)
    names = args.only or (QUICK if args.quick else [n for n, s in every.items() if s.tier in args.tiers])
    if not args.only and not any(every[name].family == "cfg" for name in names):
        names = [f"cfg-{W:g}", *names]  # what everything is compared with
    if unknown := [name for name in names if name not in every]:
        raise SystemExit(f"unknown settings {', '.join(unknown)}; --list shows them")
    return [every[name] for name in names]


def main(argv: list[str] | None = None) -> None:
    """Run, or go on; then report."""
    args = arguments(argv)
    settings = chosen(args)
    if args.list:
        for setting in settings:
            print(f"{setting.tier}  {setting.name:24s} {setting.family:18s} w={setting.w:g}  {setting.note}")
        return
    plan = Plan(args.prompts, args.each, args.seeds, args.layer, args.steps, args.draw)
    fix_plan(args.out, plan)
    todo = items(settings, args.seeds)
    if args.worker or (args.workers == 0 and not args.report):
        work(args.out, todo, plan, args.weak)
        if args.worker:
            return
    elif not args.report:
        _run_workers(args, [i.name for i in todo if i.setting.control != "weak" or args.weak is not None])
    if not done(args.out, REAL):
        raise SystemExit(f"nothing to report in {args.out} yet")
    from demos.quality import report
    from demos.quality.correlation import correlate
    from demos.quality.summary import summarise

    result = summarise(args.out, settings, plan)
    print(report.write(args.out, result, correlate(result["rows"], args.layer) if args.steps is None else []))
    print(
        f"wrote results.md, .csv, .json, quality_cost.png, quality_diversity.png and a sheet per setting in {args.out}"
    )


def _run_workers(args: argparse.Namespace, names: list[str]) -> None:
    """Start the workers and show how many items are done."""
    from tqdm import tqdm

    words = [sys.executable, "-m", "demos.quality", "--worker"]
    words += [word for word in sys.argv[1:] if word != "--worker"]
    # one thread each, kept memory and passive waiting: see demos/bundled_model/README.md
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    began = time.monotonic()
    workers = [subprocess.Popen(words, env=environment) for _ in range(max(1, args.workers))]
    try:
        with tqdm(total=len(names), desc="settings x seeds") as bar:
            while any(worker.poll() is None for worker in workers):
                if more := sum(done(args.out, name) for name in names) - bar.n:
                    bar.update(more)
                if args.minutes is not None and time.monotonic() - began > 60 * args.minutes:
                    break
                time.sleep(2)
            bar.update(sum(done(args.out, name) for name in names) - bar.n)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        failed = [worker.wait() for worker in workers]
    if any(code > 0 for code in failed):
        raise SystemExit("a worker failed; its traceback is above. What was finished is kept")


if __name__ == "__main__":
    main()
