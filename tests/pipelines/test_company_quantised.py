"""Quantised Linears next to skip guidance: torchao and bitsandbytes, where they are installed.

The reference is plain code around the same quantised model (see stg_reference), so only the skipping is compared, and
over one step: where activations are quantised too, the last bit of one step decides a whole level in the next.
"""

import pytest
import torch
from helpers.residue import no_gates
from helpers.stg_reference import SCALES, Reference

from skipguide import find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE

ONE = {"num_inference_steps": 1}
cases = pytest.mark.parametrize("case", [BY_PIPE["ltx"], BY_PIPE["wan"]], ids=repr)


def int8_weights(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def int8_activations(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())


def bitsandbytes_8bit(model):
    bnb = pytest.importorskip("bitsandbytes")
    exchange(model, lambda linear, bias: bnb.nn.Linear8bitLt(*linear, bias=bias, has_fp16_weights=False))


def bitsandbytes_4bit(model):
    bnb = pytest.importorskip("bitsandbytes")
    exchange(model, lambda linear, bias: bnb.nn.Linear4bit(*linear, bias=bias, compute_dtype=torch.float32))


def exchange(model, make):
    """As diffusers' quantizers do: other modules in the place of the blocks' Linears."""
    for block in find_blocks(model):
        for name, module in list(block.module.named_modules()):
            if type(module) is torch.nn.Linear:
                other = make((module.in_features, module.out_features), module.bias is not None)
                other.load_state_dict(module.state_dict())
                block.module.set_submodule(name, other.to("cpu").requires_grad_(False))


KINDS = [int8_weights, int8_activations, bitsandbytes_8bit, bitsandbytes_4bit]


@cases
@pytest.mark.parametrize("quantise", KINDS)
@pytest.mark.parametrize("when", ["before", "during"])
def test_quantised(case, quantise, when):
    reference, pipe = case.build(), case.build()
    plain = case.run(pipe, **ONE)
    quantise(reference.transformer)
    rounded = case.run(reference, **ONE)
    Reference(reference, case, w=SCALES[case.name])
    expected = case.run(reference, **ONE)
    if when == "before":
        quantise(pipe.transformer)
    with Stg([1]).apply(pipe) as applied:
        if when == "during":
            case.run(pipe, **ONE)
            quantise(pipe.transformer)
        out = case.run(pipe, **ONE)
    assert not torch.equal(rounded, plain)
    assert not torch.allclose(out, rounded, atol=1e-3)
    assert (out - expected).norm() < 0.03 * (out - rounded).norm()
    assert applied.stats.blocks_run < applied.stats.blocks_naive
    no_gates(pipe.transformer)
    torch.testing.assert_close(case.run(pipe, **ONE), rounded, atol=1e-5, rtol=1e-4)
    with Stg([1], part="attn_identity").apply(pipe):
        assert torch.isfinite(case.run(pipe, **ONE)).all()
