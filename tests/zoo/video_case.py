"""A tiny stock pipeline around one of the zoo's further video transformers.

No text encoder runs; where a pipeline needs a VAE or an image encoder, a stand-in gives latents of the right shape.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import diffusers
import torch
from torch import Tensor, nn

from zoo.family import Family, randomise, rows
from zoo.joint import JOINT
from zoo.one_stream import ONE_STREAM
from zoo.pipes import STEPS, embeds, flow, placed, size
from zoo.video_av import VIDEO_AUDIO
from zoo.video_cross import VIDEO_CROSS
from zoo.video_joint import VIDEO_JOINT
from zoo.video_wan import VIDEO_WAN

MODELS: dict[str, Family] = {
    family.name: family for family in (*ONE_STREAM, *JOINT, *VIDEO_WAN, *VIDEO_CROSS, *VIDEO_JOINT, *VIDEO_AUDIO)
}


def pipeline_class(name: str) -> type:
    """A pipeline of diffusers; ConsisID's hides behind a preprocessing library that its call does not need."""
    if name == "ConsisIDPipeline":
        from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

        return ConsisIDPipeline
    return getattr(diffusers, name)


@dataclass(frozen=True)
class VideoCase:
    """One pipeline class in one way of guiding.

    Attributes:
        cls: Name of the pipeline's class in diffusers.
        family: The zoo family whose block names the denoiser has.
        model: Builds another denoiser of that family, where the pipeline needs other sizes.
        parts: Components beside the denoiser.
        call: `(clips, cfg) -> ` the keyword arguments of the call.
        mode: How the denoiser is called with CFG: "batched", "two_calls", or "single".
        w: The weight of the conditional branch, for each prediction where there are several.
        scheduler: Builds the scheduler.
        clips: How many prompts a call has.
        runs: How often the call goes through its steps.
        lone: Whether there is a way of calling it without CFG.
        layer: A block that the video depends on.
        native: Whether the pipeline makes skip-guidance passes of its own in this call.
        ready: Changes the built pipeline, in place of components that do not run.
    """

    name: str
    cls: str
    family: str
    call: Callable[[int, bool], dict[str, object]]
    mode: str
    w: tuple[float, ...]
    scheduler: Callable[[], object] = flow
    parts: Callable[[], dict[str, object]] = dict
    model: Callable[[], nn.Module] | None = None
    config: dict[str, object] = field(default_factory=dict)
    clips: int = 2
    runs: int = 1
    lone: bool = True
    layer: int = 1
    native: bool = False
    ready: Callable[[object], None] | None = None

    def __repr__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> diffusers.DiffusionPipeline:
        import inspect

        torch.manual_seed(seed)
        family, cls = MODELS[self.family], pipeline_class(self.cls)
        model = family.build(seed) if self.model is None else randomise(self.model(), seed + 1, family.std)
        given = {"transformer": model, "scheduler": self.scheduler(), **self.parts(), **self.config}
        wanted = inspect.signature(cls.__init__).parameters
        absent = {name: None for name in wanted if name != "self" and wanted[name].default is inspect._empty}
        pipe = cls(**{**absent, **given})
        pipe.set_progress_bar_config(disable=True)
        if self.ready is not None:
            self.ready(pipe)
        return pipe

    def call_of(self, cfg: bool = True) -> dict[str, object]:
        """Fresh arguments for `pipe(...)`: a new seeded generator every time."""
        common = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        return {**common, "generator": torch.Generator().manual_seed(11), **self.call(self.clips, cfg)}

    def run(self, pipe: diffusers.DiffusionPipeline, cfg: bool = True, **overrides: object) -> Tensor:
        call = {**self.call_of(cfg), **overrides}
        out = pipe(**placed({name: value for name, value in call.items() if value is not ...}, pipe))
        if isinstance(out[0], list):
            return torch.cat([each.flatten(1) for each in out[0]], dim=1)
        if len(out) > 1:  # video and sound
            return torch.cat([each.flatten(1) for each in out if each is not None], dim=1)
        return out[0]


class Latents:
    """What a VAE says of its input, without chance."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean
        self.latent_dist = self

    def __getitem__(self, i: int) -> "Latents":
        return self

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: object = None) -> Tensor:
        return self.mean


class StandIn(nn.Module):
    """In place of a VAE: pixels `[B, 3, F, H, W]` to latents by averaging, and back by repeating."""

    def __init__(self, channels: int = 4, time: int = 4, space: int = 8, mean: object = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.channels, self.time, self.space = channels, time, space
        mean = [0.0] * channels if mean is None else mean
        self.temperal_downsample = [False, True, True]
        self.temporal_compression_ratio, self.spatial_compression_ratio = time, space
        self.latents_mean, self.latents_std = torch.zeros(channels), torch.ones(channels)
        self.config = SimpleNamespace(
            z_dim=channels,
            latent_channels=channels,
            latents_mean=mean,
            latents_std=[1.0] * channels,
            scale_factor_temporal=time,
            scale_factor_spatial=space,
            temporal_compression_ratio=time,
            spatial_compression_ratio=space,
            scaling_factor=1.0,
            invert_scale_latents=False,
            block_out_channels=(8, 8, 8, 8),
            timestep_conditioning=False,
            cache_mag_vae=False,
            mel_bins=2,
        )

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, x: Tensor) -> Latents:
        if x.dim() == 4:  # a picture
            return Latents(self.encode(x[:, :, None]).mean[:, :, 0])
        frames = (x.shape[2] - 1) // self.time + 1
        grey = x.mean(dim=1, keepdim=True)[:, :, :: self.time][:, :, :frames]
        small = torch.nn.functional.avg_pool3d(grey.float(), (1, self.space, self.space))  # torch has no half one here
        return Latents(small.to(x.dtype).repeat(1, self.channels, 1, 1, 1))

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        pixels = z[:, :1].repeat(1, 3, 1, 1, 1).repeat_interleave(self.space, 3).repeat_interleave(self.space, 4)
        return (pixels.repeat_interleave(self.time, 2)[:, :, self.time - 1 :],)


def picture(pixels: int = 48):
    from PIL import Image

    return Image.linear_gradient("L").resize((pixels, pixels)).convert("RGB")


def a_vae(**how: object) -> Callable[[], dict[str, object]]:
    return lambda: {"vae": StandIn(**how)}


def text(clips: int, cfg: bool, scale: float, **how: object) -> dict[str, object]:
    return {**embeds(clips, cfg, **how), **size(48, 5), "guidance_scale": scale if cfg else 1.0}


def latents(clips: int, *shape: int) -> dict[str, object]:
    return {"latents": rows(clips, 5, *(shape or (4, 2, 6, 6)))}


def see_nothing(embedding: Tensor) -> Callable[[object], None]:
    """In place of an image encoder."""

    def ready(pipe: object) -> None:
        pipe.encode_image = lambda *args, **kwargs: embedding.clone()

    return ready
