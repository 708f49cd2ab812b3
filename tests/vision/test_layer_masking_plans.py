"""Layer masking: plans and boxes change nothing but the work, and are made anew when something changes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.dispatched import Dispatched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import DenseNet, mobilenet_v2
from torchvision.models.resnet import BasicBlock, Bottleneck

from skipguide.vision import LayerMask, masked_forward
from skipguide.vision.layer_masking.masker import _TRACES
from zoo import masking
from zoo.masking import randomized, tiny

pytestmark = pytest.mark.numerics

model, images, keep = masking.model, masking.images, masking.keep
ROOT = Path(__file__).parents[2]


class Narrow(nn.Module):
    """Conv, norm, ReLU, a residual block and a classifier: small enough for property tests."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, 2, 2)
        self.norm = nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@torch.no_grad()
def test_a_box_is_exact_and_saves_work(block, images):
    model = tiny(block)
    keep = torch.zeros(1, 64, 64, dtype=torch.bool)
    keep[:, 3:37, 8:40] = True
    whole_map, boxed = masked_forward(model, crop=False), masked_forward(model)
    wanted = whole_map(keep, images)
    boxed(keep, images)
    torch.testing.assert_close(boxed(keep, images), wanted, rtol=1e-5, atol=1e-5)
    assert boxed.stats.computed < 0.6 and whole_map.stats.computed == 1.0
    assert boxed.stats.planned == 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.booleans())
