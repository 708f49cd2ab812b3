"""One training loop on accelerate for the demos: resumable to the bit, on whatever device there is.

A batch is a function of its number and the seed, so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from demos.benchmarks.measure import write_json
from skipguide.errors import SkipError

LossOfStep = Callable[[nn.Module, int, torch.device], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast: AdamW, learning rate up over a tenth of the steps and down to zero on a cosine."""

    steps: int
    lr: float
    batch: int = 8
    weight_decay: float = 1e-4
    clip: float = 1.0
    precision: str = "no"  # of accelerate: "no", "bf16" or "fp16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.lr > 0:
            raise SkipError(f"expected at least one step and image per batch, and lr > 0; got {self}")


def fast_precision(cpu: bool = False) -> str:
    """`"bf16"` where the machine multiplies in it, else `"no"`: emulated, it is ten times as slow as float32.

    Args:
        cpu: of the processor, also where there is an accelerator that is left alone.
    """
    if torch.cuda.is_available() and not cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    processor = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if any(processor.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "no"


def arguments(description: str | None, *, steps: int, batch: int) -> argparse.ArgumentParser:
    """The parser that every training has; `steps` and `batch` are its defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the states, the model and its measures")
    parser.add_argument("--encoder", help="a timm backbone; the plain network without")
    parser.add_argument("--widths", type=int, nargs="+", help="channels per level, finest first")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after", type=int, help="leave after so many steps; the same command goes on")
    parser.add_argument("--cpu", action="store_true", help="leave an accelerator alone")
    return parser


def command(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run, and leave with status 2 and one line where the user can mend something."""
    try:
        run(args)
    except SkipError as error:
        print(f"train: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def rate(step: int, steps: int) -> float:
    """The share of the highest learning rate at a step."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warm) / max(1, steps - warm)))))


def fit(
    model: nn.Module,
    loss_of_step: LossOfStep,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    save_every: int = 100,
    stop_after: int | None = None,
    accelerator: Accelerator | None = None,
    desc: str = "training",
) -> nn.Module:
    """Train a model in place.

    Args:
        model: ends in eval mode, on the accelerator's device.
        loss_of_step: the loss of the model on the batch of that number.
        recipe: the settings.
        folder: where the state goes every `save_every` steps; a later call with the same settings continues from it.
        save_every: steps between states.
        stop_after: leave after this many steps of this call, with the state saved.
        accelerator: one that exists; by default one with the recipe's precision.
        desc: before the progress bar.

    Raises:
        SkipError: if `folder` holds a state with other settings, or the loss is not finite.
    """
    accelerator = accelerator or Accelerator(mixed_precision=recipe.precision)
    torch.manual_seed(recipe.seed)  # dropout
    optimiser = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, recipe.steps))
    wrapped, optimiser, schedule = accelerator.prepare(model, optimiser, schedule)
    start = _resume(accelerator, folder, recipe)
    end = recipe.steps if stop_after is None else min(recipe.steps, start + stop_after)
    wrapped.train()
    shown = tqdm(
        range(start, end),
        desc=desc,
        initial=start,
        total=recipe.steps,
        leave=False,
        mininterval=2.0,
        disable=None if accelerator.is_main_process else True,
    )
    for step in shown:
        with accelerator.autocast():
            loss = loss_of_step(wrapped, step, accelerator.device)
        if not bool(torch.isfinite(loss)):
            raise SkipError(f"the loss is {loss.item()} at step {step}: try a lower learning rate than {recipe.lr:g}")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), recipe.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 20 == 0:
            shown.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if folder is not None and ((step + 1) % save_every == 0 or step + 1 == end):
            _save(accelerator, folder, recipe, step + 1)
    for name in ("forward", "_original_forward"):  # mixed precision, which whoever measures the model did not ask for
        model.__dict__.pop(name, None)
    return model.eval()


def _save(accelerator: Accelerator, folder: Path, recipe: Recipe, step: int) -> None:
    """The state under a temporary name, then renamed: a stopped run leaves the old one or the new one."""
    accelerator.wait_for_everyone()
    fresh = folder / ".state"
    if accelerator.is_main_process and fresh.exists():
        shutil.rmtree(fresh)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(fresh))
    if accelerator.is_main_process:
        write_json(fresh / "progress.json", {"step": step, "recipe": asdict(recipe)})
        old = folder / "state"
        if old.exists():
            os.replace(old, folder / ".old")
        os.replace(fresh, old)
        shutil.rmtree(folder / ".old", ignore_errors=True)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, folder: Path | None, recipe: Recipe) -> int:
    if folder is None:
        return 0
    for name in ("state", ".old"):  # the second is there only if a run was stopped between two renames
        path = folder / name / "progress.json"
        if path.exists():
            found: dict[str, Any] = _read_json(path)
            if found["recipe"] != asdict(recipe):
                raise SkipError(
                    f"{folder} holds a run with other settings ({found['recipe']}); choose another folder or delete it"
                )
            accelerator.load_state(str(path.parent))
            return int(found["step"])
    return 0


def _read_json(path: Path) -> dict[str, Any]:
    import json

    return dict(json.loads(path.read_text(encoding="utf-8")))


def rows_of_step(count: int, batch: int, step: int, seed: int, rank: int = 0, world: int = 1) -> Tensor:
    """`[batch]`: which examples a step sees; every epoch in another order, with processes side by side.

    >>> seen = torch.cat([rows_of_step(6, 2, step, seed=0) for step in range(3)])
    >>> sorted(seen.tolist())
    [0, 1, 2, 3, 4, 5]
    """
    first = (step * world + rank) * batch
    places = range(first, first + batch)
    orders = {}
    for epoch in {place // count for place in places}:
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        orders[epoch] = torch.randperm(count, generator=generator)
    return torch.stack([orders[place // count][place % count] for place in places])
