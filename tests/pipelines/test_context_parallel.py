"""Context parallelism of diffusers: two processes give what one gives.

Gloo and two forked CPU processes; diffusers asks for an accelerator's number only to name a device.
"""

import io
import multiprocessing
import os
import traceback

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from helpers.two_processes import free_port

from skipguide import SkipError, Skipper, SkipPlan
from skipguide.pipelines import SkipGroup
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, MODELS

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*all_gather_tensor.*:FutureWarning"),  # of torch, by diffusers
]
SETTINGS = {
    "wan first block": ("wan", {"layers": [0]}),
    "wan first block, whole": ("wan", {"layers": [0], "prefix_reuse": False}),
    "wan later": ("wan", {"layers": [2], "part": "attn_identity"}),
    "wan groups": ("wan", {"groups": (SkipGroup([1]), SkipGroup([2], scale=0.5, part="mlp"))}),
    "flux first block": ("flux", {"layers": [0]}),
    "flux later": ("flux", {"layers": [1, 4], "part": "attn"}),
}


def parallel(pipe):
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def worker(rank, port, answers):
    """Every setting, with guidance before and after the hooks of the parallelism; then what is refused."""
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=2)
        torch.accelerator.device_count = lambda: 1
        found = {}
        for name, (kind, settings) in SETTINGS.items():
            case = BY_PIPE[kind]
            pipe = case.build()
            parallel(pipe)
            with Stg(**settings).apply(pipe) as applied:
                found[name] = case.run(pipe)
            found[f"{name}, plain after"] = case.run(pipe)
            found[f"{name}, blocks"] = torch.tensor(applied.stats.blocks_run)
        case = BY_PIPE["wan"]
        pipe = case.build()
        with Stg([0]).apply(pipe):
            parallel(pipe)
            found["wan, parallel during"] = case.run(pipe)
        family, inputs = MODELS["flux"], MODELS["flux"].inputs(2)
        model = family.build()
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        try:
            with Skipper(model, SkipPlan([1], "attn_identity")):
                family.run(model, inputs)
            found["refused"] = "nothing"
        except SkipError as error:
            found["refused"] = str(error)
        buffer = io.BytesIO()
        torch.save(found, buffer)
        answers.put((rank, buffer.getvalue(), ""))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, b"", traceback.format_exc()))


def test_two_processes_give_the_result_of_one():
    fork = multiprocessing.get_context("fork")
    answers, port = fork.Queue(), free_port()
    processes = [fork.Process(target=worker, args=(rank, port, answers), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        got = [answers.get(timeout=600) for _ in processes]
    finally:
        for process in processes:
            process.join(600)
            if process.is_alive():
                process.kill()
    assert not any(error for *_, error in got), "\n".join(error for *_, error in got)
    first, second = (torch.load(io.BytesIO(data), weights_only=True) for _, data, _ in got)
    for name, (kind, settings) in SETTINGS.items():
        case = BY_PIPE[kind]
        pipe = case.build()
        with Stg(**settings).apply(pipe) as applied:
            expected = case.run(pipe)
        plain = case.run(pipe)
        for found in (first, second):
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[f"{name}, plain after"], plain, atol=1e-5, rtol=1e-4)
            assert found[f"{name}, blocks"] == applied.stats.blocks_run
    for found in (first, second):
        assert torch.equal(found["wan, parallel during"], found["wan first block"])
        assert "context parallelism deals them out" in found["refused"]
