"""Tiny stock pipelines around the zoo's models, called with random prompt embeddings for latents.

Components that a call does not touch are None. No text encoder runs, nothing is downloaded.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

from zoo.family import TEXT, Family, prefix_mask, randomise, rows
from zoo.image_joint import IMAGE_JOINT
from zoo.image_packed import IMAGE_PACKED
from zoo.image_single import IMAGE_SINGLE
from zoo.joint import JOINT
from zoo.one_stream import ONE_STREAM

MODELS: dict[str, Family] = {
    family.name: family for family in ONE_STREAM + JOINT + IMAGE_JOINT + IMAGE_SINGLE + IMAGE_PACKED
}
STEPS = 3


@dataclass(frozen=True)
class PipeCase:
    """One pipeline class in one way of guiding.

    Attributes:
        family: The zoo family of its denoiser.
        make: Builds the pipeline; takes a seed.
        call: `(num_prompts, cfg) -> ` the keyword arguments of the call.
        cfg_modes: How the denoiser is called with `cfg=True`, then with `cfg=False`: "batched" is one call
            with rows [uncond, cond], "two_calls" cond then uncond, "single" cond alone.
    """

    name: str
    family: str
    make: Callable[[int], diffusers.DiffusionPipeline]
    call: Callable[[int, bool], dict[str, object]]
    cfg_modes: tuple[str, ...]

    def __repr__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> diffusers.DiffusionPipeline:
        pipe = self.make(seed)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call_kwargs(self, num_prompts: int = 1, cfg: bool = True) -> dict[str, object]:
        """Fresh arguments for `pipe(...)`: a new seeded generator every time."""
        common = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        generator = torch.Generator().manual_seed(11)
        return {**common, "generator": generator, **self.call(num_prompts, cfg)}

    def run(
        self, pipe: diffusers.DiffusionPipeline, num_prompts: int = 1, cfg: bool = True, **overrides: object
    ) -> Tensor:
        return pipe(**{**placed(self.call_kwargs(num_prompts, cfg), pipe), **overrides})[0]


def placed(value: object, pipe: diffusers.DiffusionPipeline) -> object:
    """The tensors of a call as the pipeline's text encoder would have made them: on its device, in its precision."""
    if isinstance(value, dict):
        return {key: placed(each, pipe) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(placed(each, pipe) for each in value)
    if not isinstance(value, Tensor):
        return value
    denoiser = next(pipe.components[name] for name in ("transformer", "unet") if pipe.components.get(name) is not None)
    return value.to(pipe._execution_device, denoiser.dtype if value.is_floating_point() else None)


def embeds(num_prompts: int, cfg: bool, length: int = TEXT, mask: str | None = None, pooled: bool = False):
    """Prompt embeddings under the names that most pipelines share, negative ones only with CFG."""
    out: dict[str, Tensor] = {}
    for seed, prefix in ((1, ""), (2, "negative_"))[: 1 + cfg]:
        out[f"{prefix}prompt_embeds"] = rows(num_prompts, seed, length, 24)
        if mask:
            out[f"{prefix}{mask}"] = prefix_mask(num_prompts, length)
        if pooled:
            out[f"{prefix}pooled_prompt_embeds"] = rows(num_prompts, seed + 10, 12)
    return out


def size(pixels: int, num_frames: int | None = None) -> dict[str, int]:
    frames = {} if num_frames is None else {"num_frames": num_frames}
    return {"height": pixels, "width": pixels, **frames}


def simple(cls: str, family: str, scheduler: Callable[[], object], *absent: str, **config: object):
    """A pipeline whose components are the denoiser, a scheduler and nothing else."""

    def make(seed: int) -> diffusers.DiffusionPipeline:
        nothing = dict.fromkeys((*absent, "vae", "text_encoder", "tokenizer"))
        return getattr(diffusers, cls)(
            **nothing, transformer=MODELS[family].build(seed), scheduler=scheduler(), **config
        )

    return make


# schedulers, as the released checkpoints have them

flow = diffusers.FlowMatchEulerDiscreteScheduler
unipc = functools.partial(
    diffusers.UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)
cog_ddim = functools.partial(
    diffusers.CogVideoXDDIMScheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True
)
ddim = functools.partial(diffusers.DDIMScheduler, beta_schedule="linear", clip_sample=False)


def ltx_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, cfg, mask="prompt_attention_mask")
    return {**text, **size(96, 9), "guidance_scale": 3.0 if cfg else 1.0}


