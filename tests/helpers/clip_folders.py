"""What a folder of clips holds: the clips, their notes and the manifest, which agree."""

import hashlib
import json
from pathlib import Path


def contents(folder):
    """Name -> bytes of every clip."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.gif"))}


def manifest(folder):
    text = (Path(folder) / "manifest.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def check_whole(folder, names):
    """Every clip, its notes and one line of the manifest, that agree; and nothing else."""
    assert sorted(contents(folder)) == sorted(names)
    expected = [*names, *(f"{name}.json" for name in names), "manifest.jsonl"]
    assert sorted(path.name for path in Path(folder).iterdir() if path.name != ".claims") == sorted(expected)
    lines = manifest(folder)
    assert [line["file"] for line in lines] == sorted(names)
    for line in lines:
        assert line["sha256"] == hashlib.sha256((Path(folder) / line["file"]).read_bytes()).hexdigest()
