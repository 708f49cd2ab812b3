"""Tiny stock pipelines around the UNets with temporal layers, from an image or embeddings to latents."""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

from zoo.family import TEXT, randomise, rows
from zoo.pipes import placed
from zoo.unet import FRAMES, UNETS, motion

STEPS = 3
BY_UNET = {family.name: family for family in UNETS}


def svd_pipe(seed: int = 0) -> diffusers.StableVideoDiffusionPipeline:
    """With a real tiny VAE and image encoder: the image is encoded in every call."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=4
    )
    vision = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,  # what the pipeline resizes to
        patch_size=112,
        projection_dim=24,
    )
    side = {"height": 16, "width": 16}
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=randomise(CLIPVisionModelWithProjection(vision), seed),
        unet=BY_UNET["svd"].build(seed),
        # in place of the Euler scheduler, whose way of calling numpy is deprecated
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        feature_extractor=CLIPImageProcessor(size=side, crop_size=side),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_svd(pipe, clips: int = 1, cfg: bool = True, **overrides) -> Tensor:
    """CFG grows from 1 at the first frame to 3 at the last."""
    from PIL import Image

    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    call = {
        "image": [image, image.rotate(90)][:clips],
        "height": 8,
        "width": 8,
        "num_inference_steps": STEPS,
        "max_guidance_scale": 3.0 if cfg else 1.0,
        "noise_aug_strength": 0.0,
        "latents": rows(clips, 5, FRAMES, 4, 4, 4),
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe(**{**call, **overrides})


def animatediff_pipe(seed: int = 0, cls=diffusers.AnimateDiffPipeline, unet=None, vae=None, **others):
    pipe = cls(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet or BY_UNET["animatediff"].build(seed),
        motion_adapter=None,
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
        **others,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animatediff_video_pipe(seed: int = 0):
    return animatediff_pipe(seed, diffusers.AnimateDiffVideoToVideoPipeline)


def animatediff_xl_pipe(seed: int = 0):
    """The XL form, whose model also sees a pooled text and the sizes."""
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    }
    torch.manual_seed(seed)
    unet = randomise(motion(**added), seed + 1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    )
    return animatediff_pipe(
        seed, diffusers.AnimateDiffSDXLPipeline, unet, vae=vae, text_encoder_2=None, tokenizer_2=None
    )


def run_animatediff(pipe, clips: int = 1, cfg: bool = True, **overrides) -> Tensor:
    call = {
        "prompt_embeds": rows(clips, 1, TEXT, 24),
        "negative_prompt_embeds": rows(clips, 2, TEXT, 24),
        "num_frames": FRAMES,
        "height": 32,
        "width": 32,
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0 if cfg else 1.0,
        "latents": rows(clips, 5, 4, FRAMES, 4, 4),
        "output_type": "latent",
        "return_dict": False,
    }
    call |= overrides
    return pipe(**placed({name: value for name, value in call.items() if value is not None}, pipe))[0]


def run_animatediff_video(pipe, clips: int = 1, cfg: bool = True, **overrides) -> Tensor:
    """From the middle on: half of the steps."""
    return run_animatediff(
        pipe, clips, cfg, **{"num_frames": None, "strength": 0.5, "num_inference_steps": 6, **overrides}
    )


def run_animatediff_xl(pipe, clips: int = 1, cfg: bool = True, **overrides) -> Tensor:
    pooled = {"pooled_prompt_embeds": rows(clips, 3, 12), "negative_pooled_prompt_embeds": rows(clips, 4, 12)}
    return run_animatediff(pipe, clips, cfg, **{**pooled, **overrides})


@dataclass(frozen=True)
class UnetPipe:
    """One pipeline class around a UNet: how to make it and how to run it.

    Attributes:
        pipeline: name of its class.
        family: the zoo family of its denoiser.
    """

    name: str
    pipeline: str
    family: str
    make: Callable[..., diffusers.DiffusionPipeline]
    run: Callable[..., Tensor]

    def __repr__(self) -> str:
        return self.name


UNET_PIPES = (
    UnetPipe("svd", "StableVideoDiffusionPipeline", "svd", svd_pipe, run_svd),
    UnetPipe("animatediff", "AnimateDiffPipeline", "animatediff", animatediff_pipe, run_animatediff),
    UnetPipe(
        "animatediff_video",
        "AnimateDiffVideoToVideoPipeline",
        "animatediff",
        animatediff_video_pipe,
        run_animatediff_video,
    ),
    UnetPipe("animatediff_xl", "AnimateDiffSDXLPipeline", "animatediff", animatediff_xl_pipe, run_animatediff_xl),
)
BY_UNET_PIPE = {pipe.name: pipe for pipe in UNET_PIPES}
