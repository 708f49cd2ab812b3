"""What every README and docstring says is run here, with tiny random models in place of the downloads."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.versions import is_older

import skipguide
from skipguide.assets import bundled
from skipguide.pipelines.presets import PRESETS
from skipguide.pipelines.registry.described import PIPELINES
from zoo import modular
from zoo.pipes import BY_PIPE, MODELS, understand_prompts
from zoo.pipes_unet_picture import BY_PICTURE
from zoo.pipes_video import BY_VIDEO

# What every README says is run here, with tiny random models in place of the downloads.

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' scheduler under numpy 2

ROOT = Path(__file__).parents[2]
LONGEST = 200  # lines of the README at the root: a stranger reads it in ten minutes
# Every README by its path, so that they are tested side by side; what its code prints and writes at least.
PRINTED: dict[str, tuple[str, ...]] = {
    "README.md": ("blocks run", "x STG from where it differs"),
    "demos/README.md": (),
    "demos/bundled_lm/README.md": (),
    "demos/bundled_model/README.md": (),
    "demos/gpu/README.md": (),
    "demos/quality/README.md": (),
    "demos/real/README.md": (),
    "demos/tune/README.md": (),
    "pipelines/README.md": ("blocks run", "x STG from where it differs", "all checks passed", "transformer_blocks.27"),
    "skipguide/assets/tiny-lm/README.md": (),
    "skipguide/llm/README.md": ("% left out",),
    "vision/README.md": (),
    "vision/floorplan/README.md": (),
    "vision/layer_masking/README.md": ("convolutions computed",),
    "vision/skip_deq/README.md": ("True",),
    "vision/skip_tuning/README.md": (),
    "vision/skipnet/README.md": (),
    "vision/unetpp/README.md": (),
}
WRITTEN = {"README.md": ["tram.mp4"], "pipelines/README.md": ["plan.json"], "skipguide/llm/README.md": ["stats.json"]}
OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md", "pipelines/SUPPORTED.md")  # whose links are tested too
EVERY = pytest.mark.parametrize("name", sorted(PRINTED))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name, language):
    return re.findall(rf"```{language}\n(.*?)```", read(name), flags=re.DOTALL)


def commands(name):
    """The arguments of every `skipguide` in the shell fences, the one under `accelerate launch -m` too."""
    names = ("skipguide", "skipguide.cli")
    for block in fences(name, "sh"):
        for line in block.splitlines():
            words = shlex.split(line.split("&&")[-1], comments=True)
            if set(names) & set(words):
                yield words[min(words.index(each) for each in names if each in words) + 1 :]


def anchors(text):
    """What a link into a Markdown page can lead to, as GitHub names headings."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def tiny_download(monkeypatch, tmp_path):
    """`from_pretrained` gives a tiny LTX pipeline with enough blocks for the layers that the READMEs name."""
    import diffusers

    def ltx2():
        case = BY_VIDEO["ltx2_own"]
        pipe = case.build()
        pipe.to = lambda device: pipe
        call, arguments = type(pipe).__call__, case.call_of() | {"spatio_temporal_guidance_blocks": [2]}
        del arguments["return_dict"]

        class Tiny(type(pipe)):
            def __call__(self, prompt, num_frames, return_dict):
                return call(self, **arguments, return_dict=return_dict)

        pipe.__class__ = Tiny
        return pipe

    def sdxl():
        case = BY_PICTURE["sdxl"]
        pipe, arguments = case.build(), case.call_kwargs()
        pipe.to = lambda device: pipe
        call = type(pipe).__call__

        class Tiny(type(pipe)):
            def __call__(self, prompt):
                return call(self, **arguments)

        pipe.__class__ = Tiny
        return pipe

    stock = diffusers.DiffusionPipeline.from_pretrained

    def from_pretrained(name, torch_dtype=None):
        if name == bundled("tiny-t2v"):
            return stock(name)
        if name == "Lightricks/LTX-2":
            return ltx2()
        if name.startswith("stabilityai/stable-diffusion-xl"):
            return sdxl()
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
                assert torch.isfinite(latents).all()
                pictures = np.full((num_frames, 32, 32, 3), float(latents.sigmoid().mean()))  # there is no tiny VAE
                return type("Output", (), {"frames": [pictures]})()

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
            self.component_names = self.pipe.component_names

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


