"""The components of the bundled model, all of stock classes, and its text conditioning while training.

`WanPipeline` pads every prompt with zero vectors up to `max_sequence_length` and hides none of them. Zero vectors are
equal keys, and n equal keys act as one key with log(n) added to its attention score: so training sees the prompt's own
tokens and one more, for any length the pipeline may be called with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Tokenizer, UMT5EncoderModel

from demos.bundled_model.autoencoder import FRAMES, LATENT_CHANNELS, LATENT_FRAMES
from demos.bundled_model.text import TEXT_WIDTH, build_text_encoder

SHORT, DEFAULT = 24, 512  # tokens: what our own calls pad to, and what WanPipeline pads to when nothing is said
HIDDEN = -1e4  # an attention score that hides a key
SHIFT = 3.0  # of the noise levels, in training and in sampling


@dataclass(frozen=True)
class Shape:
    """The size of the transformer; 144 tokens a clip at the patch size given here."""

    layers: int = 8
    heads: int = 3
    head_dim: int = 64
    ffn: int = 512
    patch: tuple[int, int, int] = (1, 4, 4)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shape:
        return cls(**{**values, "patch": tuple(values["patch"])})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_transformer(shape: Shape) -> WanTransformer3DModel:
    """Full attention over space and time; the prediction starts at zero, the branches at a third of their strength."""
    model = WanTransformer3DModel(
        patch_size=shape.patch,
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=shape.ffn,
        num_layers=shape.layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    nn.init.normal_(model.condition_embedder.time_proj.weight, std=0.02)
    nn.init.zeros_(model.condition_embedder.time_proj.bias)
    gates = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[:, None]
    for block in model.blocks:
        block.scale_shift_table.data.copy_(0.3 * gates.expand(-1, block.scale_shift_table.shape[-1]))
    return model


def build_scheduler() -> UniPCMultistepScheduler:
    """Flow matching as Wan has it: x = (1 - s) x0 + s e, v = e - x0, timestep 1000 s."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)


class Bf16Linear(torch.autograd.Function):
    """`x @ weight.T + bias` with the products in bf16 and everything else in fp32, for processors that have them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, half = x.flatten(0, -2).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(rows, half)
        return (rows @ half.mT).float().add_(bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, half = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        low = flat.bfloat16()
        return (low @ half).float().unflatten(0, grad.shape[:-1]), (low.mT @ rows).float(), flat.sum(0)


class TrainingAttention:
    """A processor for Wan's attention while training: the same numbers with less memory traffic.

    The rotation is one complex product. With `bf16` the products of attention are in bf16, which takes half the time of
    the fused kernel at these sizes. In cross attention `offsets`, which `T2V` sets before each pass, stand for the
    padding that is not there.
    """

    def __init__(self, bf16: bool = False) -> None:
        self.bf16 = bf16
        self.offsets: Tensor | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(source)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(source).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            turn = torch.complex(rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2])
            query, key = _turned(query, turn), _turned(key, turn)
        mask = self.offsets if encoder_hidden_states is not None else None
        attend = _attend_in_bf16 if self.bf16 else F.scaled_dot_product_attention
        mixed = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def _attend_in_bf16(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of `[B, heads, T, D]` with the products in bf16 and the softmax in fp32."""
    query, key, value = (
        states.to(torch.bfloat16, memory_format=torch.contiguous_format)
        for states in (query * query.shape[-1] ** -0.5, key, value)
    )
    scores = (query @ key.mT).float()
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights.bfloat16() @ value).float()


def _turned(states: Tensor, turn: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(states.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class T2V(nn.Module):
    """What is trained: text encoder and transformer, called the way the pipeline calls them."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel, bf16: bool = False) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        self.processor = TrainingAttention(bf16)
        for block in transformer.blocks:
            block.attn1.set_processor(self.processor)
            block.attn2.set_processor(self.processor)
            if bf16:
                for module in block.modules():
                    if isinstance(module, nn.Linear):
                        module.forward = lambda x, it=module: Bf16Linear.apply(x, it.weight, it.bias)

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor, padded: Tensor) -> Tensor:
        """Velocities of noised latents `[B, C, T, H, W]` at levels `[B]`.

        `ids` and `mask` `[B, L]` are the captions, `padded` `[B]` the number of tokens to act like.
        """
        text = self.text_encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]
        text = F.pad(text, (0, 0, 0, 1))  # the last token stands for all the padding
        missing = (padded - mask.sum(1)).clamp(min=1).float().log()
        offsets = torch.cat([(1.0 - mask.float()) * HIDDEN, missing[:, None]], dim=1)
        self.processor.offsets = offsets[:, None, None].expand(-1, -1, 1, -1)
        return self.transformer(noisy, timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False)[0]


def stock_attention(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """Give a transformer that was trained its own attention back."""
    for block in transformer.blocks:
        for attention in (block.attn1, block.attn2):
            attention.set_processor(WanAttnProcessor())
    return transformer


def build(shape: Shape, tokenizer: T5Tokenizer, bf16: bool = False) -> T2V:
    return T2V(build_text_encoder(tokenizer), build_transformer(shape), bf16)


def assemble(
    vae: AutoencoderKLWan, tokenizer: T5Tokenizer, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel
) -> WanPipeline:
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=build_scheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(steps: int = 16, guidance: float = 3.0) -> dict[str, Any]:
    """What a call of the pipeline should say; `generation.json` of the exported folder."""
    return {
        "height": 64,
        "width": 64,
        "num_frames": FRAMES,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "max_sequence_length": SHORT,
    }


def padded_lengths(count: int) -> Tensor:
    """The length that the pipeline would pad to: ours three times in four, its own default otherwise."""
    return torch.where(torch.rand(count) < 0.75, SHORT, DEFAULT)


def latent_shape(clips: int) -> tuple[int, ...]:
    return (clips, LATENT_CHANNELS, LATENT_FRAMES, 16, 16)
