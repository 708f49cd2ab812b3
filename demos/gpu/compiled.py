"""Skip guidance on a denoiser whose blocks are compiled."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch

from demos.benchmarks.stg_models import run
from demos.gpu.race import Variant, race, ratio, tell
from demos.gpu.setting import Setting
from demos.gpu.video import STEPS, guided


def measure(setting: Setting, name: str) -> dict[str, Any]:
    """Plain and guided, first as they are, then with `compile_repeated_blocks`, and how long compiling took.

    The two halves are not interleaved: a compiled model does not go back.
    """
    from demos.gpu.models import MODELS

    model = MODELS[name]
    steps, rounds = setting.pick(STEPS, 2), setting.pick(3, 1)
    pipe = model.build(setting)
    call, layer = model.call(setting, steps), model.skipped(setting)

    def work() -> None:
        run(pipe, call)

    def variants() -> dict[str, Variant]:
        return {"plain": Variant(nullcontext, work), "guided": Variant(guided(pipe, layer), work)}

    found = race(setting, variants(), rounds)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(**setting.pick({}, {"backend": "eager"}))
    seconds = {}
    ready = variants()
    for each, variant in ready.items():
        began = time.monotonic()
        variant.attempt(variant.run)
        seconds[each] = round(time.monotonic() - began, 2)
        tell(f"    compiled {each}: {seconds[each]} s {variant.error}")
    compiled = race(setting, ready, rounds)
    found |= {f"compiled_{each}": row for each, row in compiled.items()}
    return {
        "title": model.case.title, "layer": layer, "steps": steps,
        "tokens": model.case.sizes[setting.pick("full", "dry")].tokens, "first_call_seconds": seconds,
        "compiled_guided_to_compiled_plain": ratio(compiled, "guided", "plain"), "variants": found,
    }  # fmt: skip
