"""Tiny stock pipelines around the zoo's further video transformers.

No text encoder runs; where a pipeline needs a VAE or an image encoder, a stand-in gives latents of the right shape.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import diffusers
import torch
from torch import Tensor, nn

from zoo.family import TEXT, Family, randomise, rows
from zoo.joint import JOINT
from zoo.one_stream import ONE_STREAM
from zoo.pipes import STEPS, cog_ddim, embeds, flow, size, unipc
from zoo.video_av import VIDEO_AUDIO
from zoo.video_cross import VIDEO_CROSS, cosmos, kandinsky5
from zoo.video_joint import VIDEO_JOINT, hunyuan_like
from zoo.video_joint import motif as zoo_motif
from zoo.video_wan import VIDEO_WAN, wan_like
from zoo.video_wan import animate as zoo_animate

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

    def run(self, pipe: diffusers.DiffusionPipeline, cfg: bool = True, **overrides: object) -> Tensor:
        common = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        call = {**common, "generator": torch.Generator().manual_seed(11), **self.call(self.clips, cfg), **overrides}
        out = pipe(**{name: value for name, value in call.items() if value is not ...})
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
        small = torch.nn.functional.avg_pool3d(grey, (1, self.space, self.space))
        return Latents(small.repeat(1, self.channels, 1, 1, 1))

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


# -- Wan's relatives --------------------------------------------------------------------------------------------------


def wan_v2v_call(clips: int, cfg: bool):
    call = text(clips, cfg, 5.0) | latents(clips) | {"strength": 0.6, "num_inference_steps": 5}
    return {**call, "num_frames": ...}


def vace_call(clips: int, cfg: bool):
    return text(clips, cfg, 5.0)


def vace():
    """The mask has one channel for every pixel of a latent one."""
    return wan_like("WanVACETransformer3DModel", rope_max_seq_len=32, vace_layers=[0, 2], vace_in_channels=2 * 4 + 64)


def animate():
    return zoo_animate(image_dim=20, added_kv_proj_dim=32)


def animate_call(clips: int, cfg: bool):
    """Two segments of five frames that overlap by one."""
    call = text(clips, cfg, 5.0, length=512)
    return {
        **call,
        "num_frames": ...,
        "image": picture(),
        "pose_video": [picture().rotate(10 * i) for i in range(9)],
        "face_video": [picture(16).rotate(10 * i) for i in range(9)],
        "segment_frame_length": 5,
        "prev_segment_conditioning_frames": 1,
    }


def skyreels_df_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 6.0), "prompt": None, "num_frames": 13, "ar_step": 2}


def skyreels_long_call(clips: int, cfg: bool):
    """Longer than the model's window: two chunks, the second one after a part of the first."""
    long = {"prompt": None, "num_frames": 13, "base_num_frames": 9, "overlap_history": 5, "addnoise_condition": 0}
    return {**text(clips, cfg, 6.0), **long}


def chronoedit():
    config = {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 32}
    return wan_like("ChronoEditTransformer3DModel", rope_max_seq_len=32, **config)


def chronoedit_call(clips: int, cfg: bool):
    """After one step only the first and the last frame go on."""
    call = text(clips, cfg, 5.0, length=512) | {"image": picture(), "num_frames": 9}
    return {**call, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 1}


def lucy():
    return wan_like("WanTransformer3DModel", layers=4, rope_max_seq_len=32, in_channels=8)


def lucy_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 5.0), "video": [picture()] * 5}


def anyflow_call(clips: int, cfg: bool):
    return text(clips, cfg, 5.0)


def helios_call(clips: int, cfg: bool):
    """Two chunks."""
    history = {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 2, "num_frames": 10}
    return {**text(clips, cfg, 5.0), **history}


# -- joint attention --------------------------------------------------------------------------------------------------


def cog_v2v_call(clips: int, cfg: bool):
    call = text(clips, cfg, 6.0) | latents(clips, 2, 4, 6, 6)
    return {**call, "num_frames": ..., "strength": 1.0}


def cog_control():
    config = dict(MODELS["cogvideox"].make().config) | {"in_channels": 8}
    return diffusers.CogVideoXTransformer3DModel.from_config(config)


