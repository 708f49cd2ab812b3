"""Skip Tuning at the shape of CLIP ViT-B/16: a training step with the cached prefix, and without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from demos.gpu.race import clear, describe, tell
from demos.gpu.setting import Setting
from skipguide.vision import SkipTuner

END = 49407


def build(setting: Setting) -> Any:
    """The model, random, on the device."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    text = setting.pick({}, small) | {"eos_token_id": END}
    vision = setting.pick({"patch_size": 16}, small | {"patch_size": 16, "image_size": 32})
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=setting.pick(512, 16)))
    return model.eval().to(setting.device)


def tokens(texts: list[str]) -> Tensor:
    """In place of a tokenizer: 8 to 16 tokens a text, padded with its end to 77."""
    out = torch.full((len(texts), 77), END)
    for row, text in enumerate(texts):
        generator = torch.Generator().manual_seed(sum(text.encode()))
        length = 8 + sum(text.encode()) % 8
        out[row, 1:length] = torch.randint(1000, 40000, (length - 1,), generator=generator)
    out[:, 0] = 49406
    return out


def measure(setting: Setting) -> dict[str, Any]:
    """cached: as the package does it. all_classes: the same, every class in every step. whole_pass: the same weights
    trained, the frozen blocks run in every step. full: everything trained. One fit each, after one of one epoch.
    """
    classes, epochs, size = setting.pick((100, 4, 224), (4, 1, 32))
    model = build(setting)
    half = model.config.vision_config.num_hidden_layers // 2
    names = [f"class {number}" for number in range(classes)]
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, size, size, generator=generator) for _ in range(classes)]
    data = (images, list(range(classes)))
    trained = set(SkipTuner(model, tokens, names, skip_layers=half).parameters())
    ways: dict[str, dict[str, Any]] = {
        "cached": {"skip_layers": half},
        "all_classes": {"skip_layers": half, "class_skip": None},
        "whole_pass": {"skip_layers": 0, "class_skip": None, "trainable": trained.__contains__},
        "full": {"skip_layers": 0, "class_skip": None},
    }
    fits: dict[str, Any] = {}
    for name, how in ways.items():
        try:
            for count in setting.pick((1, epochs), (epochs,)):
                tuner = SkipTuner(model, tokens, names, **how)
                report = tuner.fit(data, epochs=count, cache="device", progress=False)
                del tuner
                clear()
            step = (report.seconds - report.extraction_seconds) / report.steps
            fits[name] = {
                "seconds": round(report.seconds, 4), "extraction_seconds": round(report.extraction_seconds, 4),
                "ms_per_step": round(1000 * step, 4), "steps": report.steps, "peak_bytes": report.peak_bytes,
                "peak_kind": report.peak_kind, "cache_bytes": report.cache_bytes, "trained": report.trained,
                "classes_per_step": round(report.kept, 2),
            }  # fmt: skip
        except Exception as error:  # one way must not end the others
            fits[name] = {"error": describe(error)}
            clear()
        tell(f"    {name}: {fits[name].get('error') or fits[name]['ms_per_step']}")
    for name, row in fits.items():
        if "ms_per_step" in row and "ms_per_step" in fits["full"] and name != "full":
            row["to_full"] = round(row["ms_per_step"] / fits["full"]["ms_per_step"], 4)
    return {"classes": classes, "batch": 4, "epochs": epochs, "fits": fits}
