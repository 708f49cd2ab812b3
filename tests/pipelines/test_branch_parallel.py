"""Branch parallelism: two processes (gloo) share the branches of every step and get what one process gets."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from skipguide import SkipError, SkipPlan
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.sampling import branch_parallel as split
from skipguide.pipelines.sampling.ledger import GuidanceStats
from zoo.pipes import BY_PIPE

ROOT = Path(__file__).resolve().parents[2]

# Imports once and forks once; both ranks run every case alone, then together.
RANKS = """
import datetime, json, os, sys, warnings
import torch
torch.set_num_threads(1)
from skipguide import SkipError
from skipguide.pipelines import SkipGroup, SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE
from zoo.pipes_video import BY_VIDEO
import diffusers.pipelines, transformers
warnings.simplefilter("ignore")
for name in ("ltx", "wan", "hunyuan"):
    BY_PIPE[name].build()
pids = []
for rank in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        break
    pids.append(pid)
else:
    sys.exit(any(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
torch.distributed.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=int(sys.argv[1]),
    timeout=datetime.timedelta(seconds=600))
said = {}

def case(label, name, cfg=True, prompts=1, seed=11, layers=(1,), **settings):
    case = BY_PIPE[name]
    stg = Stg(list(layers) if "groups" not in settings else None, **settings)
    pipe = case.build()
    call = {"generator": torch.Generator().manual_seed(seed)}
    with stg.apply(pipe) as alone:
        expected = case.run(pipe, prompts, cfg, generator=torch.Generator().manual_seed(seed))
    try:
        with stg.apply(pipe, branch_parallel=True) as applied:
            out = case.run(pipe, prompts, cfg, **call)
    except SkipError as error:
        said[label] = str(error)
        return
    again = case.run(pipe, prompts, cfg, generator=torch.Generator().manual_seed(seed))
    said[label] = {
        "equal": torch.equal(out, expected),
        "difference": float((out - expected).abs().max() / expected.abs().max()),
        "effect": float((again - expected).abs().max() / expected.abs().max()),
        "mine": applied.stats.to_dict(),
        "alone": alone.stats.to_dict(),
        "words": str(applied.stats),
    }

with torch.no_grad():
    case("two calls", "wan")
    case("no CFG", "hunyuan")
    case("one batch", "ltx", prompts=2)
    case("wan formula", "wan", formula="wan")
    case("groups", "wan", groups=[SkipGroup([1]), SkipGroup([2], part="mlp", scale=0.5)])
    case("every", "wan", every=2, rescale=0.7)
    case("window", "ltx", start=0.3, stop=0.7, cfg_interval=(0.0, 0.5))
    case("off", "wan", scale=0.0)
    case("other seed", "ltx", seed=rank)
    joined = BY_VIDEO["ltx2"]
    outs = []
    for how in (None, True):
        pipe = joined.build()
        with Stg([joined.layer]).apply(pipe, branch_parallel=how) as applied:
            outs.append(joined.run(pipe))
    said["two predictions"] = {
        "difference": float((outs[1] - outs[0]).abs().max() / outs[0].abs().max()),
        "ranks": applied.stats.ranks,
    }
    pipe = BY_PIPE["wan"].build()
    try:
        with Stg([1]).apply(pipe, branch_parallel=True):
            pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
            BY_PIPE["wan"].run(pipe)
    except SkipError as error:
        said["cache"] = str(error)
    class Odd(Exception):
        pass
    pipe = BY_PIPE["wan"].build()
    def fails(*args, **kwargs):
        raise Odd("here")
    if rank == 1:
        pipe.transformer.blocks[1].ffn.forward = fails
    try:
        with Stg([2]).apply(pipe, branch_parallel=True):
            BY_PIPE["wan"].run(pipe)
    except (Odd, SkipError) as error:
        said["failure"] = f"{type(error).__name__}: {error}"
open(f"rank{rank}.json", "w").write(json.dumps(said))
torch.distributed.destroy_process_group()
os._exit(0)
"""


def run_ranks(folder, ranks):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANKS, str(ranks), str(port)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("two"), 2)


SHARED = ["two calls", "no CFG", "one batch", "wan formula", "groups", "every", "window"]


@pytest.mark.parametrize("label", SHARED)
def test_every_rank_has_the_single_process_result(two, label):
    for rank, found in enumerate(two):
        case = found[label]
        if label in ("one batch", "window"):  # rows of a batch are parted
            assert case["difference"] < 1e-5
        else:
            assert case["equal"], case["difference"]
        assert case["effect"] > 1e-4
        assert (case["mine"]["rank"], case["mine"]["ranks"]) == (rank, 2)
        for name in ("blocks_plain", "blocks_naive", "delivery", "renewals"):
            assert case["mine"][name] == case["alone"][name], name


def test_the_ledger_says_who_ran_what(two):
    """N blocks, of which layer 1 is skipped, in three steps."""
    plain, skipped = (found["two calls"]["mine"] for found in two)
    n = plain["blocks_plain"] // 6
    assert (plain["blocks_run"], skipped["blocks_run"]) == (3 * 2 * n, 3 * (n - 1)), "c and u here, k there"
    assert (plain["passes"], skipped["passes"]) == (6, 3)
    plain, skipped = (found["no CFG"]["mine"] for found in two)
    n = plain["blocks_plain"] // 3
    assert (plain["blocks_run"], skipped["blocks_run"]) == (3 * n, 3 * (n - 1))
    uncond, cond = (found["one batch"]["mine"] for found in two)
    n = uncond["blocks_plain"] // 6
    assert (uncond["blocks_run"], cond["blocks_run"]) == (3 * n, 3 * (n + n - 2)), "u here, c and its suffix there"
    assert two[1]["two calls"]["words"].startswith("rank 1 of 2: 3 passes")


def test_without_guidance_nothing_is_shared(two):
    for found in two:
        assert found["off"]["equal"] and found["off"]["effect"] == 0


def test_video_and_sound_are_shared_too(two):
    for found in two:
        assert found["two predictions"]["difference"] < 1e-5 and found["two predictions"]["ranks"] == 2


def test_what_goes_wrong_goes_wrong_everywhere(two):
    for found in two:
        assert "rank 1 was called with other latents or prompts than rank 0" in found["other seed"]
        assert "FirstBlockCache and branch_parallel do not work together" in found["cache"]
    assert two[0]["failure"].startswith("SkipError: rank 1 failed, so this step cannot be finished here: Odd: here")
    assert two[1]["failure"] == "Odd: here"


def owners_of(monkeypatch, ranks, branches, skips):
    """Who runs what in a step of so many plain branches in one batch, the conditional rows last."""
    told = {}

    class Told(Exception):  # noqa: N818
        pass

    def shared(self, run, owners, args, kwargs):
        told.update(owners)
        raise Told

    monkeypatch.setattr(split.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(split.distributed, "get_world_size", lambda group: ranks)
    monkeypatch.setattr(split.BranchParallelPasses, "_shared", shared)
    model = BY_PIPE["ltx"].build().transformer
    passes = split.BranchParallelPasses(model, True, GuidanceStats(), True, None)
    path = passes.prepared([SkipPlan([layer]) for layer in range(skips)])
    try:
        with pytest.raises(Told):
            rows = slice(branches - 1, branches)
            passes.plain(None, (torch.zeros(branches, 1),), {}, 1, step=path, rows=rows, counted=branches)
    finally:
        passes.remove()
    assert not passes._whole_skippers and (passes.stats.rank, passes.stats.ranks) == (0, ranks)
    return [told[f"rows {half}"] for half in range(branches)], [told[f"skip {n}"] for n in range(skips)]


def test_skipped_passes_go_to_ranks_that_would_wait(monkeypatch):
    assert owners_of(monkeypatch, 2, 1, 1) == ([0], [1])
    assert owners_of(monkeypatch, 2, 2, 2) == ([0, 1], [1, 1]), "on from the conditional rows' streams"
    assert owners_of(monkeypatch, 3, 2, 1) == ([0, 1], [2])
    assert owners_of(monkeypatch, 4, 1, 4) == ([0], [1, 2, 3, 1]), "round the ranks that have nothing to do"


def test_a_prediction_comes_in_the_frame_that_it_had():
    tensor = torch.rand(2, 3)
    output = Transformer2DModelOutput(sample=tensor)
    for out in (tensor, (tensor,), (tensor, None), output):
        kind, shape, dtype = split._output_kind(out)
        framed = split._output_of(kind, torch.ones(shape, dtype=dtype))
        assert type(framed) is type(out) and (out is tensor or len(framed) == len(out))
        assert torch.equal(framed if out is tensor else framed[0], torch.ones(2, 3))


def test_bad_input():
    pipe = BY_PIPE["ltx"].build()
    with pytest.raises(SkipError, match="init_process_group"):
        Stg([1]).apply(pipe, branch_parallel=True)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(SkipError, match="at least two processes"):
            Stg([1]).apply(pipe, branch_parallel=True)
    finally:
        torch.distributed.destroy_process_group()
    assert "forward" not in pipe.transformer.__dict__
    with pytest.raises(SkipError, match="one prediction, and this denoiser returns more"):
        split._output_kind((torch.zeros(1), torch.zeros(1)))
