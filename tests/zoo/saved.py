"""A tiny random pipeline in a folder, as the command line loads it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn


def save_tiny_latte(folder: Path) -> str:
    """A folder with a Latte pipeline of 6 blocks that makes 4 frames of 16x16."""
    from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "moving", "left", "right"]
    vocabulary = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    text = T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = LatteTransformer3DModel(
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=16,
        video_length=4,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )
    for weight in transformer.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.2)
    pipeline = LattePipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=vocabulary, model_max_length=16, **special),
        text_encoder=T5EncoderModel(text),
        vae=AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        transformer=transformer,
        scheduler=DDIMScheduler(),
    )
    pipeline.save_pretrained(folder)
    defaults = {"height": 16, "width": 16, "video_length": 4, "num_inference_steps": 2, "guidance_scale": 3.0}
    (folder / "generation.json").write_text(json.dumps(defaults))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a Latte pipeline of 6 blocks that makes 4 frames of 16x16."""
    return save_tiny_latte(tmp_path_factory.mktemp("tiny"))