def cog_control_call(clips: int, cfg: bool):
    call = text(clips, cfg, 6.0) | latents(clips, 2, 4, 6, 6)
    return {**call, "num_frames": ..., "control_video": [picture()] * 5}


def consisid():
    sizes = {"in_channels": 8, "num_attention_heads": 3, "attention_head_dim": 16}
    config = dict(MODELS["consisid"].make().config) | sizes
    return diffusers.ConsisIDTransformer3DModel.from_config(config)


def consisid_call(clips: int, cfg: bool):
    faces = {"id_cond": rows(clips, 8, 8), "id_vit_hidden": [rows(clips, 9, 3, 8), rows(clips, 10, 3, 8)]}
    if cfg:
        double = lambda t: torch.cat([t, t])  # noqa: E731
        faces = {"id_cond": double(faces["id_cond"]), "id_vit_hidden": [double(t) for t in faces["id_vit_hidden"]]}
    return {**text(clips, cfg, 6.0), "image": [picture()] * clips, **faces}


def hunyuan_text(clips: int, cfg: bool):
    """True CFG beside the scale that is an input of the model."""
    call = embeds(clips, cfg, mask="prompt_attention_mask", pooled=True)
    return {**call, **size(48, 5), "guidance_scale": 1.0, "true_cfg_scale": 4.0 if cfg else 1.0}


def hunyuan_i2v_call(clips: int, cfg: bool):
    return {**hunyuan_text(clips, cfg), "image": picture()}


def hunyuan_i2v():
    return hunyuan_like("HunyuanVideoTransformer3DModel", image_condition_type="token_replace", guidance_embeds=False)


def skyreels_hunyuan():
    config = dict(MODELS["hunyuan"].make().config) | {"in_channels": 8}
    return diffusers.HunyuanVideoTransformer3DModel.from_config(config)


def framepack_call(clips: int, cfg: bool):
    """Two sections. No text is masked: one row would have its masked text cut off."""
    call = hunyuan_text(clips, cfg) | {"image": picture(), "latent_window_size": 2, "num_frames": 10}
    return call | {name: torch.ones(clips, TEXT, dtype=torch.long) for name in call if name.endswith("_mask")}


def see_nothing(embedding: Tensor) -> Callable[[object], None]:
    """In place of an image encoder."""

    def ready(pipe: object) -> None:
        pipe.encode_image = lambda *args, **kwargs: embedding.clone()

    return ready


def hunyuan15_i2v_call(clips: int, cfg: bool):
    from zoo.pipes import hunyuan15_call

    call = hunyuan15_call(clips, cfg)
    return {**call, "image": picture(), "height": ..., "width": ...}


def ready_hunyuan15(pipe: object) -> None:
    pipe.vision_num_semantic_tokens = 3
    pipe.video_processor.calculate_default_height_width = lambda *args, **kwargs: (48, 48)
    pipe._get_image_embeds = lambda *args, **kwargs: rows(1, 8, 3, 20)


def easyanimate_call(clips: int, cfg: bool):
    return text(clips, cfg, 5.0, mask="prompt_attention_mask")


def motif():
    return zoo_motif(in_channels=9)


def motif_call(clips: int, cfg: bool):
    return embeds(clips, True, mask="prompt_attention_mask") | size(48, 5)


def with_guider():
    return {"vae": StandIn(), "guider": diffusers.ClassifierFreeGuidance(guidance_scale=6.0)}


# -- cross-attention --------------------------------------------------------------------------------------------------


def allegro_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 7.5, mask="prompt_attention_mask"), "negative_prompt": None, "clean_caption": False}


def ltx_condition_call(clips: int, cfg: bool):
    call = embeds(clips, cfg, mask="prompt_attention_mask") | size(96, 9)
    return {**call, "guidance_scale": 3.0 if cfg else 1.0, **latents(clips, 8, 2, 3, 3)}


class Harmless:
    """In place of NVIDIA's guardrail."""

    def to(self, device: object) -> None: ...

    def check_text_safety(self, prompt: str) -> bool:
        return True


def harmless(**vae: object) -> Callable[[], dict[str, object]]:
    return lambda: {"safety_checker": Harmless(), "vae": StandIn(**vae) if vae else None}


