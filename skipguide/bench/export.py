"""Export: the clips in the folders that two evaluation suites read. The suites themselves are neither run nor needed.

- VBench (`vbench evaluate --videos_path FOLDER`): one folder per setting, `PROMPT-NUMBER.mp4` in it. Prompts of one's
  own go with `--mode custom_input`, and the file `prompts.json` says which prompt a clip was made for, for
  `--prompt_file`.
- ImageReward (`benchmark/test-benchmark.py --img_dir generations --prompts_path prompts.json`): a folder of PNG files
  per setting, `ID_NUMBER.png`, and a list of `{"id", "prompt"}`. Of a clip the middle frame is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skipguide.errors import SkipError
from skipguide.files import fitting, replacing
from skipguide.media import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

EXPORTS = ("vbench", "imagereward")


@dataclass(frozen=True)
class Exported:
    """One clip to export.

    Attributes:
        setting: its row in the table.
        prompt: what it was made for.
        number: of the prompt, from 1.
        seed: from 0.
        frames: the clip.
        fps: how fast it plays.
    """

    setting: str
    prompt: str
    number: int
    seed: int
    frames: list[Image]
    fps: float


def export(kind: str, folder: Path, clips: Iterator[Exported]) -> int:
    """Write clips as a suite reads them.

    Args:
        kind: one of `EXPORTS`.
        folder: need not exist; what is in it already is replaced file by file.
        clips: in any order, each of them read when its turn comes.

    Returns:
        How many files were written.

    Raises:
        SkipError: for another suite, or an mp4 that cannot be written here.
    """
    if kind not in EXPORTS:
        raise SkipError(f"unknown suite {kind!r}; expected one of {', '.join(EXPORTS)}")
    return (_vbench if kind == "vbench" else _imagereward)(folder, clips)


def _vbench(folder: Path, clips: Iterator[Exported]) -> int:
    pictures.require_video()
    prompts: dict[str, dict[str, str]] = {}
    count = 0
    for clip in clips:
        name = fitting(f"{file_words(clip.prompt)}-{clip.seed}", ".mp4")
        with replacing(folder / clip.setting / name) as (file,):
            pictures.save_video(clip.frames, file, clip.fps)
        prompts.setdefault(clip.setting, {})[name] = clip.prompt
        count += 1
    for setting, of in prompts.items():
        _write_json(folder / f"{setting}-prompts.json", of)
    return count


def _imagereward(folder: Path, clips: Iterator[Exported]) -> int:
    prompts: dict[str, str] = {}
    count = 0
    for clip in clips:
        own = f"{clip.number:05d}"
        with replacing(folder / "generations" / clip.setting / f"{own}_{clip.seed}.png") as (file,):
            clip.frames[len(clip.frames) // 2].save(file)
        prompts[own] = clip.prompt
        count += 1
    _write_json(folder / "prompts.json", [{"id": own, "prompt": prompt} for own, prompt in sorted(prompts.items())])
    return count


def file_words(prompt: str) -> str:
    """A prompt as a file name has it: VBench takes the prompt from there, so that as little as possible is changed.

    Example:
        >>> file_words("a cat / a dog?")
        'a cat _ a dog?'
    """
    return re.sub(r"[/\\\x00-\x1f]", "_", prompt).strip() or "_"


def _write_json(path: Path, content: object) -> None:
    with replacing(path) as (file,):
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