def ltx_i2v_call(num_prompts: int, cfg: bool):
    """Packed latents given directly: frame 0 is the condition and is not denoised."""
    return {**ltx_call(num_prompts, cfg), "latents": rows(num_prompts, 5, 2 * 3 * 3, 8)}


def wan_call(num_prompts: int, cfg: bool):
    return {**embeds(num_prompts, cfg), **size(48, 5), "guidance_scale": 5.0 if cfg else 1.0}


def wan22(seed: int):
    """Two transformers with different weights; the boundary lies between the first and the second step."""
    second = MODELS["wan"].build(seed + 50)
    return simple("WanPipeline", "wan", unipc, transformer_2=second, boundary_ratio=0.875)(seed)


def wan22_call(num_prompts: int, cfg: bool):
    return {**wan_call(num_prompts, cfg), "guidance_scale_2": 3.0 if cfg else 1.0}


def wan_i2v(seed: int):
    """A real tiny VAE and image encoder: this pipeline encodes the image in every call."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    vision = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    side = {"height": 16, "width": 16}
    return diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        image_encoder=randomise(CLIPVisionModel(vision), seed),
        image_processor=CLIPImageProcessor(size=side, crop_size=side),
        transformer=MODELS["wan_i2v"].build(seed),
        scheduler=unipc(),
    )


def wan_i2v_call(num_prompts: int, cfg: bool):
    from PIL import Image

    image = Image.linear_gradient("L").resize((48, 48)).convert("RGB")
    text = embeds(num_prompts, cfg, length=512)
    return {**text, **size(48, 5), "image": image, "guidance_scale": 5.0 if cfg else 1.0}


def cog_call(num_prompts: int, cfg: bool):
    return {**embeds(num_prompts, cfg), **size(48, 5), "guidance_scale": 6.0 if cfg else 1.0}


def cog_dynamic_call(num_prompts: int, cfg: bool):
    return {**cog_call(num_prompts, cfg), "use_dynamic_cfg": cfg}


def cog_i2v(seed: int):
    """A real tiny VAE: the image is encoded in every call, and its latents are further input channels."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2
    )
    config = dict(MODELS["cogvideox"].make().config) | {"in_channels": 8}
    transformer = diffusers.CogVideoXTransformer3DModel.from_config(config)
    return diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=randomise(transformer, seed + 1),
        scheduler=cog_ddim(),
    )


def cog_i2v_call(num_prompts: int, cfg: bool):
    from PIL import Image

    image = Image.linear_gradient("L").resize((48, 48)).convert("RGB")
    return {**cog_call(num_prompts, cfg), "image": [image] * num_prompts}


def mochi_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, cfg, mask="prompt_attention_mask")
    return {**text, **size(48, 7), "guidance_scale": 4.5 if cfg else 1.0}


def hunyuan_call(num_prompts: int, cfg: bool):
    """Guidance-distilled: one call per step, the scale is an input of the model."""
    text = embeds(num_prompts, False, mask="prompt_attention_mask", pooled=True)
    return {**text, **size(48, 5), "guidance_scale": 6.0}


def hunyuan_true_cfg_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, cfg, mask="prompt_attention_mask", pooled=True)
    return {**hunyuan_call(num_prompts, cfg), **text, "true_cfg_scale": 4.0 if cfg else 1.0}


