"""The UNet++ of skipguide and that of segmentation_models_pytorch on the same backbone and nuclei: time and IoU.

    pip install --no-deps segmentation-models-pytorch
    nice -n 19 python -m demos.real.nuclei_smp                # 200 steps each, five minutes of one core
    nice -n 19 python -m demos.real.nuclei_smp --steps 1500   # 60 epochs

Both have timm's ResNet-18 to stride 16 and begin with random weights; both are trained on the pictures of
`demos.real.nuclei` (96 pixels) for as many steps of 8, with one learning rate and one seed. The other library's has one
head; ours has four, of which the head for the test pictures is chosen on the validation pictures. Times are process
time in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demos import study
from demos.benchmarks.measure import Ratio, interleaved, keep_existing, machine, write_json
from demos.real.nuclei import SHORT, Study
from demos.real.weights import NotInstalledError
from demos.training import Recipe, fit
from demos.unetpp.train import loss_on, measure
from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import deep_supervision_loss

OUT = Path(__file__).with_suffix(".json")
WORK = study.ROOT / "runs" / "real-nuclei-smp"
OURS, THEIRS = "skipguide", "segmentation_models_pytorch"
RATE, ROUNDS = 1e-3, 9


class OneHead(nn.Module):
    """A network with one output, asked as ours is."""

    levels, classes = (1,), 1

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor, head: Any = None) -> Tensor:
        """Logits."""
        return self.inner(images)


def build(name: str) -> Any:
    """An untrained network.

    Raises:
        NotInstalledError: without segmentation_models_pytorch.
    """
    torch.manual_seed(0)
    if name == OURS:
        model: nn.Module = UNetPlusPlus("resnet18", depth=4, widths=(16, 32, 64, 128, 256), full_resolution=True)
    else:
        try:
            import segmentation_models_pytorch as smp
        except ImportError as error:
            raise NotInstalledError(
                "segmentation_models_pytorch is not installed: pip install --no-deps segmentation-models-pytorch"
            ) from error
        widths = (128, 64, 32, 16)
        model = OneHead(smp.UnetPlusPlus("resnet18", encoder_weights=None, encoder_depth=4, decoder_channels=widths))
    return model.to(memory_format=torch.channels_last)


def times(models: dict[str, Any], images: Tensor, masks: Tensor) -> dict[str, Any]:
    """Of one forward pass in eval mode (ours: its last head), and of one training step; ours over theirs."""
    now = [models[OURS]]

    def select(name: str) -> Any:
        now[0] = models[name]
        return nullcontext()

    def step() -> None:
        deep_supervision_loss(now[0].train()(images), masks).backward()
        now[0].zero_grad()

    @torch.no_grad()
    def read() -> None:
        now[0].eval()(images, head=now[0].levels[-1])

    found = {}
    for what, run in (("inference", read), ("training_step", step)):
        turns = {name: (lambda name=name: select(name)) for name in models}
        rounds = list(interleaved(turns, run, ROUNDS))[1:]
        found[what] = Ratio.of(*([clocks[name][1] for clocks in rounds] for name in (OURS, THEIRS))).to_dict()
    return found


def compute(steps: int, work: Path) -> dict[str, Any]:
    """Both networks, trained and measured; what is finished is kept."""
    plan = Study(SHORT, work / "pictures")
    cells = study.Cells(work / f"cells-{steps}", {"steps": steps, "batch": SHORT.batch, "rate": RATE})

    def trained(name: str) -> dict[str, Any]:
        recipe = Recipe(steps, RATE, SHORT.batch)
        model = build(name)
        fit(model, loss_on(plan.train, recipe, SHORT.size), recipe, folder=work / f"{name}-{steps}", desc=name)
        heads = measure(model, plan.validation)
        chosen = max(heads, key=lambda head: heads[head]["iou"])
        test = measure(model, plan.test)
        weights = sum(p.numel() for p in model.parameters())
        return {"weights": weights, "head": chosen, "test": test[chosen], "all_heads": test}

    models = {name: build(name) for name in (OURS, THEIRS)}
    images, masks = plan.train.batch(SHORT.batch, SHORT.size, 0, 0)
    images = images.to(memory_format=torch.channels_last)
    ratio = cells("times", lambda: times(models, images, masks))
    return {
        "steps": steps, "batch": SHORT.batch, "size": SHORT.size, "rate": RATE, "encoder": "resnet18",
        "models": {name: cells(name, lambda name=name: trained(name)) for name in models}, "ours_over_theirs": ratio,
    }  # fmt: skip


def text(result: dict[str, Any]) -> str:
    """The table."""
    rows = [
        [name, f"{m['weights']:,}", m["head"], f"{m['test']['iou']:.1%}", f"{m['test']['dice']:.1%}"]
        for name, m in result["models"].items()
    ]
    ratio = {what: value["median"] for what, value in result["ours_over_theirs"].items()}
    return (
        f"UNet++ on {result['encoder']}, {result['steps']} steps of {result['batch']} on nuclei, one seed\n\n"
        + study.table(["library", "weights", "head", "test IoU", "test Dice"], rows)
        + f"\nTime, skipguide over the other: {ratio['inference']:.2f} to read a batch, "
        f"{ratio['training_step']:.2f} for a training step.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    args = parser.parse_args(argv)
    keep_existing(args.out, args.force)
    try:
        result = compute(args.steps, args.work)
    except NotInstalledError as error:
        raise SystemExit(str(error)) from error
    write_json(args.out, {**result, "machine": machine()})
    print(text(result))


if __name__ == "__main__":
    main()
