"""Skip guidance on the stock image pipelines, against a reference that knows nothing of gates, prefixes or shifts."""

import pytest
import torch
from helpers.image_reference import reference
from helpers.stg_reference import LAYER, close

from skipguide import SkipError, find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes_image import IMAGE_PIPES

BY_NAME = {case.name: case for case in IMAGE_PIPES}
W = {
    "sd3_img2img": 7.0, "sd3_inpaint": 7.0, "flux_img2img": 4.0, "flux_inpaint": 4.0, "flux_kontext": 4.0,
    "flux2_klein": 4.0, "qwen_image": 4.0, "qwen_img2img": 4.0, "sana": 4.5, "pixart_alpha": 4.5,
    "pixart_sigma": 4.5, "hunyuan_dit": 5.0, "lumina2": 4.0, "auraflow": 3.5, "hidream": 5.0, "chroma": 5.0,
    "chroma_img2img": 5.0, "zimage": 4.0, "zimage_img2img": 4.0, "cogview3": 5.0, "cogview4": 5.0,
    "hunyuan_image": 3.5, "bria": 5.0, "longcat": 4.5, "ovis": 5.0, "prx": 4.0, "krea2": 4.0, "dit": 4.0,
    "prx_pixel": 4.0,
    "flux_kontext_inpaint": 4.0, "zimage_inpaint": 4.0, "qwen_inpaint": 4.0, "flux2_klein_inpaint": 4.0,
}  # fmt: skip
WITH_CFG = [case for case in IMAGE_PIPES if case.name in W]
# the pipeline brings the result to the norm of c, so that only `solve` is exact
RENORM = {"qwen_image", "qwen_img2img", "qwen_inpaint", "lumina2", "longcat"}
RESCALED = {
    "sd3_img2img", "flux_kontext", "qwen_image", "pixart_sigma", "hunyuan_dit", "lumina2", "auraflow", "hidream",
    "chroma", "zimage", "hunyuan_image", "ovis", "krea2",
}  # fmt: skip
ONE_PROMPT = {"prx", "prx_pixel"}  # diffusers 0.42.1 gives its denoiser two timesteps, whatever the batch


def expected(case, cfg=True, prompts=1, call=None, **how):
    pipe = case.build()
    reference(pipe, case, W.get(case.name), cfg, **how)
    return case.run(pipe, prompts, cfg, **(call or {}))


def guided(case, stg, cfg=True, prompts=1, call=None):
    pipe = case.build()
    with stg.apply(pipe) as applied:
        out = case.run(pipe, prompts, cfg, **(call or {}))
    return out, applied.stats


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=repr)


@named(IMAGE_PIPES)
def test_guided_pipeline_equals_the_reference(case):
    prompts = 1 if case.name in ONE_PROMPT else 2
    pipe = case.build()
    plain = case.run(pipe, prompts)
    names = [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()]
    with Stg([LAYER], scale=1.5).apply(pipe) as applied:
        out = case.run(pipe, prompts)
    close(out, expected(case, prompts=prompts, s=1.5))
    assert not torch.allclose(out, plain, atol=1e-4), "the guidance did nothing"
    stats, n, branches = applied.stats, len(find_blocks(pipe.transformer)), 2 if case in WITH_CFG else 1
    assert stats.delivery == ("solve" if case.name in RENORM else "shift")
    assert stats.blocks_plain == 3 * branches * n
    assert stats.blocks_run == 3 * (branches * n + n - 1 - LAYER)
    assert [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()] == names
    with Stg([LAYER], scale=0).apply(pipe):
        assert torch.equal(case.run(pipe, prompts), plain)


@named([case for case in WITH_CFG if "single" in case.cfg_modes])
def test_without_cfg(case):
    out, stats = guided(case, Stg([LAYER]), cfg=False)
    close(out, expected(case, cfg=False))
    assert stats.passes == 6


@named([case for case in WITH_CFG if case.name in RESCALED])
def test_rescale(case):
    out, stats = guided(case, Stg([LAYER], rescale=0.7))
    close(out, expected(case, rescale=0.7))
    assert stats.delivery == "solve"


@pytest.mark.parametrize(
    ("name", "call", "delivery"),
    [
        ("lumina2", {"cfg_normalization": False}, "shift"),
        ("zimage", {"cfg_normalization": True}, "solve"),
        ("longcat", {"enable_cfg_renorm": False}, "shift"),
        ("hunyuan_dit", {"guidance_rescale": 0.7}, "solve"),
        ("bria", {"normalize": True}, "solve"),
    ],
)
def test_what_the_pipeline_does_to_its_result_is_noticed(name, call, delivery):
    case = BY_NAME[name]
    out, stats = guided(case, Stg([LAYER]), call=call)
    close(out, expected(case, call=call))
    assert stats.delivery == delivery


@pytest.mark.parametrize(("name", "call"), [("lumina2", {"cfg_trunc_ratio": 0.5}), ("zimage", {"cfg_truncation": 0.1})])
def test_steps_without_cfg_inside_a_run(name, call):
    """The pipeline leaves its unconditional branch out at some steps: guidance is what it is without CFG there."""
    case = BY_NAME[name]
    _, plain = guided(case, Stg([LAYER], scale=0), call=call)
    out, stats = guided(case, Stg([LAYER]), call=call)
    n = len(find_blocks(case.build().transformer))
    assert 3 * n < plain.blocks_plain < 6 * n, "some steps have CFG, some have none"
    assert stats.blocks_run == plain.blocks_plain + 3 * (n - 1 - LAYER)
    full, _ = guided(case, Stg([LAYER], prefix_reuse=False), call=call)
    close(out, full)


def test_what_looks_at_variances_is_refused():
    with pytest.raises(SkipError, match="variances"):
        Stg([LAYER], zero_star=True).apply(BY_NAME["pixart_alpha"].build())