def hunyuan15(seed: int, guidance_scale: float = 6.0):
    """The guider is a component, so CFG is not an argument of the call. The VAE gives the sizes."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae.eval(),
        transformer=MODELS["hunyuan15"].build(seed),
        scheduler=flow(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=guidance_scale),
    )
    pipe.vision_num_semantic_tokens = 3  # 729 masked image tokens would cost forty times the video's
    return pipe


def hunyuan15_call(num_prompts: int, cfg: bool):
    out: dict[str, object] = {}
    for seed, prefix in ((1, ""), (2, "negative_")):
        out[f"{prefix}prompt_embeds"] = rows(num_prompts, seed, TEXT, 24)
        out[f"{prefix}prompt_embeds_mask"] = prefix_mask(num_prompts, TEXT)
        out[f"{prefix}prompt_embeds_2"] = rows(num_prompts, seed + 10, 4, 12)
        out[f"{prefix}prompt_embeds_mask_2"] = prefix_mask(num_prompts, 4)
    return {**out, **size(48, 5)}


def latte_call(num_prompts: int, cfg: bool):
    text = {"negative_prompt": None, "clean_caption": False, "mask_feature": False}
    return {
        **embeds(num_prompts, cfg),
        **text,
        **size(48),
        "video_length": 3,
        "guidance_scale": 7.5 if cfg else 1.0,
    }


def sd3_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, cfg, pooled=True)
    return {**text, **size(64), "guidance_scale": 7.0 if cfg else 1.0}


def flux_call(num_prompts: int, cfg: bool):
    """Guidance-distilled."""
    return {**embeds(num_prompts, False, pooled=True), **size(64), "guidance_scale": 3.5}


def flux_true_cfg_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, cfg, pooled=True)
    return {**flux_call(num_prompts, cfg), **text, "true_cfg_scale": 4.0 if cfg else 1.0}


BATCHED, TWO_CALLS, SINGLE = ("batched", "single"), ("two_calls", "single"), ("single",)

make_ltx = simple("LTXPipeline", "ltx", flow)
make_ltx_i2v = simple("LTXImageToVideoPipeline", "ltx", flow)
make_wan = simple("WanPipeline", "wan", unipc)
make_wan_ti2v = simple("WanPipeline", "wan", unipc, expand_timesteps=True)
make_cog = simple("CogVideoXPipeline", "cogvideox", cog_ddim)
make_mochi = simple("MochiPipeline", "mochi", functools.partial(flow, invert_sigmas=True))
make_hunyuan = simple(
    "HunyuanVideoPipeline", "hunyuan", functools.partial(flow, shift=7.0), "text_encoder_2", "tokenizer_2"
)
make_hunyuan15_no_cfg = functools.partial(hunyuan15, guidance_scale=1.0)
make_latte = simple("LattePipeline", "latte", ddim)
SD3_TEXT = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
make_sd3 = simple("StableDiffusion3Pipeline", "sd3", functools.partial(flow, shift=3.0), *SD3_TEXT)
make_sd35 = simple("StableDiffusion3Pipeline", "sd35", functools.partial(flow, shift=3.0), *SD3_TEXT)
make_flux = simple("FluxPipeline", "flux", flow, "text_encoder_2", "tokenizer_2")

PIPES = (
    PipeCase("ltx", "ltx", make_ltx, ltx_call, BATCHED),
    PipeCase("ltx_i2v", "ltx", make_ltx_i2v, ltx_i2v_call, BATCHED),
    PipeCase("wan", "wan", make_wan, wan_call, TWO_CALLS),
    PipeCase("wan_ti2v", "wan", make_wan_ti2v, wan_call, TWO_CALLS),
    PipeCase("wan22", "wan", wan22, wan22_call, TWO_CALLS),
    PipeCase("wan_i2v", "wan_i2v", wan_i2v, wan_i2v_call, TWO_CALLS),
    PipeCase("cogvideox", "cogvideox", make_cog, cog_call, BATCHED),
    PipeCase("cogvideox_dynamic", "cogvideox", make_cog, cog_dynamic_call, BATCHED),
    PipeCase("cogvideox_i2v", "cogvideox", cog_i2v, cog_i2v_call, BATCHED),
    PipeCase("mochi", "mochi", make_mochi, mochi_call, BATCHED),
    PipeCase("hunyuan", "hunyuan", make_hunyuan, hunyuan_call, SINGLE),
    PipeCase("hunyuan_true_cfg", "hunyuan", make_hunyuan, hunyuan_true_cfg_call, TWO_CALLS),
    PipeCase("hunyuan15", "hunyuan15", hunyuan15, hunyuan15_call, ("two_calls",)),
    PipeCase("hunyuan15_no_cfg", "hunyuan15", make_hunyuan15_no_cfg, hunyuan15_call, SINGLE),
    PipeCase("latte", "latte", make_latte, latte_call, BATCHED),
    PipeCase("sd3", "sd3", make_sd3, sd3_call, BATCHED),
    PipeCase("sd35", "sd35", make_sd35, sd3_call, BATCHED),
    PipeCase("flux", "flux", make_flux, flux_call, SINGLE),
    PipeCase("flux_true_cfg", "flux", make_flux, flux_true_cfg_call, TWO_CALLS),
)

BY_PIPE = {case.name: case for case in PIPES}


def understand_prompts(pipe: diffusers.LTXPipeline | diffusers.WanPipeline) -> None:
    """In place of the text encoder: the same words give the same embeddings."""
    masked = isinstance(pipe, diffusers.LTXPipeline)

    def encode(prompt, num_videos_per_prompt=1, **_):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        text = torch.cat([rows(1, sum(map(ord, words)) % 1000 + 100, TEXT, 24) for words in prompts])
        text = text.repeat_interleave(num_videos_per_prompt, dim=0)
        return (text, torch.ones(text.shape[:2], dtype=torch.long)) if masked else text

    pipe._get_t5_prompt_embeds = encode
