"""The state of a training run, and the files that a run is resumed from."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import torch

from skipguide.errors import SkipError
from skipguide.files import replacing
from skipguide.vision.skipnet.net import SkipNet
from skipguide.vision.skipnet.train_config import TrainConfig

logger = logging.getLogger(__name__)


class TrainState:
    """The step, the history and what is on disk."""

    def __init__(
        self, net: SkipNet, config: TrainConfig, decisions: Any, out: Path | None, resume: bool, main: bool
    ) -> None:
        self.net, self.config, self.decisions, self.out, self.main = net, config, decisions, out, main
        self.step = 0
        self.history: list[dict[str, float]] = []
        decay: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        groups = [{"params": list(net.backbone.parameters())}, {"params": list(net.gates.parameters())}]
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, **decay)
        else:
            self.optimizer = torch.optim.AdamW(groups, **decay)
        if out is None:
            return
        path = out / "state.pt"
        if path.exists():
            if not resume:
                raise SkipError(f"{path} exists; pass resume=True to go on from it, or another folder")
            self._load(path)
        elif main:
            notes = out / "config.json"
            if notes.exists():  # of a run that was stopped before its first state, or of a saved model
                try:
                    TrainConfig.load_json(notes)
                except SkipError as error:
                    raise SkipError(f"{notes} belongs to something else ({error}); take another folder") from error
            out.mkdir(parents=True, exist_ok=True)
            config.save_json(notes, overwrite=True)

    def _load(self, path: Path) -> None:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise SkipError(f"{path} is damaged ({error}); delete it, or take another folder") from error
        if found["config"] != self.config.to_dict():
            differ = sorted(k for k, v in self.config.to_dict().items() if found["config"].get(k) != v)
            raise SkipError(f"{path} is of a run with other settings ({', '.join(differ)}); take another folder")
        if found.get("decisions", self.decisions) != self.decisions:
            raise SkipError(f"{path} is of a run with other decisions, {found['decisions']}; take another folder")
        try:
            self.net.load_state_dict(found["net"])
        except RuntimeError as error:
            raise SkipError(f"{path} is of another network; take another folder: {error}") from error
        self.optimizer.load_state_dict(found["optimizer"])
        self.step, self.history = found["step"], found["history"]
        logger.info("going on from step %d of %s", self.step, path)

    def record(self, row: dict[str, float]) -> None:
        """Count a step."""
        self.step += 1
        self.history.append({"step": self.step, **row})

    def save(self) -> None:
        """Write the state and the history, each under a temporary name first."""
        if self.out is None or not self.main:
            return
        state = {
            "config": self.config.to_dict(),
            "decisions": self.decisions,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
        }
        with replacing(self.out / "state.pt", self.out / "history.csv") as (weights, table):
            torch.save(state, weights)
            self._write_history(table)

    def _write_history(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            columns = ["step", "loss", "cross_entropy", "accuracy", "computation"]
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: v if k == "step" else round(v, 5) for k, v in row.items()} for row in self.history)
