"""Handles, maps and ledgers print as a small table, in a terminal and in a notebook."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from skipguide import Schedule, Skipper, SkipPlan, Timetable, find_blocks
from skipguide.llm import AdaSkip, SelfSpeculative, SublayerPlan, sublayer_map
from skipguide.pipelines import PrefixReuse, SpatiotemporalSkipGuidance
from skipguide.shown import Shown, ranges
from skipguide.vision import LayerMask
from zoo import BY_NAME
from zoo.pipes import BY_PIPE


def language_model():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).eval()


@torch.no_grad()
def shown():
    """Each object while it is in force, after a pass, with what a person must be able to read in it."""
    family = BY_NAME["flux"]
    model = family.build()
    yield find_blocks(model), ["FluxTransformer2DModel: ", " blocks", "single_transformer_blocks", "attn_identity"]
    with Skipper(model, SkipPlan([1], "attn")) as skipper:
        family.run(model, family.inputs(1))
        yield skipper, ["FluxTransformer2DModel (installed), 1 pass", "transformer_blocks.1.attn  1"]
        yield skipper.stats, ["1 pass", "% left out", "transformer_blocks.1.attn  1"]
    yield skipper, ["not entered"]
    lm = language_model()
    yield sublayer_map(lm), ["LlamaForCausalLM: 3 x LlamaDecoderLayer, serial", "0-2", "LlamaMLP"]
    with SublayerPlan(attn=[1]).apply(lm) as applied:
        lm(torch.arange(4)[None])
        yield applied, ["LlamaForCausalLM", "1 pass", "model.layers.1.self_attn  1"]
        yield applied.stats, ["16.7% of the sublayers", "bytes of keys and values"]
    yield applied, ["removed"]
    with AdaSkip(count=1, online=False).apply(lm) as chosen:
        yield chosen, ["AdaSkip (measuring the first request)", "LlamaForCausalLM"]
        lm.generate(torch.arange(1, 5)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        yield chosen, ["AdaSkip (chosen)", "model.layers.", "left out"]
    yield chosen, ["removed"]
    with SelfSpeculative(lookup=False).apply(lm) as drafting:
        lm.generate(torch.arange(1, 5)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        yield drafting, ["Self-speculation (on LlamaForCausalLM)", "1 request", "the whole model, plainly"]
        yield drafting.stats, ["of the drafts accepted", "seconds"]
    yield drafting, ["removed"]
    yield Schedule(0.2, 0.5), ["Schedule(start=0.2, stop=0.5, every=1)"]
    yield Timetable([(0.0, 2.0), (0.5, 1.0)]), ["Timetable(points=((0.0, 2.0), (0.5, 1.0))"]
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with SpatiotemporalSkipGuidance(layers=[1]).apply(pipe) as guided:
        yield guided, ["LTXPipeline", "has not run yet", "transformer", "block"]
    yield guided, ["removed"]
    with PrefixReuse().apply(pipe) as reuse:
        yield reuse, ["Prefix reuse (on LTXPipeline)", "has not run yet"]
        yield reuse.stats, ["has not run yet"]
    yield reuse, ["removed"]
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten())
    keep = torch.zeros(1, 8, 8, dtype=torch.bool)
    keep[:, :4] = True
    with LayerMask(keep).apply(network) as mask:
        yield mask, ["Sequential", "50% of the pixels kept"]
    yield mask, ["removed"]


def test_what_people_print_says_what_it_is():
    for each, words in shown():
        text, page = repr(each), each._repr_html_()
        assert len(text.splitlines()) <= 15 and max(map(len, text.splitlines())) < 200, text
        for word in words:
            assert word in text, (word, text)
        assert page.startswith("<div>") and page.endswith("</table></div>") and page.count("<tr>") < 16


def test_a_long_table_is_cut_and_says_so():
    class Many(Shown):
        def _rows(self):
            return [("layer", "what"), *((f"layer.{i}", "<b>") for i in range(100))]

    assert repr(Many()).splitlines()[-1].strip() == "... 88 more"
    assert "&lt;b&gt;" in Many()._repr_html_() and "<b>" not in Many()._repr_html_()
    assert repr(Shown()) == "Shown"


@pytest.mark.parametrize(("numbers", "said"), [([], ""), ([4], "4"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_whole_numbers_as_people_write_them(numbers, said):
    assert ranges(numbers) == said
