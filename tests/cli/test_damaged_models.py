"""Models of other libraries whose files were damaged: one sentence, whatever the library raises."""

import os
import shutil

import pytest
from helpers.cli_stub import one_line

from skipguide.assets import bundled

COMMANDS = {
    "tiny-lm": ("llm", "def"),
    "tiny-t2v": ("generate", "p", "-o", "out.gif"),
    "tiny-clip": ("clip", "predict", "x.png", "--classes", "a,b"),
}


@pytest.mark.parametrize("damage", [b"", b"half", b"\x10" + b"\0" * 7 + b"{" * 16])
@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_weights(name, damage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundled(name), tmp_path / "model", copy_function=os.symlink)
    weights = sorted((tmp_path / "model").rglob("*.safetensors"))[0]
    weights.unlink()
    weights.write_bytes(damage)
    one_line(capsys, 2, "cannot load ./model", *COMMANDS[name], "--model", "./model")
