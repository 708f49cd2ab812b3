"""Self-consistency: 0 where a step leads to the clip, and the exact error of a model that is off by a known part."""

from types import SimpleNamespace

import pytest
import torch

from skipguide import SkipError
from skipguide.bench.consistency import APART, LastLatents, can_measure, noised, prompt_margin, self_consistency


class Flow:
    """Flow matching by arithmetic: noised = (1 - s) clean + s noise, with s from 1 to 0."""

    def set(self, steps):
        self.sigmas = torch.linspace(1, 0, steps + 1)
        self.timesteps = self.sigmas[:-1] * 1000

    def scale_noise(self, sample, timestep, noise):
        return torch.lerp(sample, noise, float(timestep) / 1000)


class Pipe:
    """Steps towards `believed`, as a denoiser would that takes it for the clean clip behind everything."""

    def __init__(self, believed):
        self.believed = believed
        self.scheduler = Flow()

    def __call__(
        self,
        prompt=None,
        num_inference_steps=50,
        guidance_scale=7.5,
        generator=None,
        output_type="pil",
        callback_on_step_end=None,
    ):
        self.seen = {"guidance_scale": guidance_scale, "output_type": output_type, "prompt": prompt}
        self.scheduler.set(num_inference_steps)
        x, sigmas = torch.randn(self.believed.shape, generator=generator), self.scheduler.sigmas
        for step, t in enumerate(self.scheduler.timesteps):
            velocity = (x - self.believed) / sigmas[step]
            x = x + (sigmas[step + 1] - sigmas[step]) * velocity
            x = callback_on_step_end(self, step, t, {"latents": x}).pop("latents", x)
        return SimpleNamespace(frames=x)


def test_a_clip_that_the_model_believes_in_has_no_error():
    clean = torch.randn(1, 4, 2, 3)
    pipe = Pipe(clean)
    assert self_consistency(pipe, {"prompt": "p"}, clean, seed=0) == pytest.approx(0, abs=1e-4)
    assert pipe.seen == {"guidance_scale": 1.0, "output_type": "latent", "prompt": "p"}


def test_the_error_is_the_share_of_the_step_that_is_wrong():
    """From x = z + s (n - z) the step is ds (x - b) / s, and should be ds (n - z): off by ds (z - b) / s."""
    generator = torch.Generator().manual_seed(7 + APART)
    clean = torch.randn(1, 4, 2, 3)
    noise = torch.randn(clean.shape, generator=generator)
    believed = clean + 0.3 * torch.randn(clean.shape)
    for steps in (3, 6):
        inner = torch.linspace(1, 0, steps + 1)[1:-1]  # the first step begins at pure noise and is not counted
        off = [float((clean - believed).norm() / s / (noise - clean).norm()) for s in inner]
        found = self_consistency(Pipe(believed), {}, clean, seed=7, steps=steps)
        assert found == pytest.approx(sum(off) / len(off), rel=1e-4)


def test_the_noise_is_the_seeds_so_that_clips_are_compared_in_pairs():
    clean = torch.randn(1, 4, 2, 3)
    far = Pipe(torch.zeros(1, 4, 2, 3))
    one, two, other = (self_consistency(far, {}, clean, seed=seed) for seed in (1, 1, 2))
    assert one == two != other


def test_the_margin_is_what_the_prompt_explains():
    clean = torch.randn(1, 4, 2, 3)

    class Prompted(Pipe):
        def __call__(self, prompt=None, **more):
            self.believed = clean if prompt == "a cat" else clean + 0.3
            return Pipe.__call__(self, prompt, **more)

    pipe = Prompted(clean)
    error = self_consistency(pipe, {"prompt": "a cat"}, clean, seed=1)
    off = self_consistency(Pipe(clean + 0.3), {}, clean, seed=1)
    assert prompt_margin(error, pipe, {"prompt": "a cat"}, clean, 1) == pytest.approx(off, rel=1e-4)
    assert prompt_margin(off, Pipe(clean + 0.3), {"prompt": "a cat"}, clean, 1) == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_measured():
    clean = torch.zeros(1, 4, 2, 3)
    with pytest.raises(SkipError, match="has none to measure"):
        self_consistency(Pipe(clean), {}, clean, seed=0, steps=1)
    with pytest.raises(SkipError, match="neither scale_noise nor add_noise"):
        noised(SimpleNamespace(), clean, clean, 5)
    with pytest.raises(SkipError, match=r"expected latents \(1, 4\); got"):
        self_consistency(Pipe(clean), {}, torch.zeros(1, 4), seed=0)
    assert can_measure(Pipe)
    assert not can_measure(SimpleNamespace)


def test_schedulers_of_noise_prediction_are_asked_too():
    class Ddim:
        def add_noise(self, sample, noise, timesteps):
            assert timesteps.shape == (1,)
            return sample + noise * timesteps

    assert noised(Ddim(), torch.ones(2), torch.ones(2), 3).tolist() == [4.0, 4.0]


def test_the_last_latents_are_kept_as_they_were():
    keep, x = LastLatents(), torch.ones(2)
    assert keep(None, 0, 0, {"latents": x}) == {}
    x += 1
    assert keep.latents.tolist() == [1.0, 1.0]
    keep(None, 1, 0, {})
    assert keep.latents.tolist() == [1.0, 1.0]
