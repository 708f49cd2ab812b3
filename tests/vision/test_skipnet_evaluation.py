"""Evaluation of SkipNet counts what ran; its controls have the compute that they are given."""

import pytest
import torch
from helpers.wired_skipnet import tiny
from torch import nn

from demos.skipnet.wires import make_wires
from skipguide import SkipError
from skipguide.vision.skipnet.evaluate import best_subset, evaluate, fixed_gates, random_gates


def test_evaluation_counts_what_ran():
    net, found = tiny(), make_wires(30, 10, 4, 3)
    with torch.no_grad():
        net.gates.sharpen(30.0)
    hard = evaluate(net, found.images, found.labels, batch_size=7)
    whole = net(found.images, return_routing=True)
    assert torch.equal(hard.gates, whole.gates > 0.5) and hard.block_rows == int(whole.gates.sum())
    assert torch.equal(hard.correct, whole.logits.argmax(1) == found.labels)
    assert hard.macs_fraction == pytest.approx(whole.macs_fraction)
    rows = hard.per_class(found.labels)
    assert sum(row["images"] for row in rows) == 30
    assert sum(row["images"] * row["accuracy"] for row in rows) == pytest.approx(30 * hard.accuracy)
    assert sum(row["images"] * row["blocks"] for row in rows) == pytest.approx(30 * hard.mean_blocks)


@torch.no_grad()
def loss(net, found, kept):
    logits = net(found.images, return_routing=True, decisions=kept).logits
    return float(nn.functional.cross_entropy(logits, found.labels))


def test_controls_have_the_compute_they_are_given():
    net, found = tiny(), make_wires(60, 10, 4, 3)
    rates = torch.tensor([1.0, 0.5, 0.0])
    drawn = evaluate(net, found.images, found.labels, decide=random_gates(rates, 1)).gates.double().mean(0)
    assert drawn[0] == 1 and drawn[2] == 0 and abs(float(drawn[1]) - 0.5) < 0.2
    subset = best_subset(net, found.images, found.labels, 1, rates)
    assert int(subset.sum()) == 1
    fixed = evaluate(net, found.images, found.labels, decide=fixed_gates(subset))
    assert bool((fixed.gates == subset).all()) and fixed.mean_blocks == 2
    assert loss(net, found, subset) <= loss(net, found, torch.tensor([True, False, False])), "the block open most often"
    pairs = ~torch.eye(3, dtype=torch.bool)
    best = min(pairs, key=lambda pair: loss(net, found, pair))
    assert torch.equal(best_subset(net, found.images, found.labels, 2), best)


def test_bad_input_of_evaluation():
    net, found = tiny(), make_wires(8, 10, 4, 3)
    for wrong in (-1, 4):
        with pytest.raises(SkipError, match=f"between .*{wrong}"):
            best_subset(net, found.images, found.labels, wrong)
    with pytest.raises(SkipError, match="labels"):
        evaluate(net, found.images, found.labels[:3])
    with pytest.raises(SkipError, match="batch_size"):
        evaluate(net, found.images, found.labels, batch_size=0)
    for measure in (evaluate, lambda *given: best_subset(*given, 1)):
        with pytest.raises(SkipError, match=r"net\.eval"):
            measure(tiny().train(), found.images, found.labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_controls_on_cuda():
    net, found = tiny().cuda(), make_wires(16, 10, 4, 3)
    images, labels = found.images.cuda(), found.labels.cuda()
    seen = evaluate(net, images, labels)
    rates = seen.gates.float().mean(0)
    drawn = evaluate(net, images, labels, decide=random_gates(rates))
    subset = best_subset(net, images, labels, 1, rates)
    fixed = evaluate(net, images, labels, decide=fixed_gates(subset))
    assert drawn.gates.shape == (16, 3) and bool((fixed.gates.cpu() == subset).all())