@EVERY
def test_python_of_the_readme_runs(name, tiny_download, capsys):
    if name == "vision/README.md" and is_older("torch", "2.14"):
        pytest.skip("exporters of an older torch guard on the sizes of the example")
    space: dict[str, object] = {}
    for code in fences(name, "python"):
        exec(compile(code, name, "exec"), space)
    printed = capsys.readouterr().out
    assert all(words in printed for words in PRINTED[name])
    assert all(Path(path).stat().st_size for path in WRITTEN.get(name, []))


@EVERY
def test_commands_of_the_readme_parse(name):
    from skipguide.cli import build_parser

    for words in commands(name):
        build_parser().parse_args(words)


def test_the_readmes_show_commands():
    assert sum(len(list(commands(name))) for name in PRINTED) >= 20
    assert all(list(commands(name)) for name in ("README.md", "pipelines/README.md", "skipguide/llm/README.md"))


def test_every_readme_is_tested_here():
    folders = (ROOT / name for name in ("demos", "pipelines", "vision", "skipguide/assets", "skipguide/llm"))
    found = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("README.md")}
    assert found | {"README.md"} == set(PRINTED)


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= LONGEST
    assert len(re.findall(r"!\[", read("README.md"))) == 4, (
        "the first, and one for each door; others are in the folders"
    )


def test_the_two_commands_stay_one_line_each():
    first, second, *_ = fences("README.md", "sh")
    assert first == 'pip install -e . && skipguide generate "a red circle moving right"\n'
    assert second == 'pip install -e ".[test]" && pytest -n 2\n'


def test_tables_of_the_readme_match_the_data():
    supported = read("pipelines/SUPPORTED.md")
    for name in PIPELINES:
        assert f"`{name}`" in supported, f"{name} is supported and not in pipelines/SUPPORTED.md"
    for known in PRESETS:
        assert known.name in supported, f"{known.name} is known and not in pipelines/SUPPORTED.md"
    assert f"{len(PIPELINES)} pipelines" in read("README.md")
    assert MODELS


@pytest.mark.parametrize("name", [*sorted(PRINTED), *OTHERS])
def test_files_of_the_readme_exist(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        linked = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), f"{target} leads out of the repository"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", [*sorted(PRINTED), *OTHERS])
def test_no_placeholder_is_left(name):
    assert "<!--" not in read(name)


# Every example in a docstring runs and prints what it says.


def modules():
    found = (module.name for module in pkgutil.walk_packages(skipguide.__path__, "skipguide."))
    return ["skipguide", *sorted(name for name in found if not name.startswith(("skipguide.cli", "skipguide.assets")))]


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    torch.manual_seed(0)
    done = doctest.testmod(module, extraglobs={"torch": torch, **vars(skipguide)}, optionflags=flags)
    assert done.failed == 0


def test_the_core_and_the_nets_have_examples():
    floorplan = ("", ".graph", ".net", ".regions", ".msd", ".generate")
    nets = (
        "unetpp.network",
        "segmentation",
        "skip_deq.network",
        "fixed_point",
        *(f"floorplan{name}" for name in floorplan),
    )
    found = doctest.DocTestFinder(exclude_empty=True)
    for name in ("blocks", "plan", "skipper", "check", *(f"vision.{net}" for net in nets)):
        tests = found.find(importlib.import_module(f"skipguide.{name}"))
        assert any(test.examples for test in tests), name


PUBLIC = ("skipguide", "skipguide.pipelines", "skipguide.llm", "skipguide.vision", "skipguide.vision.layer_masking")


@pytest.mark.parametrize("package", PUBLIC)
def test_examples_run_as_a_person_types_them(package):
    """With the package's public names and nothing else: what an example needs beside them, it imports."""
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    found = doctest.DocTestFinder(exclude_empty=True)
    wrong: list[str] = []
    for name, each in public.items():
        if callable(each) and each.__doc__:
            for test in found.find(each, name, globs=dict(public)):
                doctest.DocTestRunner(verbose=False).run(test, out=wrong.append)
    assert not wrong, "".join(wrong)


@pytest.mark.parametrize("package", PUBLIC)
def test_tab_shows_the_public_names(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    if package in ("skipguide.pipelines", "skipguide.vision"):  # packages of many files, which are not for users
        assert set(dir(module)) == set(module.__all__)


def test_nothing_that_ships_names_a_folder_of_the_machine_that_made_it():
    for path in (ROOT / "skipguide" / "assets").rglob("*"):
        if path.suffix in (".json", ".md"):
            text = path.read_text(encoding="utf-8")
            assert "_name_or_path" not in text and "/work/" not in text and "/root/" not in text, path
