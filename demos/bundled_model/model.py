"""The bundled model's components, all of stock classes, and the text conditioning used while training.

`LattePipeline` conditions on text in three ways, none with a mask in the transformer, and training shows all
three: one prompt keeps its own tokens only; several prompts are padded to 120 tokens with zero vectors; the
negative prompt keeps what the text encoder says at padding positions, cut to the length of the prompt. The
120 tokens are never materialised here: n equal keys act as one key with log(n) added to its attention score.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, LattePipeline, LatteTransformer3DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from demos.bundled_model.clips import FRAMES, vocabulary

LATENT_SIDE = 16
LATENT_CHANNELS = 4
TEXT_WIDTH = 96
PADDED = 120  # the length LattePipeline pads a batch of prompts to
HIDDEN = -1e4  # an attention score that hides a key


def build_tokenizer() -> T5Tokenizer:
    """A `T5Tokenizer` over whole words; anything else becomes <unk>."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [(word if word in {",", "."} else f"▁{word}", -1.0) for word in vocabulary()]
    return T5Tokenizer(vocab=special + words, extra_ids=0, model_max_length=PADDED)


def text_settings(tokenizer: T5Tokenizer) -> dict[str, Any]:
    """The arguments of a T5 config for two layers of the small text width."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": TEXT_WIDTH,
        "d_kv": 24,
        "num_heads": 4,
        "d_ff": 256,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 32,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
    }


def build_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**text_settings(tokenizer)))


def build_transformer(layers: int, heads: int, head_dim: int) -> LatteTransformer3DModel:
    """`layers` spatial and as many temporal blocks, interleaved; the output starts at zero."""
    model = LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        cross_attention_dim=heads * head_dim,
        attention_bias=True,
        sample_size=LATENT_SIDE,
        patch_size=4,
        activation_fn="linear-silu",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_WIDTH,
        video_length=FRAMES,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
    nn.init.zeros_(model.adaln_single.linear.bias)
    for block in (*model.transformer_blocks, *model.temporal_transformer_blocks):
        gates = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[:, None]
        block.scale_shift_table.data.copy_(0.2 * gates.expand(-1, block.scale_shift_table.shape[1]))
    return model


def build_scheduler(shift: float) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ on flow matching: x = (1 - s) x0 + s e, v = e - x0, timestep 1000 s.

    `variance_type="learned"` is there for `LattePipeline`, which otherwise takes the first half of the
    channels for the prediction; a flow prediction has no variance and the scheduler ignores the setting.
    """
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, variance_type="learned"
    )


class TextConditioner(nn.Module):
    """Token ids to cross attention's keys and score offsets, as `LattePipeline` feeds them."""

    def __init__(self, text_encoder: T5EncoderModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor, mask: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L + 1, D] and offsets [B, 1, L + 1] for token ids [B, L] and their mask.

        `padded` [B] is the total number of tokens to act like; at most the own length means no padding.
        An empty caption is one token long; it is padded with the text encoder's output, others with zeros.
        """
        ids, mask = F.pad(ids, (0, 1)), F.pad(mask, (0, 1))  # the last token stands for all the padding
        embeddings = self.text_encoder(ids, attention_mask=mask)[0]
        length = mask.sum(1)
        zeros = (torch.arange(ids.shape[1]) == ids.shape[1] - 1) & (length > 1)[:, None]
        embeddings = embeddings.masked_fill(zeros[..., None], 0.0)
        missing = (padded - length).clamp(min=0).float()
        filler = torch.where(missing > 0, missing.clamp(min=1).log(), HIDDEN)
        offsets = torch.cat([(1.0 - mask[:, :-1].float()) * HIDDEN, filler[:, None]], dim=1)
        return embeddings, offsets[:, None]


class SharedTextProcessor:
    """Cross attention that projects a clip's text once instead of once per frame; same numbers, less work."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        **kwargs: object,
    ) -> Tensor:
        rows, tokens, width = hidden_states.shape
        clips = attention_mask.shape[0]
        text = encoder_hidden_states[:: rows // clips]
        query, key, value = (
            projected.view(clips, -1, attn.heads, width // attn.heads).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask[:, None])
        return attn.to_out[0](mixed.transpose(1, 2).reshape(rows, tokens, width))


def share_text(transformer: LatteTransformer3DModel) -> LatteTransformer3DModel:
    """Install `SharedTextProcessor` in every cross attention; for training only, offsets become mandatory."""
    for block in transformer.transformer_blocks:
        block.attn2.set_processor(SharedTextProcessor())
    return transformer


def assemble(
    vae: AutoencoderKL,
    tokenizer: T5Tokenizer,
    text_encoder: T5EncoderModel,
    transformer: LatteTransformer3DModel,
    shift: float,
) -> LattePipeline:
    pipe = LattePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(shift),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encode_mean(vae: AutoencoderKL, frames: Tensor) -> Tensor:
    """Scaled latents of frames [N, 3, 64, 64] in [0, 1]."""
    pixels = (frames * 2 - 1).contiguous(memory_format=torch.channels_last)
    return vae.encoder(pixels).chunk(2, dim=1)[0] * vae.config.scaling_factor


def load_vae(path: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(path).to(memory_format=torch.channels_last)
    return vae.eval().requires_grad_(False)


def padded_lengths(lengths: Tensor) -> Tensor:
    """The lengths that the pipeline would act with: half the time a single prompt's, half a batch's."""
    alone = torch.rand(lengths.shape) < 0.5
    drawn = torch.where(lengths == 1, torch.randint(4, 16, lengths.shape), lengths)
    return torch.where(alone, drawn, PADDED)


def sample_sigmas(count: int, shift: float) -> Tensor:
    """Noise levels: three quarters logit-normal, one quarter uniform, then the sampler's shift."""
    uniform = torch.rand(count) < 0.25
    sigma = torch.where(uniform, torch.rand(count), torch.randn(count).sigmoid())
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise_like(latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latents and the velocity to predict."""
    noise = torch.randn_like(latents)
    level = sigma.view(-1, *[1] * (latents.ndim - 1))
    return torch.lerp(latents, noise, level), noise - latents


def parameters(module: nn.Module) -> float:
    """Millions of parameters."""
    return sum(math.prod(p.shape) for p in module.parameters()) / 1e6
