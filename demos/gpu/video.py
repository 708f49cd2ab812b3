"""Skip guidance on a video model: seconds per step and memory, next to the pipeline alone and the usual ways."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import skipguide.pipelines
from demos.benchmarks.stg_models import run
from demos.gpu.race import Variant, race, tell
from demos.gpu.setting import Setting
from skipguide import find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance

STEPS = 4


def guided(pipe: Any, layer: int, **settings: Any) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which the pipeline's calls are guided."""
    return lambda: SpatiotemporalSkipGuidance(layers=[layer], **settings).apply(pipe)


def measure(setting: Setting, name: str) -> dict[str, Any]:
    """Every way to guide one model.

    plain: the pipeline alone (with CFG where the model has it). guided: the third pass from the skipped layer on.
    batched: the same with tail="batched". third_pass: the whole third pass. third_row: the whole third row in the
    batch, the block computed and its result not used. own: the pipeline's own skip guidance; own_reused: the same
    with `PrefixReuse`, where this version of skipguide has it.
    """
    from demos.benchmarks.stg_rivals import OneBatch
    from demos.gpu.models import MODELS

    model = MODELS[name]
    steps = setting.pick(STEPS, 2)
    pipe = model.build(setting)
    call = model.call(setting, steps)
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    tell(f"    {name}: {parameters / 1e9:.2f} G parameters built")
    layer, blocks = model.skipped(setting), len(find_blocks(pipe.transformer))

    def work() -> None:
        run(pipe, call)

    variants = {
        "plain": Variant(nullcontext, work),
        "guided": Variant(guided(pipe, layer), work),
        "batched": Variant(guided(pipe, layer, tail="batched"), work),
        "third_pass": Variant(guided(pipe, layer, prefix_reuse=False), work),
    }
    if model.calls:
        variants["third_row"] = Variant(lambda: OneBatch(pipe, model.case, call, layer, 1.0), work)
    if model.own:
        own = call | model.own | {"spatio_temporal_guidance_blocks": [layer]}
        variants["own"] = Variant(nullcontext, lambda: run(pipe, own))
        reuse = getattr(skipguide.pipelines, "PrefixReuse", None)
        if reuse is not None:
            variants["own_reused"] = Variant(lambda: reuse().apply(pipe), lambda: run(pipe, own))
    found = race(setting, variants, rounds=setting.pick(3, 1))
    for row in found.values():
        if "seconds" in row:
            row["seconds_per_step"] = round(row["seconds"] / steps, 6)
    cost = SpatiotemporalSkipGuidance(layers=[layer]).cost(pipe, guidance=model.case.branches == 2)
    return {
        "title": model.case.title, "cfg": model.case.cfg, "parameters": parameters, "blocks": blocks, "layer": layer,
        "tokens": model.case.sizes[setting.pick("full", "dry")].tokens, "steps": steps, "note": model.note,
        "blocks_to_plain": round(cost.ratio_to_plain, 4), "variants": found,
    }  # fmt: skip
