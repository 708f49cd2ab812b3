"""Normalized attention guidance against attention written out by hand, on models with an attention to the text."""

import copy
import inspect

import pytest
import torch
from helpers.residue import no_gates, traces
from helpers.stg_reference import close
from torch import nn

from skipguide import SkipError, applied_to
from skipguide.guidance import normalized_attention
from skipguide.pipelines import NormalizedAttentionGuidance as Nag
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.family import TEXT, prefix_mask, rows
from zoo.pipes import BY_PIPE, STEPS
from zoo.pipes_image import IMAGE_PIPES
from zoo.pipes_video import BY_VIDEO

pytestmark = pytest.mark.numerics
IMAGES = {case.name: case for case in IMAGE_PIPES}
SETTINGS = Nag(scale=4.0, tau=1.3, alpha=0.6)
CASES = {
    "ltx": (BY_PIPE["ltx"], "transformer_blocks", True),
    "wan": (BY_PIPE["wan"], "blocks", False),
    "pixart": (IMAGES["pixart_sigma"], "transformer_blocks", True),
    "sana": (IMAGES["sana"], "transformer_blocks", True),
    "latte": (BY_PIPE["latte"], "transformer_blocks", False),
}
cases = pytest.mark.parametrize("name", CASES)


def negative(masked, clips=1):
    text = {"encoder_hidden_states": rows(clips, 77, TEXT, 24)}
    return text | ({"encoder_attention_mask": prefix_mask(3, TEXT)[2:].expand(clips, -1)} if masked else {})


def test_the_formula():
    positive, other = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    found = normalized_attention(positive, other, 4.0, 1.3, 0.6)
    for b in range(2):
        for n in range(3):
            z, bad = positive[b, n], other[b, n]
            guided = 4.0 * z - 3.0 * bad
            ratio = guided.abs().sum() / z.abs().sum()
            limited = guided * min(ratio, 1.3) / ratio
            torch.testing.assert_close(found[b, n], 0.6 * limited + 0.4 * z)
    torch.testing.assert_close(normalized_attention(positive, other, 1.0, 1.3, 0.6), positive)


class ByHand(nn.Module):
    """An attention that is called for both texts up to its projection, which is then applied by hand."""

    def __init__(self, attention, texts, guided):
        super().__init__()
        self.attention, self.bare = attention, copy.deepcopy(attention)
        self.bare.to_out[0] = nn.Identity()
        self.texts, self.guided = texts, guided
        self.norm_cross = getattr(attention, "norm_cross", None)

    def forward(self, *args, **kwargs):
        z = self.bare(*args, **kwargs)
        rows = self.guided(len(z))
        hidden, other = (args[0] if args else kwargs["hidden_states"]), self.texts
        given = {k: v for k, v in kwargs.items() if k not in ("hidden_states", *other)}
        bad = self.bare(hidden[rows], **given, **other)
        z = z.clone()
        z[rows] = normalized_attention(z[rows], bad, SETTINGS.scale, SETTINGS.tau, SETTINGS.alpha)
        return self.attention.to_out[0](z)


