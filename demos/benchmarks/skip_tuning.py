"""What a Skip Tuning step costs: `python -m demos.benchmarks.skip_tuning --force`.

Time and peak memory of one training step (forward, backward, SGD) at the shape of CLIP ViT-B/16 with random weights:
full fine-tuning, the reference's procedure, and ours, with 100 and 1,000 classes, batch 4. Full fine-tuning with 1,000
classes does not fit this machine: its numbers are extrapolated from 50 and 100 classes, and marked so.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from demos.benchmarks import measure
from skipguide.vision.skip_tuning.classes import ClassSkip, choose, rank
from skipguide.vision.skip_tuning.step import StepModule, TextPrefix
from skipguide.vision.skip_tuning.tower import Towers
from skipguide.vision.skip_tuning.towers import find_towers

OUT = Path(__file__).with_suffix(".json")
BATCH = 4
END = 49407


def build(size: str) -> CLIPModel:
    torch.manual_seed(0)
    if size == "b16":
        vision = {"patch_size": 16}
        return CLIPModel(CLIPConfig(vision_config=vision, text_config={"eos_token_id": END}, projection_dim=512))
    shared = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    return CLIPModel(CLIPConfig(text_config=shared | {"eos_token_id": END}, vision_config=shared | {"patch_size": 32}))


def class_tokens(classes: int) -> Tensor:
    """Prompts of 8 to 16 tokens, padded to 77 with the end of the text, as CLIP's tokenizer does."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1000, 40000, (classes, 77), generator=generator)
    ends = torch.randint(7, 16, (classes,), generator=generator)
    tokens[torch.arange(77) >= ends[:, None]] = END
    tokens[:, 0] = 49406
    return tokens


def size_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Case:
    """One way of training with some number of classes: `step()` is one optimizer step.

    Attributes:
        resident: bytes that stay from step to step: all weights, momentum, cached features. The frozen prefix counts
            for every case, although ours leaves a GPU after caching.
    """

    def __init__(self, towers: Towers, parameters: list[nn.Parameter], cached: int) -> None:
        self.towers, self.parameters = towers, parameters
        # The whole model requires gradients for full fine-tuning only.
        self.optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9, weight_decay=5e-4)
        self.resident = size_of(towers.model.parameters()) + size_of(parameters) + cached

    def loss(self) -> Tensor:
        raise NotImplementedError

    def step(self) -> None:
        wanted = {id(p) for p in self.parameters}
        for p in self.towers.model.parameters():
            p.requires_grad_(id(p) in wanted)
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Full(Case):
    """The stock model on images and all class texts, every parameter but the logit scale."""

    def __init__(self, towers: Towers, pixels: Tensor, classes: int) -> None:
        super().__init__(towers, [p for n, p in towers.model.named_parameters() if n != "logit_scale"], 0)
        self.pixels, self.tokens = pixels, class_tokens(classes)

    def loss(self) -> Tensor:
        images = F.normalize(self.towers.image.full(self.pixels), dim=-1)
        texts = F.normalize(self.towers.text.full(self.tokens), dim=-1)
        return F.cross_entropy(self.towers.scale() * images @ texts.T, torch.zeros(BATCH, dtype=torch.long))


class Skipping(Case):
    """What both skipping procedures share: cached prefixes, half of the blocks trained."""

    def __init__(self, towers: Towers, pixels: Tensor, classes: int, crop: bool) -> None:
        self.layer = len(towers.image.blocks) // 2
        tokens = class_tokens(classes)
        self.where = towers.text.pooled_at(tokens)
        with torch.no_grad():
            self.images = towers.image.prefix(pixels, self.layer)
            kept = tokens[:, : int(self.where.max()) + 1] if crop else tokens
            # Caching is not timed here, and the cost of a step does not depend on the values.
            self.texts = torch.randn(*kept.shape, towers.text.width)
        self.prototypes = F.normalize(torch.randn(classes, 512, generator=torch.Generator().manual_seed(2)), dim=-1)
        parameters = towers.image.trained(self.layer) + towers.text.trained(self.layer)
        super().__init__(towers, parameters, size_of([self.images, self.texts, self.prototypes]))


class Reference(Skipping):
    """The published procedure on stock blocks: 77 positions of every kept text, all queries in every block."""

    def __init__(self, towers: Towers, pixels: Tensor, classes: int) -> None:
        super().__init__(towers, pixels, classes, crop=False)
        self.ranks = ClassSkip().draw(classes, torch.Generator().manual_seed(3))

    def loss(self) -> Tensor:
        model: Any = self.towers.model
        blocks = len(self.towers.image.blocks)
        labels = torch.zeros(BATCH, dtype=torch.long)
        hidden = self.towers.image.run(self.images, self.layer, blocks)
        images = F.normalize(model.visual_projection(model.vision_model.post_layernorm(hidden[:, 0])), dim=-1)
        kept = choose(rank(images.detach(), labels, self.prototypes)[1], self.ranks, labels)
        hidden = model.text_model.final_layer_norm(self.towers.text.run(self.texts[kept], self.layer, blocks))
        texts = F.normalize(model.text_projection(hidden[torch.arange(len(kept)), self.where[kept]]), dim=-1)
        return F.cross_entropy(self.towers.scale() * images @ texts.T, torch.searchsorted(kept, labels))


