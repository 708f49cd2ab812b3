"""What the README says is run here, with a tiny random model in place of the download."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from skipguide.pipelines.presets import PRESETS
from skipguide.pipelines.registry.described import PIPELINES
from zoo import modular
from zoo.pipes import BY_PIPE, MODELS, understand_prompts

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fences(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def tiny_download(monkeypatch, tmp_path):
    """`from_pretrained` gives a tiny LTX pipeline with enough blocks for the layers that the README names."""
    import diffusers

    def from_pretrained(name, torch_dtype):
        case = BY_PIPE["ltx"]
        pipe = case.build()
        config = dict(pipe.transformer.config) | {"num_layers": 28}
        torch.manual_seed(0)
        pipe.transformer = type(pipe.transformer).from_config(config).eval()
        understand_prompts(pipe)
        pipe.to = lambda device: pipe
        call = type(pipe).__call__
        arguments = {"num_inference_steps": 2, "height": 96, "width": 96, "output_type": "latent"}

        class Tiny(type(pipe)):
            def __call__(self, prompt, num_frames=9):
                latents = call(self, prompt, negative_prompt="", num_frames=9, **arguments).frames
                return type("Output", (), {"frames": [latents]})()

        Tiny.__name__ = type(pipe).__name__
        pipe.__class__ = Tiny
        return pipe

    class TinyModular:
        """A modular Wan pipeline with enough blocks, from prompt embeddings to latents."""

        def __init__(self):
            self.pipe = modular.build("wan")
            config = dict(self.pipe.transformer.config) | {"num_layers": 30}
            torch.manual_seed(0)
            self.pipe.update_components(transformer=type(self.pipe.transformer).from_config(config).eval())
            self.update_components = self.pipe.update_components

        @property
        def guider(self):
            return self.pipe.guider

        def load_components(self, torch_dtype):
            pass

        def to(self, device):
            return self

        def __call__(self, prompt, num_frames, output):
            return modular.run(self.pipe)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(diffusers.ModularPipeline, "from_pretrained", lambda name: TinyModular())
    monkeypatch.chdir(tmp_path)


def test_python_of_the_readme_runs(tiny_download, capsys):
    space: dict[str, object] = {}
    for code in fences("python"):
        exec(compile(code, "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "blocks run" in printed and "all checks passed" in printed and "transformer_blocks.27" in printed
    assert Path("plan.json").exists()


def test_commands_of_the_readme_parse():
    from skipguide.cli import build_parser

    lines = [shlex.split(line.split("&&")[-1], comments=True) for block in fences("sh") for line in block.splitlines()]
    names = ("skipguide", "skipguide.cli")  # the second under `accelerate launch -m`
    commands = [words for words in lines if set(names) & set(words)]
    assert len(commands) >= 5
    for words in commands:
        build_parser().parse_args(words[min(words.index(name) for name in names if name in words) + 1 :])


def test_tables_of_the_readme_match_the_data():
    for name in PIPELINES:
        assert f"`{name}`" in README, f"{name} is supported and not in the README"
    for (_, blocks), preset in PRESETS.items():
        assert f"`{list(preset.layers)}`" in README or blocks == 12, preset
    assert MODELS


def test_files_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_no_placeholder_is_left():
    assert "<!--" not in README
