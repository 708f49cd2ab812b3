"""Do the model's own scores of `skipguide bench` agree with the Fréchet distance of this study? On the bundled model.

    python -m demos.quality.self_scores      # six settings, four clips each: half a minute of one processor

Each clip is noised again, and the model takes one step back from each of a few noise levels without CFG: with the
prompt (self-consistency error) and without it (the difference is the prompt margin). The distances beside them are
those of `results.json`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from demos.benchmarks.measure import machine, write_json
from demos.quality.sampling import load
from skipguide.assets import bundled
from skipguide.bench.consistency import APART, LastLatents, StepErrors
from skipguide.pipelines import SpatiotemporalSkipGuidance

OUT = Path(__file__).with_suffix(".json")
PROMPTS = ("a large red circle moving right on a black background", "a small blue square moving up on stripes")
SEEDS, STEPS, SHORT = 2, 12, 6
# setting -> CFG scale, skip guidance, the row of results.json
SETTINGS: dict[str, tuple[float, bool, str]] = {
    "no CFG": (1.0, False, "none"),
    **{f"cfg-{w:g}": (w, False, f"cfg-{w:g}") for w in (2.0, 3.0, 4.0, 6.0)},
    "preset at 3": (3.0, True, "stg-block-0.5"),
}


def errors(pipe: Any, call: dict[str, Any], latents: Any, prompt: str, seed: int) -> list[float]:
    """Of every noise level."""
    watch = StepErrors(latents, torch.Generator().manual_seed(seed + APART))
    short = {**call, "guidance_scale": 1.0, "num_inference_steps": SHORT, "output_type": "latent"}
    with torch.no_grad():
        pipe(prompt=prompt, generator=torch.Generator().manual_seed(5), callback_on_step_end=watch, **short)
    return watch.errors


def measure(pipe: Any, call: dict[str, Any], w: float, guided: bool) -> dict[str, Any]:
    """A setting's scores, and the errors by noise level, from high to low."""
    found = []
    own = {**call, "guidance_scale": w, "num_inference_steps": STEPS, "output_type": "latent"}
    for number, prompt in enumerate(PROMPTS):
        for seed in range(SEEDS):
            noise, last = 1000 * seed + number, LastLatents()
            more = {"generator": torch.Generator().manual_seed(noise), "callback_on_step_end": last}
            if guided:
                with SpatiotemporalSkipGuidance().apply(pipe):
                    pipe(prompt=prompt, **own, **more)
            else:
                pipe(prompt=prompt, **own, **more)
            found.append([errors(pipe, call, last.latents, words, noise) for words in (prompt, "")])
    levels = [[round(statistics.fmean(level), 3) for level in zip(*of, strict=True)] for of in zip(*found, strict=True)]
    with_prompt, without = (statistics.fmean(map(statistics.fmean, of)) for of in zip(*found, strict=True))
    return {
        "self_consistency_error": round(with_prompt, 4),
        "prompt_margin": round(without - with_prompt, 4),
        "levels_with_prompt": levels[0],
        "levels_without": levels[1],
    }


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    pipe = load(bundled())
    call = json.loads((bundled() / "generation.json").read_text())
    call.pop("fps")
    study = json.loads((OUT.parent / "results.json").read_text())["rows"]
    distance = {row["name"]: round(row["frechet"]["mean"], 2) for row in study}
    rows = {}
    for name, (w, guided, row) in SETTINGS.items():
        rows[name] = {**measure(pipe, call, w, guided), "frechet": distance[row]}
        print(name, rows[name])
    write_json(OUT, {"machine": machine(), "clips": len(PROMPTS) * SEEDS, "steps": STEPS, "rows": rows})


if __name__ == "__main__":
    main()
