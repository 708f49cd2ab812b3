"""A stub pipeline that draws, behind the command line, and what a command left."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from skipguide import BlockSpec, find_blocks, register_blocks
from skipguide.cli import main, models, pipeline_calls
from skipguide.pipelines import PipelineSpec, register_pipeline

BLOCKS = 4


class StubDenoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(BLOCKS))


class StubPipeline:
    """Draws a bar on noise; the guidance that is applied makes it redder."""

    def __init__(self):
        self.transformer = StubDenoiser()
        self.calls = []
        self.red = 0.0
        self.fails = None

    def set_progress_bar_config(self, **kwargs):
        self.bar = kwargs

    def draw(self, generator, count, height, width):
        if self.fails is not None:
            raise self.fails
        frames = torch.rand(count, height, width, 3, generator=generator) * 0.5
        frames[:, :, : width // 4, 0] = min(1.0, 0.5 + self.red)
        return (frames * 255).round().to(torch.uint8).numpy()

    def __call__(
        self,
        prompt=None,
        negative_prompt="",
        num_inference_steps=50,
        guidance_scale=7.5,
        video_length=16,
        height=64,
        width=64,
        generator=None,
        output_type="pil",
    ):
        self.calls.append({k: v for k, v in locals().items() if k not in ("self", "generator")})
        return SimpleNamespace(frames=[self.draw(generator, video_length, height, width)])


class StubPictures(StubPipeline):
    def __call__(self, prompt=None, num_inference_steps=50, height=64, width=64, generator=None):
        self.calls.append({"prompt": prompt, "height": height, "width": width})
        return SimpleNamespace(images=[Image.fromarray(self.draw(generator, 1, height, width)[0])])


class StubGuidance:
    def __init__(self, layers, scale=1.0, part="block", **more):
        self.layers, self.scale, self.part = layers, scale, part

    @contextmanager
    def apply(self, pipeline):
        pipeline.red = 0.01 * self.scale * (1 + sum(self.layers))
        try:
            yield SimpleNamespace(stats=StubStats(passes=9, delivery="shift"))
        finally:
            pipeline.red = 0.0

    def cost(self, pipeline):
        find_blocks(pipeline.transformer).select(self.layers)
        return SimpleNamespace(ratio_to_plain=1 + (BLOCKS - 1 - min(self.layers)) / (2 * BLOCKS))


class StubStats(dict):
    def __str__(self):
        return "9 passes"

    def to_dict(self):
        return dict(self)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A stub pipeline behind `--model anything`, in an empty folder; counts how often it was loaded."""
    register_blocks(StubDenoiser, BlockSpec("blocks"))
    register_pipeline(StubPipeline, PipelineSpec("single"))
    state = SimpleNamespace(pipeline=StubPipeline(), loads=0, defaults={"num_inference_steps": 5, "fps": 10})
    folder = tmp_path / "model"
    folder.mkdir()

    def load(source, device, dtype):
        state.loads += 1
        return state.pipeline

    def resolve(name):
        path, text = folder / "generation.json", json.dumps(state.defaults)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return models.Source(name, folder)

    monkeypatch.setattr(models, "resolve", resolve)
    monkeypatch.setattr(models, "pipeline_class", lambda source: type(state.pipeline))
    monkeypatch.setattr(models, "load_pipeline", load)
    monkeypatch.setattr(pipeline_calls, "make_guidance", lambda settings: StubGuidance(**settings))
    state.folder = tmp_path / "out"
    state.folder.mkdir()
    monkeypatch.chdir(state.folder)
    return state


def interrupt_after(draws, monkeypatch):
    """Ctrl-C at the draw after so many; the list that is returned holds how many are left."""
    draw, left = StubPipeline.draw, [draws]

    def interrupted(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return draw(self, *args)

    monkeypatch.setattr(StubPipeline, "draw", interrupted)
    return left


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def one_line(capsys, status, expected, *argv):
    """The command ends with `status`, nothing on stdout, and one line on stderr that holds `expected`."""
    assert main(argv) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert expected in err
    assert err.startswith("skipguide")
