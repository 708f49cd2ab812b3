"""The video models at their released shapes, with random weights, inside stock pipelines: embeddings in, latents out.

The cases are those of the cost benchmark with other sizes, and LTX-2 beside them. Weights are made on the device in
float32 and cast, so that nothing of a model's own constants is made in half precision; the largest takes 76 GB then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from demos.benchmarks.stg_models import BY_NAME, Case, Size
from demos.gpu.setting import Setting


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
        case: its pipeline; sizes `"full"` and `"dry"`.
        layer: what guidance skips: about two thirds of the depth, or the layer that the released pipeline skips.
        calls: whether the batch can be widened by hand (`demos.benchmarks.stg_rivals`), which knows one prediction.
        own: the pipeline's own skip guidance, as arguments beside its layers; empty where it has none.
        note: what of the released shape is cut.
    """

    case: Case
    layer: int
    calls: bool = True
    own: dict[str, Any] | None = None
    note: str = ""

    def build(self, setting: Setting, depth: int | None = None) -> Any:
        """The pipeline on the device, perhaps with the first blocks of every stack only; dry, with three."""
        depth = setting.pick(depth, 3)
        pipe = self.case.build(setting.pick("full", "dry"), setting.device, setting.dtype)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # its numbers belong on the CPU
        for name in ("blocks", "transformer_blocks", "single_transformer_blocks"):
            if depth and hasattr(pipe.transformer, name):
                del getattr(pipe.transformer, name)[depth:]
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        return pipe

    def skipped(self, setting: Setting) -> int:
        """The layer that guidance skips."""
        return setting.pick(self.layer, 1)

    def call(self, setting: Setting, steps: int) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        return self.case.call(setting.pick("full", "dry"), steps, setting.device, setting.dtype)

    def sized(self, size: Size) -> Model:
        """The same model at another number of tokens."""
        return replace(self, case=replace(self.case, sizes={"full": size, "dry": size}))


class Stub(nn.Module):
    """In place of a VAE that only says what its latents are like."""

    def __init__(self, channels: int, **said: Any) -> None:
        super().__init__()
        self.register_buffer("latents_mean", torch.zeros(channels))
        self.register_buffer("latents_std", torch.ones(channels))
        self.config = SimpleNamespace(scaling_factor=1.0, timestep_conditioning=False, **said)

    @property
    def device(self) -> torch.device:
        return self.latents_mean.device

    @property
    def dtype(self) -> torch.dtype:
        return self.latents_mean.dtype


class VideoStub(Stub):
    """LTX-2's video VAE."""

    spatial_compression_ratio, temporal_compression_ratio = 32, 8


class AudioStub(Stub):
    """LTX-2's audio VAE: 8 channels of 16 bands, 25 latent frames a second."""

    mel_compression_ratio, temporal_compression_ratio = 4, 4

    def __init__(self) -> None:
        super().__init__(128, latent_channels=8, sample_rate=16000, mel_hop_length=160, mel_bins=64)


class Connectors(Stub):
    """LTX-2's text connectors: the embeddings go to both streams."""

    def forward(self, text: Tensor, mask: Tensor, padding_side: str = "left") -> tuple[Tensor, Tensor, Tensor]:
        return text, text, mask


def _ltx2(size: Size) -> Any:
    """The audio stream is half as wide as the video's, as released."""
    model = diffusers.LTX2VideoTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        cross_attention_dim=size.width,
        audio_num_attention_heads=size.heads,
        audio_attention_head_dim=size.head_dim // 2,
        audio_cross_attention_dim=size.width // 2,
        caption_channels=size.text_width,
        num_layers=48,
        perturbed_attn=True,
    )
    return diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=VideoStub(128),
        audio_vae=AudioStub(),
        text_encoder=None,
        tokenizer=None,
        connectors=Connectors(1),
        transformer=model,
        vocoder=None,
    )


def _ltx2_call(size: Size) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    call: dict[str, Any] = {}
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(1, size.text, size.text_width, generator=generator)
        call[f"{prefix}prompt_attention_mask"] = torch.ones(1, size.text, dtype=torch.long)
    for prefix in ("", "audio_"):
        off = {"guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
        call |= {f"{prefix}{name}": value for name, value in off.items()}
    height, width = (32 * patches for patches in size.side)
    return call | {"height": height, "width": width, "num_frames": 8 * (size.frames - 1) + 1}


def _sized(name: str, full: Size, dry: Size) -> Case:
    return replace(BY_NAME[name], sizes={"full": full, "dry": dry})


MODELS = {
    "ltx": Model(_sized("ltx", Size(32, 64, 13, (16, 24), 128, 4096), Size(2, 16, 2, (2, 2), 4, 32)), layer=19),
    "wan": Model(
        _sized("wan", Size(12, 128, 9, (30, 52), 512, 4096), Size(2, 16, 2, (2, 2), 4, 32)),
        layer=20,
        note="33 of 81 frames",
    ),
    "ltx2": Model(
        Case(
            "ltx2",
            "LTX-2",
            "batched",
            _ltx2,
            _ltx2_call,
            {"full": Size(32, 128, 9, (16, 24), 256, 3840), "dry": Size(2, 16, 2, (2, 2), 4, 32)},
            {},
        ),
        layer=29,
        calls=False,
        own={"stg_scale": 1.0, "audio_stg_scale": 1.0},
        note="65 of 121 frames",
    ),
    "hunyuan": Model(
        _sized("hunyuan_distilled", Size(24, 128, 5, (32, 40), 256, 4096), Size(2, 32, 2, (2, 2), 4, 32)),
        layer=40,
        note="17 of 129 frames at 640 x 512",
    ),
}
