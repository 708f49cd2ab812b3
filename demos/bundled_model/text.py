"""The words: a tokenizer of whole ones, the text encoder's sizes, and the captions that training shows."""

from __future__ import annotations

import random

from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from demos.bundled_model.clips import ClipSpec, caption, vocabulary

TEXT_WIDTH = 96
LONGEST = 120  # tokens
SHOWN = (
    "a large red circle moving right on a black background",
    "a small blue square moving up on stripes",
    "a large green triangle circling on a checkerboard",
    "a big yellow star growing on a grey gradient",
    "a large purple ring standing still on a white background",
    "a small cyan cross moving left on black",
    "a red circle moving right",
    "a large orange triangle moving down on a checkerboard",
)


def build_tokenizer() -> T5Tokenizer:
    """A `T5Tokenizer` over whole words; anything else becomes <unk>."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [(word if word in {",", "."} else f"▁{word}", -1.0) for word in vocabulary()]
    return T5Tokenizer(vocab=special + words, extra_ids=0, model_max_length=LONGEST)


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """Two layers of the small text width."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=24,
        num_heads=4,
        d_ff=256,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)


def training_caption(spec: ClipSpec, rng: random.Random) -> str:
    """A random wording; one in eight is empty, a few contain a word the tokenizer does not know."""
    if rng.random() < 0.12:
        return ""
    words = caption(spec, rng).split()
    if rng.random() < 0.03:
        words.insert(rng.randrange(len(words) + 1), "xyzzy")
    return " ".join(words)
