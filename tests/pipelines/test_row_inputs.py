"""Inputs whose first dimension is not the batch: their rows are not known, so none are taken."""

import pytest
import torch
from helpers.stg_reference import close
from torch import nn

from skipguide import SkipError, find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.skipper import Skipper, SkipPlan
from zoo.pipes import BY_PIPE

FURTHER = 2  # texts for each row


class FoldedText:
    """An attention processor that is given several texts for each row, one after the other, and averages over them."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, attn, hidden_states, encoder_hidden_states, *rest):
        texts = len(encoder_hidden_states) // FURTHER
        if texts == len(hidden_states):
            parts = encoder_hidden_states.chunk(FURTHER)
        else:  # what a processor does that trusts its first dimension
            parts = [encoder_hidden_states.mean(0, keepdim=True).expand(len(hidden_states), -1, -1)]
        outs = [self.inner(attn, hidden_states, part, *rest) for part in parts]
        return sum(outs) / len(outs)


def several_texts(case):
    """Wan with cross-attention to two texts per row, the second being the first one backwards."""
    pipe = case.build()
    for block in pipe.transformer.blocks:
        block.attn2.processor = FoldedText(block.attn2.processor)

    def more(module, args, kwargs):
        text = kwargs["encoder_hidden_states"]
        return args, {**kwargs, "encoder_hidden_states": torch.cat([text, text.flip(1)])}

    pipe.transformer.register_forward_pre_hook(more, with_kwargs=True)
    return pipe


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("prompts", [1, 2])
def test_the_batched_tail_is_refused_and_the_others_are_right(cfg, prompts):
    case = BY_PIPE["wan"]
    pipe = several_texts(case)
    with Stg([1]).apply(pipe):
        expected = case.run(pipe, prompts, cfg=cfg)
    with Stg([1], prefix_reuse=False).apply(pipe):
        close(case.run(pipe, prompts, cfg=cfg), expected)
    with Stg([1], tail="auto").apply(pipe) as applied:
        assert torch.equal(case.run(pipe, prompts, cfg=cfg), expected)
    assert not applied.stats.batched
    with Stg([1], tail="batched").apply(pipe), pytest.raises(SkipError, match=r"tail='batched'.*encoder_hidden_states"):
        case.run(pipe, prompts, cfg=cfg)


def test_the_separate_tail_by_hand():
    case = BY_PIPE["wan"]
    pipe = several_texts(case)
    with Stg([1]).apply(pipe):
        out = case.run(pipe, cfg=False, num_inference_steps=1)
    pipe = several_texts(case)
    model, calls = pipe.transformer, []
    forward = model.forward

    def by_hand(*args, **kwargs):
        calls.append(1)
        c = forward(*args, **kwargs)
        with Skipper(model, SkipPlan([1])):
            k = forward(*args, **kwargs)
        return (2 * c[0] - k[0], *c[1:])

    model.forward = by_hand
    try:
        expected = case.run(pipe, cfg=False, num_inference_steps=1)
    finally:
        del model.forward
    assert calls and find_blocks(model)
    close(out, expected)


def test_nested_inputs_are_looked_at_too():
    """LTX with CFG in one batch, and something per token in its keyword arguments."""
    case = BY_PIPE["ltx"]
    pipe = case.build()
    things = {"extra": [torch.zeros(5, 4)]}

    def more(module, args, kwargs):
        return args, {**kwargs, "attention_kwargs": things}

    pipe.transformer.register_forward_pre_hook(more, with_kwargs=True)
    with Stg([1]).apply(pipe), pytest.raises(SkipError, match=r"attention_kwargs \(\(5, 4\)\)"):
        case.run(pipe)
    things["extra"] = [torch.zeros(1, 4), torch.tensor(3.0), None, nn.Identity()]
    with Stg([1]).apply(pipe):
        case.run(pipe)
