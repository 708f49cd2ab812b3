"""Files of weights that somebody touched: each is compared with the model before anything is copied."""

import copy
import json

import pytest
import torch
from helpers.tuning import clip, pairs, run, same, state, tuner, words
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18

from skipguide.errors import SkipError
from skipguide.vision import FloorPlanNet, SkipNet, UNetPlusPlus
from skipguide.vision.layer_masking.classifiers import load_classifier
from skipguide.vision.skip_tuning import SkipTuner
from skipguide.vision.skipnet.train import TrainConfig, train
from skipguide.vision.weights import check_optimizer, check_weights

TINY = {"blocks": [1, 2], "widths": [4, 8], "num_classes": 3}
# what was copied without a word: one number, one row, whole numbers, a square turned round; and what torch itself sees
WRONG = {
    "one number": lambda t: torch.ones(()),
    "one row": lambda t: t.reshape(len(t), -1)[:1, 0].clone() if t.ndim else t[None],
    "whole numbers": lambda t: torch.ones_like(t, dtype=torch.int64),
    "truths": lambda t: torch.ones_like(t, dtype=torch.bool),
    "complex": lambda t: t.to(torch.complex64),
    "turned": lambda t: t.reshape(-1, len(t)).contiguous() if t.ndim else t[None],
}


def wrong_in(tensors, how):
    """Pairs: the name of a floating tensor, and all tensors with that one wrong, unless it stays the same so."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            other = WRONG[how](tensor)
            if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                yield name, tensors | {name: other}


# --- adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with an adapter, its tensors and its notes."""
    folder = tmp_path_factory.mktemp("adapter")
    run()[0].save_adapter(folder)
    with safe_open(folder / "adapter.safetensors", "pt") as opened:
        return folder, load_file(folder / "adapter.safetensors"), json.loads(opened.metadata()["skipguide"])


def write(folder, tensors, notes):
    folder.mkdir(exist_ok=True)
    text = notes if isinstance(notes, str) else json.dumps(notes)
    save_file(tensors, folder / "adapter.safetensors", metadata={"skipguide": text})
    return folder


@pytest.mark.parametrize("how", WRONG)
def test_an_adapter_whose_tensors_are_not_the_models(how, adapter, tmp_path):
    _, tensors, notes = adapter
    t, seen = tuner(), 0
    before = state(t.model)
    for name, changed in wrong_in(tensors, how):
        with pytest.raises(SkipError, match=f"expected the weights of this model in .*{name} is"):
            t.load_adapter(write(tmp_path, changed, notes))
        seen += 1
    assert seen > 10 and same(state(t.model), before), "nothing was copied"
    half = {name: tensor.half() for name, tensor in tensors.items()}
    t.load_adapter(write(tmp_path, half, notes))
    assert not same(state(t.model), before), "another precision is no other kind"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ([], "as a mapping; got list"),
        ("[" * 3000 + "]" * 3000, "nested at most"),
        ("{", "it is damaged"),
        ({"version": True}, "version 1; got version True"),
        ({"fingerprint": None}, "expected fingerprint .* as a text; got None"),
        ({"classnames": "cat"}, "expected classnames .* as a list of texts; got 'cat'"),
        ({"classnames": [1]}, "expected classnames"),
        ({"templates": []}, "expected templates"),
        ({"skip_layers": [1, 1]}, "expected skip_layers"),
        ({"skip_layers": {"image": True, "text": 1}}, "expected skip_layers"),
        ({"class_skip": 3}, "expected class_skip .* as a mapping or null"),
        ({"class_skip": {"version": 1, "ratio": "half"}}, "ratio as a finite number"),
        ({"templates": ["no place"]}, "one {} for the class name"),
        ({"skip_layers": {"image": 99, "text": 1}}, "skip_layers from 0 to"),
    ],
    ids=str,
)
def test_notes_of_an_adapter(change, says, adapter, tmp_path):
    _, tensors, notes = adapter
    folder = write(tmp_path, tensors, notes | change if isinstance(change, dict) else change)
    with pytest.raises(SkipError, match=says):
        SkipTuner.from_adapter(clip(), words, folder)


