"""Image transformers in which text and pictures share a sequence, or its attention, beyond the common ones."""

import copy
import dataclasses

import diffusers
import torch

from zoo.family import HEAD_DIM, HEADS, TEXT, BlockKind, Family, numbered, prefix_mask, rows, timesteps

# Lumina-Next: the attentions to the image and to the text are summed before one projection


def lumina_next():
    return diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=24,
    )


def lumina_next_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 8, 8),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "encoder_mask": prefix_mask(batch, TEXT),
        "image_rotary_emb": diffusers.models.embeddings.get_2d_rotary_pos_embed_lumina(HEAD_DIM, 16, 16),
        "cross_attention_kwargs": {},
    }


LUMINA_NEXT_BLOCK = BlockKind(returns="h", projections={})

# Bria FIBO 2: a few tokens stand for the text, and every other block reads it too


def fibo2():
    return diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=HEADS,
        cap_feat_dim=24,
        injection_layer_ids=(1, 3),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=2,
        gist_max_text_len=8,
        axes_dims=(4, 6, 6),
        axes_lens=(16, 16, 16),
    )


def fibo2_inputs(batch=2, seed=0):
    """As many tokens for every row: the pipeline calls it for one prompt, or for several that are as long."""
    return {
        "hidden_states": rows(batch, seed, 4, 8, 8),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": rows(batch, seed + 1, 3, TEXT, 24),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
    }


FIBO2_BLOCK = BlockKind(returns="h", projections={"attn": ("attention.to_out.0",), "mlp": ("feed_forward.w2",)})
FIBO2_TEXT = BlockKind("h", {**FIBO2_BLOCK.projections, "cross_attn": ("cross_attention.to_out.0",)})

# Qwen-Image 2.1: one sequence, in which a picture sees what stands before it


def qwen21():
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        context_in_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def qwen21_inputs(batch=2, seed=0):
    """A picture of four tokens within the text and one of sixteen after it; the text has a place for each four."""
    return {
        "hidden_states": rows(batch, seed, 4 + 16, 16),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "timestep": timesteps(batch) / 1000,
        "img_shapes": [[(1, 2, 2), (1, 4, 4)]] * batch,
        "img_mask": torch.tensor([[i == 2 for i in range(TEXT)] + [True] * 4] * batch),
        "encoder_hidden_states_mask": prefix_mask(batch, TEXT).bool(),
    }


QWEN21_BLOCK = BlockKind(returns="h", projections={"attn": ("attn.to_out.0",), "mlp": ("img_mlp.out",)})

# Nucleus: the first block is dense, in the others each expert picks its tokens


def nucleus():
    return diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        mlp_ratio=8.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=1.0,
    )


def nucleus_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 16, 16),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "timestep": timesteps(batch) / 1000,
        "img_shapes": [(1, 4, 4)] * batch,
        "encoder_hidden_states_mask": prefix_mask(batch, TEXT).bool(),
    }


NUCLEUS_DENSE = BlockKind(returns="h", projections={"attn": ("attn.to_out.0",), "mlp": ("img_mlp.net.2",)})
NUCLEUS_EXPERTS = BlockKind(
    returns="h", projections={"attn": ("attn.to_out.0",), "mlp": ("img_mlp.shared_expert.net.2",)}
)


# Ideogram 4: text and image in one sequence, which token is which is said beside


def ideogram4(**config):
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        intermediate_size=48,
        adaln_dim=16,
        llm_features_dim=24,
        mrope_section=(4, 2, 2),
        **config,
    )


def ideogram4_places(batch, side=4):
    """(position_ids, segment_ids, indicator) of the text, then of a square; one row has less text."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([torch.zeros_like(x), y, x], dim=-1).flatten(0, 1) + 65536
    places = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), image])
    segments = torch.cat([prefix_mask(batch, TEXT) - 1, torch.zeros(batch, side * side, dtype=torch.long)], dim=1)
    kinds = torch.tensor([3] * TEXT + [2] * side * side).expand(batch, -1)
    return places.expand(batch, -1, -1), segments, kinds


def ideogram4_inputs(batch=2, seed=0):
    places, segments, kinds = ideogram4_places(batch)
    return {
        "hidden_states": rows(batch, seed, TEXT + 16, 16),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": rows(batch, seed + 1, TEXT + 16, 24),
        "position_ids": places,
        "segment_ids": segments,
        "indicator": kinds,
    }


class InPlace(Family):
    """Its model reads the modules of a block that is left out, or calls it in a way of its own."""

    def identity_block(self, model, i):
        edited = copy.deepcopy(model)
        edited.get_submodule(self.block_names[i]).forward = first_stream
        return edited


def first_stream(*args, **kwargs):
    return args[0] if args else kwargs["hidden_states"]


class NucleusFamily(Family):
    """The experts' last projections are one parameter."""

    def scaled(self, model, i, part, factor):
        edited = super().scaled(model, i, part, factor)
        if part == "mlp" and (experts := getattr(edited.transformer_blocks[i].img_mlp, "experts", None)) is not None:
            with torch.no_grad():
                experts.down_proj *= factor
        return edited


_FAMILIES = (
    Family("ideogram4", ideogram4, ideogram4_inputs, numbered({"layers": (4, FIBO2_BLOCK)})),
    Family("lumina_next", lumina_next, lumina_next_inputs, numbered({"layers": (4, LUMINA_NEXT_BLOCK)})),
    InPlace(
        "fibo2",
        fibo2,
        fibo2_inputs,
        (
            ("noise_refiner.0", FIBO2_BLOCK),
            *((f"layers.{i}", FIBO2_TEXT if i % 2 else FIBO2_BLOCK) for i in range(4)),
        ),
        slack=3e-5,  # predictions of size 10
    ),
    InPlace("qwen21", qwen21, qwen21_inputs, numbered({"transformer_blocks": (4, QWEN21_BLOCK)})),
    NucleusFamily(
        "nucleus",
        nucleus,
        nucleus_inputs,
        (
            ("transformer_blocks.0", NUCLEUS_DENSE),
            *((f"transformer_blocks.{i}", NUCLEUS_EXPERTS) for i in range(1, 4)),
        ),
    ),
)
IMAGE_PACKED = tuple(dataclasses.replace(family, thin=True) for family in _FAMILIES)
