"""Progress bars: at once on a terminal, seldom in a log, and made in one place."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skipguide.hosts import progress

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def no_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)


def test_a_terminal_shows_the_bar_at_once(monkeypatch, no_notebook):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.progress_bar(range(3), "pieces")) == [0, 1, 2]
    assert "pieces:   0%" in sys.stderr.getvalue()


def test_a_log_has_nothing_of_what_is_short(monkeypatch, no_notebook):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.progress_bar(what="pieces", total=3, leave=True) as bar:
        for _ in range(3):
            bar.update()
    assert sys.stderr.getvalue() == ""
    assert progress.pace()["mininterval"] >= 5


def test_a_notebook_is_watched(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert progress.is_watched() and progress.pace() == {}


def test_without_any_output_nothing_fails(monkeypatch, no_notebook):
    monkeypatch.setattr(sys, "stderr", None)  # pythonw, some services
    assert not progress.is_watched()


def test_not_asked_for_there_is_none(monkeypatch, no_notebook):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.progress_bar(range(3), show=False)) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""


def test_the_environment_turns_bars_off():
    """A process of its own: tqdm reads the environment when it is imported."""
    code = "from skipguide.hosts.progress import progress_bar; print(sum(progress_bar(range(3), 'pieces')))"
    known = os.environ | {"TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    code = f"import sys; sys.stderr.isatty = lambda: True; {code}"
    done = subprocess.run([sys.executable, "-c", code], env=known, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n" and done.stderr == ""


def test_bars_are_made_in_one_place():
    for folder in ("skipguide", "pipelines", "vision"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name == "progress.py" or "tqdm(" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(("bundled", "shown"), [(True, False), (False, True)])
def test_weights_that_take_minutes_have_the_bars_of_their_library(monkeypatch, no_notebook, tmp_path, bundled, shown):
    import diffusers
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled

    from skipguide.cli import models

    before = [each.utils.logging.is_progress_bar_enabled() for each in (diffusers, transformers)]
    monkeypatch.setattr(sys, "stderr", Terminal())
    source = models.resolve("tiny-t2v") if bundled else models.Source("somebody/model", None)
    try:
        models.loading_bars(source)
        for each in (diffusers, transformers):
            assert each.utils.logging.is_progress_bar_enabled() == shown
        assert not are_progress_bars_disabled()
    finally:
        for each, on in zip((diffusers, transformers), before, strict=True):
            (each.utils.logging.enable_progress_bar if on else each.utils.logging.disable_progress_bar)()


def test_what_a_bar_is_at_is_no_drawing_of_its_own_where_nobody_looks(monkeypatch, capfd):
    monkeypatch.setattr(progress, "is_watched", lambda: False)
    bar = progress.progress_bar(total=50, what="clips")
    for number in range(50):
        progress.say(bar, f"number {number}")
        bar.update()
    bar.close()
    assert capfd.readouterr().err.count("number") <= 1
