"""An independent judge of clips: five attribute heads over features that also serve Fréchet distances."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from demos.bundled_model.clips import ATTRIBUTES, FRAMES
from demos.bundled_model.common import save_half

WEIGHTS = Path(__file__).with_name("classifier.safetensors")


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class AttributeClassifier(nn.Module):
    """Clips [N, 16, 3, 64, 64] in [0, 1] to logits per attribute; `features` is the layer before the heads.

    Of a longer clip the first 16 frames are read.
    Every frame goes through strided convolutions that also see its coordinates, then into pooled values and
    soft key points (so that motion survives the pooling); two strided convolutions over time join the frames.
    """

    width = 128

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Sequential(_conv(5, 16, 5, 2), _conv(16, 32, 3, 2), _conv(32, 64, 3, 1), _conv(64, 64, 3, 2))
        self.points = nn.Conv2d(64, 8, 1)
        self.frame_out = nn.Linear(64 * 2 + 8 * 2, 96)
        self.time = nn.Sequential(
            nn.Conv1d(96, 128, 3, 2, 1, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Conv1d(128, 128, 3, 2, 1, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(),
        )
        self.collect = nn.Linear(4 * 128, self.width)
        self.heads = nn.ModuleDict({name: nn.Linear(self.width, len(v)) for name, v in ATTRIBUTES.items()})

    @staticmethod
    def _grid(side: int) -> Tensor:
        line = torch.linspace(-1, 1, side)
        return torch.stack(torch.meshgrid(line, line, indexing="ij"))

    def features(self, clips: Tensor) -> Tensor:
        """Features [N, 128] of the whole clip."""
        clips = clips[:, :FRAMES]
        count, frames, _, side, _ = clips.shape
        grid = self._grid(side).to(clips).expand(count * frames, -1, -1, -1)
        maps = torch.cat([clips.flatten(0, 1) * 2 - 1, grid], dim=1)
        maps = self.frames(maps.contiguous(memory_format=torch.channels_last))
        weight = self.points(maps).flatten(2).softmax(-1)
        places = self._grid(maps.shape[-1]).to(clips).flatten(1)
        points = torch.einsum("npk,dk->npd", weight, places).flatten(1)
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3)), points], dim=1)
        series = F.relu(self.frame_out(pooled)).unflatten(0, (count, frames)).mT
        return F.relu(self.collect(self.time(series).flatten(1)))

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        features = self.features(clips)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def correct(self, clips: Tensor, labels: dict[str, Tensor], chunk: int = 32) -> dict[str, Tensor]:
        """Whether each clip is read as labelled, per attribute, [N] bool."""
        logits = [self(part) for part in clips.split(chunk)]
        return {name: torch.cat([part[name] for part in logits]).argmax(1) == labels[name] for name in labels}

    def save(self, path: Path = WEIGHTS) -> None:
        """Write the weights as fp16."""
        save_half(self, path)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> AttributeClassifier:
        """The trained classifier, in fp32 and evaluation mode."""
        model = cls()
        model.load_state_dict(load_file(path))  # copies into fp32 parameters
        return model.eval()
