"""Which layer, what scale: a first look at skip guidance on the bundled model, for its preset.

Prompts of training combinations, the same seeds for every setting; every clip is read by the classifier. With this
few prompts differences of several points are noise: the preset is a starting point, not a claim.

    python -m demos.bundled_model.preset --layers 3 5 7 9 --scales 1 --prompts 64
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from demos.bundled_model.classifier import AttributeClassifier
from demos.bundled_model.clips import caption
from demos.bundled_model.common import atomically
from demos.bundled_model.evaluate import accuracy, choose
from skipguide.pipelines import SpatiotemporalSkipGuidance, bundled_pipeline

HERE = Path(__file__).parent
SEED = 7_000_000


def generate(pipe: DiffusionPipeline, prompts: Sequence[str], call: dict[str, object], batch: int) -> Tensor:
    """Clips [N, T, 3, 64, 64] in [0, 1]; clip i always starts from seed SEED + i."""
    clips = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(SEED + start + i) for i in range(len(some))]
        clips.append(pipe(some, generator=generators, output_type="pt", **call).frames)
    return torch.cat(clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 5, 7, 9])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE / "preset.json")
    args = parser.parse_args()

    pipe, call = bundled_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call |= {"num_inference_steps": args.steps}
    classifier = AttributeClassifier.load()
    specs = choose(args.prompts, SEED, unseen=False)
    prompts = [caption(spec) for spec in specs]
    settings: list[tuple[int, float] | None] = [None, *((layer, s) for layer in args.layers for s in args.scales)]
    rows = []
    for setting in tqdm(settings, desc="settings"):
        began = time.perf_counter()
        if setting is None:
            clips, ratio = generate(pipe, prompts, call, args.batch), 1.0
        else:
            stg = SpatiotemporalSkipGuidance([setting[0]], scale=setting[1])
            ratio = stg.cost(pipe).ratio_to_plain
            with stg.apply(pipe):
                clips = generate(pipe, prompts, call, args.batch)
        rows.append(
            {"layer": setting and setting[0], "scale": setting and setting[1], "relative_cost": round(ratio, 3)}
            | {"accuracy": accuracy(classifier, clips, specs), "seconds": round(time.perf_counter() - began, 1)}
        )
    error = math.sqrt(0.25 / args.prompts)
    result = {"prompts": args.prompts, "standard_error_at_most": round(error, 3), "call": call, "settings": rows}
    text = json.dumps(result, indent=1) + "\n"
    atomically(args.out, lambda path: path.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
