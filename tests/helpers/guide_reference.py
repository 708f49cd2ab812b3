"""A guider on a pipeline by hand: its arithmetic alone, on the predictions of full passes of the model and of edits.

It knows nothing of gates, plans or deliveries. Both branches of one call are the guider's result; of two calls the
second is solved for in float64.
"""

import diffusers.guiders as home
import torch
from diffusers import LayerSkipConfig
from helpers.perturbation_table import PERTURBATIONS

from zoo.pipes import BY_PIPE, MODELS, STEPS

LAYER = 1
W = {"ltx": 3.0, "wan": 5.0, "sd35": 7.0, "flux_true_cfg": 4.0}
WHOLE = {"start": 0.0, "stop": 1.0}


def skipping(cls, name, **how):
    """A guider whose weak pass is in force at every step but the first, which diffusers never lets it be."""
    scale = {"SkipLayerGuidance": "skip_layer", "PerturbedAttentionGuidance": "perturbed"}[cls]
    middle = "skip_layer_guidance" if scale == "skip_layer" else "perturbed_guidance"
    given = {f"{middle}_scale": 1.5, f"{middle}_start": 0.0, f"{middle}_stop": 1.0, name: LayerSkipConfig([LAYER])}
    return getattr(home, cls)(guidance_scale=4.0, **given, **how)


GUIDERS = {
    "cfg": lambda: home.ClassifierFreeGuidance(guidance_scale=4.5),
    "cfg in a window": lambda: home.ClassifierFreeGuidance(guidance_scale=4.0, start=0.4, stop=0.9),
    "cfg rescaled": lambda: home.ClassifierFreeGuidance(guidance_scale=4.0, guidance_rescale=0.7),
    "apg": lambda: home.AdaptiveProjectedGuidance(
        guidance_scale=4.0,
        adaptive_projected_guidance_momentum=-0.5,
        adaptive_projected_guidance_rescale=3.0,
        eta=0.3,
    ),
    "cfg zero star": lambda: home.ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=1),
    "tcfg": lambda: home.TangentialClassifierFreeGuidance(guidance_scale=4.0),
    "fdg": lambda: home.FrequencyDecoupledGuidance(guidance_scales=[6.0, 3.0], parallel_weights=[1.0, 0.5]),
    "magnitude": lambda: home.MagnitudeAwareGuidance(guidance_scale=4.0, alpha=1.0),
    "autoguidance": lambda: home.AutoGuidance(guidance_scale=2.0, auto_guidance_config=LayerSkipConfig([LAYER])),
    "slg": lambda: skipping("SkipLayerGuidance", "skip_layer_config"),
    "pag": lambda: skipping("PerturbedAttentionGuidance", "perturbed_guidance_config"),
    "seg": lambda: home.SmoothedEnergyGuidance(
        guidance_scale=4.0, seg_guidance_scale=1.5, seg_blur_sigma=0.7, seg_guidance_layers=[LAYER]
    ),
}


def weak_models(name, case, pipe):
    """Prediction -> the model with the edit that its pass has."""
    family, model = MODELS[case.family], pipe.transformer
    if name == "autoguidance":
        return {"pred_uncond": family.identity_block(model, LAYER)}
    if name == "slg":
        return {"pred_cond_skip": family.identity_block(model, LAYER)}
    if name == "pag":
        return {"pred_cond_skip": family.value_identity(model, LAYER, family.inputs(1))}
    if name == "seg":
        return {"pred_cond_seg": PERTURBATIONS["blur"].by_hand(family, model, LAYER)}
    return {}


def magnitude(c, u, w=4.0, alpha=1.0):
    """Section 3 of 2508.03442, in diffusers' form; diffusers' own fails on more than three dimensions."""
    dims = tuple(range(1, c.dim()))
    ratio = (c - u).square().sum(dims, keepdim=True).sqrt() / u.square().sum(dims, keepdim=True).sqrt()
    return u + (1 + (w - 1) * torch.exp(-alpha * ratio)) * (c - u)


class ByGuider:
    """Installed on the denoiser for the length of a test."""

    def __init__(self, name, case, pipe, images=None):
        self.name, self.mode, self.w = name, case.cfg_modes[0], W[case.name]
        self.guider, self.weak = GUIDERS[name](), weak_models(name, case, pipe)
        self.images = images  # predictions as images, and back
        self.plain, self.step, self.cond = pipe.transformer.forward, -1, None
        pipe.transformer.forward = self

    def __call__(self, *args, **kwargs):
        out = self.plain(*args, **kwargs)[0].double()
        weak = {key: model(*args, **kwargs)[0].double() for key, model in self.weak.items()}
        if self.mode == "batched":
            u, c = out.chunk(2)
            halves = {key: each.chunk(2)[key != "pred_uncond"] for key, each in weak.items()}
            y = self.result({"pred_cond": c, "pred_uncond": u} | halves)
            return (torch.cat([y, y]).float(),)
        if self.cond is None:
            self.cond = out, {key: each for key, each in weak.items() if key != "pred_uncond"}
            return (out.float(),)
        (c, weak_c), self.cond = self.cond, None
        weak_u = {key: each for key, each in weak.items() if key == "pred_uncond"}
        y = self.result({"pred_cond": c, "pred_uncond": out} | weak_c | weak_u)
        return (((y - self.w * c) / (1 - self.w)).float(),)

    def result(self, found):
        self.step += 1
        self.guider.set_state(self.step, STEPS, None)
        names = [b.__guidance_identifier__ for b in self.guider.prepare_inputs({"i": (0, 1)})]
        if self.name == "magnitude":
            return magnitude(found["pred_cond"], found["pred_uncond"])
        there, back = self.images or (lambda x: x, lambda x: x)
        given = {name: there(found[name]) for name in names}
        return back(self.guider.forward(**given)[0])


def by_hand(name, case_name, prompts=2, images=None):
    case = BY_PIPE[case_name]
    pipe = case.build()
    ByGuider(name, case, pipe, images)
    return case.run(pipe, prompts)
