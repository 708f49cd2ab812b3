"""Skip Tuning: few-shot CLIP adaptation with short gradient paths (arXiv 2412.11509).

Layers before ω are frozen and computed once per image, classes unlike the batch are left out of the step.
"""

from skipguide.vision.skip_tuning.classes import ClassSkip
from skipguide.vision.skip_tuning.config import TuneConfig
from skipguide.vision.skip_tuning.results import BaseNew, Evaluation, TuneReport, split_base_new
from skipguide.vision.skip_tuning.samplers import few_shot
from skipguide.vision.skip_tuning.tuner import SkipTuner

__all__ = [
    "BaseNew",
    "ClassSkip",
    "Evaluation",
    "SkipTuner",
    "TuneConfig",
    "TuneReport",
    "few_shot",
    "split_base_new",
]
