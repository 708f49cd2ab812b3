"""Tiny CLIP models, images and class names for them, and a tuner that has run."""

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from skipguide.vision.skip_tuning import SkipTuner

NAMES = ["red circle", "blue star", "green cross", "pink moon"]
CONTEXT, END = 12, 49


def config(**more):
    shared = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    text = {"vocab_size": 50, "max_position_embeddings": CONTEXT, "bos_token_id": 48, "eos_token_id": END}
    return {
        "text_config": shared | text | {"pad_token_id": 1, "projection_size": 16} | more,
        "vision_config": shared | {"image_size": 16, "patch_size": 8} | more,
    }


def clip(seed=0, **more):
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(**config(**more), projection_dim=8)).eval()


def siglip():
    torch.manual_seed(0)
    return SiglipModel(SiglipConfig(**config())).eval()


def open_clip_model():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": CONTEXT, "vocab_size": 50, "width": 16, "heads": 2, "layers": 3}
    return open_clip.CLIP(8, vision, text).eval()


MODELS = {"clip": clip, "siglip": siglip, "open_clip": open_clip_model}


def words(texts):
    """A tokenizer: one id per word, the end, then padding to the context."""
    rows = []
    for text in texts:
        ids = [48, *(2 + hash_of(word) % 44 for word in text.split()), END]
        rows.append(ids + [1] * (CONTEXT - len(ids)))
    return torch.tensor(rows)


def hash_of(word):
    return sum((i + 1) * ord(letter) for i, letter in enumerate(word))


def images(count=8, seed=0):
    return list(torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))


def pairs(per_class=2):
    return images(4 * per_class), [i for i in range(4) for _ in range(per_class)]


def tuner(model=None, skip=1, classes=None, **more):
    return SkipTuner(model or clip(), words, NAMES, skip, classes, templates="a {}", **more)


def run(which=None, **more):
    more = {"epochs": 2, "lr_text": 1e-2, "lr_image": 1e-2, "warmup_lr": 1e-3, "progress": False} | more
    done = which or tuner()
    return done, done.fit(pairs(), **more)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def folder(tmp_path, names=("red_circle", "blue star"), count=3):
    for i, name in enumerate(names):
        (tmp_path / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (40, 32), (60 * k + 40, 100 * i, 10)).save(tmp_path / name / f"{k}.png")
    return tmp_path
