"""A folder of clips that several processes fill: which are there, what they were made with, and the manifest.

Per clip there are two files, `00001-a-red-circle.gif` and its notes `00001-a-red-circle.gif.json`. Both are written
under temporary names; the notes are renamed first and the clip last, so a clip that is there is whole and described,
and a run that is killed between any two of these steps leaves a clip that counts as not made. The manifest is put
together from the notes, under a lock and renamed into place: it has no line twice and no half line, whichever process
was killed, and when.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from skipguide.cli.file_locks import FolderLocks, remove_leftovers
from skipguide.cli.outputs import one_line, read_json, replacing, sidecar, write_json
from skipguide.errors import SkipError
from skipguide.files import landing

MANIFEST = "manifest.jsonl"
MADE_WITH = "made_with"
OTHERS = Literal["refuse", "replace", "keep"]
SHOWN = 4  # differences that a refusal names


@dataclass(frozen=True)
class Clip:
    """One clip that is asked for.

    Args:
        file: its name in the folder.
        made_with: everything that the clip depends on, as plain data.
    """

    file: str
    made_with: Mapping[str, Any]

    @property
    def stem(self) -> str:
        """The name of its lock."""
        return Path(self.file).stem


class ClipFolder:
    """Clips in a folder.

    Args:
        folder: need not exist.
        clips: those that are asked for.
        others: what happens to a clip that was made with other settings.
    """

    def __init__(self, folder: Path, clips: Sequence[Clip], others: OTHERS = "refuse") -> None:
        self.folder = folder
        self.clips = clips
        self.others = others
        self.locks = FolderLocks(folder)
        self._lines: dict[str, tuple[tuple[int, int, str | None], str]] = {}
        self._digests: dict[str, tuple[tuple[int, int, int], str]] = {}

    def check(self) -> None:
        """Refuse a folder that was made with other settings, before anything is loaded.

        Raises:
            SkipError: naming what differs.
        """
        if self.folder.exists() and not (self.folder.is_dir() and os.access(self.folder, os.W_OK)):
            raise SkipError(f"{self.folder} is not a folder that can be written to")
        for clip in self.clips:
            self.done(clip)
        if self.others == "refuse":
            asked = {clip.file for clip in self.clips}
            strange = [path.stem for path in self._notes() if path.stem not in asked and self._line(path) is not None]
            if strange:
                raise SkipError(
                    f"{self.folder} has clips that are not asked for here ({len(strange)}: {strange[0]}, ...): "
                    f"were the prompts changed? Choose another folder, or --keep to leave them there"
                )

    def done(self, clip: Clip) -> bool:
        """Whether a clip is there, made with the settings that are asked for.

        Raises:
            SkipError: if one is there that was made with other settings, or that its notes do not describe.
        """
        path = self.folder / clip.file
        notes = _own_notes(sidecar(path))
        if not path.exists():
            return False  # never made, removed, or its process was killed before the last step
        if self.others == "keep":
            return True
        if notes is not None and notes[MADE_WITH] == clip.made_with and notes.get("sha256") == self._digest(path):
            return True
        if self.others == "replace":
            return False
        if notes is None:
            what = "exists already, without notes on how it was made"
        elif notes[MADE_WITH] != clip.made_with:
            what = f"was made with other settings: {differences(notes[MADE_WITH], clip.made_with)}"
        else:
            what = "is not the file that its notes describe: it was changed, or the disk lost a part of it"
        raise SkipError(f"{path} {what}. Choose another folder, --force to make it anew, or --keep to leave it")

    def write(self, clip: Clip, save: Callable[[Path], None], notes: Mapping[str, Any]) -> None:
        """Write a clip and its notes; the lock must be held.

        Args:
            clip: which one.
            save: writes the clip to a file of that suffix.
            notes: more than what it was made with.
        """
        path = self.folder / clip.file
        remove_leftovers(self.folder, clip.stem)
        landing(path).unlink(missing_ok=True)  # with --force: new notes never stand next to an old clip
        with replacing(sidecar(path), path) as (notes_file, clip_file):
            save(clip_file)
            content = clip_file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            write_json(notes_file, {**notes, MADE_WITH: clip.made_with, "bytes": len(content), "sha256": digest})
            for file in (clip_file, notes_file):
                _to_disk(file)

    def write_manifest(self) -> int:
        """Bring the manifest up to date: a line per clip in the folder, in the order of their names.

        Returns:
            The number of lines.
        """
        with self.locks.hold("manifest", wait=True):
            remove_leftovers(self.folder, Path(MANIFEST).stem)
            lines = [line for path in self._notes() if (line := self._line(path)) is not None]
            text = "".join(f"{line}\n" for line in lines)
            path, content = self.folder / MANIFEST, text.encode()
            if not path.exists() or path.read_bytes() != content:  # bytes: a damaged one need not be text
                with replacing(path) as (partial,):
                    partial.write_bytes(content)
        return len(lines)

    def _notes(self) -> Iterator[Path]:
        """The notes of every clip in the folder, also of clips that are not asked for here."""
        return (path for path in sorted(self.folder.glob("[0-9]*.json")) if path.with_suffix("").exists())

    def _line(self, path: Path) -> str | None:
        """What the manifest says of one clip, None if its notes are not of this kind; they are read once."""
        stat, digest = path.stat(), self._digest(path.with_suffix(""))
        state = (stat.st_mtime_ns, stat.st_size, digest)
        known = self._lines.get(path.name)
        if known is None or known[0] != state:
            notes = _own_notes(path)
            if notes is None or digest is None:
                return None
            made, model = notes[MADE_WITH], notes.get("model")
            line = {
                "file": path.stem,
                "prompt": made.get("prompt"),
                "seed": made.get("seed"),
                "model": {**(model if isinstance(model, dict) else {}), "hash": made.get("model")},
                "guidance": notes.get("guidance"),
                "call": notes.get("call"),
                "image": made.get("image"),
                "frames": notes.get("frames"),
                "size": notes.get("size"),
                "fps": notes.get("fps"),
                "versions": made.get("versions"),
                "seconds": notes.get("seconds"),
                "sha256": digest,  # of the file that is there, which with --keep may not be the one of its notes
            }
            known = self._lines[path.name] = (state, one_line(line))
        return known[1]

    def _digest(self, path: Path) -> str | None:
        """The sha256 of a clip, read once while it is not written to; None if it is gone."""
        try:
            stat = path.stat()
            state = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            known = self._digests.get(path.name)
            if known is None or known[0] != state:
                with path.open("rb") as file:
                    known = self._digests[path.name] = (state, hashlib.file_digest(file, "sha256").hexdigest())
        except FileNotFoundError:
            return None
        return known[1]


def _own_notes(path: Path) -> dict[str, Any] | None:
    """The notes of a clip, None if there are none that say what it was made with."""
    notes = read_json(path)
    return notes if notes is not None and isinstance(notes.get(MADE_WITH), dict) else None


def _to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk: after a power cut a renamed file must not be empty."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, Mapping):
        return {prefix: data}
    return {k: v for name, value in data.items() for k, v in _flat(value, f"{prefix}.{name}".lstrip(".")).items()}


def differences(before: Any, now: Any) -> str:
    """What differs between two settings, in words."""
    old, new = _flat(before), _flat(now)
    words = [
        f"{name} was {_short(old.get(name))} and is {_short(new.get(name))}"
        for name in dict.fromkeys((*new, *old))
        if old.get(name) != new.get(name)
    ]
    return ", ".join(words[:SHOWN]) + (f", and {len(words) - SHOWN} more" if len(words) > SHOWN else "")


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
