"""A package that is installed beside skipguide adds a model and a pipeline of its own, through its entry points."""

import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from skipguide import BlockSpec, SkipError, Skipper, SkipPlan, UnknownBlockError, blocks, check, find_blocks
from skipguide.blocks import register_blocks
from skipguide.pipelines import PipelineSpec, SpatiotemporalSkipGuidance, register_pipeline
from skipguide.pipelines.registry import described as registry
from skipguide.spec import Sublayer

THEIRS = Path(__file__).parents[1] / "helpers" / "third_party"


@pytest.fixture
def theirs(monkeypatch):
    """The package as if it were installed; skipguide forgets it afterwards."""
    monkeypatch.setattr(blocks, "_REGISTERED", {})
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.syspath_prepend(THEIRS)
    yield importlib.import_module("theirs")
    sys.modules.pop("theirs", None)


def parts(theirs):
    torch.manual_seed(0)
    pipe = theirs.TheirPipeline(theirs.TheirDenoiser().eval().requires_grad_(False))
    return pipe, torch.randn(2, 4, 8), torch.randn(2, 4, 8)


def test_the_metadata_is_found(theirs):
    for group in ("skipguide.blocks", "skipguide.pipelines"):
        assert "theirs" in {entry.name for entry in entry_points(group=group)}


def test_their_model_is_known_and_proven(theirs):
    pipe, text, latents = parts(theirs)
    inputs = {"hidden_states": latents, "text": text, "timestep": torch.full((2,), 500.0)}
    assert find_blocks(pipe.transformer)[1].parts[:3] == ("block", "attn", "mlp")
    assert check(pipe.transformer, inputs).blocks == 3
    with Skipper(pipe.transformer, SkipPlan([0], part="mlp")) as skipper:
        out = pipe.transformer(**inputs)[0]
    first, *rest = pipe.transformer.layers
    expected = latents + first.look(latents + text)
    for layer in rest:
        expected = layer(text, expected)
    assert torch.equal(out, expected * 1.5)
    assert skipper.stats.skips == {"layers.0.think": 1}


def test_their_pipeline_is_guided(theirs):
    pipe, text, latents = parts(theirs)
    plain = pipe(text, latents)
    with SpatiotemporalSkipGuidance([1], scale=0.5).apply(pipe) as applied:
        out = pipe(text, latents)
    model, x = pipe.transformer, latents
    for t in (1000.0, 500.0):
        time = torch.full((2,), t)
        cond, uncond = model(x, text, time)[0], model(x, torch.zeros_like(text), time)[0]
        first, _, last = model.layers
        weak = last(text, first(text, x)) * (1 + t / 1000)
        x = x - (uncond + 3.0 * (cond - uncond) + 0.5 * (cond - weak)) / 2
    torch.testing.assert_close(out, x, atol=1e-5, rtol=1e-5)
    assert applied.stats.delivery == "shift" and torch.equal(pipe(text, latents), plain)


def test_without_the_package_both_are_unknown(theirs, monkeypatch):
    pipe, _, _ = parts(theirs)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(THEIRS)])
    with pytest.raises(UnknownBlockError, match="TheirDenoiser"):
        find_blocks(pipe.transformer)
    with pytest.raises(SkipError, match="register_pipeline"):
        SpatiotemporalSkipGuidance([1]).apply(pipe)


def test_only_descriptions_are_registered(theirs):
    with pytest.raises(SkipError, match="expects a PipelineSpec; got str"):
        register_pipeline(theirs.TheirPipeline, "batched")
    register_pipeline("TheirPipeline", PipelineSpec("named", scales=((),)))
    assert registry.pipeline_spec(parts(theirs)[0]).cfg == "named"
    with pytest.raises(SkipError, match="expects a class or its name; got a TheirPipeline"):
        register_pipeline(parts(theirs)[0], PipelineSpec("named", scales=((),)))
    for spec in (None, 5, "layers", ["layers"], []):
        with pytest.raises(SkipError, match="expects a BlockSpec"):
            register_blocks(theirs.TheirDenoiser, spec)
    with pytest.raises(SkipError, match="expects a class or its name; got a TheirDenoiser"):
        register_blocks(theirs.TheirDenoiser(), BlockSpec("layers"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"cfg": "both"}, "unknown cfg 'both'; expected one of batched, two_calls"),
        ({"layout": "bhwc"}, "unknown layout"),
        ({"denoisers": "transformer"}, "a tuple of attribute names"),
        ({"denoisers": ("transformer", "transformer_2")}, "scales has a tuple for each"),
    ],
)
def test_a_pipeline_is_called_in_a_way_that_exists(wrong, words):
    with pytest.raises(SkipError, match=words):
        PipelineSpec(**{"cfg": "batched"} | wrong)


def test_a_description_that_names_other_arguments_is_refused_at_once(theirs):
    model = theirs.TheirDenoiser()
    think = (Sublayer("think", outputs=("nothing",)),)
    block, sublayer = BlockSpec("layers", ("nothing",)), BlockSpec("layers", ("tokens",), mlp=think)
    for spec, part in ((block, "block"), (sublayer, "mlp")):
        register_blocks(theirs.TheirDenoiser, spec)
        with pytest.raises(SkipError, match="described with the arguments nothing, but its forward takes"):
            Skipper(model, SkipPlan([1], part))


def test_checks_are_of_a_model_and_a_call(theirs):
    with pytest.raises(SkipError, match=r"expected a torch\.nn\.Module"):
        check(parts(theirs)[0])
    with pytest.raises(SkipError, match="expected inputs as a mapping"):
        check(parts(theirs)[0].transformer, torch.randn(2, 4, 8))