def test_a_plan_changes_nothing(seed, rows, boxes):
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = randomized(Narrow(), seed)
    size = [int(v) for v in torch.randint(17, 48, (2,), generator=g)]
    images = torch.randn(rows, 3, *size, generator=g)
    keep = torch.zeros(rows, 1, *size, dtype=torch.bool)
    for row in keep:
        if boxes:
            y, x = (int(torch.randint(0, s, (), generator=g)) for s in size)
            h, w = (int(torch.randint(1, s // 2, (), generator=g)) for s in size)
            row[:, y : y + h, x : x + w] = True
        else:
            row |= torch.rand(1, *size, generator=g) > torch.rand((), generator=g)
    with torch.no_grad():
        forward, uncut = masked_forward(model), masked_forward(model, crop=False)
        first = forward(keep, images)  # worked out on the way, with k - 1 rounds and nothing cut
        torch.testing.assert_close(forward(keep, images), first, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(uncut(keep, images), first, rtol=1e-5, atol=1e-5)
        each = torch.cat([uncut(k[None], x[None]) for k, x in zip(keep, images, strict=True)])
        torch.testing.assert_close(each, first, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_fill_rounds_are_as_few_as_can_be(images):
    """7x7 needs six at most, a 3x3 cut by an add one, a 1x1 none (spec 2.2)."""
    model = tiny(Bottleneck)
    keep = torch.zeros(1, 64, 64, dtype=torch.bool)
    keep[:, ::2] = True  # every second row: nothing is further than one ring from something visible
    with LayerMask(keep).apply(model) as applied:
        model(images)
        first = applied.stats.fill_rounds
        model(images)
        assert 1 <= first <= 1 + 4  # without a plan 6 + 4 * 2 + 0
        assert applied.stats.fill_rounds - first == first
    keep = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    keep[..., 16:48, 16:48] = True
    with LayerMask(keep, crop=False).apply(model) as applied:
        model(images)
        model(images)
        plan = applied.masker._plan[2]
    threes = [
        r
        for op, r in zip(plan.trace.ops, plan.rounds, strict=True)
        if getattr(op, "kernel", 0) == (3, 3) and op.kind == "conv"
    ]
    ones = [r for op, r in zip(plan.trace.ops, plan.rounds, strict=True) if getattr(op, "kernel", 0) == (1, 1)]
    assert set(threes) == {-1, 1} and set(ones) == {-1}  # -1: reads nothing hidden


@torch.no_grad()
def test_equal_masks_share_a_plan_and_changed_ones_do_not(model, images, keep):
    forward = masked_forward(model)
    forward(keep, images)
    first = forward(keep, images)
    plan = forward.masker._plan[2]
    assert torch.equal(forward(keep.clone(), images), first) and forward.masker._plan[2] is plan
    mask = keep.clone()
    with LayerMask(mask).apply(model):
        assert torch.equal(model(images), first)
        mask[0] = ~mask[0]  # in place
        changed = model(images)
    torch.testing.assert_close(changed, forward(mask, images), rtol=1e-5, atol=1e-5)
    assert not torch.equal(changed[0], first[0])


@torch.no_grad()
def test_a_plan_asks_once_of_masks_that_meet_again(images, keep):
    """In a dense block every layer reads all before it; each question would be a wait for a GPU."""
    asked = []
    for layers in (4, 8):
        forward = masked_forward(randomized(DenseNet(4, (layers, layers), 8, num_classes=3)))
        forward(keep, images)
        with Dispatched() as ran:
            forward(keep, images)
        asked.append(ran.names.count("equal"))
    assert asked[0] == asked[1] <= 6


def test_committed_bars():
    """Issue 5's bars hold in the committed measurement, the plan made in the same call."""
    path = ROOT / "demos" / "benchmarks" / "layer_masking.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result["bars"]) == {
        f"{name} with its plan"
        for name in (
            "half_of_14x14_patches",
            "half_of_7x7_patches",
            "box_51_percent_centre",
            "box_51_percent_corner",
        )
    }
    for name, bar in result["bars"].items():
        assert bar["median"] == result["ratio_to_plain"][name]["median"]
        assert bar["at_most"] == (1.25 if "patches" in name else 0.75)
        assert bar["passed"] and bar["median"] <= bar["at_most"], name
    networks = result["networks"]["results"]
    assert set(networks) == {"efficientnet_lite0", "efficientnet_b0", "mobilenetv3_large_100"}
    bars = networks["efficientnet_lite0"]["bars"]
    assert {name: bar["at_most"] for name, bar in bars.items()} == {
        "half_of_7x7_patches": 1.5, "box_18_percent_centre": 0.7,
    }  # fmt: skip
    assert all(bar["passed"] and bar["median"] <= bar["at_most"] for bar in bars.values()), bars


@torch.no_grad()
def test_a_model_that_changes_is_seen(images, keep):
    model = tiny(BasicBlock)
    forward = masked_forward(model)
    forward(keep, images)
    model.layer2 = nn.Sequential(model.layer2, nn.Conv2d(128, 128, 5, padding=2))
    model.eval()
    changed = forward(keep, images)
    assert torch.equal(changed, masked_forward(model, crop=False)(keep, images)) or torch.allclose(
        changed, masked_forward(model, crop=False)(keep, images), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(changed, forward(keep, images.masked_fill(~keep, float("nan"))))


@torch.no_grad()
def test_other_resolutions_and_keyword_calls(model, keep):
    forward = masked_forward(model)
    for size in ((48, 80), (33, 47), (64, 64)):
        x = torch.randn(2, 3, *size)
        mask = torch.zeros(2, *size)
        mask[:, 5:30, 7:40] = 1
        first = forward(mask, x)
        torch.testing.assert_close(forward(mask, x), first, rtol=1e-5, atol=1e-5)
    x = torch.randn(3, 3, 64, 64)
    with LayerMask(keep).apply(model):
        assert torch.equal(model(x=x), model(x))
    assert len(_TRACES[model]) >= 3


@pytest.mark.parametrize("fill", ["neighbours", "zeros", "partial"])
@pytest.mark.parametrize("net", ["resnet", "mobilenet"])
@torch.no_grad()
def test_the_first_call_has_the_bits_of_later_ones(net, fill, images):
    """Also after another mask, and in batches of another size; a model that was never run before is new each time."""

    def new():
        torch.manual_seed(0)
        return tiny(BasicBlock) if net == "resnet" else randomized(mobilenet_v2(width_mult=0.25, num_classes=5))

    keep = torch.zeros(1, 64, 64, dtype=torch.bool)
    keep[:, 3:37, 8:40] = True
    other = keep.roll(20, 2)
    known = masked_forward(new(), fill)
    for rows in (2, 1, 3):
        model = new()
        with LayerMask(keep, fill).apply(model) as applied:
            first = model(images[:rows])
            assert torch.equal(model(images[:rows]), first)
            assert applied.stats.planned == applied.stats.calls == 2
        forward = masked_forward(model, fill)
        forward(other, images)
        assert torch.equal(forward(keep, images[:rows]), first)
        known(other, images[: 4 - rows])  # traced long before
        assert torch.equal(known(keep, images[:rows]), first)


@torch.no_grad()
def test_finding_out_what_a_model_does_draws_no_random_numbers(images):
    class Noisy(Narrow):
        def forward(self, x):
            return super().forward(x) + torch.randn(1)

    keep = torch.zeros(1, 64, 64, dtype=torch.bool)
    keep[:, 3:37, 8:40] = True
    answers = []
    with LayerMask(keep).apply(randomized(Noisy())) as applied:
        for _ in range(2):
            torch.manual_seed(5)
            answers.append(applied.model(images))
    assert torch.equal(*answers)


@torch.no_grad()
def test_training_and_evaluation_have_a_trace_each(images, keep):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            x = self.a(x)
            return (F.relu(x) if self.training else F.avg_pool2d(x, 3, 1, 1)).mean((2, 3))

    model = Two()
    forward = masked_forward(model)
    for training in (True, False, True, False):
        model.train(training)
        forward(keep, images)
    assert sorted(key[-1] for key in _TRACES[model]) == [False, True]
