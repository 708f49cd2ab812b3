"""Somebody else's package: a model and a pipeline of its own, described for skipguide through entry points.

It does not import skipguide at its top: skipguide calls `blocks` and `pipelines` when it meets a class that it does not
know.
"""

import torch
from torch import nn


class TheirBlock(nn.Module):
    """A residual block that takes (text, tokens) and returns the tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.look = nn.Linear(width, width)
        self.think = nn.Linear(width, width)

    def forward(self, text, tokens):
        tokens = tokens + self.look(tokens + text)
        return tokens + self.think(tokens).tanh()


class TheirDenoiser(nn.Module):
    """Three blocks."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.ModuleList(TheirBlock(width) for _ in range(3))

    def forward(self, hidden_states, text, timestep):
        for layer in self.layers:
            hidden_states = layer(text, hidden_states)
        return (hidden_states * (1 + timestep[:, None, None] / 1000),)


class TheirScheduler:
    """Steps of one size."""

    config = None

    def set_timesteps(self, steps: int):
        self.timesteps = torch.linspace(1000, 1000 / steps, steps)


class TheirPipeline:
    """One call per step, with the rows [cond, uncond]."""

    def __init__(self, transformer: TheirDenoiser):
        self.transformer = transformer
        self.scheduler = TheirScheduler()

    def __call__(self, text, latents, scale: float = 3.0, steps: int = 2):
        self.scheduler.set_timesteps(steps)
        self.strength = scale
        for t in self.scheduler.timesteps:
            twice, texts = torch.cat([latents] * 2), torch.cat([text, torch.zeros_like(text)])
            cond, uncond = self.transformer(twice, texts, t.expand(len(twice)))[0].chunk(2)
            latents = latents - (uncond + scale * (cond - uncond)) / steps
        return latents


def blocks() -> None:
    """The entry point in the group `skipguide.blocks`."""
    from skipguide import BlockSpec, register_blocks
    from skipguide.spec import Sublayer

    attn, mlp = (Sublayer(name, outputs=("",)) for name in ("look", "think"))
    register_blocks(TheirDenoiser, BlockSpec("layers", streams=("tokens",), attn=(attn,), mlp=(mlp,), identity=False))


def pipelines() -> None:
    """The entry point in the group `skipguide.pipelines`."""
    from skipguide.pipelines import PipelineSpec, register_pipeline

    register_pipeline(TheirPipeline, PipelineSpec("batched", scales=(("strength",),), cond_first=True))
