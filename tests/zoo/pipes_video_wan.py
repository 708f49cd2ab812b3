"""Tiny stock pipelines of Wan's relatives."""

from zoo.family import rows
from zoo.pipes import unipc
from zoo.video_case import VideoCase, a_vae, latents, picture, see_nothing, text
from zoo.video_wan import animate as zoo_animate
from zoo.video_wan import wan_like


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


WAN_PIPES = (
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
)
