"""Finding blocks: unknown models, descriptions by third parties, entry points, tables."""

import importlib
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import nn

from skipguide import (
    BlockSpec,
    ModelSpec,
    NoEffectError,
    SkipError,
    Skipper,
    SkipPlan,
    Sublayer,
    UnknownBlockError,
    blocks,
    check,
    find_blocks,
    register_blocks,
)
from skipguide.pipelines import PipelineSpec, SpatiotemporalSkipGuidance, register_pipeline
from skipguide.pipelines.registry import described as registry
from zoo import BY_NAME, randomise

# Finding blocks: unknown models, descriptions by third parties, entry points, tables.


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(blocks, "_REGISTERED", dict(blocks._REGISTERED))


class One(nn.Module):
    """One stream: a tensor in, a tensor out."""

    def __init__(self):
        super().__init__()
        self.mixer, self.ff = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, scale=1.0):
        x = x + scale * self.mixer(x).tanh()
        return x + self.ff(x)


class Two(nn.Module):
    """Two streams: a tuple out, in either order."""

    def __init__(self, text_first):
        super().__init__()
        self.image, self.text, self.text_first = nn.Linear(8, 8), nn.Linear(8, 8), text_first

    def forward(self, image, text):
        image, text = image + self.image(image) + text.mean(1, keepdim=True), text + self.text(text)
        return (text, image) if self.text_first else (image, text)


class ToyOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(One() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return x


class ToyTwo(nn.Module):
    def __init__(self, text_first):
        super().__init__()
        self.net = nn.Module()
        self.net.layers = nn.ModuleList(Two(text_first) for _ in range(3))

    def forward(self, image, text):
        for layer in self.net.layers:
            out = layer(image, text=text)
            image, text = out[::-1] if layer.text_first else out
        return image + text.mean(1, keepdim=True)


IMAGE, TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)), torch.full((2, 3, 8), 0.3)
SUBLAYERS = {"attn", "cross_attn", "mlp"}
ONE = BlockSpec("layers", streams=("x",), mlp=(Sublayer("ff", outputs=("input",)),))


def two(text_first):
    returns = ("text", "image") if text_first else ("image", "text")
    return BlockSpec("net.layers", streams=("image", "text"), returns=returns)


def test_an_unknown_model_lists_what_was_seen():
    with pytest.raises(
        UnknownBlockError, match=r"blocks of ToyOne .*layers \(4 x One\).*register_blocks\(ToyOne"
    ) as error:
        find_blocks(ToyOne())
    assert isinstance(error.value, SkipError)
    with pytest.raises(UnknownBlockError, match="no ModuleList of blocks"):
        find_blocks(nn.Linear(2, 2))


def test_something_that_is_not_a_model():
    with pytest.raises(SkipError, match=r"pipe\.transformer.*got dict"):
        find_blocks({})


def test_a_third_party_model_with_a_tensor_output():
    register_blocks(ToyOne, ONE)
    model = randomise(ToyOne())
    report = check(model, {"x": IMAGE})
    assert report.blocks == 4 and "residue: none" in str(report)
    assert SUBLAYERS & set(find_blocks(model)[0].parts) == {"mlp"}
    with Skipper(model, SkipPlan([1, 2], "mlp")), torch.no_grad():
        skipped = model(IMAGE)
    for layer in (1, 2):
        nn.init.zeros_(model.layers[layer].ff.weight)
        nn.init.zeros_(model.layers[layer].ff.bias)
    torch.testing.assert_close(skipped, model(IMAGE))


@pytest.mark.parametrize("text_first", [False, True])
def test_a_third_party_model_with_two_streams(text_first):
    register_blocks("ToyTwo", two(text_first))
    model = randomise(ToyTwo(text_first))
    assert check(model, {"image": IMAGE, "text": TEXT}).blocks == 3
    with Skipper(model, SkipPlan([0, 1, 2])):
        assert torch.equal(model(IMAGE, TEXT), IMAGE + TEXT.mean(1, keepdim=True))


def test_check_refuses_a_wrong_description():
    """Streams in the wrong order would change places without any other error; an output too few would fail later."""
    inputs = {"image": IMAGE, "text": TEXT}
    for text_first, streams in ((True, ("image", "text")), (True, ("image",)), (False, ("hidden_states", "text"))):
        register_blocks(ToyTwo, BlockSpec("net.layers", streams=streams))
        with pytest.raises(SkipError, match=rf"layers\.0 returns .* is described as returning {', '.join(streams)}"):
            check(randomise(ToyTwo(text_first)), inputs)


