"""tail="batched" or "separate": where the crossover lies on this device, as a function of the tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from demos.benchmarks.stg_models import Size, run
from demos.gpu.race import Variant, clear, describe, race, ratio, tell
from demos.gpu.setting import Setting
from demos.gpu.video import guided

DEPTH, LAYER = 8, 4
STEPS = 2
# latent frames, height and width in patches: 256 to 32,768 tokens
POINTS = (
    (1, (16, 16)), (2, (16, 16)), (4, (16, 16)), (4, (16, 32)), (8, (16, 32)), (8, (32, 32)), (16, (32, 32)),
    (32, (32, 32)),
)  # fmt: skip
DRY = ((1, (2, 2)), (2, (2, 4)))


def measure(setting: Setting, name: str) -> dict[str, Any]:
    """Both tails at every size, on the first blocks of the model; what they add to the plain step is compared too."""
    from demos.gpu.models import MODELS

    model = MODELS[name]
    like = model.case.sizes[setting.pick("full", "dry")]
    pipe = model.build(setting, DEPTH)
    points = []
    for frames, side in setting.pick(POINTS, DRY):
        size = Size(like.heads, like.head_dim, frames, side, like.text, like.text_width)
        tell(f"    {name}, {size.tokens} tokens")
        rows = 3 if model.case.cfg == "batched" else 2
        point: dict[str, Any] = {"tokens": size.tokens, "rows": rows, "tokens_times_rows": size.tokens * rows}
        try:
            call = model.sized(size).call(setting, STEPS)
            points.append(point | at(setting, pipe, call))
        except Exception as error:  # a size that does not fit must not end the others
            points.append(point | {"error": describe(error)})
        clear()
    return {
        "title": model.case.title, "cfg": model.case.cfg, "depth": DEPTH, "layer": LAYER, "steps": STEPS,
        "points": points,
    }  # fmt: skip


def at(setting: Setting, pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """One size."""

    layer = setting.pick(LAYER, 1)

    def work() -> None:
        run(pipe, call)

    variants = {
        "plain": Variant(nullcontext, work),
        "separate": Variant(guided(pipe, layer), work),
        "batched": Variant(guided(pipe, layer, tail="batched"), work),
    }
    found = race(setting, variants, rounds=setting.pick(4, 1))
    return {"batched_to_separate": ratio(found, "batched", "separate"), "variants": found}
