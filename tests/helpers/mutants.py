"""Small mistakes put into a copy of the library, one at a time: the tests named beside each have to notice.

    python tests/helpers/mutants.py            # all
    python tests/helpers/mutants.py acceptance  # those whose file or mistake has this in it

The copy is temporary; the working tree is only read. A mutant that lives needs a test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HANG = 600  # seconds; a mutant that never ends is noticed too


class Mutant(NamedTuple):
    """`before`, which stands once in the file, becomes `after`; `tests` are arguments of pytest."""

    file: str
    before: str
    after: str
    tests: str


KEPT = "tests/pipelines/test_kept_predictions.py"
VERDICTS = "tests/llm/test_draft_verdicts.py"
PLANS = "tests/vision/test_layer_masking_plans.py"
FIXED = "tests/vision/test_fixed_point.py"
FINITE = "tests/pipelines/test_finite_predictions.py"
PLAN = "tests/core/test_plan.py"
DRAFTS = "tests/llm/test_self_speculative_drafts.py tests/llm/test_draft_verdicts.py"
WEIGHTS = "tests/vision/test_weight_files.py"
ACCEPT = "skipguide/llm/speculative/acceptance.py"
VERIFY = "skipguide/llm/speculative/verify.py"
MUTANTS = [
    Mutant("pipelines/sampling/pipeline_call.py", "        self.extra = None\n        if", "        if", KEPT),
    Mutant("pipelines/sampling/directions.py", "        if not self.kept:\n            state",
           "        if False:\n            state", KEPT),
    Mutant("pipelines/sampling/interceptor.py", "            self.passes.clear()\n", "", KEPT),
    Mutant("pipelines/guider/skip_guider.py", "step <= self._step:", "step < self._step:", KEPT),
    Mutant("skipguide/llm/speculative/loop.py", "torch.where(request.unfinished.bool(), verdict.matches, count)",
           "verdict.matches", VERDICTS),
    Mutant(VERIFY, "draws * q_drafted < p_drafted", "draws * q_drafted <= p_drafted", VERDICTS),
    Mutant("skipguide/llm/online.py", "/ self.seen", "/ (self.seen + 1)", VERDICTS),
    Mutant("skipguide/llm/online.py", "self.seen >= self.passes", "self.seen > self.passes", VERDICTS),
    Mutant("vision/layer_masking/masker.py", ", self.model.training)", ")", PLANS + " -k training"),
    Mutant("skipguide/sequential.py", "len(active_plans()) == 1", "True", "tests/core/test_sequential.py"),
    # further ones
    Mutant("vision/layer_masking/masker.py", "torch.equal(self._plan[1], keep)", "True", PLANS + " -k equal_masks"),
    Mutant("vision/layer_masking/masker.py", "mine = keep.clone()", "mine = keep", PLANS + " -k equal_masks"),
    Mutant("vision/layer_masking/masker.py", "self._trace(call, keep, images, args, kwargs, one)",
           "self._recorded(call, keep, images, args, kwargs)[0].trace()", PLANS + " -k random_numbers"),
    Mutant("vision/anderson.py", "    EVERY = 3\n", "    EVERY = 4\n", FIXED + " -k 'orbit or three_times'"),
    Mutant("vision/anderson.py", "self.alive = self.alive & torch.isfinite(step).all(1)", "pass",
           FIXED + " -k not_finite"),
    Mutant("vision/anderson.py", "        reserve.keep_up()\n", "", FIXED + " -k 'alone_misses or orbit'"),
    Mutant("vision/anderson.py", "damping / 2", "damping", FIXED + " -k half_the_step"),
    Mutant("vision/fixed_point_search.py", "close | ~ended)", "close)", FIXED + " -k 'best_point or divergence'"),
    Mutant("vision/fixed_point_search.py", "self.evaluations >= self.budget", "self.evaluations > self.budget",
           FIXED + " -k best_point"),
    Mutant(VERIFY, "(p - q).clamp_min(0.0)", "p", "tests/llm -k 'sampl'"),
    Mutant(ACCEPT, "len(self._rounds) > self.patience", "len(self._rounds) >= self.patience", DRAFTS),
    # core
    Mutant("skipguide/schedule.py", "fraction < self.stop - SLACK", "fraction < self.stop + SLACK",
           PLAN + " -k window"),
    Mutant("skipguide/gate.py", "            if not self.users:\n", "            if True:\n",
           "tests/core/test_removal.py"),
    Mutant("skipguide/planned.py", "if earlier.index < block.index:", "if earlier.index <= block.index:",
           "tests/core/test_skipper.py tests/core/test_laws.py -k 'resum or prefix'"),
    Mutant("skipguide/planned.py", "<= asked:", "<= places.keys() | all_:", "tests/core/test_shared_modules.py"),
    Mutant("skipguide/skipper.py", "            if gate.key not in plan.seen and not gate.reachable():\n",
           "            if False:\n", "tests/core/test_hooks.py tests/core/test_residue.py tests/core/test_skipper.py"),
    Mutant("skipguide/recomputation.py", "tuple(plan.snapshot() for plan in plans if plan.live)", "plans",
           "tests/core/test_gradient_checkpointing.py"),
    Mutant("skipguide/router.py", "passed = self.once.known = self.shortcut(x)", "passed = self.shortcut(x)",
           "tests/core/test_router.py"),
    Mutant("skipguide/config.py", "if isinstance(value, bool) or not isinstance(value, Integral):",
           "if not isinstance(value, Integral):", "tests/core/test_files.py tests/core/test_plan.py"),
    Mutant("skipguide/files.py", "places = [landing(path) for path in paths]", "places = list(paths)",
           "tests/cli/test_outputs.py -k link"),
    # pipelines
    Mutant("pipelines/sampling/interceptor.py", 'self.watch.see("skipped", skipped[each.plan], state.step)', "pass",
           FINITE),
    Mutant("pipelines/sampling/predictions.py", "    if not torch.isfinite(skipped).all():\n", "    if False:\n",
           FINITE),
    Mutant("pipelines/sampling/interceptor.py", "            self.watch.forget()\n", "", FINITE + " -k told_of_twice"),
    Mutant("pipelines/sampling/delivery.py", "return bool(w != state.w) if said is None else bool(said)",
           "return bool(w != state.w)", "tests/pipelines/test_delivery.py"),
    Mutant("pipelines/calibration.py", "halves[::-1] if self.spec.cond_first else halves", "halves",
           "tests/pipelines/test_calibration.py"),
    Mutant("pipelines/sampling/tail.py", "own if block >= (each.start or 0)", "own if block > (each.start or 0)",
           "tests/pipelines/test_tail.py"),
    # llm
    Mutant("skipguide/llm/unified.py", "count = min(num_layers, max(2, ", "count = min(num_layers, max(1, ",
           "tests/llm/test_unified.py"),
    Mutant("skipguide/llm/choose.py", "key=lambda n: -damage[n]", "key=lambda n: damage[n]",
           "tests/llm/test_stats.py"),
    Mutant("skipguide/llm/cache.py", "            cache.crop(-added)\n", "            pass\n",
           "tests/llm/test_cache.py tests/llm/test_plans.py -k 'draft or hidden'"),
    Mutant(ACCEPT, "self.retry * 2**self.switched_off", "self.retry", DRAFTS),
    Mutant("skipguide/llm/similarity.py", "(-COSINE, COSINE)", "(None, None)", "tests/core/test_files.py"),
    # vision
    Mutant("vision/weights.py", " or _kind(tensor) != _kind(own[name])", "", WEIGHTS + " -k adapter"),
    Mutant("vision/weights.py", "tensor.shape != own[name].shape or ", "", WEIGHTS + " -k adapter"),
    Mutant("vision/unetpp/network.py", "mask_disagreement(before, now) > tolerance",
           "mask_disagreement(before, now) >= tolerance", "tests/vision/test_unetpp.py -k adaptive"),
    Mutant("vision/skip_tuning/classes.py", "    scores[labels] = math.inf\n", "",
           "tests/vision/test_skip_tuning_parity.py tests/vision/test_skip_tuning_fit.py"),
    Mutant("vision/floorplan/graph.py", "[:, edges[0] != edges[1]]", "", "tests/vision/test_floorplan_graphs.py"),
]  # fmt: skip


def copy_of_the_library(folder: Path) -> None:
    """What tests read: the packages and their links, the tests, and what describes the project."""
    for name in ("skipguide", "pipelines", "vision", "tests", "demos"):
        ignored = shutil.ignore_patterns("__pycache__", "runs")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for path in ROOT.glob("*.*"):
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)


def lives(mutant: Mutant, folder: Path) -> bool:
    """Whether the tests pass although the mistake is there."""
    path = folder / mutant.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(mutant.before) != 1:
        raise SystemExit(f"{mutant.file} has {mutant.before!r} {whole.count(mutant.before)} times; expected once")
    path.write_text(whole.replace(mutant.before, mutant.after), encoding="utf-8")
    try:
        words = mutant.tests.replace("'", "").split(" -k ")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
        command += [*words[0].split(), *(["-k", words[1]] if len(words) > 1 else [])]
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=HANG, check=False)
        if done.returncode not in (0, 1):  # no tests, or none that could be collected
            raise SystemExit(done.stdout.decode()[-2000:])
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        path.write_text(whole, encoding="utf-8")


def main(words: list[str]) -> int:
    """How many live."""
    chosen = [m for m in MUTANTS if not words or any(word in m.file + m.before + m.after for word in words)]
    living = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_library(folder)
        for mutant in chosen:
            alive = lives(mutant, folder)
            living += alive
            print("LIVES" if alive else "dies ", mutant.file, repr(mutant.before), "->", repr(mutant.after), flush=True)
    print(f"{living} of {len(chosen)} live")
    return living


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
