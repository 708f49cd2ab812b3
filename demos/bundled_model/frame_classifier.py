"""A judge of single frames: shape, colour and background, whatever the frames before and after show.

`AttributeClassifier` reads a clip as a whole, and so cannot say whether the shape holds from frame to frame; this one
sees one frame at a time. It is trained on all combinations, held-out ones too: it is a judge, not the model under test.

    python -m demos.bundled_model.frame_classifier --steps 300
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from demos.bundled_model.clips import ATTRIBUTES, FRAMES, all_specs, held_out, labels, render
from demos.bundled_model.common import atomically, save_half
from demos.bundled_model.optim import optimizers

WEIGHTS = Path(__file__).with_name("frame_classifier.safetensors")
READ = ("shape", "colour", "background")
EACH = 8  # frames of a clip that training sees; rendering the clip costs as much as they do


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class FrameClassifier(nn.Module):
    """Frames `[N, 3, 64, 64]` in [0, 1] to logits per attribute of `READ`."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _conv(3, 24, 5, 2), _conv(24, 48, 3, 1), _conv(48, 64, 3, 2), _conv(64, 96, 3, 1), _conv(96, 96, 3, 2)
        )
        self.collect = nn.Linear(2 * 96, 128)
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(ATTRIBUTES[name])) for name in READ})

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        maps = self.trunk((frames * 2 - 1).contiguous(memory_format=torch.channels_last))
        features = F.relu(self.collect(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, clips: Tensor, chunk: int = 256) -> dict[str, Tensor]:
        """Class indices `[N, T]` of every frame of clips `[N, T, 3, 64, 64]`, per attribute."""
        parts = [self(frames) for frames in clips.flatten(0, 1).split(chunk)]
        return {
            name: torch.cat([part[name] for part in parts]).argmax(1).unflatten(0, clips.shape[:2]) for name in READ
        }

    def save(self, path: Path = WEIGHTS) -> None:
        """Write the weights as fp16."""
        save_half(self, path)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> FrameClassifier:
        """The trained classifier, in fp32 and evaluation mode."""
        model = cls()
        model.load_state_dict(load_file(path))
        return model.eval()


def stability(readings: Tensor) -> Tensor:
    """For readings `[N, T]` of single frames, the share of a clip's frames that say what most of them say, `[N]`.

    >>> stability(torch.tensor([[0, 0, 0, 2], [1, 1, 1, 1]]))
    tensor([0.7500, 1.0000])
    """
    return (readings == readings.mode(1, keepdim=True).values).float().mean(1)


def train(steps: int, batch: int, lr: float, seed: int) -> FrameClassifier:
    """A classifier trained on mildly noisy, blurred and tinted frames."""
    from demos.bundled_model.train_classifier import augment

    torch.manual_seed(seed)
    rng = random.Random(seed)
    specs, model = all_specs(), FrameClassifier().to(memory_format=torch.channels_last)
    opts = optimizers(model, lr, weight_decay=0.02, outer=("heads",))
    average, bar = 0.0, tqdm(range(steps), desc="frames", mininterval=10)
    for step in bar:
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = lr * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        chosen = rng.choices(specs, k=batch)
        clips = render(chosen, seed * 1_000_003 + step)
        picked = torch.rand(batch, FRAMES).argsort(1)[:, :EACH]
        frames = clips[torch.arange(batch)[:, None], picked].flatten(0, 1)[:, None]
        truth = {name: values.repeat_interleave(EACH) for name, values in labels(chosen).items()}
        logits = model(augment(frames)[:, 0])
        loss = torch.stack([F.cross_entropy(logits[name], truth[name]) for name in READ]).sum()
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        average = loss.item() if step == 0 else 0.97 * average + 0.03 * loss.item()
        bar.set_postfix_str(f"loss {average:.4f}", refresh=False)
    return model.eval()


def measure(model: FrameClassifier, clips: int, seed: int) -> dict[str, object]:
    """Accuracy on every frame of rendered clips, and how steady the readings are over a clip."""
    specs = random.Random(seed).sample(all_specs(), clips)
    right: dict[str, list[Tensor]] = {name: [] for name in READ}
    steady = []
    for start in range(0, clips, 32):
        part = specs[start : start + 32]
        readings, truth = model.read(render(part, 900_000_001 + start)), labels(part)
        for name in READ:
            right[name].append(readings[name] == truth[name][:, None])
        steady.append(stability(readings["shape"]))
    unseen = torch.tensor([held_out(spec) for spec in specs])
    hits = {name: torch.cat(parts).float() for name, parts in right.items()}
    return {
        "clips": clips,
        "frames": clips * FRAMES,
        "accuracy": {name: round(values.mean().item(), 4) for name, values in hits.items()},
        "accuracy_held_out": {name: round(values[unseen].mean().item(), 4) for name, values in hits.items()},
        "stability": round(torch.cat(steady).mean().item(), 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="clips; eight frames of each")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clips", type=int, default=512, help="for the measurement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = train(args.steps, args.batch, args.lr, args.seed)
    model.save(args.out)
    report = {"steps": args.steps} | measure(FrameClassifier.load(args.out), args.clips, args.seed + 1)
    text = json.dumps(report, indent=2) + "\n"
    atomically(args.out.with_suffix(".json"), lambda path: path.write_text(text))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
