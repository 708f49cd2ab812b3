"""Calls of a guider: through a modular pipeline, and one step by hand."""

import pytest
import torch
from helpers.residue import no_gates, traces

from zoo import modular
from zoo.pipes import BY_PIPE

LAYER = 1


@pytest.fixture(scope="module")
def wan():
    """A modular and a classic Wan pipeline with the same weights; the guider is exchanged by each test."""
    classic = BY_PIPE["wan"].build()
    return modular.build("wan"), classic


def by_guider(pipe, guider, prompts=2, **call):
    pipe.update_components(guider=guider)
    before = traces(pipe.transformer)
    out = modular.run(pipe, prompts, **call)
    assert traces(pipe.transformer) == before
    no_gates(pipe.transformer)
    return out


def predictions(family, model, layer, inputs):
    """c, u, k, and k of the unconditional inputs, in float64."""
    less = {**inputs, "encoder_hidden_states": 0.5 * inputs["encoder_hidden_states"]}
    if "pooled_projections" in inputs:
        less["pooled_projections"] = 0.5 * inputs["pooled_projections"]
    weak = family.identity_block(model, layer)
    runs = ((model, inputs), (model, less), (weak, inputs), (weak, less))
    return [family.run(each, given).double() for each, given in runs]


def step(guider, model, inputs, number=0, steps=4):
    """What a denoising loop does in one step; the text is what CFG changes."""
    guider.set_state(number, steps, torch.tensor(700.0))
    varied = [name for name in ("encoder_hidden_states", "pooled_projections") if name in inputs]
    batches = guider.prepare_inputs({name: (inputs[name], 0.5 * inputs[name]) for name in varied})
    kinds = []
    for batch in batches:
        guider.prepare_models(model)
        kinds.append(guider.is_conditional)
        given = {**inputs, **{name: getattr(batch, name) for name in varied}}
        with torch.no_grad():
            batch.noise_pred = model(**given, return_dict=False)[0]
        guider.cleanup_models(model)
    return guider(batches), kinds
