"""The controls as formulas: against directions computed by hand, on a pipeline with a denoiser of arithmetic."""

import pytest
import torch

from skipguide import SkipError, Timetable
from skipguide.bench.directions import effective_scale, projected_share, random_direction, random_like
from skipguide.cli import models, pipeline_calls
from skipguide.pipelines import SpatiotemporalSkipGuidance
from zoo.saved import tiny

tiny = tiny
CALL = {"height": 16, "width": 16, "video_length": 4, "num_inference_steps": 3, "clean_caption": False}


@pytest.fixture(scope="module")
def pipe(tiny):
    return models.load_pipeline(models.resolve(tiny), "cpu", "float32")


def latents(pipe, guidance=None, w=4.0):
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "guidance_scale": w, "output_type": "latent", "generator": torch.Generator().manual_seed(3)}
    if guidance is None:
        return pipe("a red circle", **call).frames
    with guidance.apply(pipe):
        return pipe("a red circle", **call).frames


def test_a_random_direction_has_the_norm_row_by_row_and_nothing_else():
    d = torch.randn(3, 4, 5, 6) * torch.tensor([1.0, 10.0, 0.0]).view(3, 1, 1, 1)
    found = random_like(d, torch.Generator().manual_seed(5))
    norms = [x.flatten(1).norm(dim=1) for x in (d, found)]
    torch.testing.assert_close(norms[0], norms[1])
    assert abs(torch.cosine_similarity(d[0].flatten(), found[0].flatten(), dim=0)) < 0.3
    torch.testing.assert_close(found, random_like(d, torch.Generator().manual_seed(5)))
    assert not torch.equal(found, random_like(d, torch.Generator().manual_seed(1)))


def test_the_share_along_cfg():
    u, c = torch.zeros(1, 3), torch.tensor([[0.0, 2.0, 0.0]])
    assert projected_share(torch.tensor([[5.0, 3.0, -1.0]]), u, c) == pytest.approx(1.5)
    assert projected_share(torch.ones(1, 3), u, u) is None


def test_the_control_replaces_the_direction_and_costs_the_same(pipe):
    arguments = {"layers": [2], "scale": 1.0}
    own = SpatiotemporalSkipGuidance(**arguments)
    control = random_direction(arguments, pipe, seed=5)
    assert control.cost(pipe).blocks_per_step == own.cost(pipe).blocks_per_step
    plain, guided, random = latents(pipe), latents(pipe, own), latents(pipe, control)
    assert not torch.allclose(random, guided)
    assert not torch.allclose(random, plain)
    assert torch.equal(random, latents(pipe, random_direction(arguments, pipe, seed=5))), "the same seed"
    assert torch.equal(random, latents(pipe, control)), "each use starts anew"
    assert not torch.equal(random, latents(pipe, random_direction(arguments, pipe, seed=6)))
    assert torch.equal(plain, latents(pipe)), "nothing is left behind"


def test_the_effective_scale_of_cfg_itself(pipe):
    """A direction that is twice CFG's own, at scale 0.5, raises w by one: the pipeline's result says so too."""

    class Doubled(SpatiotemporalSkipGuidance):
        @property
        def rule(self):
            from dataclasses import replace

            return replace(super().rule, direction=lambda u, c, k, w: 2 * (c - u), needs_w=True)

    higher = latents(pipe, w=5.0)
    torch.testing.assert_close(latents(pipe, Doubled(layers=[2], scale=0.5), w=4.0), higher, rtol=1e-3, atol=1e-4)


def test_the_effective_scale_is_w_and_the_projection(pipe):
    seen = []

    def run(guidance):
        own = guidance.rule.direction

        class Noting(type(guidance)):
            @property
            def rule(self):
                from dataclasses import replace

                def direction(u, c, k, w):
                    d, half = own(u, c, k, w), c.shape[1] // 2  # the other half are variances
                    along = (c - u)[:, :half]
                    seen.append(4.0 + 2.0 * float(((c - k)[:, :half] * along).sum() / along.square().sum()))
                    return d

                return replace(super().rule, direction=direction)

        latents(pipe, Noting(layers=[2], scale=2.0))

    found = effective_scale({"layers": [2], "scale": 2.0}, pipe, run)
    assert len(seen) == CALL["num_inference_steps"]
    assert found == pytest.approx(sum(seen) / len(seen), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"layers": [2], "formula": "uncond"}, "has no direction of its own"),
        ({"layers": [2], "cfg_interval": (0.0, 0.5)}, "steps without CFG"),
        ({"layers": [2], "formula": "segmented"}, "steps without CFG"),
        ({"layers": [2], "scale": Timetable(((0.0, 1.0), (0.5, 2.0)))}, "changes with the step"),
    ],
)
def test_guidance_that_no_one_scale_stands_for(pipe, arguments, expected):
    with pytest.raises(SkipError, match=expected):
        effective_scale(arguments, pipe, lambda guidance: None)


def test_a_run_without_cfg_has_no_effective_scale(pipe):
    with pytest.raises(SkipError, match="no CFG direction to project on"):
        effective_scale({"layers": [2]}, pipe, lambda guidance: latents(pipe, guidance, w=1.0))


def test_the_callers_call_stays_as_it_was(pipe):
    assert pipeline_calls.without_native(pipe) == {}
