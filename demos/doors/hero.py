"""The hero: a clip plainly, as the model draws it with the layer left out, and guided away from that.

The rule by which the clip is chosen: of the first 32 captions of the quality study, each with its own seed, those whose
plain clip the judge (the classifier of demos/bundled_model) reads right; of these the one that guidance changes most,
for better or worse; its middle frame. How many of the 32 the judge becomes surer of is printed, and belongs under the
picture. The setting is the preset.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from PIL import Image
from torch import Tensor

from demos.bundled_model.classifier import AttributeClassifier
from demos.bundled_model.clips import caption, labels
from demos.doors.panels import Panel, row
from demos.quality.sampling import prompts
from skipguide import Skipper, SkipPlan
from skipguide.media import pictures
from skipguide.pipelines import SpatiotemporalSkipGuidance, bundled_pipeline, find_preset

CLIPS, BATCH = 32, 8


@torch.no_grad()
def certainty(judge: AttributeClassifier, clips: Tensor, asked: dict[str, Tensor]) -> Tensor:
    """Log-likelihood of what was asked for, summed over the attributes, `[N]`."""
    found = [scores.log_softmax(1).gather(1, asked[name][:, None])[:, 0] for name, scores in judge(clips).items()]
    return torch.stack(found).sum(0)


def draw() -> Image.Image:
    """Three panels of the clip that guidance changes most."""
    pipe, call = bundled_pipeline()
    pipe.set_progress_bar_config(disable=True)
    preset = find_preset(pipe.transformer)
    specs = prompts(CLIPS, 1)

    def clips(around: AbstractContextManager[object]) -> Tensor:
        made = []
        with around:
            for at in range(0, CLIPS, BATCH):
                words = [caption(spec) for spec in specs[at : at + BATCH]]
                seeds = [torch.Generator().manual_seed(at + number) for number in range(len(words))]
                made.append(pipe(words, generator=seeds, output_type="pt", **call).frames)
        return torch.cat(made)

    guidance = SpatiotemporalSkipGuidance(preset.layers, preset.scale, preset.part)
    plain, guided = clips(nullcontext()), clips(guidance.apply(pipe))
    left_out = clips(Skipper(pipe.transformer, SkipPlan(preset.layers, preset.part)))
    judge, asked = AttributeClassifier.load(), labels(specs)
    gains = certainty(judge, guided, asked) - certainty(judge, plain, asked)
    right = torch.stack(list(judge.correct(plain, asked).values())).all(0)
    chosen = int(((guided - plain).abs().flatten(1).mean(1) * right).argmax())
    print(f"the judge is surer of {int((gains > 0).sum())} of {CLIPS} clips with guidance, less sure of the others")
    cost = guidance.cost(pipe, steps=call["num_inference_steps"]).ratio_to_plain
    costs = {"plain": 1.0, "layer left out": 1.0, "guided": cost}
    panels = [
        Panel(pictures.as_images(made[chosen])[made.shape[1] // 2], words, share / cost, f"{share:.2f} x the work")
        for (words, share), made in zip(costs.items(), (plain, left_out, guided), strict=True)
    ]
    return row(panels, caption(specs[chosen]))