def test_check_refuses_blocks_that_do_nothing_and_models_that_vary():
    register_blocks(ToyOne, ONE)
    dead = randomise(ToyOne())
    for layer in dead.layers:
        for parameter in layer.parameters():
            parameter.zero_()
    with pytest.raises(NoEffectError, match=r"layers\.0"):
        check(dead, {"x": IMAGE})
    noisy = type("Noisy", (ToyOne,), {"forward": lambda self, x: ToyOne.forward(self, x + torch.rand(()))})()
    with pytest.raises(SkipError, match=r"model\.eval\(\)"):
        check(noisy, {"x": IMAGE})


def test_check_asks_for_inputs_it_cannot_make():
    register_blocks(ToyOne, ONE)
    with pytest.raises(SkipError, match=r"check\(model, inputs\)"):
        check(ToyOne())


def test_subclasses_and_the_latest_description_win():
    register_blocks(ToyOne, ONE)

    class Finer(ToyOne):
        pass

    assert len(find_blocks(Finer())) == 4
    register_blocks(Finer, ModelSpec((BlockSpec("layers", streams=("x",)),)))
    assert find_blocks(Finer())[0].parts == ("block",)
    assert SUBLAYERS & set(find_blocks(ToyOne())[0].parts) == {"mlp"}


def test_a_described_stack_that_is_not_there():
    register_blocks(ToyOne, BlockSpec("blocks"))
    with pytest.raises(UnknownBlockError, match=r"stack 'blocks', which this instance does not have; it has layers"):
        find_blocks(ToyOne())


def test_describe_is_a_table():
    lines = find_blocks(BY_NAME["hunyuan"].build()).describe().splitlines()
    assert lines[0] == "HunyuanVideoTransformer3DModel: 6 blocks"
    assert lines[1].split() == ["layer", "name", "class", "parts"]
    assert lines[2].startswith("0      transformer_blocks.0")
    assert lines[-1].split()[:3] == ["5", "single_transformer_blocks.2", "HunyuanVideoSingleTransformerBlock"]
    assert "block, attn, mlp, attn_identity" in lines[-1]
    assert len({line.index(line.split("  ")[-1].strip()) for line in lines[2:]}) == 1


def test_a_map_is_a_sequence():
    found = find_blocks(BY_NAME["latte"].build())
    assert len(found) == 6 == len(list(found))
    assert [block.index for block in found] == list(range(6))
    assert found[1].name == "temporal_transformer_blocks.0" and found[-1] is found[5]


