"""The tests that need a GPU, in a process of their own."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from demos.gpu.setting import Setting

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 150
WORKERS = "6"


def files() -> list[str]:
    """Those with such tests."""
    found = sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    )
    return [path for path in found if path != "tests/repo/test_gpu_demo.py"]


def measure(setting: Setting) -> dict[str, Any]:
    """Run them; what failed is in the figures by name, with the line that said why."""
    chosen = setting.pick(files(), ["tests/vision/test_layer_masking_masks.py"])
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    if not setting.dry and importlib.util.find_spec("xdist") is not None:
        command += ["-n", WORKERS]
    seconds = min(SECONDS, max(30.0, setting.left))
    began = time.monotonic()
    try:
        done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        text, code = "".join(_text(part) for part in (late.stdout, late.stderr)), None
    lines = text.splitlines()
    return {
        "files": len(chosen), "exit_code": code, "timed_out": code is None,
        "seconds": round(time.monotonic() - began, 2), "counts": counts(text),
        "failures": [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))][:60],
        "end": [line[:300] for line in lines[-25:]],
    }  # fmt: skip


def counts(text: str) -> dict[str, int]:
    """`3 passed, 1 skipped` as numbers, from the last line that has any.

    Example:
        >>> counts("..s\\n1 failed, 3 passed, 10 deselected in 2.00s")
        {'failed': 1, 'passed': 3, 'deselected': 10}
    """
    for line in reversed(text.splitlines()):
        found = re.findall(r"(\d+) (failed|passed|skipped|deselected|errors?|xfailed|xpassed)", line)
        if found and " in " in line:
            return {word: int(number) for number, word in found}
    return {}


def _text(part: str | bytes | None) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part or ""