def cosmos_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 6.0), "num_frames": 9}


def cosmos2_image_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 6.0), "num_frames": ...}


def cosmos2_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 6.0), "image": picture()}


def cosmos2():
    return cosmos(in_channels=5)


def sana_call(clips: int, cfg: bool):
    call = text(clips, cfg, 6.0, mask="prompt_attention_mask") | size(64)
    return {**call, "negative_prompt": None, "num_frames": ..., "frames": 5, "use_resolution_binning": False}


def kandinsky5_call(clips: int, cfg: bool):
    call: dict[str, object] = {**size(64, 5), "guidance_scale": 5.0 if cfg else 1.0}
    for seed, prefix in ((1, ""), (2, "negative_"))[: 1 + cfg]:
        call[f"{prefix}prompt_embeds_qwen"] = rows(clips, seed, TEXT, 24)
        call[f"{prefix}prompt_embeds_clip"] = rows(clips, seed + 10, 12)
        call[f"{prefix}prompt_cu_seqlens"] = torch.arange(clips + 1, dtype=torch.int32) * TEXT
    return call


# -- video and sound --------------------------------------------------------------------------------------------------


class Connectors(nn.Module):
    """In place of LTX-2's text connectors: the embeddings go to both streams."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, text: Tensor, mask: Tensor, padding_side: str = "left"):
        return text, text + 0.5, mask


def ltx2_parts():
    return {"vae": StandIn(8, 8, 32), "audio_vae": AudioStandIn(), "connectors": Connectors(), "vocoder": None}


class AudioStandIn(StandIn):
    """In place of an audio VAE."""

    def __init__(self) -> None:
        super().__init__(4)
        self.mel_compression_ratio, self.temporal_compression_ratio, self.latent_hop_length = 1, 4, 4000
        self.latents_mean, self.latents_std = torch.zeros(8), torch.ones(8)
        self.config.sample_rate, self.config.mel_hop_length = 16000, 1000


def ltx2_call(clips: int, cfg: bool, **own: object):
    """Another scale for the sound; without the pipeline's own skip and modality passes unless asked."""
    call = embeds(clips, cfg, mask="prompt_attention_mask") | size(96, 9)
    scales = {"guidance_scale": 3.0 if cfg else 1.0, "audio_guidance_scale": 5.0 if cfg else 1.0}
    off = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    off |= {f"audio_{name}": value for name, value in off.items()}
    return {**call, **scales, **off, "frame_rate": 24.0, **own}


ltx2_own_call = functools.partial(
    ltx2_call,
    stg_scale=0.7,
    audio_stg_scale=0.6,
    modality_scale=2.0,
    audio_modality_scale=1.5,
    spatio_temporal_guidance_blocks=[0],
)
ltx2_rescaled_call = functools.partial(ltx2_own_call, guidance_rescale=0.7, audio_guidance_rescale=0.4)


karras = functools.partial(flow, use_karras_sigmas=True)


def kandinsky6_call(clips: int, cfg: bool, sound: bool = True):
    call: dict[str, object] = {**size(48, 5), "guidance_scale": 5.0 if cfg else 1.0, "sample_audio": sound}
    for seed, prefix in ((1, ""), (2, "negative_"))[: 1 + cfg]:
        call[f"{prefix}prompt_embeds"] = rows(clips, seed, TEXT, 24)
        call[f"{prefix}pooled_prompt_embeds"] = rows(clips, seed + 10, 12)
    return call


kandinsky6_silent_call = functools.partial(kandinsky6_call, sound=False)

# -- with a picture or a video to start from --------------------------------------------------------------------------


def skyreels_i2v():
    config = {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 32}
    return wan_like("SkyReelsV2Transformer3DModel", rope_max_seq_len=32, **config)


def skyreels_i2v_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 5.0, length=512), "image": picture()}


def skyreels_df_i2v_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 5.0), "prompt": None, "image": picture(), "num_frames": 13}


def skyreels_df_v2v_call(clips: int, cfg: bool):
    call = text(clips, cfg, 5.0) | {"num_frames": 13, "overlap_history": 5, "base_num_frames": 9}
    return {**call, "video": [picture()] * 5}