@pytest.mark.parametrize(
    "name", ["fingerprint", "classnames", "templates", "skip_layers", "class_skip", "model", "name"]
)
def test_notes_that_lack_something(name, adapter, tmp_path):
    _, tensors, notes = adapter
    folder = write(tmp_path, tensors, {key: value for key, value in notes.items() if key != name})
    with pytest.raises(SkipError, match=f"expected {name} in the notes of"):
        SkipTuner.from_adapter(clip(), words, folder)
    with pytest.raises(SkipError, match=f"expected {name} in the notes of"):
        tuner().load_adapter(folder)


# --- checkpoints of runs


def damaged(states, how):
    """States of a run with one thing wrong in them, and what is said of it."""
    weights = next(key for key in ("weights", "net") if key in states)
    for name, changed in wrong_in(states[weights], how):
        yield states | {weights: changed}, f"{name} is"
        break
    some = copy.deepcopy(states)
    number = next(n for n, kept in some["optimizer"]["state"].items() if kept)
    key = next(k for k, value in some["optimizer"]["state"][number].items() if torch.is_tensor(value) and value.ndim)
    some["optimizer"]["state"][number][key] = torch.zeros(1, 1, 1, 1, 1)
    yield some, f"expected {key} of shape"
    yield states | {"optimizer": {"state": {}, "param_groups": []}}, "got another's"
    yield states | {"optimizer": [1]}, "expected the state of an optimizer"
    yield {key: value for key, value in states.items() if key != "optimizer"}, "expected the state of an optimizer"
    yield states | {weights: {}}, "is missing"
    yield states | {weights: [1]}, "expected tensors by name"
    yield [states], "expected a checkpoint of|is no state of"
    for key in ("epoch", "step"):
        if key in states:
            yield states | {key: "3"}, "expected a checkpoint of|is no state of"
            yield states | {key: True}, "expected a checkpoint of|is no state of"


@pytest.mark.parametrize("how", ["one number", "whole numbers", "turned"])
def test_a_checkpoint_of_tuning(how, tmp_path):
    settings = {"epochs": 2, "lr_text": 1e-2, "lr_image": 1e-2, "progress": False, "optimizer": "adamw"}
    tuner().fit(pairs(), checkpoint_dir=tmp_path, **settings)
    states = torch.load(tmp_path / "checkpoint.pt")
    for changed, says in damaged(states, how):
        torch.save(changed, tmp_path / "checkpoint.pt")
        t = tuner()
        before = state(t.model)
        with pytest.raises(SkipError, match=says):
            t.fit(pairs(), checkpoint_dir=tmp_path, **settings)
        assert same(state(t.model), before)
    torch.save(states, tmp_path / "checkpoint.pt")
    assert tuner().fit(pairs(), checkpoint_dir=tmp_path, **settings).resumed_from == 2


@pytest.mark.parametrize("how", ["one number", "whole numbers", "turned"])
def test_a_state_of_training(how, tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 3)
    config = TrainConfig(stage="budget", steps=2, batch_size=4, save_every=1)
    train(SkipNet(TINY), data, config, out=tmp_path)
    states = torch.load(tmp_path / "state.pt")
    for changed, says in [*damaged(states, how), (states | {"history": [{"loss": "1"}]}, "is no state of")]:
        torch.save(changed, tmp_path / "state.pt")
        net = SkipNet(TINY)
        before = state(net)
        with pytest.raises(SkipError, match=says):
            train(net, data, config, out=tmp_path)
        assert same(state(net), before)
    torch.save(states, tmp_path / "state.pt")
    assert len(train(SkipNet(TINY), data, config, out=tmp_path)) == 2


# --- networks that are saved, and published checkpoints


