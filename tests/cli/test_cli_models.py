"""Which model the command line takes, on which device, in which precision."""

import pytest
from helpers import cli_stub
from helpers.cli_stub import one_line

from skipguide.cli import arguments, build_parser, models

stub = cli_stub.stub


def test_models_that_are_none(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["X"]}')
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model_index.json").write_text("{")
    (tmp_path / "future").mkdir()
    (tmp_path / "future" / "model_index.json").write_text('{"_class_name": "FuturePipeline"}')
    for name, expected in {
        "nonsense": "no model 'nonsense': expected tiny-t2v (bundled), a folder, or a hub id",
        "./no/such": "no model './no/such'",
        "file": "file is a file",
        "empty": "no model_index.json",
        "bad": "model_index.json is not JSON",
        "future": "FuturePipeline",
        "other": "it is a single model: only `describe` takes one",
    }.items():
        one_line(capsys, 2, expected, "generate", "p", "--model", name)
    one_line(capsys, 2, "no model 'nonsense'", "describe", "nonsense")
    one_line(capsys, 2, "neither model_index.json nor config.json", "describe", "empty")
    one_line(capsys, 2, "no _class_name", "describe", "other")
    one_line(capsys, 2, "none of transformer", "describe", "future")


@pytest.mark.parametrize("command", [["describe"], ["generate", "p", "--model"]])
def test_a_hub_model_without_a_network_is_one_line(command, capsys, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(self, *args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    expected = "somebody/some-model is neither a folder here nor in the local cache, and the hub does not answer"
    one_line(capsys, 2, expected, *command, "somebody/some-model")


def test_unknown_words_of_a_small_vocabulary():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<unk>": 0, "▁a": 1, "▁red": 2, ",": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert models.vocabulary_note(tokenizer, "A Red red") == ""
    note = models.vocabulary_note(tokenizer, "a tram in a red tram")
    assert note == "was not trained on tram, in; its words are a, red"


def test_device_that_is_not_there(stub, capsys):
    one_line(capsys, 2, "cannot use device 'warp'", "generate", "p", "--device", "warp", "--layers", "1")


@pytest.mark.parametrize(
    ("name", "device", "bundled", "dtype"),
    [
        ("auto", "cpu", False, "float32"),
        ("auto", "cuda:1", False, "bfloat16"),
        ("auto", "cuda", True, "float32"),
        ("float16", "cuda", True, "float16"),
    ],
)
def test_dtype(name, device, bundled, dtype):
    assert models.choose_dtype(name, device, bundled=bundled) == dtype


def test_bundled_name_is_the_default(tmp_path, monkeypatch):
    assert build_parser().parse_args(["generate", "p"]).model == arguments.BUNDLED
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr("skipguide.assets.bundled", lambda name: tmp_path / "assets" / name)
    assert models.resolve("shipped") == models.Source("shipped", tmp_path / "assets" / "shipped", bundled=True)
    assert not models.resolve("./shipped").bundled
