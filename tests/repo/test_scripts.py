"""Every script in `demos/scripts`: its tiny form, and its full form with a tiny pipeline in place of the download."""

import importlib
import inspect
import wave
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch

from demos.scripts import tiny

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


def script(name):
    return importlib.import_module(f"demos.scripts.{name}")


def made(name, folder):
    """Where the result of a script goes, as tests name it."""
    return folder / f"made{'.mp4' if len(SCRIPTS[name]) == 3 else '.png'}"


def looked_at(name, path):
    pictures = imageio.imread(path)
    assert pictures.shape == (*SCRIPTS[name], 3)
    assert pictures.std() > 1
    if name == "ltx2":
        with wave.open(str(path.with_suffix(".wav"))) as sound:
            assert sound.getnchannels() == 2 and sound.getnframes() > 1000


@EVERY
def test_the_tiny_form_writes_a_file_and_keeps_what_is_there(name, tmp_path, capsys):
    path = made(name, tmp_path)
    script(name).main(["--tiny", "-o", str(path)])
    looked_at(name, path)
    said = capsys.readouterr().out
    assert "passes" in said and f"wrote {path}" in said
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        script(name).main(["--tiny", "-o", str(path)])
    assert "--force" in capsys.readouterr().err and path.read_bytes() == before


@EVERY
def test_the_full_form_with_a_tiny_pipeline_in_place_of_the_download(name, tmp_path, monkeypatch):
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
    script(name).main(["a tram", "--seed", "3", "-o", str(made(name, tmp_path))])
    looked_at(name, made(name, tmp_path))
    assert any("offload" in what for what in prepared)


def test_every_script_is_here():
    files = {path.stem for path in Path(tiny.__file__).parent.glob("*.py")}
    assert files - {"__init__", "common", "tiny"} == set(SCRIPTS)


def test_force_replaces_a_file_and_no_folder(tmp_path, capsys):
    path, folder = tmp_path / "made.mp4", tmp_path / "folder.mp4"
    path.write_text("old")
    folder.mkdir()
    script("ltx").main(["--tiny", "--force", "-o", str(path)])
    looked_at("ltx", path)
    for wrong in (folder, tmp_path / "made.png", tmp_path / "none" / "made.mp4"):
        with pytest.raises(SystemExit):
            script("ltx").main(["--tiny", "--force", "-o", str(wrong)])
        assert str(wrong.parent) in capsys.readouterr().err


def test_without_a_gpu_the_full_form_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script("ltx").main(["a tram"])
    assert "--tiny" in capsys.readouterr().err
