"""Image transformers with a joint attention over text and image, beyond SD3 and Flux."""

import dataclasses
import warnings

import diffusers
import torch

from zoo import image_values, values
from zoo.family import HEAD_DIM, HEADS, TEXT, BlockKind, Family, numbered, prefix_mask, rows, timesteps
from zoo.image_cogview import IMAGE_COGVIEW
from zoo.joint import dual, single

WIDTH = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
LAYERS = {"num_layers": 2, "num_single_layers": 2}


def places(side=4, text=TEXT, axes=3):
    """(img_ids, txt_ids): rows and columns of a square of tokens."""
    y, x = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    image = torch.stack([torch.zeros(side * side), y.flatten(), x.flatten()], dim=-1)
    return {
        "img_ids": torch.nn.functional.pad(image, (0, axes - 3)),
        "txt_ids": torch.zeros(text, axes),
    }


def tokens(batch, seed):
    return {
        "hidden_states": rows(batch, seed, 16, 16),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "timestep": timesteps(batch) / 1000,
    }


def dual_and_packed(first, second, **stacks):
    return numbered({"transformer_blocks": (2, first), "single_transformer_blocks": (2, second)})


FLUX_DUAL = dual(values.FluxValues, "eh")
FLUX_SINGLE = single(values.FluxSingleValues, "eh")
PACKED_SINGLE = BlockKind(returns="h", projections={"attn": ("proj_out:attn",), "mlp": ("proj_out:mlp",)})

# Flux 2: in the single blocks one module is attention and feed-forward, from its first projection to its last


def flux2(**config):
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **WIDTH,
        **LAYERS,
        **config,
    )


def flux2_inputs(batch=2, seed=0):
    return {**tokens(batch, seed), **places(axes=4), "guidance": torch.full((batch,), 3.5)}


def klein():
    return flux2(guidance_embeds=False)


FLUX2_DUAL = BlockKind(
    returns="eh",
    projections={
        "attn": ("attn.to_out.0", "attn.to_add_out"),
        "mlp": ("ff.linear_out", "ff_context.linear_out"),
    },
    values={"attn": values.FluxValues},
)
FLUX2_SINGLE = BlockKind(returns="h", projections={})

# Chroma: as Flux, text and image as one sequence in the single blocks, a mask over both


def chroma():
    with warnings.catch_warnings():  # diffusers' own use of a name that it deprecates
        warnings.simplefilter("ignore", FutureWarning)
        return diffusers.ChromaTransformer2DModel(
            in_channels=16,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
            **WIDTH,
            **LAYERS,
        )


def chroma_inputs(batch=2, seed=0):
    mask = torch.cat([prefix_mask(batch, TEXT), torch.ones(batch, 16, dtype=torch.long)], dim=1)
    return {**tokens(batch, seed), **places(), "attention_mask": mask.float()}


CHROMA_DUAL = dual(image_values.ChromaValues, "eh")

# Bria, Bria FIBO, LongCat-Image, Ovis-Image: kin of Flux


def bria():
    return diffusers.BriaTransformer2DModel(
        in_channels=16, joint_attention_dim=24, axes_dims_rope=[4, 6, 6], **WIDTH, **LAYERS
    )


def bria_inputs(batch=2, seed=0):
    return {**tokens(batch, seed), **places(), "timestep": timesteps(batch)}


def bria_fibo():
    return diffusers.BriaFiboTransformer2DModel(
        in_channels=16, joint_attention_dim=24, text_encoder_dim=12, axes_dims_rope=[4, 6, 6], **WIDTH, **LAYERS
    )


def bria_fibo_inputs(batch=2, seed=0):
    layers = [rows(batch, seed + 5 + i, TEXT, 12) for i in range(4)]
    return {**bria_inputs(batch, seed), "text_encoder_layers": layers}


def longcat():
    return diffusers.LongCatImageTransformer2DModel(
        in_channels=16, joint_attention_dim=24, axes_dims_rope=[4, 6, 6], **WIDTH, **LAYERS
    )


def ovis():
    return diffusers.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), **WIDTH, **LAYERS
    )


def flux_like_inputs(batch=2, seed=0):
    return {**tokens(batch, seed), **places()}


# Qwen-Image: dual blocks only, a mask over the text


def qwen(**config):
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        **WIDTH,
        **config,
    )


def qwen_inputs(batch=2, seed=0):
    return {
        **tokens(batch, seed),
        "encoder_hidden_states_mask": prefix_mask(batch, TEXT).bool(),
        "img_shapes": [[(1, 4, 4)]] * batch,
    }


