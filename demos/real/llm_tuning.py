"""Unified Layer Skipping fine-tuned on a real model: the recipe of `demos.unified_finetune`, a few minutes of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from demos.benchmarks.measure import now
from demos.unified_finetune.finetune import perplexities, train_steps
from skipguide.llm import UnifiedSkip

RATE = 1e-4  # the paper's 2e-5 is for seven billion parameters and two epochs


def fine_tuned(model: Any, samples: list[Tensor], test: Tensor, layers: int, steps: int, rows: int) -> dict[str, Any]:
    """Fine-tune a model in place for the layers that the balanced rule leaves out; before and after.

    Args:
        model: a Llama of transformers.
        samples: windows to train on, `[N, T]` each; half of a window is the prompt, which the whole model reads.
        test: windows to judge on, `[N, T]`.
        layers: to leave out.
        steps: of AdamW.
        rows: windows of a step.

    Returns:
        Perplexities on the second halves of the windows, of the whole model and with the layers left out.
    """
    every = model.config.num_hidden_layers
    skip = UnifiedSkip(every / (every - layers), "balanced", phase="decode")
    length = test.shape[1]
    with torch.enable_grad():
        model.requires_grad_(True)
        model.get_input_embeddings().requires_grad_(False)  # the head too, where it is tied
        args = argparse.Namespace(steps=steps, length=length, lr=RATE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.01)
        began = now()
        before = perplexities(model, skip, test, length // 2)
        train_steps(args, Accelerator(cpu=True), model, optimizer, skip, _windows(torch.cat(samples), rows))
        after = perplexities(model, skip, test, length // 2)
    return {
        "method": "Unified, balanced", "count": 2 * (every - len(skip.layers(every))), "steps": steps,
        "tokens": steps * rows * length, "windows": sum(len(sample) for sample in samples), "before": before,
        "after": after, "cpu_seconds": round(now()[1] - began[1], 1),
    }  # fmt: skip


def _windows(every: Tensor, rows: int) -> Iterator[Tensor]:
    """Rows of windows without end, each epoch in an order of its own."""
    g = torch.Generator().manual_seed(0)
    while True:
        yield from (every[part] for part in torch.randperm(len(every), generator=g).split(rows) if len(part) == rows)
