"""The checkpoint of a run, from which a killed run goes on after its last whole epoch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from skipguide.config import number, whole
from skipguide.errors import SkipError
from skipguide.files import replacing
from skipguide.vision.skip_tuning.config import TuneConfig
from skipguide.vision.skip_tuning.inputs import Examples
from skipguide.vision.skip_tuning.options import RunOptions
from skipguide.vision.skip_tuning.trainable_classifier import TrainableClassifier
from skipguide.vision.weights import check_optimizer, check_weights

log = logging.getLogger(__name__)


class Checkpoint:
    """The state after the last whole epoch, in one file that is replaced at once."""

    def __init__(self, tuner: TrainableClassifier, config: TuneConfig, examples: Examples, options: RunOptions) -> None:
        self.tuner = tuner
        self.file = Path(str(options.checkpoint_dir)) / "checkpoint.pt"
        self.about = {
            "config": config.to_dict(),
            "model": tuner.fingerprint,
            "names": list(tuner.names),
            "classnames": list(tuner.classnames),
            "class_skip": None if tuner.class_skip is None else tuner.class_skip.to_dict(),
            "templates": list(tuner.templates),
            "preprocessing": tuner.prepare.name,
            "labels": list(examples.labels),
        }

    def save(self, optimizer: torch.optim.Optimizer, epoch: int, losses: list[float]) -> None:
        """Write the state after `epoch` epochs."""
        state = {
            "about": self.about,
            "epoch": epoch,
            "losses": losses,
            "weights": {name: p.detach().cpu() for name, p in self.tuner.parameters().items()},
            "optimizer": optimizer.state_dict(),
        }
        with replacing(self.file) as (partial,):
            torch.save(state, partial)

    def load(self, optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
        """Go on from the file if it is there: the epoch to start with, and the losses so far."""
        if not self.file.exists():
            return 0, []
        try:
            state = torch.load(self.file, map_location=self.tuner.device, weights_only=True)
        except Exception as error:
            raise SkipError(f"expected a checkpoint in {self.file}; it is damaged ({error}): delete it") from error
        advice = "delete it, or choose another checkpoint_dir"
        parts = ("about", "epoch", "losses", "weights", "optimizer")
        found: list[Any] = list(map(state.get, parts)) if isinstance(state, dict) else [None] * 5
        about, epoch, losses, weights, rest = found
        known = isinstance(about, dict) and isinstance(losses, list) and None not in map(number, losses)
        if not known or (done := whole(epoch)) is None or done < 0:
            raise SkipError(f"expected a checkpoint of SkipTuner.fit in {self.file}; got something else: {advice}")
        was, own = _flat(about), _flat(self.about)
        differs = [f"{key} was {was.get(key)} and is {value}" for key, value in own.items() if was.get(key) != value]
        if differs:
            raise SkipError(
                f"expected a checkpoint of this run in {self.file}; it is of another ({'; '.join(differs[:4])}): "
                f"{advice}"
            )
        check_weights(weights, self.tuner.parameters(), str(self.file), advice, complete=True)
        check_optimizer(rest, optimizer, str(self.file), advice)
        self.tuner.load_parameters(weights)
        optimizer.load_state_dict(rest)
        log.info("going on after epoch %d of %s", done, self.file)
        return done, list(losses)


def _flat(about: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every setting by its path, as a text; long ones by their beginning and a hash of the rest."""
    out: dict[str, str] = {}
    for key, value in about.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
            continue
        text = str(value)
        if len(text) > 60:
            text = f"{text[:40]}... ({hashlib.blake2b(text.encode(), digest_size=3).hexdigest()})"
        out[prefix + key] = text
    return out
