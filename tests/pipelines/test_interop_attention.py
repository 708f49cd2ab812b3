"""Attention backends of diffusers next to skips: every part is right under each that runs on a CPU."""

import contextlib
import logging
import threading

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from helpers.residue import traces
from helpers.stg_reference import close

from skipguide import SkipError, Skipper, SkipPlan
from skipguide.hosts.attention_backends import TorchAttention
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import BY_NAME
from zoo.pipes import BY_PIPE

PARTS = ("block", "attn", "mlp", "attn_identity")
BACKENDS = ("native", "_native_math", "flex")


@pytest.fixture(autouse=True)
def quiet():
    torch._dynamo.reset()  # flex attention compiles itself, even when nobody asked
    logging.disable(logging.WARNING)
    active = _AttentionBackendRegistry._active_backend  # set_attention_backend sets it for the whole process too
    yield
    _AttentionBackendRegistry.set_active_backend(active)
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


def backends(model):
    processors = [getattr(module, "processor", None) for module in model.modules()]
    found = [getattr(p, "_attention_backend", None) for p in processors if p is not None]
    return {None if each is None else str(getattr(each, "value", each)) for each in found}


@pytest.mark.parametrize("family", [BY_NAME[name] for name in ("wan", "flux", "hunyuan")], ids=repr)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_part_under_every_backend(family, backend):
    """Against a model with the part really taken out, on torch's own attention."""
    inputs, model = family.inputs(2), family.build()
    edits = {"block": family.identity_block(model, 1), "attn_identity": family.value_identity(model, 1, inputs)}
    edits |= {part: family.zeroed(model, 1, part) for part in ("attn", "mlp")}
    model.set_attention_backend(backend)
    before, used = traces(model), backends(model)
    for part in PARTS if backend != "flex" else ("block", "attn_identity"):
        with Skipper(model, SkipPlan([1], part)):
            close(family.run(model, inputs), family.run(edits[part], inputs))
    assert backends(model) == used
    assert traces(model) == before


def test_guidance_under_flex_attention():
    case = BY_PIPE["flux"]
    call = {"num_inference_steps": 2}
    with Stg([1], part="attn_identity").apply(pipe := case.build()):
        expected = case.run(pipe, **call)
    with attention_backend("flex"), Stg([1], part="attn_identity").apply(pipe):
        close(case.run(pipe, **call), expected)
    assert backends(pipe.transformer) == {None}


class Processor:
    """Somebody's own attention, which is none of torch's."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs):
        return hidden_states, encoder_hidden_states


def test_another_attention_is_noticed():
    family = BY_NAME["cogvideox"]
    model = family.build()
    model.transformer_blocks[1].attn1.processor = Processor()
    inputs = family.inputs(2)
    with pytest.raises(SkipError, match="no call of torch"), Skipper(model, SkipPlan([1], "attn_identity")):
        family.run(model, inputs)
    with Skipper(model, SkipPlan([1])):
        assert torch.isfinite(family.run(model, inputs)).all()


def test_a_picture_that_a_block_looks_at_too_is_refused_by_name():
    """An IP-Adapter adds attention from the image to its picture inside the block, which is no self-attention."""
    family = BY_NAME["flux"]
    model = family.build()
    attention = model.transformer_blocks[1].attn
    attention.set_processor(FluxIPAdapterAttnProcessor(attention.inner_dim, 6, (3,)))
    inputs = family.inputs(2) | {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(2, 3, 6)]}}
    says = r"self-attention.* queries and 3 keys of something else, such as an IP-Adapter's .*unload_ip_adapter"
    with pytest.raises(SkipError, match=says), Skipper(model, SkipPlan([1], "attn_identity")):
        family.run(model, inputs)
    with Skipper(model, SkipPlan([0], "attn_identity")):
        assert torch.isfinite(family.run(model, inputs)).all(), "another block has no such picture"
    for part in ("attn", "block"):
        with Skipper(model, SkipPlan([1], part)):
            assert torch.isfinite(family.run(model, inputs)).all()


@contextlib.contextmanager
def on_torch_attention(module, name):
    """On torch's attention, and back however it ends."""
    override = TorchAttention(module, name)
    try:
        override.hold()
        yield
    finally:
        override.release()


def test_backends_go_back_whoever_leaves_first():
    model = BY_NAME["flux"].build()
    block = model.transformer_blocks[1]
    model.set_attention_backend("flex")
    inside, leave = threading.Event(), threading.Event()

    def other():
        with on_torch_attention(block, "block"):
            inside.set()
            assert leave.wait(30)

    thread = threading.Thread(target=other)
    with on_torch_attention(block, "block"):
        thread.start()
        assert inside.wait(30)
        assert backends(block) == {"native"}
    assert backends(block) == {"native"}, "the other thread is still inside"
    leave.set()
    thread.join()
    assert backends(block) == {"flex"}
    with pytest.raises(KeyError), on_torch_attention(block, "block"):
        raise KeyError
    assert backends(block) == {"flex"}


def test_the_known_backends_are_those_of_diffusers():
    from skipguide.hosts.attention_backends import _TORCH_BACKENDS

    assert set(_TORCH_BACKENDS) <= {
        backend.value for backend in diffusers.models.attention_dispatch.AttentionBackendName
    }