def test_an_installed_package_describes_its_own_models(tmp_path):
    """A distribution with an entry point in the group skipguide.blocks, in a fresh interpreter."""
    (tmp_path / "theirs.py").write_text(
        textwrap.dedent("""
        from torch import nn

        class Layer(nn.Linear):
            pass

        class Theirs(nn.Module):
            def __init__(self):
                super().__init__()
                self.stack = nn.ModuleList(Layer(2, 2) for _ in range(3))

        calls = []

        def describe():
            from skipguide import BlockSpec, register_blocks
            calls.append(1)
            register_blocks(Theirs, BlockSpec("stack", streams=("input",)))
    """)
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[skipguide.blocks]\ntheirs = theirs:describe\n")
    code = """
        import skipguide, theirs
        assert not theirs.calls
        print(skipguide.find_blocks(theirs.Theirs())[2].name)
        skipguide.find_blocks(theirs.Theirs())
        assert theirs.calls == [1]
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": f"{tmp_path}:{root}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "stack.2\n", done.stderr


# A package that is installed beside skipguide adds a model and a pipeline of its own, through its entry points.

THEIRS = Path(__file__).parents[1] / "helpers" / "third_party"


@pytest.fixture
def theirs(monkeypatch):
    """The package as if it were installed; skipguide forgets it afterwards."""
    monkeypatch.setattr(blocks, "_REGISTERED", {})
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.syspath_prepend(THEIRS)
    yield importlib.import_module("theirs")
    sys.modules.pop("theirs", None)


def parts(theirs):
    torch.manual_seed(0)
    pipe = theirs.TheirPipeline(theirs.TheirDenoiser().eval().requires_grad_(False))
    return pipe, torch.randn(2, 4, 8), torch.randn(2, 4, 8)


def test_the_metadata_is_found(theirs):
    for group in ("skipguide.blocks", "skipguide.pipelines"):
        assert "theirs" in {entry.name for entry in entry_points(group=group)}


def test_their_model_is_known_and_proven(theirs):
    pipe, text, latents = parts(theirs)
    inputs = {"hidden_states": latents, "text": text, "timestep": torch.full((2,), 500.0)}
    assert find_blocks(pipe.transformer)[1].parts[:3] == ("block", "attn", "mlp")
    assert check(pipe.transformer, inputs).blocks == 3
    with Skipper(pipe.transformer, SkipPlan([0], part="mlp")) as skipper:
        out = pipe.transformer(**inputs)[0]
    first, *rest = pipe.transformer.layers
    expected = latents + first.look(latents + text)
    for layer in rest:
        expected = layer(text, expected)
    assert torch.equal(out, expected * 1.5)
    assert skipper.stats.skips == {"layers.0.think": 1}


def test_their_pipeline_is_guided(theirs):
    pipe, text, latents = parts(theirs)
    plain = pipe(text, latents)
    with SpatiotemporalSkipGuidance([1], scale=0.5).apply(pipe) as applied:
        out = pipe(text, latents)
    model, x = pipe.transformer, latents
    for t in (1000.0, 500.0):
        time = torch.full((2,), t)
        cond, uncond = model(x, text, time)[0], model(x, torch.zeros_like(text), time)[0]
        first, _, last = model.layers
        weak = last(text, first(text, x)) * (1 + t / 1000)
        x = x - (uncond + 3.0 * (cond - uncond) + 0.5 * (cond - weak)) / 2
    torch.testing.assert_close(out, x, atol=1e-5, rtol=1e-5)
    assert applied.stats.delivery == "shift" and torch.equal(pipe(text, latents), plain)


def test_without_the_package_both_are_unknown(theirs, monkeypatch):
    pipe, _, _ = parts(theirs)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(THEIRS)])
    with pytest.raises(UnknownBlockError, match="TheirDenoiser"):
        find_blocks(pipe.transformer)
    with pytest.raises(SkipError, match="register_pipeline"):
        SpatiotemporalSkipGuidance([1]).apply(pipe)


def test_only_descriptions_are_registered(theirs):
    with pytest.raises(SkipError, match="expects a PipelineSpec; got str"):
        register_pipeline(theirs.TheirPipeline, "batched")
    register_pipeline("TheirPipeline", PipelineSpec("named", scales=((),)))
    assert registry.pipeline_spec(parts(theirs)[0]).cfg == "named"
    with pytest.raises(SkipError, match="expects a class or its name; got a TheirPipeline"):
        register_pipeline(parts(theirs)[0], PipelineSpec("named", scales=((),)))
    for spec in (None, 5, "layers", ["layers"], []):
        with pytest.raises(SkipError, match="expects a BlockSpec"):
            register_blocks(theirs.TheirDenoiser, spec)
    with pytest.raises(SkipError, match="expects a class or its name; got a TheirDenoiser"):
        register_blocks(theirs.TheirDenoiser(), BlockSpec("layers"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"cfg": "both"}, "unknown cfg 'both'; expected one of batched, two_calls"),
        ({"layout": "bhwc"}, "unknown layout"),
        ({"denoisers": "transformer"}, "a tuple of attribute names"),
        ({"denoisers": ("transformer", "transformer_2")}, "scales has a tuple for each"),
    ],
)
def test_a_pipeline_is_called_in_a_way_that_exists(wrong, words):
    with pytest.raises(SkipError, match=words):
        PipelineSpec(**{"cfg": "batched"} | wrong)


def test_a_description_that_names_other_arguments_is_refused_at_once(theirs):
    model = theirs.TheirDenoiser()
    think = (Sublayer("think", outputs=("nothing",)),)
    block, sublayer = BlockSpec("layers", ("nothing",)), BlockSpec("layers", ("tokens",), mlp=think)
    for spec, part in ((block, "block"), (sublayer, "mlp")):
        register_blocks(theirs.TheirDenoiser, spec)
        with pytest.raises(SkipError, match="described with the arguments nothing, but its forward takes"):
            Skipper(model, SkipPlan([1], part))


def test_checks_are_of_a_model_and_a_call(theirs):
    with pytest.raises(SkipError, match=r"expected a torch\.nn\.Module"):
        check(parts(theirs)[0])
    with pytest.raises(SkipError, match="expected inputs as a mapping"):
        check(parts(theirs)[0].transformer, torch.randn(2, 4, 8))
