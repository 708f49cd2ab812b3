"""Skip guidance on every stock pipeline equals the reference: formulas, parts, rescaling, steps, videos."""

import pytest
from helpers.stg_reference import LAYER, SCALES, SOLVABLE, WITH_CFG, Reference, close, expected, guided, named

from skipguide import find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, PIPES, understand_prompts


@named(PIPES)
def test_guided_pipeline_equals_the_reference(case):
    out, stats = guided(case, Stg([LAYER], scale=1.5))
    close(out, expected(case, s=1.5))
    n, steps, branches = len(find_blocks(case.build().transformer)), 3, 2 if case in WITH_CFG else 1
    assert stats.delivery == "shift"
    assert stats.blocks_plain == steps * branches * n
    assert stats.blocks_naive == steps * (branches + 1) * n
    assert stats.blocks_run == steps * (branches * n + n - 1 - LAYER)


@named([c for c in WITH_CFG if "single" in c.cfg_modes])
def test_without_cfg(case):
    out, stats = guided(case, Stg([LAYER]), cfg=False)
    close(out, expected(case, cfg=False))
    assert stats.passes == 6


@named([BY_PIPE[name] for name in ("ltx", "wan", "latte", "cogvideox", "sd3", "flux_true_cfg")])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_sublayer_parts(case, part):
    out, _ = guided(case, Stg([LAYER], part=part))
    close(out, expected(case, part=part))


@named(SOLVABLE)
@pytest.mark.parametrize("formula", ["uncond", "wan"])
def test_other_formulas(case, formula):
    out, stats = guided(case, Stg([LAYER], formula=formula))
    close(out, expected(case, formula=formula))
    n = len(find_blocks(case.build().transformer))
    assert stats.blocks_run == 3 * (2 * n - 1 if formula == "uncond" else 2 * n + n - 1 - LAYER)
    assert stats.delivery == ("solve" if formula == "wan" else "shift")


@named(SOLVABLE)
@pytest.mark.parametrize("over", ["sample", "batch"])
def test_rescale(case, over):
    out, stats = guided(case, Stg([LAYER], rescale=0.7, rescale_over=over))
    close(out, expected(case, rescale=0.7, over=over))
    assert stats.delivery == "solve"


@named([BY_PIPE["ltx"], BY_PIPE["hunyuan"], BY_PIPE["flux"]])
def test_rescale_without_cfg(case):
    out, _ = guided(case, Stg([LAYER], rescale=0.7), cfg=False)
    close(out, expected(case, cfg=False, rescale=0.7))


def test_the_pipelines_own_rescale_is_noticed():
    case, call = BY_PIPE["ltx"], {"guidance_rescale": 0.7}
    out, stats = guided(case, Stg([LAYER]), call=call)
    close(out, expected(case, call=call))
    assert stats.delivery == "solve"


@named([BY_PIPE["ltx"], BY_PIPE["wan"], BY_PIPE["hunyuan"]])
def test_window_of_steps(case):
    """Three steps: [1/3, 2/3) is the second one only."""
    out, stats = guided(case, Stg([LAYER], start=1 / 3, stop=2 / 3))
    close(out, expected(case, on={1}))
    assert stats.blocks_naive - stats.blocks_plain == len(find_blocks(case.build().transformer))


@named([BY_PIPE["ltx"], BY_PIPE["wan"]])
def test_several_videos_per_prompt(case):
    call = dict.fromkeys(
        ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
    )
    call = {k: v for k, v in call.items() if k in case.call_kwargs()} | {
        "prompt": ["a cat", "a dog"], "negative_prompt": "blurry", "num_videos_per_prompt": 2,
    }  # fmt: skip

    def run(pipe):
        understand_prompts(pipe)
        return case.run(pipe, 1, True, **call)

    reference = case.build()
    Reference(reference, case, w=SCALES[case.name])
    pipe = case.build()
    with Stg([LAYER]).apply(pipe):
        out = run(pipe)
    assert out.shape[0] == 4
    close(out, run(reference))