def reference(name, cfg, clips=2):
    """Every attention to the text is by hand; what the negative prompt is for the blocks is seen in a whole pass."""
    case, stack, masked = CASES[name]
    pipe = case.build()
    model, seen = pipe.transformer, {}
    other = copy.deepcopy(model)

    def note(module, args, kwargs):
        found = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        seen.setdefault("text", found["encoder_hidden_states"])
        seen.setdefault("mask", found.get("encoder_attention_mask"))

    getattr(other, stack)[0].register_forward_pre_hook(note, with_kwargs=True)
    batched = cfg and case.cfg_modes[0] == "batched"
    texts, plain, calls = {}, model.forward, []

    def guided(size):
        return slice(size // 2, size) if batched else slice(0, size)

    def forward(*args, **kwargs):
        calls.append(0)
        if cfg and not batched and len(calls) % 2 == 0:  # the unconditional call
            return stock.forward(*args, **kwargs)
        seen.clear()
        values = negative(masked)
        rows = 2 * clips if batched else clips
        given = {key: value.expand(rows, *value.shape[1:]) for key, value in values.items()}
        other(*args, **(kwargs | given))
        fold = len(seen["text"]) // rows
        texts["encoder_hidden_states"] = seen["text"][guided(rows * fold)]
        if seen["mask"] is not None:
            texts["attention_mask"] = seen["mask"][guided(rows * fold)]
        return plain(*args, **kwargs)

    stock = copy.deepcopy(model)
    for block in getattr(model, stack):
        block.attn2 = ByHand(block.attn2, texts, guided)
    model.forward = forward
    return case.run(pipe, clips, cfg)


@pytest.mark.parametrize("cfg", [False, True], ids=["alone", "with CFG"])
@cases
def test_a_pipeline_is_guided_as_by_hand(name, cfg):
    case, _, masked = CASES[name]
    pipe = case.build()
    plain, before = case.run(pipe, 2, cfg), traces(pipe.transformer)
    with SETTINGS.apply(pipe, negative=negative(masked)) as applied:
        assert applied_to(pipe) == [applied]
        out = case.run(pipe, 2, cfg)
    assert not torch.allclose(out, plain, atol=1e-3)
    assert traces(pipe.transformer) == before
    no_gates(pipe.transformer)
    assert torch.equal(case.run(pipe, 2, cfg), plain)
    close(out, reference(name, cfg))
    assert applied.stats.passes == STEPS


def test_a_scale_of_one_is_the_plain_pipeline_to_rounding():
    case = BY_PIPE["wan"]
    pipe = case.build()
    plain = case.run(pipe, cfg=False)
    with Nag(scale=1.0).apply(pipe, negative=negative(False)):
        close(case.run(pipe, cfg=False), plain)


def test_the_prompt_itself_as_negative_prompt_changes_nothing():
    case = BY_PIPE["ltx"]
    pipe, call = case.build(), case.call_kwargs(1, False)
    own = {
        "encoder_hidden_states": call["prompt_embeds"],
        "encoder_attention_mask": call["prompt_attention_mask"],
    }
    with SETTINGS.apply(pipe, negative=own) as applied:
        out = case.run(pipe, cfg=False)
    assert applied.stats.attentions
    close(out, case.run(pipe, cfg=False))


def test_layers_and_window_say_where_and_when():
    case = BY_PIPE["wan"]
    pipe = case.build()
    with Nag(layers=[1, 2], start=0.3).apply(pipe, negative=negative(False)) as applied:
        case.run(pipe, cfg=False)
    assert (applied.stats.passes, applied.stats.attentions) == (STEPS - 1, 2 * (STEPS - 1))


def test_a_prompt_is_encoded_by_the_pipeline():
    case = BY_PIPE["wan"]
    pipe = case.build()
    plain = pipe.encode_prompt

    def encode(prompt, do_classifier_free_guidance=True, device=None, **how):
        if prompt == "blurry":
            return rows(1, 77, TEXT, 24), None
        return plain(prompt, do_classifier_free_guidance=do_classifier_free_guidance, device=device, **how)

    pipe.encode_prompt = encode
    with SETTINGS.apply(pipe, "blurry"):
        out = case.run(pipe, cfg=False)
    with SETTINGS.apply(pipe, negative=negative(False)):
        assert torch.equal(case.run(pipe, cfg=False), out)


def test_what_is_refused():
    wan = BY_PIPE["wan"].build()
    for wrong in ({"scale": 0.5}, {"tau": 0}, {"alpha": 1.5}, {"layers": [1, 1]}, {"start": 0.9, "stop": 0.1}):
        with pytest.raises(SkipError):
            Nag(**wrong)
    with pytest.raises(SkipError, match="in one way"):
        Nag().apply(wan)
    with pytest.raises(SkipError, match="out of range"):
        Nag(layers=[99]).apply(wan, negative=negative(False))
    with pytest.raises(SkipError, match="forward takes"):
        Nag().apply(wan, negative={"text": torch.zeros(1)})
    with pytest.raises(SkipError, match="joint attention"):
        Nag().apply(BY_PIPE["flux"].build(), negative=negative(False))
    with pytest.raises(SkipError, match="predicts 2 things"):
        Nag().apply(BY_VIDEO["ltx2_own"].build(), negative=negative(False))
    with Nag().apply(wan, negative=negative(False, clips=3)), pytest.raises(SkipError, match="one for each of 2 clips"):
        BY_PIPE["wan"].run(wan, 2, cfg=False)
    with Stg([1]).apply(wan), pytest.raises(SkipError, match="already applied"):
        Nag().apply(wan, negative=negative(False))
    with Nag().apply(wan, negative=negative(False)), pytest.raises(SkipError, match="already applied"):
        Stg([1]).apply(wan)
    no_gates(wan.transformer)
