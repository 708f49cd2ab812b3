"""Every script in `demos/scripts`: its tiny form, and its full form with a tiny pipeline in place of the download."""

import inspect
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import imageio.v3 as imageio
import pytest
import torch
from scipy.io import wavfile

from demos.scripts import tiny

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "demos" / "scripts"
# Every script, and the size of its tiny result: frames, height, width, or height and width of a picture.
SCRIPTS = {
    "ltx": (9, 96, 96),
    "ltx2": (9, 64, 64),
    "wan22": (5, 48, 48),
    "hunyuan15": (5, 48, 48),
    "cogvideox": (9, 48, 48),
    "flux": (64, 64),
    "sd35": (64, 64),
    "qwen_image": (64, 64),
}
EVERY = pytest.mark.parametrize("name", sorted(SCRIPTS))


@pytest.fixture(autouse=True)
def threads():
    """The tiny forms take one thread for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def script(monkeypatch):
    """Runs a script by its path, as `python FILE ARGUMENTS` does, and gives what its lines name."""

    def run(name, *words):
        path = FOLDER / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
        monkeypatch.syspath_prepend(str(FOLDER))
        return runpy.run_path(str(path), run_name="__main__")

    return run


def made(name, folder):
    """Where the result of a script goes, as tests name it."""
    return folder / f"made{'.mp4' if len(SCRIPTS[name]) == 3 else '.png'}"


def looked_at(name, path):
    pictures = imageio.imread(path)
    assert pictures.shape == (*SCRIPTS[name], 3)
    assert pictures.std() > 1
    if name == "ltx2":
        rate, sound = wavfile.read(path.with_suffix(".wav"))
        assert rate >= 16000 and sound.shape[0] > 1000 and sound.shape[1] == 2


@EVERY
def test_the_tiny_form_writes_a_file(name, tmp_path, capsys, script):
    path = made(name, tmp_path)
    script(name, "--tiny", "-o", path)
    looked_at(name, path)
    said = capsys.readouterr().out
    assert "passes" in said and f"wrote {path}" in said
    with pytest.raises(SystemExit):
        script(name, "--tiny", "-o", path)
    assert "is there already: name another file with --out" in capsys.readouterr().err


@EVERY
def test_the_full_form_with_a_tiny_pipeline_in_place_of_the_download(name, tmp_path, monkeypatch, script):
    """Its arguments are the pipeline's, its layers the model's, and guidance goes on top of what it sets up."""
    pipe, call = getattr(tiny, name)()
    cls, denoisers = type(pipe), [each for each in ("transformer", "transformer_2") if each in pipe.components]
    prepared = []

    def note(what):
        def noted(self, **how):
            assert what != "compile_repeated_blocks" or self._repeated_blocks, "this model has no blocks to compile"
            prepared.append(what)

        return noted

    def small(self, *args, **given):
        inspect.signature(cls.__call__).bind(self, *args, **given)
        assert set(call) <= set(given), "what is not said here comes from the signature, which suits no released model"
        return cls.__call__(self, *args, **given | call)

    def from_pretrained(hub_id, torch_dtype, **components):
        assert hub_id.count("/") == 1
        pipe.__class__ = type(cls.__name__, (cls,), {"__call__": small})
        return pipe

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(cls, "from_pretrained", from_pretrained)
    monkeypatch.setattr(type(pipe.vae), "from_pretrained", lambda hub_id, subfolder, torch_dtype: pipe.vae)
    for what in ("enable_model_cpu_offload", "enable_group_offload"):
        monkeypatch.setattr(cls, what, note(what))
    monkeypatch.setattr(type(getattr(pipe, denoisers[0])), "compile_repeated_blocks", note("compile_repeated_blocks"))
    script(name, "a tram", "-o", made(name, tmp_path))
    looked_at(name, made(name, tmp_path))
    assert any("offload" in what for what in prepared)


def test_every_script_is_here():
    files = {path.stem for path in FOLDER.glob("*.py")}
    assert files - {"__init__", "tiny"} == set(SCRIPTS)


@EVERY
def test_a_script_needs_no_other_file_and_is_short(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert "import demos" not in text and "from demos" not in text
    assert text.count("tiny import") == 1 and len(text.splitlines()) <= 58


@pytest.mark.parametrize("copied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_by_its_path_from_anywhere(copied, tmp_path):
    """A process of its own, in another folder, that knows where skipguide is and nothing of `demos`."""
    path = FOLDER / "flux.py"
    if copied:
        path = Path(shutil.copy(path, tmp_path / "mine.py"))
        shutil.copy(FOLDER / "tiny.py", tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "skipguide").symlink_to(ROOT / "skipguide")
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    known |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, str(path), "--tiny"], cwd=tmp_path, env=known, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    looked_at("flux", tmp_path / "flux.png")
    assert "wrote flux.png" in done.stdout


def test_as_a_module_of_the_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flux", "--tiny", "-o", str(tmp_path / "made.png")])
    runpy.run_module("demos.scripts.flux", run_name="__main__")
    looked_at("flux", tmp_path / "made.png")


def test_tiny_stands_in_for_classes_of_diffusers():
    for name in ("AutoencoderKLWan", *(each for each in vars(tiny) if each.endswith("Pipeline"))):
        assert hasattr(getattr(diffusers, name), "from_pretrained") and hasattr(getattr(tiny, name), "from_pretrained")


def test_without_a_gpu_the_full_form_says_so_before_it_loads(monkeypatch, capsys, script):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script("ltx", "a tram")
    assert "--tiny" in capsys.readouterr().err