class Ours(Skipping):
    """The step of the package."""

    def __init__(self, towers: Towers, pixels: Tensor, classes: int) -> None:
        super().__init__(towers, pixels, classes, crop=True)
        texts = TextPrefix(self.texts, self.where, self.prototypes)
        self.module = StepModule(towers, texts, self.layer, self.layer, ClassSkip(), 3)

    def loss(self) -> Tensor:
        loss, _ = self.module(self.images, torch.zeros(BATCH, dtype=torch.long))
        found: Tensor = loss
        return found


KINDS: dict[str, Callable[[Towers, Tensor, int], Case]] = {"full": Full, "reference": Reference, "ours": Ours}


def bench(towers: Towers, pixels: Tensor, classes: int, kinds: list[str], rounds: int) -> dict[str, Any]:
    """Peak memory and seconds per step, interleaved."""
    cases, rows = {}, {}
    for kind in kinds:
        cases[kind] = case = KINDS[kind](towers, pixels, classes)
        case.optimizer.step()
        for p in case.parameters:  # momentum is there from the start, so that the peak is that of any later step
            case.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        rows[kind] = {"resident_bytes": case.resident, "step_peak_bytes": measure.peak_bytes(case.step)}
        gc.collect()
    clocks: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            clocks[kind].append(measure.timed(cases[kind].step)[0])
    for kind, row in rows.items():
        row["peak_bytes"] = row["resident_bytes"] + row["step_peak_bytes"]
        row["seconds"] = sorted(clocks[kind])[len(clocks[kind]) // 2]
        row["every_second"] = [round(s, 4) for s in clocks[kind]]
    return {
        "rows": rows,
        "time_to_reference": measure.Ratio.of(clocks["ours"], clocks["reference"]).to_dict()
        if "reference" in clocks
        else None,
    }


def result(size: str, rounds: int) -> dict[str, Any]:
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        towers = find_towers(build(size).eval())
        pixels = torch.randn(BATCH, 3, 224, 224)
    small = bench(towers, pixels, 50, ["full"], 1) if size == "b16" else None
    found = {"100": bench(towers, pixels, 100, ["full", "reference", "ours"], rounds)}
    found["1000"] = bench(towers, pixels, 1000, ["reference", "ours"], 1)
    if small is not None:
        low, high = small["rows"]["full"], found["100"]["rows"]["full"]
        line = {key: high[key] + 18 * (high[key] - low[key]) for key in ("seconds", "peak_bytes")}
        found["1000"]["rows"]["full"] = line | {"extrapolated": "from 50 and 100 classes"}
        found["50"] = small
    rows = found["100"]["rows"]
    bars = {
        "time_to_reference_100": {"value": found["100"]["time_to_reference"]["median"], "at_most": 0.5},
        "memory_to_full_100": {"value": round(rows["ours"]["peak_bytes"] / rows["full"]["peak_bytes"], 4)},
    }
    bars["memory_to_full_100"]["at_most"] = 0.3333
    for bar in bars.values():
        bar["passed"] = bar["value"] <= bar["at_most"]
    settings = {"size": size, "rounds": rounds, "batch": BATCH, "layer": len(towers.image.blocks) // 2}
    return {"machine": measure.machine(), "settings": settings, "classes": found, "bars": bars}


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| classes | procedure | s / step | peak MB | time to reference |", "|---|---|---|---|---|"]
    for classes in ("100", "1000"):
        entry = found["classes"][classes]
        for kind in ("full", "reference", "ours"):
            row = entry["rows"].get(kind)
            if row is None:
                continue
            mark = " (extrapolated)" if "extrapolated" in row else ""
            ratio = f"{entry['time_to_reference']['median']:.2f}" if kind == "ours" else ""
            lines.append(
                f"| {classes} | {kind}{mark} | {row['seconds']:.2f} | {row['peak_bytes'] / 1e6:.0f} | {ratio} |"
            )
    lines += [""] + [
        f"{'Held' if bar['passed'] else 'Missed'}: {name} {bar['value']:.3f}, at most {bar['at_most']}."
        for name, bar in found["bars"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("b16", "quick"), default="b16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    measure.keep_existing(args.out, args.force)
    found = result(args.size, args.rounds)
    measure.write_json(args.out, found)
    measure.write_text(args.out.with_suffix(".md"), table(found))
    print(table(found))


if __name__ == "__main__":
    main()
