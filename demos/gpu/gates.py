"""SkipNet: what it costs to route images around blocks, and what that saves."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from demos.gpu.race import Variant, describe, race, tell
from demos.gpu.setting import Setting
from skipguide.vision import skipnet


def measure(setting: Setting) -> dict[str, Any]:
    """Both depths and both gates, batch 256."""
    nets = []
    for name in setting.pick(("resnet38", "resnet110"), ("resnet38",)):
        for gate in ("rnn", "ff1"):
            tell(f"    {name}, {gate}")
            try:
                nets.append({"net": name, "gate": gate} | one(setting, name, gate))
            except Exception as error:  # one network must not end the others
                nets.append({"net": name, "gate": gate, "error": describe(error)})
    return {"nets": nets}


def halves(batch: int, gates: int) -> Tensor:
    """Decisions bool `[batch, gates]`: every gate lets half of the images through, another half each time."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.zeros(batch, gates, dtype=torch.bool)
    for gate in range(gates):
        keep[torch.randperm(batch, generator=generator)[: batch // 2], gate] = True
    return keep


def one(setting: Setting, name: str, gate: str) -> dict[str, Any]:
    """plain: the network without gates. open: every gate computed and overruled, every block runs. half: so that every
    gated block runs for half of the images. own: as the untrained gates decide.
    """
    torch.manual_seed(0)
    batch, calls = setting.pick((256, 10), (2, 1))
    net = skipnet(name, gate=gate, num_classes=10).eval().to(setting.device)
    count = len(net.block_names) - 1
    images = torch.randn(batch, 3, 32, 32, device=setting.device)
    everything = torch.ones(batch, count, dtype=torch.bool, device=setting.device)
    half = halves(batch, count).to(setting.device)

    def repeated(call: Any) -> Any:
        def work() -> None:
            with torch.inference_mode():
                for _ in range(calls):
                    call()

        return work

    runs = {
        "plain": lambda: net.backbone(images),
        "open": lambda: net(images, return_routing=True, decisions=everything),
        "half": lambda: net(images, return_routing=True, decisions=half),
        "own": lambda: net(images),
    }
    variants = {each: Variant(nullcontext, repeated(call)) for each, call in runs.items()}
    found = race(setting, variants, rounds=setting.pick(6, 1))
    for row in found.values():
        if "seconds" in row:
            row["ms_per_batch"] = round(1000 * row["seconds"] / calls, 4)
    return {"batch": batch, "gated_blocks": count, "variants": found}