def sana_i2v_call(clips: int, cfg: bool):
    return {**sana_call(clips, cfg), "image": picture(64)}


def kandinsky5_image_call(clips: int, cfg: bool):
    return {**kandinsky5_call(clips, cfg), "num_frames": ...}


def kandinsky5_i2v_call(clips: int, cfg: bool):
    """Six latent frames: the first four are brought to the deviation of the others."""
    return {**kandinsky5_call(clips, cfg), "image": picture(64), "num_frames": 21}


def small_pictures(pipe: object) -> None:
    pipe.resolutions = [(64, 64)]


def kandinsky5_i2i_call(clips: int, cfg: bool):
    return {**kandinsky5_image_call(clips, cfg), "image": picture(64)}


def kandinsky5_conditioned():
    return kandinsky5(visual_cond=True)


def motif_i2v_call(clips: int, cfg: bool):
    return {**motif_call(clips, cfg), "prompt": None, "image": picture()}


def ltx2_i2v_call(clips: int, cfg: bool):
    return {**ltx2_own_call(clips, cfg), "image": picture(96), "image_crf": 0}


def easyanimate_inpaint():
    config = dict(MODELS["easyanimate"].make().config) | {"in_channels": 9}
    return diffusers.EasyAnimateTransformer3DModel.from_config(config)


def easyanimate_inpaint_call(clips: int, cfg: bool):
    """The right half of every frame is made anew."""
    mask = torch.zeros(clips, 1, 5, 48, 48)
    mask[..., 24:] = 255
    call = easyanimate_call(clips, cfg) | {"video": rows(clips, 7, 3, 5, 48, 48).clamp(0, 1), "strength": 1.0}
    return {**call, "mask_video": mask}


SANA_FLOW = functools.partial(flow, shift=3.0)
CFG15 = {"mode": "two_calls", "w": (6.0,), "lone": False}

