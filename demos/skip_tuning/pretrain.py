"""Pretrain tiny-clip, the small CLIP that ships: `python -m demos.skip_tuning.pretrain --minutes 14`.

1.0 million parameters, about 14 minutes on one CPU core. Resumable: a killed run goes on where its last checkpoint was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from demos.bundled_model.optim import optimizers
from demos.skip_tuning import data

CONTEXT = 24


def build_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE as CLIP's own, learned on the captions: their words are single tokens, others are spelled."""
    blank = CLIPTokenizer()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer, bpe.pre_tokenizer = blank.backend_tokenizer.normalizer, blank.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(data.words(), trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = state["vocab"]
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):  # a byte that ends a word
        vocab.setdefault(letter + "</w>", len(vocab))
    specials = ["<|startoftext|>", "<|endoftext|>"]  # at the very end, as in CLIP's own vocabulary
    ordered = [token for token in sorted(vocab, key=vocab.__getitem__) if token not in specials] + specials
    vocab = {token: place for place, token in enumerate(ordered)}
    merges = [tuple(pair) for pair in state["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    shared = {"num_hidden_layers": 6, "hidden_act": "quick_gelu", "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **shared,
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 256,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **shared,
            "hidden_size": 96,
            "intermediate_size": 384,
            "image_size": data.SIDE,
            "patch_size": 8,
        },
        projection_dim=64,
    )
    torch.manual_seed(0)
    return CLIPModel(config)


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    from transformers import CLIPImageProcessor

    side = {"height": data.SIDE, "width": data.SIDE}
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessor(size={"shortest_edge": data.SIDE}, crop_size=side, image_mean=half, image_std=half)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def batch_of(rng: random.Random, size: int, pairs: list[tuple[str, str]]) -> tuple[Tensor, list[str]]:
    scenes = [data.draw(rng, pairs) for _ in range(size)]
    images = data.render(scenes, rng.randrange(2**31))
    return images * 2 - 1, [data.caption(scene, rng) for scene in scenes]


def loss_of(model: CLIPModel, pixels: Tensor, tokens: Tensor) -> Tensor:
    out = model(input_ids=tokens, pixel_values=pixels)
    target = torch.arange(len(pixels))
    return (F.cross_entropy(out.logits_per_image, target) + F.cross_entropy(out.logits_per_text, target)) / 2


@torch.no_grad()
def zero_shot(model: CLIPModel, tokenizer: CLIPTokenizer, classes: list[str], strength: float) -> float:
    """Accuracy among `classes` with one template, 20 images a class."""
    images, labels = data.class_images(classes, 20, 77, strength)
    texts = tokenizer([f"a photo of a {name}" for name in classes], padding=True, return_tensors="pt")
    prototypes = F.normalize(model.get_text_features(**texts).pooler_output, dim=-1)
    features = model.get_image_features(pixel_values=images * 2 - 1).pooler_output
    return (features @ prototypes.T).argmax(1).eq(labels).double().mean().item()


def report(model: CLIPModel, tokenizer: CLIPTokenizer) -> dict[str, float]:
    model.eval()
    groups = {"base": data.BASE_CLASSES, "new": data.NEW_CLASSES, "all": data.BASE_CLASSES + data.NEW_CLASSES}
    groups["held out"] = [f"{texture} {shape}" for texture, shape in sorted(data.HELD_OUT)]
    found = {
        f"{name}, shift {strength}": round(zero_shot(model, tokenizer, classes, strength), 4)
        for name, classes in groups.items()
        for strength in (0.0, 0.3, 0.5, 0.7)
    }
    model.train()
    return found


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path, notes: dict[str, object]) -> None:
    """fp16 weights under a config that says float32, so that `from_pretrained` computes in float32."""
    import copy

    copy.deepcopy(model).half().save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "pretraining.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--work", type=Path, default=Path("work/tiny-clip"))
    parser.add_argument("--out", type=Path, default=Path("skipguide/assets/tiny-clip"))
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    rng, pairs = random.Random(1), data.pretraining_pairs()
    groups = optimizers(model, lr=args.lr, weight_decay=0.02, outer=("embedding", "logit_scale"))
    state_file = args.work / "state.pt"
    start, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        start, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for group, saved in zip(groups, state["optimizers"], strict=True):
            group.load_state_dict(saved)
        rng.setstate(state["rng"])
    began = time.process_time() - seconds
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps)
    for step in bar:
        warm, cool = min(1.0, (step + 1) / 60), min(1.0, (args.steps - step) / (0.55 * args.steps))
        for group in groups:
            for part in group.param_groups:
                part["lr"] = args.lr * warm * (1 - math.cos(math.pi * cool)) / 2
        pixels, texts = batch_of(rng, args.batch, pairs)
        tokens = tokenizer(texts, padding=True, return_tensors="pt").input_ids
        loss = loss_of(model, pixels, tokens)
        loss.backward()
        for group in groups:
            group.step()
            group.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.1f}")
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            args.work.mkdir(parents=True, exist_ok=True)
            seconds = time.process_time() - began
            state = {"step": step + 1, "seconds": seconds, "model": model.state_dict(), "rng": rng.getstate()}
            torch.save(state | {"optimizers": [g.state_dict() for g in groups]}, state_file.with_suffix(".new"))
            os.replace(state_file.with_suffix(".new"), state_file)
            shown = report(model, tokenizer)
            tqdm.write(f"step {step + 1} cpu {seconds:.0f}s loss {loss.item():.3f} {shown}")
    notes = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "cpu_seconds": round(seconds)}
    save(model, tokenizer, args.out, notes | {"zero_shot": report(model, tokenizer)})


if __name__ == "__main__":
    main()
