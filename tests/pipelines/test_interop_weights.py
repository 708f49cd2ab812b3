"""LoRA and quantised Linears next to skip guidance: the result is that of plain code on the same weights."""

import pytest
import torch
from helpers.residue import no_gates
from helpers.stg_reference import SCALES, Reference

from skipguide import LostGateError, find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE

# LoRA next to skip guidance: the result is that of a plain model with the same edit in its weights.

RANK = 2
CASES = [BY_PIPE[name] for name in ("ltx", "wan", "flux")]
cases = pytest.mark.parametrize("case", CASES, ids=repr)
parts = pytest.mark.parametrize("part", ["block", "attn_identity", "mlp"])
ENDS = (".to_q", ".to_v", ".to_out.0", ".net.2", ".proj_out")


def targets(model):
    """The Linear layers that get an edit: in every block, in attention and feed-forward."""
    inside = {f"{block.name}.{name}": m for block in find_blocks(model) for name, m in block.module.named_modules()}
    return {name: m for name, m in inside.items() if isinstance(m, torch.nn.Linear) and name.endswith(ENDS)}


def lora(pipe, seed=0):
    """A file's content, as a download would have it."""
    pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, linear in targets(pipe.transformer).items():
        shapes = {"lora_A": (RANK, linear.in_features), "lora_B": (linear.out_features, RANK)}
        for half, shape in shapes.items():
            state[f"transformer.{name}.{half}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    return state


def merged(case, *weighted):
    """A pipeline whose weights hold the edits, made by hand."""
    pipe = case.build()
    with torch.no_grad():
        for weight, state in weighted:
            for name, linear in targets(pipe.transformer).items():
                a, b = (state[f"transformer.{name}.{half}.weight"] for half in ("lora_A", "lora_B"))
                linear.weight += weight * b @ a
    return pipe


def guided(case, pipe, part="block"):
    with Stg([1], part=part).apply(pipe):
        return case.run(pipe)


def close(out, expected):
    torch.testing.assert_close(out, expected, atol=5e-5 * max(expected.abs().max().item(), 1.0), rtol=0)


@cases
@parts
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_loaded_before_during_and_after(case, part, when):
    pipe = case.build()
    state, base = lora(pipe), guided(case, pipe, part)
    expected = guided(case, merged(case, (1.0, state)), part)
    assert not torch.allclose(expected, base, atol=1e-3)
    if when == "before":
        pipe.load_lora_weights(dict(state))
    with Stg([1], part=part).apply(pipe) as applied:
        if when != "before":
            assert torch.equal(case.run(pipe), base)
        if when == "during":
            pipe.load_lora_weights(dict(state))
        if when != "after":
            close(case.run(pipe), expected)
    if when == "after":
        pipe.load_lora_weights(dict(state))
        close(guided(case, pipe, part), expected)
    no_gates(pipe.transformer)
    assert applied.stats.blocks_run > applied.stats.blocks_plain
    pipe.unload_lora_weights()
    close(guided(case, pipe, part), base)


@cases
def test_fused_weighted_and_unloaded_inside(case):
    """Everything that pipelines offer, in one `with` block; every state equals the plain model with that edit."""
    pipe = case.build()
    one, two = lora(pipe, 1), lora(pipe, 2)

    def expect(*weighted):
        close(case.run(pipe), guided(case, merged(case, *weighted)))

    with Stg([1]).apply(pipe):
        base = case.run(pipe)
        pipe.load_lora_weights(dict(one), adapter_name="one")
        expect((1.0, one))
        pipe.load_lora_weights(dict(two), adapter_name="two")
        pipe.set_adapters(["one", "two"], [0.5, 1.5])
        expect((0.5, one), (1.5, two))
        pipe.fuse_lora(adapter_names=["one"])
        pipe.set_adapters(["two"], [1.0])
        pipe.unfuse_lora()
        expect((1.0, two))
        pipe.disable_lora()
        close(case.run(pipe), base)
        pipe.enable_lora()
        pipe.delete_adapters("one")
        expect((1.0, two))
        pipe.fuse_lora()
        expect((1.0, two))
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        close(case.run(pipe), base)
    no_gates(pipe.transformer)
    assert not [name for name, _ in pipe.transformer.named_modules() if "lora" in name]


def test_fused_before_the_guidance_and_unfused_after_it():
    case = BY_PIPE["wan"]
    pipe = case.build()
    state, base = lora(pipe), guided(case, pipe)
    pipe.load_lora_weights(dict(state))
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    close(guided(case, pipe), guided(case, merged(case, (0.7, state))))
    pipe = case.build()
    pipe.load_lora_weights(dict(state))
    with Stg([1]).apply(pipe):
        pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    close(guided(case, pipe), base)


def test_an_adapter_that_takes_the_place_of_a_gated_linear_is_noticed():
    """The feed-forward of HunyuanVideo's single blocks is one Linear, at which part='mlp' has its gate."""
    from peft import LoraConfig

    case = BY_PIPE["hunyuan"]
    pipe = case.build()
    config = LoraConfig(r=RANK, target_modules=["proj_mlp"], init_lora_weights=False)
    words = r"proj_mlp is now another module .*apply plans after adapters are added"
    with pytest.raises(LostGateError, match=words), Stg([4], part="mlp").apply(pipe):
        case.run(pipe)
        pipe.transformer.add_adapter(config)
        case.run(pipe)
    no_gates(pipe.transformer)
    with Stg([4], part="mlp").apply(pipe):  # applied after the adapter was added
        assert torch.isfinite(case.run(pipe)).all()


# Quantised Linears next to skip guidance: torchao and bitsandbytes, where they are installed.
#
# The reference is plain code around the same quantised model (see stg_reference), so only the skipping is compared, and
# over one step: where activations are quantised too, the last bit of one step decides a whole level in the next.

ONE = {"num_inference_steps": 1}
kinds = pytest.mark.parametrize("case", [BY_PIPE["ltx"], BY_PIPE["wan"]], ids=repr)


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


@kinds
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
