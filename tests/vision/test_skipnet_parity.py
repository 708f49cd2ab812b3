"""SkipNet: parity with the published code, and rows that are really skipped."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from skipguide import find_blocks
from skipguide.vision import SkipNet
from skipguide.vision.skipnet.objectives import Reinforce, cumulative_rewards, reinforce_loss

pytestmark = pytest.mark.numerics

GOLDEN = Path(__file__).parents[1] / "golden" / "skipnet"


def golden():
    return load_file(GOLDEN / "sn_ff1_cases.safetensors"), load_file(GOLDEN / "sn_ff1_weights.safetensors")


def test_eval_equals_the_reference_and_half_of_the_blocks_run():
    case, weights = golden()
    net = SkipNet.from_reference_checkpoint(weights)
    with torch.no_grad():
        routing = net(case["x"], return_routing=True)
        logits, gates = net(case["x"], return_gates=True)
    assert torch.allclose(routing.logits, case["eval.logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(routing.gates, case["eval.hard"]) and torch.equal(gates, case["eval.hard"])
    assert torch.equal(logits, routing.logits)
    assert torch.allclose(routing.probabilities, case["eval.soft"], atol=1e-5)
    # of 8 images x 5 gated blocks
    assert case["eval.hard"].numel() == 40 and sum(routing.stats.rows.values()) == 20


def test_the_blocks_that_the_ledger_counts_are_the_ones_that_ran():
    case, weights = golden()
    net = SkipNet.from_reference_checkpoint(weights)
    rows = {}
    for block in find_blocks(net.backbone):
        block.module.conv2.register_forward_hook(
            lambda module, args, out, name=block.name: rows.update({name: rows.get(name, 0) + len(out)})
        )
    with torch.no_grad():
        routing = net(case["x"], return_routing=True)
    assert rows.pop("groups.0.0") == 8
    assert rows == routing.stats.rows and sum(rows.values()) == 20
    assert routing.blocks.tolist() == (1 + case["eval.hard"].sum(1)).tolist()
    assert routing.computation_percentage == pytest.approx(100 * (20 / 8 + 1) / 6)


def test_soft_gates_equal_the_reference():
    case, weights = golden()
    net = SkipNet.from_reference_checkpoint(weights)
    with torch.no_grad():
        routing = net(case["x"], return_routing=True, mode="soft")
    assert torch.allclose(routing.logits, case["soft_train.logits"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(routing.gates, case["soft_train.masks"], atol=1e-5)


def gradients(net):
    backbone, gates = net.backbone, net.gates.gates
    return {
        "conv1.weight": backbone.conv1.weight.grad,
        "fc.weight": backbone.fc.weight.grad,
        "group1_gate0.linear_layer.weight": gates[0].head.weight.grad,
        "group2_gate0.linear_layer.weight": gates[2].head.weight.grad,
        "group3_gate0.linear_layer.bias": gates[4].head.bias.grad,
    }


def check_gradients(net, case, prefix):
    found = gradients(net)
    names = [name for name in found if f"{prefix}.grad.{name}" in case]
    assert len(names) >= 4
    for name in names:
        wanted = case[f"{prefix}.grad.{name}"]
        assert torch.allclose(
            found[name].view_as(wanted), wanted, rtol=1e-4, atol=1e-5 * max(1, float(wanted.abs().max()))
        ), name


def test_straight_through_gradients_equal_the_reference():
    case, weights = golden()
    net = SkipNet.from_reference_checkpoint(weights)
    routing = net(case["x"], return_routing=True, mode="straight_through")
    loss = functional.cross_entropy(routing.logits, case["y"])
    loss.backward()
    assert loss.item() == pytest.approx(case["sp.loss"].item(), rel=1e-5)
    assert set(routing.gates.detach().unique().tolist()) <= {0.0, 1.0}, "exactly 0 or 1 in the forward pass"
    check_gradients(net, case, "sp")


def test_reinforcement_terms_equal_the_reference():
    case, weights = golden()
    net = SkipNet.from_reference_checkpoint(weights)
    actions = case["hrl.actions"]
    routing = net(case["x"], return_routing=True, decisions=actions.bool())
    each = functional.cross_entropy(routing.logits, case["y"], reduction="none")
    assert torch.allclose(routing.logits, case["hrl.logits"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(routing.probabilities, case["hrl.p_execute"], atol=1e-5)
    assert torch.allclose(each[:, None], case["hrl.pred_loss"], atol=1e-5)
    terms = Reinforce.cifar(alpha=0.1, weight=0.01)
    assert torch.allclose(cumulative_rewards(actions, each, terms), case["hrl.cum_rewards"], atol=1e-5)
    policy = reinforce_loss(routing.gate_logits, actions, each, terms)
    assert policy.item() == pytest.approx(case["hrl.surrogate_cifar_sum"].item(), rel=1e-5)
    imagenet = Reinforce.imagenet(5, alpha=0.1, weight=0.01, detach=True)
    assert torch.allclose(cumulative_rewards(actions, each, imagenet), case["hrl.imagenet.cum_rewards"], atol=1e-6)
    assert reinforce_loss(routing.gate_logits, actions, each, imagenet).item() == pytest.approx(
        case["hrl.imagenet.rl_loss_detached"].item(), rel=1e-4
    )
    (each.mean() + policy).backward()
    check_gradients(net, case, "hrl")
