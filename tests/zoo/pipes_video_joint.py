"""Tiny stock pipelines around the joint attention of video and text."""

import diffusers
import torch

from zoo.family import TEXT, rows
from zoo.pipes import cog_ddim, embeds, size
from zoo.video_case import MODELS, StandIn, VideoCase, a_vae, latents, picture, see_nothing, text
from zoo.video_joint import hunyuan_like
from zoo.video_joint import motif as zoo_motif


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


def motif_i2v_call(clips: int, cfg: bool):
    return {**motif_call(clips, cfg), "prompt": None, "image": picture()}


def easyanimate_inpaint():
    config = dict(MODELS["easyanimate"].make().config) | {"in_channels": 9}
    return diffusers.EasyAnimateTransformer3DModel.from_config(config)


def easyanimate_inpaint_call(clips: int, cfg: bool):
    """The right half of every frame is made anew."""
    mask = torch.zeros(clips, 1, 5, 48, 48)
    mask[..., 24:] = 255
    call = easyanimate_call(clips, cfg) | {"video": rows(clips, 7, 3, 5, 48, 48).clamp(0, 1), "strength": 1.0}
    return {**call, "mask_video": mask}


CFG15 = {"mode": "two_calls", "w": (6.0,), "lone": False}


JOINT_PIPES = (
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