QWEN_BLOCK = BlockKind(
    returns="eh",
    projections={
        "attn": ("attn.to_out.0", "attn.to_add_out"),
        "mlp": ("img_mlp.net.2", "txt_mlp.net.2"),
    },
    values={"attn": image_values.QwenValues},
)

# HunyuanImage 2.1: as HunyuanVideo, in the plane; a second text for glyphs


def hunyuan_image():
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=(1, 1),
        text_embed_dim=24,
        text_embed_2_dim=12,
        rope_axes_dim=(8, 8),
        **WIDTH,
        **LAYERS,
    )


def hunyuan_image_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 4, 4),
        "timestep": timesteps(batch),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "encoder_attention_mask": prefix_mask(batch, TEXT),
        "encoder_hidden_states_2": rows(batch, seed + 2, 4, 12),
        "encoder_attention_mask_2": prefix_mask(batch, 4),
    }


# AuraFlow: the attention's result is only what the feed-forward sees; eight register tokens before the text


def auraflow():
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
        **WIDTH,
    )


def auraflow_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 8, 8),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "timestep": timesteps(batch) / 1000,
    }


AURAFLOW_JOINT = BlockKind(
    returns="eh",
    projections={
        "attn": ("attn.to_out.0", "attn.to_add_out"),
        "mlp": ("ff.out_projection", "ff_context.out_projection"),
    },
    values={"attn": image_values.AuraFlowValues},
)
AURAFLOW_SINGLE = BlockKind(returns="h", projections={"attn": ("attn.to_out.0",), "mlp": ("ff.out_projection",)})

# HiDream: every block wrapped in another module; a text of its own is added to each block's text


def hidream(experts=2):
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        caption_channels=[24, 24],
        text_emb_dim=12,
        num_routed_experts=experts,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(8, 8),
        llama_layers=[0, 1, 1, 0],
        **WIDTH,
        **LAYERS,
    )


def hidream_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 8, 8),
        "timesteps": timesteps(batch),
        "encoder_hidden_states_t5": rows(batch, seed + 1, TEXT, 24),
        "encoder_hidden_states_llama3": torch.stack([rows(batch, seed + 2 + i, 4, 24) for i in range(2)]),
        "pooled_embeds": rows(batch, seed + 4, 12),
    }


EXPERTS = tuple(f"block.ff_i.{name}.w2" for name in ("shared_experts", "experts.0", "experts.1"))
HIDREAM_DUAL = BlockKind(
    returns="he",
    projections={"attn": ("block.attn1.to_out", "block.attn1.to_out_t"), "mlp": (*EXPERTS, "block.ff_t.w2")},
    values={"block.attn1": image_values.HiDreamValues},
)
HIDREAM_SINGLE = BlockKind(returns="h", projections={"attn": ("block.attn1.to_out",), "mlp": EXPERTS})

# CogView 3 Plus, CogView 4, GLM-Image: one attention and one feed-forward for both streams


_FAMILIES = (
    Family("flux2", flux2, flux2_inputs, dual_and_packed(FLUX2_DUAL, FLUX2_SINGLE)),
    Family("chroma", chroma, chroma_inputs, dual_and_packed(CHROMA_DUAL, PACKED_SINGLE)),
    Family("bria", bria, bria_inputs, dual_and_packed(FLUX_DUAL, FLUX_SINGLE)),
    Family("bria_fibo", bria_fibo, bria_fibo_inputs, dual_and_packed(FLUX_DUAL, PACKED_SINGLE)),
    Family("longcat", longcat, flux_like_inputs, dual_and_packed(FLUX_DUAL, FLUX_SINGLE)),
    Family("ovis", ovis, flux_like_inputs, dual_and_packed(FLUX_DUAL, FLUX_SINGLE)),
    Family("qwen_image", qwen, qwen_inputs, numbered({"transformer_blocks": (4, QWEN_BLOCK)})),
    Family(
        "hunyuan_image",
        hunyuan_image,
        hunyuan_image_inputs,
        dual_and_packed(dual(values.HunyuanValues), single(values.HunyuanValues)),
    ),
    Family(
        "auraflow",
        auraflow,
        auraflow_inputs,
        numbered({"joint_transformer_blocks": (2, AURAFLOW_JOINT), "single_transformer_blocks": (2, AURAFLOW_SINGLE)}),
    ),
    Family(
        "hidream",
        hidream,
        hidream_inputs,
        numbered({"double_stream_blocks": (2, HIDREAM_DUAL), "single_stream_blocks": (2, HIDREAM_SINGLE)}),
        std=0.12,
    ),
)
IMAGE_JOINT = tuple(dataclasses.replace(family, thin=True) for family in (*_FAMILIES, *IMAGE_COGVIEW))
