"""Finding blocks: unknown models, descriptions by third parties, entry points, tables."""

import subprocess
import sys
import textwrap
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
from zoo import BY_NAME, randomise


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
