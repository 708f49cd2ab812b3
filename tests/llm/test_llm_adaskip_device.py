"""AdaSkip on a device: measuring waits for nothing, and a GPU measures what the CPU does."""

import copy

import pytest
import torch
from helpers import adaskip_golden
from helpers.adaskip_golden import settings_of
from torch.utils._python_dispatch import TorchDispatchMode

from skipguide.llm import AdaSkip, watch
from skipguide.llm.online import OnlineWindow
from skipguide.llm.similarity import RequestMeter

golden, model, stats = adaskip_golden.golden, adaskip_golden.model, adaskip_golden.stats


class HostReads(TorchDispatchMode):
    """Counts the reads of single numbers from the device: each would wait for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_measuring_waits_for_nothing(golden, model, stats):
    ids = torch.tensor([golden["prompt"]])
    meter, window = RequestMeter(8), OnlineWindow(20, 8, range(8))
    with torch.no_grad():
        model(ids)
        with HostReads() as plain:
            model(ids)
        with watch(model, meter.entering()), HostReads() as prefill:
            model(ids)
        with watch(model, window.enter), HostReads() as decode:
            model(ids[:, :1])
    assert meter.measured("mlp") == list(range(8))
    assert prefill.count == decode.count == plain.count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_as_on_the_cpu(golden, model, stats):
    moved = copy.deepcopy(model).cuda()
    there = AdaSkip.calibrate(moved, golden["warmup_ids"])
    assert there.attn_similarity == pytest.approx(stats.attn_similarity, abs=1e-5)
    assert there.ranking() == stats.ranking()
    case = golden["cases"]["decode_N4"]
    with settings_of(case).apply(moved, there), torch.no_grad():
        out = moved.generate(torch.tensor([golden["prompt"]]).cuda(), max_new_tokens=32, do_sample=False)
    assert out[0, len(golden["prompt"]) :].tolist() == case["tokens"]
