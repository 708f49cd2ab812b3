"""The state of a training run, and the files that a run is resumed from."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import torch

from skipguide.config import number, whole
from skipguide.errors import SkipError
from skipguide.files import landing, replacing
from skipguide.vision.skipnet.net import SkipNet
from skipguide.vision.skipnet.train_config import TrainConfig
from skipguide.vision.weights import check_optimizer, check_weights

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
            landing(out).mkdir(parents=True, exist_ok=True)
            config.save_json(notes, overwrite=True)

    def _load(self, path: Path) -> None:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise SkipError(f"{path} is damaged ({error}); delete it, or take another folder") from error
        found = found if isinstance(found, dict) else {}
        settings: Any = found.get("config")
        step, history = found.get("step"), found.get("history")
        if not isinstance(settings, dict) or (done := whole(step)) is None or done < 0 or not _is_history(history):
            raise SkipError(f"{path} is no state of a training run; take another folder")
        if settings != self.config.to_dict():
            differ = sorted(k for k, v in self.config.to_dict().items() if settings.get(k) != v)
            raise SkipError(f"{path} is of a run with other settings ({', '.join(differ)}); take another folder")
        if found.get("decisions", self.decisions) != self.decisions:
            raise SkipError(f"{path} is of a run with other decisions, {found['decisions']}; take another folder")
        advice = "it is of another network, or damaged; take another folder"
        check_weights(found.get("net"), self.net.state_dict(), str(path), advice, complete=True)
        check_optimizer(found.get("optimizer"), self.optimizer, str(path), advice)
        self.net.load_state_dict(found["net"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.step, self.history = done, [dict(row) for row in history or ()]
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


def _is_history(rows: Any) -> bool:
    """Whether it is a list of rows of numbers, as `record` makes them."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(isinstance(name, str) and number(value) is not None for name, value in row.items())
        for row in rows
    )