VIDEO_PIPES = (
    VideoCase("wan_v2v", "WanVideoToVideoPipeline", "wan", wan_v2v_call, "two_calls", (5.0,), unipc),
    VideoCase("wan_vace", "WanVACEPipeline", "wan_vace", vace_call, "two_calls", (5.0,), unipc, a_vae(), vace, clips=1),
    VideoCase(
        "wan_animate",
        "WanAnimatePipeline",
        "wan_animate",
        animate_call,
        "two_calls",
        (5.0,),
        unipc,
        a_vae(),
        animate,
        clips=1,
        runs=2,
        ready=see_nothing(rows(1, 8, 5, 20)),
    ),
    VideoCase("lucy", "LucyEditPipeline", "wan", lucy_call, "two_calls", (5.0,), unipc, a_vae(), lucy, clips=1),
    VideoCase("skyreels", "SkyReelsV2Pipeline", "skyreels", anyflow_call, "two_calls", (5.0,), unipc),
    VideoCase(
        "skyreels_df",
        "SkyReelsV2DiffusionForcingPipeline",
        "skyreels_df",
        skyreels_df_call,
        "two_calls",
        (6.0,),
        unipc,
        a_vae(),
        clips=1,
    ),
    VideoCase(
        "skyreels_long",
        "SkyReelsV2DiffusionForcingPipeline",
        "skyreels",
        skyreels_long_call,
        "two_calls",
        (6.0,),
        unipc,
        a_vae(),
        clips=1,
        runs=2,
    ),
    VideoCase(
        "chronoedit",
        "ChronoEditPipeline",
        "chronoedit",
        chronoedit_call,
        "two_calls",
        (5.0,),
        unipc,
        a_vae(),
        chronoedit,
        ready=see_nothing(rows(1, 8, 5, 20)),
    ),
    VideoCase("anyflow", "AnyFlowPipeline", "anyflow", anyflow_call, "batched", (5.0,)),
    VideoCase("helios", "HeliosPipeline", "helios", helios_call, "two_calls", (5.0,), parts=a_vae(), runs=2),
    VideoCase("cogvideox_v2v", "CogVideoXVideoToVideoPipeline", "cogvideox", cog_v2v_call, "batched", (6.0,), cog_ddim),
    VideoCase(
        "cogvideox_control",
        "CogVideoXFunControlPipeline",
        "cogvideox",
        cog_control_call,
        "batched",
        (6.0,),
        cog_ddim,
        a_vae(),
        cog_control,
        clips=1,
    ),
    VideoCase(
        "consisid", "ConsisIDPipeline", "consisid", consisid_call, "batched", (6.0,), cog_ddim, a_vae(), consisid
    ),
    VideoCase(
        "hunyuan_i2v",
        "HunyuanVideoImageToVideoPipeline",
        "hunyuan_i2v",
        hunyuan_i2v_call,
        "two_calls",
        (4.0,),
        parts=a_vae(),
        model=hunyuan_i2v,
        clips=1,
    ),
    VideoCase(
        "hunyuan_skyreels",
        "HunyuanSkyreelsImageToVideoPipeline",
        "hunyuan",
        hunyuan_i2v_call,
        "two_calls",
        (4.0,),
        parts=a_vae(),
        model=skyreels_hunyuan,
        clips=1,
    ),
    VideoCase(
        "framepack",
        "HunyuanVideoFramepackPipeline",
        "framepack",
        framepack_call,
        "two_calls",
        (4.0,),
        parts=a_vae(),
        clips=1,
        runs=2,
        ready=see_nothing(rows(1, 8, 3, 20)),
    ),
    VideoCase(
        "hunyuan15_i2v",
        "HunyuanVideo15ImageToVideoPipeline",
        "hunyuan15",
        hunyuan15_i2v_call,
        parts=with_guider,
        ready=ready_hunyuan15,
        **CFG15,
    ),
    VideoCase("easyanimate", "EasyAnimatePipeline", "easyanimate", easyanimate_call, "batched", (5.0,), parts=a_vae()),
    VideoCase("motif", "MotifVideoPipeline", "motif", motif_call, parts=with_guider, model=motif, **CFG15),
    VideoCase("allegro", "AllegroPipeline", "allegro", allegro_call, "batched", (7.5,), cog_ddim),
    VideoCase(
        "ltx_condition",
        "LTXConditionPipeline",
        "ltx",
        ltx_condition_call,
        "batched",
        (3.0,),
        parts=a_vae(channels=8, time=8, space=32),
    ),
    VideoCase(
        "cosmos",
        "CosmosTextToWorldPipeline",
        "cosmos",
        cosmos_call,
        "two_calls",
        (7.0,),
        diffusers.EDMEulerScheduler,
        harmless(),
    ),
    VideoCase(
        "cosmos2_image",
        "Cosmos2TextToImagePipeline",
        "cosmos",
        cosmos2_image_call,
        "two_calls",
        (7.0,),
        karras,
        parts=harmless(channels=4),
    ),
    VideoCase(
        "cosmos2",
        "Cosmos2VideoToWorldPipeline",
        "cosmos",
        cosmos2_call,
        "two_calls",
        (7.0,),
        karras,
        parts=harmless(channels=4),
        model=cosmos2,
        clips=1,
    ),
    VideoCase(
        "cosmos25",
        "Cosmos2_5_PredictBasePipeline",
        "cosmos",
        cosmos2_call,
        "two_calls",
        (7.0,),
        unipc,
        harmless(channels=4),
        cosmos2,
        clips=1,
    ),
    VideoCase("sana_video", "SanaVideoPipeline", "sana_video", sana_call, "batched", (6.0,), SANA_FLOW),
    VideoCase("kandinsky5", "Kandinsky5T2VPipeline", "kandinsky5", kandinsky5_call, "two_calls", (5.0,)),
    VideoCase(
        "kandinsky6",
        "Kandinsky6TI2VAPipeline",
        "kandinsky6",
        kandinsky6_call,
        "two_calls",
        (5.0, 5.0),
        parts=lambda: {"audio_vae": AudioStandIn(), "vocoder": Connectors()},
        layer=2,
    ),
    VideoCase(
        "kandinsky6_silent",
        "Kandinsky6TI2VAPipeline",
        "kandinsky6",
        kandinsky6_silent_call,
        "two_calls",
        (5.0,),
        layer=2,
    ),
    VideoCase("ltx2", "LTX2Pipeline", "ltx2", ltx2_call, "batched", (3.0, 5.0), parts=ltx2_parts),
    VideoCase("ltx2_own", "LTX2Pipeline", "ltx2_gated", ltx2_own_call, "batched", (3.0, 5.0), parts=ltx2_parts),
    VideoCase(
        "ltx2_rescaled",
        "LTX2Pipeline",
        "ltx2_gated",
        ltx2_rescaled_call,
        "batched",
        (3.0, 5.0),
        parts=ltx2_parts,
        lone=False,
    ),
    VideoCase(
        "skyreels_i2v",
        "SkyReelsV2ImageToVideoPipeline",
        "skyreels",
        skyreels_i2v_call,
        "two_calls",
        (5.0,),
        unipc,
        a_vae(),
        skyreels_i2v,
        lone=False,
        ready=see_nothing(rows(1, 8, 5, 20)),
    ),
    VideoCase(
        "skyreels_df_i2v",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "skyreels_df",
        skyreels_df_i2v_call,
        "two_calls",
        (5.0,),
        unipc,
        a_vae(),
        clips=1,
        lone=False,
    ),
    VideoCase(
        "skyreels_df_v2v",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        "skyreels",
        skyreels_df_v2v_call,
        "two_calls",
        (5.0,),
        unipc,
        a_vae(),
        clips=1,
        lone=False,
    ),
    VideoCase(
        "sana_i2v",
        "SanaImageToVideoPipeline",
        "sana_video",
        sana_i2v_call,
        "batched",
        (6.0,),
        SANA_FLOW,
        a_vae(),
        lone=False,
    ),
    VideoCase(
        "kandinsky5_image",
        "Kandinsky5T2IPipeline",
        "kandinsky5",
        kandinsky5_image_call,
        "two_calls",
        (5.0,),
        lone=False,
        ready=small_pictures,
    ),
    VideoCase(
        "kandinsky5_i2v",
        "Kandinsky5I2VPipeline",
        "kandinsky5",
        kandinsky5_i2v_call,
        "two_calls",
        (5.0,),
        parts=a_vae(),
        model=kandinsky5_conditioned,
        clips=1,
        lone=False,
    ),
    VideoCase(
        "kandinsky5_i2i",
        "Kandinsky5I2IPipeline",
        "kandinsky5",
        kandinsky5_i2i_call,
        "two_calls",
        (5.0,),
        parts=a_vae(),
        model=kandinsky5_conditioned,
        clips=1,
        lone=False,
        ready=small_pictures,
    ),
    VideoCase(
        "motif_i2v",
        "MotifVideoImage2VideoPipeline",
        "motif",
        motif_i2v_call,
        parts=with_guider,
        model=motif,
        clips=1,
        **CFG15,
    ),
    VideoCase(
        "ltx2_i2v",
        "LTX2ImageToVideoPipeline",
        "ltx2_gated",
        ltx2_i2v_call,
        "batched",
        (3.0, 5.0),
        parts=ltx2_parts,
        lone=False,
    ),
    VideoCase(
        "ltx2_condition",
        "LTX2ConditionPipeline",
        "ltx2_gated",
        ltx2_own_call,
        "batched",
        (3.0, 5.0),
        parts=ltx2_parts,
        lone=False,
    ),
    VideoCase(
        "cosmos_v2w",
        "CosmosVideoToWorldPipeline",
        "cosmos",
        cosmos2_call,
        "two_calls",
        (7.0,),
        diffusers.EDMEulerScheduler,
        harmless(channels=4),
        cosmos2,
        clips=1,
        lone=False,
    ),
    VideoCase(
        "ltx2_in_context",
        "LTX2InContextPipeline",
        "ltx2_gated",
        ltx2_own_call,
        "batched",
        (3.0, 5.0),
        parts=ltx2_parts,
        lone=False,
    ),
    VideoCase(
        "easyanimate_inpaint",
        "EasyAnimateInpaintPipeline",
        "easyanimate",
        easyanimate_inpaint_call,
        "batched",
        (5.0,),
        parts=a_vae(),
        model=easyanimate_inpaint,
        lone=False,
    ),
)

BY_VIDEO = {case.name: case for case in VIDEO_PIPES}
