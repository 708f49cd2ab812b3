"""PrefixReuse in low precision: over some seeds no further from a float32 run than the plain call is."""

import pytest
import torch
from helpers.versions import needs

from skipguide.pipelines import PrefixReuse
from zoo.pipes import BY_PIPE
from zoo.pipes_video import BY_VIDEO

LTX2 = BY_VIDEO["ltx2_own"]
LAYER = 2


def errors(case, precise, pipe, seeds, **call):
    """How far a low-precision run is from one in float32, without prefix reuse and with it, over some seeds."""
    found = {"plain": [], "reused": []}
    for seed in range(seeds):
        exact = case.run(precise, generator=torch.Generator().manual_seed(seed), **call)
        for name in found:
            generator = torch.Generator().manual_seed(seed)
            if name == "plain":
                out = case.run(pipe, generator=generator, **call)
            else:
                with PrefixReuse().apply(pipe) as applied:
                    out = case.run(pipe, generator=generator, **call)
                assert applied.stats.reused
            found[name].append(float((out.float() - exact).norm() / exact.norm()))
    return {name: sum(values) / seeds for name, values in found.items()}


@needs("torch", "2.14", "the plain call in bfloat16 is off by more than the law can measure")
@pytest.mark.parametrize(
    ("case", "call"),
    [
        (LTX2, {"spatio_temporal_guidance_blocks": [LAYER], "num_inference_steps": 1}),
        (
            BY_PIPE["sd35"],
            {"skip_guidance_layers": [2], "skip_layer_guidance_start": -0.1, "skip_layer_guidance_stop": 1.0},
        ),
    ],
    ids=["ltx2", "sd35"],
)
def test_bfloat16_is_no_further_from_float32_than_the_plain_call(case, call):
    precise, pipe = case.build(), case.build()
    pipe.transformer.to(torch.bfloat16)
    found = errors(case, precise, pipe, seeds=10, **call)
    assert 1e-3 < found["plain"] < 0.2
    assert found["reused"] <= 1.1 * found["plain"], found
