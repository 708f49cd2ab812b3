"""Muon for hidden matrices and AdamW for everything else, behind one learning rate.

The usual Muon orthogonalises in bf16, which CPUs without instructions for it run some fifty times slower than fp32, and
those with AVX512_BF16 twice as fast: so fp32 unless asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(batch: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on a batch of matrices [N, R, C]: singular values move to about 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = batch.shape[1] <= batch.shape[2]
    x = batch if wide else batch.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; convolution kernels count as matrices [out, in * k * k].

    Updates are scaled to the root mean square of an AdamW step, so that both share a learning rate.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        bf16: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape[0], p[0].numel()].append(p)
            for (rows, columns), params in shapes.items():
                steps = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    steps.append(p.grad.lerp(state["momentum"], group["momentum"]).reshape(rows, columns))
                scale = -group["lr"] * 0.2 * max(rows, columns) ** 0.5
                updates = orthogonalise(torch.stack(steps).to(self.precision)).to(params[0].dtype)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.reshape(p.shape), alpha=scale)


def optimizers(
    module: nn.Module, lr: float, weight_decay: float = 0.0, outer: tuple[str, ...] = (), bf16: bool = False
) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels, AdamW for vectors and for names that contain one of `outer`."""
    inner_params, outer_params = [], []
    for name, p in module.named_parameters():
        is_outer = p.ndim < 2 or any(part in name for part in outer)
        (outer_params if is_outer else inner_params).append(p)
    return [
        Muon(inner_params, lr=lr, weight_decay=weight_decay, bf16=bf16),
        torch.optim.AdamW(outer_params, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]