NETS = {
    "UNetPlusPlus": lambda: UNetPlusPlus(widths=(4, 6)),
    "FloorPlanNet": lambda: FloorPlanNet(widths=(4, 6), hidden=4, features=4),
    "SkipNet": lambda: SkipNet(TINY),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("kind", NETS)
def test_weights_of_a_saved_network(kind, how, tmp_path):
    net = NETS[kind]()
    net.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, changed in list(wrong_in(tensors, how))[::5]:
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(SkipError, match=f"{name} is"):
            type(net).from_pretrained(tmp_path)
    counts = {name: t.float() for name, t in tensors.items() if name.endswith("num_batches_tracked")}
    save_file(tensors | counts, tmp_path / "model.safetensors")
    with pytest.raises(SkipError, match="num_batches_tracked is float32"):
        type(net).from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", NETS)
def test_a_folder_that_is_none(kind, tmp_path):
    net = NETS[kind]()
    cls = type(net)
    net.save_pretrained(tmp_path / "whole")
    config, weights = (tmp_path / "whole" / name for name in ("config.json", "model.safetensors"))
    settings, content = config.read_text(), weights.read_bytes()
    for text, says in (("{", "expected JSON in"), ("[]", "as a mapping"), ('{"a":' * 99 + "1" + "}" * 99, "nested")):
        config.write_text(text)
        with pytest.raises(SkipError, match=says):
            cls.from_pretrained(tmp_path / "whole")
    config.unlink()
    with pytest.raises(SkipError, match=r"has no config\.json"):
        cls.from_pretrained(tmp_path / "whole")
    config.write_text(settings)
    weights.write_bytes(content[:50])
    with pytest.raises(SkipError, match="damaged"):
        cls.from_pretrained(tmp_path / "whole")
    weights.unlink()
    with pytest.raises(SkipError, match=r"has no model\.safetensors: expected what .*save_pretrained wrote"):
        cls.from_pretrained(tmp_path / "whole")
    with pytest.raises(SkipError, match="is a file"):
        cls.from_pretrained(config)
    with pytest.raises(SkipError, match="no folder"):
        cls.from_pretrained(tmp_path / "not" / "there")


@pytest.mark.parametrize("how", WRONG)
def test_a_published_unetpp(how):
    net = UNetPlusPlus(widths=(4, 6)).eval()
    names = {"node": "conv", "head": "final"}
    tensors = {}
    for key, tensor in net.state_dict().items():
        top, first, rest = key.split(".", 2)
        second, leaf = rest.split(".", 1) if top == "node" else ("", rest)
        tensors[f"conv{first}_{second}.{leaf}" if top == "node" else f"{names[top]}{first}.{leaf}"] = tensor
    assert same(state(UNetPlusPlus.from_reference_checkpoint(tensors)), state(net))
    for _, changed in list(wrong_in(tensors, how))[::4]:
        with pytest.raises(SkipError):
            UNetPlusPlus.from_reference_checkpoint(changed)


@pytest.mark.parametrize("how", WRONG)
def test_a_published_skipnet(how):
    net = resnet18(num_classes=3)
    tensors = dict(net.state_dict())
    assert SkipNet.from_reference_checkpoint(tensors)
    for _, changed in list(wrong_in(tensors, how))[::25]:
        with pytest.raises(SkipError):
            SkipNet.from_reference_checkpoint(changed)
    with pytest.raises(SkipError, match="not one is under"):
        SkipNet.from_reference_checkpoint({1: torch.ones(1)})


@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # timm copies; what it made is thrown away
def test_weights_of_a_classifier(tmp_path):
    from skipguide.assets import bundled

    source = bundled("tiny-cnn")
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_classifier(str(tmp_path)).labels
    for how in WRONG:
        for _, changed in list(wrong_in(tensors, how))[::20]:
            save_file(changed, tmp_path / "model.safetensors")
            with pytest.raises(SkipError):
                load_classifier(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(SkipError, match="cannot load"):
        load_classifier(str(tmp_path))
    for text in ("{", "[]", "[" * 3000 + "]" * 3000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(SkipError):
            load_classifier(str(tmp_path))


def test_names_and_states_of_the_checks_themselves():
    own = {"a": torch.ones(2)}
    with pytest.raises(SkipError, match="b is of no parameter: mend it"):
        check_weights({"b": torch.ones(2)}, own, "f", "mend it")
    many = {f"x{n}": torch.ones(1) for n in range(9)}
    with pytest.raises(SkipError, match=r"\(and 5 more\)"):
        check_weights(many, own, "f", "mend it")
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    check_optimizer(optimizer.state_dict(), optimizer, "f", "mend it")
    with pytest.raises(SkipError, match="another's"):
        check_optimizer(optimizer.state_dict() | {"state": {7: {}}}, optimizer, "f", "mend it")
