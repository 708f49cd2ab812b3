"""Handles, maps and ledgers print as a small table, in a terminal and in a notebook."""

import importlib
from dataclasses import fields, is_dataclass

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from skipguide import Prefix, Schedule, Skipper, SkipPlan, Timetable, capture, find_blocks
from skipguide.llm import AdaSkip, SelfSpeculative, SkipOrder, SublayerPlan, sublayer_map, watch
from skipguide.pipelines import (
    NormalizedAttentionGuidance,
    PrefixReuse,
    SpatiotemporalSkipGuidance,
    TangentialAmplifyingGuidance,
)
from skipguide.shown import Shown, ranges
from skipguide.vision import LayerMask, SkipDEQ, masked_forward, skipnet
from skipguide.vision.layer_masking.classifiers import load_classifier
from skipguide.vision.layer_masking.explain import explain
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
    blocks = find_blocks(model)
    yield blocks, ["FluxTransformer2DModel: ", " blocks", "single_transformer_blocks", "attn_identity"]
    yield blocks[1], ["Block 1: transformer_blocks.1 (FluxTransformerBlock), parts block attn mlp"]
    prefix = Prefix(1)
    yield prefix, ["Prefix of block 1, nothing captured yet"]
    with capture(model, prefix):
        family.run(model, family.inputs(1))
    yield prefix, ["Prefix of block 1\n", "hidden_states", "torch.float32"]
    with Skipper(model, SkipPlan([1], "attn")) as skipper:
        family.run(model, family.inputs(1))
        yield skipper, ["FluxTransformer2DModel (installed), 1 pass", "transformer_blocks.1.attn  1"]
        yield skipper.stats, ["1 pass", "% left out", "transformer_blocks.1.attn  1"]
    yield skipper, ["not entered"]
    lm = language_model()
    yield sublayer_map(lm), ["LlamaForCausalLM: 3 x LlamaDecoderLayer, serial", "0-2", "LlamaMLP"]
    yield sublayer_map(lm).site(1, "mlp"), ["mlp of layer 1, model.layers.1.mlp (LlamaMLP)"]
    with watch(lm, lambda *stream: None) as watching:
        yield watching, ["Watch on LlamaForCausalLM (watching), 3 layers"]
    yield watching, ["not entered"]
    yield (
        AdaSkip.calibrate(lm, [torch.arange(4)[None]]),
        ["3 layers over 1 request of 4 tokens", "1     ", "similarity"],
    )
    yield SkipOrder((1, 3), (2.0, 2.1), 2.0, 2), ["2 of 4 sublayers", "1         1      attn  7.389"]
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
        yield guided.stats, ["GuidanceStats: guidance has not run yet"]
    yield guided, ["removed"]
    yield SpatiotemporalSkipGuidance(layers=[1]).cost(pipe), ["passes and", "blocks a step", "x the plain pipeline"]
    with TangentialAmplifyingGuidance().apply(pipe) as tangential:
        yield tangential, ["on FlowMatchEulerDiscreteScheduler", "no step changed yet"]
    yield tangential, ["removed"]
    with NormalizedAttentionGuidance().apply(pipe, negative={"encoder_hidden_states": torch.zeros(1, 4, 16)}) as nag:
        yield nag, ["on LTXPipeline", "guidance has not run yet", "all", "2.5"]
        yield nag.stats, ["NagStats: guidance has not run yet"]
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
    yield mask.mask, ["LayerMask(1 x 8 x 8, 50% of the pixels kept"]
    yield masked_forward(network), ["MaskedForward of Sequential, fill 'neighbours'", "visible"]
    classifier = load_classifier("tiny-cnn")
    yield classifier, ["Classifier tiny-cnn (ResNet), 10 classes: disc, ring"]
    picture = classifier.prepare(Image.new("RGB", (64, 64)))
    yield explain(classifier, picture, method="occlusion", segments="grid:2"), ["4 segments", "segment  weight"]
    net = skipnet("resnet38", gate="rnn", num_classes=4).eval()
    routing = net(torch.randn(2, 3, 32, 32), return_routing=True)
    yield routing, ["Routing of 2 images: ", " of 18 blocks run on average", "image  blocks"]
    deq = SkipDEQ(lambda z, x: 0.5 * z + x, init=torch.nn.Linear(2, 2), tol=1e-3)
    yield deq(torch.ones(1, 2))[1], ["DEQInfo: converged after", "worst residual"]


def test_what_people_print_says_what_it_is():
    for each, words in shown():
        text, page = repr(each), each._repr_html_()
        assert len(text.splitlines()) <= 15 and max(map(len, text.splitlines())) < 200, text
        for word in words:
            assert word in text, (word, text)
        assert page.startswith("<div>") and page.endswith("</div>") and page.count("<tr>") < 16
        assert "<table></table>" not in page


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


def test_settings_print_what_was_set_and_make_their_equal():
    union = SkipPlan([2, 3], part="mlp", start=0.123456) | SkipPlan([5])
    assert repr(union) == "SkipPlan(layers=(2, 3), part='mlp', start=0.123456) | SkipPlan(layers=(5,))"
    assert repr(SpatiotemporalSkipGuidance()) == "SpatiotemporalSkipGuidance()"
    assert repr(AdaSkip(skip_ratio=0.1)) == "AdaSkip(skip_ratio=0.1)"
    assert repr(SublayerPlan(attn=[1])) == "SublayerPlan(attn=(1,))"
    for each in (union, SpatiotemporalSkipGuidance([1], apg=0.5), AdaSkip(count=2), SublayerPlan(attn=[1])):
        assert eval(repr(each)) == each


def test_the_description_of_a_model_is_short():
    said = repr(find_blocks(BY_NAME["flux"].build()).spec)
    assert said.startswith("ModelSpec(stacks=(BlockSpec(stack='transformer_blocks'") and "none_outputs=0" not in said


@pytest.mark.parametrize("package", ["skipguide", "skipguide.pipelines", "skipguide.llm", "skipguide.vision"])
def test_no_settings_print_every_default(package):
    """A frozen dataclass of many fields is made with `repr=False`, so that what was set is not lost among the rest."""
    module = importlib.import_module(package)
    for name in module.__all__:
        each = getattr(module, name)
        if isinstance(each, type) and is_dataclass(each) and len(fields(each)) > 5:
            own = not hasattr(each.__repr__, "__wrapped__")
            assert own or name in ("Pass", "Preset"), f"{name} has the repr that dataclass makes"
