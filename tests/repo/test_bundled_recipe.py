"""The recipe of the bundled video model: its shortcuts compute what the stock classes do, and its runs go on."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from demos.bundled_model import evaluate, train_vae
from demos.bundled_model.autoencoder import FRAMES, alone, as_images, build_vae, encode_clips, load_vae
from demos.bundled_model.clips import render, training_specs
from demos.bundled_model.common import Ema
from demos.bundled_model.export import export, pipeline
from demos.bundled_model.export import main as export_command
from demos.bundled_model.frame_classifier import FrameClassifier, stability
from demos.bundled_model.frame_classifier import main as judge_of_frames
from demos.bundled_model.model import (
    DEFAULT,
    SHORT,
    Bf16Linear,
    Shape,
    _attend_in_bf16,
    assemble,
    build,
    stock_attention,
)
from demos.bundled_model.optim import Muon
from demos.bundled_model.pool import ClipPool
from demos.bundled_model.progress import NOTES, Progress, load_weights, read_progress, write_progress
from demos.bundled_model.text import build_tokenizer
from demos.bundled_model.train_transformer import Probe, Run, backward, batch_of, parse, train
from skipguide import SkipError
from skipguide.pipelines import SpatiotemporalSkipGuidance

TINY = Shape(layers=2, heads=2, head_dim=16, ffn=32)
FLAGS = "--layers 2 --heads 2 --head-dim 16 --ffn 32 --batch 4 --micro 2 --pool 6 --first-clips 4 --fresh 1 --probe 1"


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae(base=4, dim_mult=(1, 1, 2)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae_folder(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def specs(number, seed=0):
    return random.Random(seed).sample(training_specs(), number)


def test_clips_of_any_length_show_the_same_path():
    short, long = render(specs(2), 3), render(specs(2), 3, FRAMES)
    assert short.shape[1] == 16 and long.shape[1] == FRAMES
    assert (short[:, 0] - long[:, 0]).abs().max() < 1e-5
    assert (short[:, -1] - long[:, -1]).abs().mean() < 0.01


# -- the autoencoder ------------------------------------------------------------------------------------------------


def test_frames_as_images_are_encoded_as_the_stock_class_does(vae):
    clips = render(specs(2), 5, FRAMES)
    stock = vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mean
    assert stock.shape == (2, 8, 9, 16, 16)
    torch.testing.assert_close(encode_clips(vae, clips), stock, rtol=1e-4, atol=1e-5)
    assert not any("forward" in module.__dict__ for module in vae.modules()), "the stock forwards are back"


def test_frames_as_images_are_decoded_as_the_stock_class_does(vae):
    latents = torch.randn(1, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    stock = vae.decode(latents).sample
    assert stock.shape[2] == 5, "one frame, then two of each latent"
    with as_images(vae):
        alone(vae, True)
        first = vae.decoder(vae.post_quant_conv(latents[:, :, 0]))
        alone(vae, False)
        rest = vae.decoder(vae.post_quant_conv(latents[0, :, 1:].transpose(0, 1)))
    mine = torch.cat([first, rest]).clamp(-1, 1)
    torch.testing.assert_close(mine, stock[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_two_equal_frames_have_nearly_the_latent_of_one():
    torch.manual_seed(0)
    vae = build_vae().eval()
    still = render(specs(1), 5, 1).expand(-1, 3, -1, -1, -1)
    first, pair = (
        vae.encode(still.transpose(1, 2).repeat(1, 1, 2, 1, 1)[:, :, :5] * 2 - 1).latent_dist.mean[0, :, :2].unbind(1)
    )
    assert (first - pair).norm() < 0.3 * first.norm()


def test_the_past_stays_out_of_a_trained_autoencoder(tmp_path):
    args = train_vae.parse(["--out", str(tmp_path), "--steps", "4", "--clips", "2", "--batch", "4"])
    torch.manual_seed(0)
    made = [build_vae(base=4, dim_mult=(1, 1, 2)) for _ in range(2)]
    train_vae.run(args, *made)
    state = torch.load(tmp_path / "state.pt")
    assert state["step"] == 4
    args.steps = 6
    train_vae.run(args, *made)
    assert torch.load(tmp_path / "state.pt")["step"] == 6, "a run goes on from its state"
    trained = load_vae(tmp_path / "model")
    past = [m.weight[:, :, :-1] for n, m in trained.named_modules() if n.endswith(("conv1", "conv2"))]
    assert past and all(not taps.any() for taps in past)
    assert trained.config.latents_std != [1.0] * 8
    clips = render(specs(1), 5, FRAMES)
    stock = trained.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mean
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (trained.config.latents_mean, trained.config.latents_std)
    )
    torch.testing.assert_close(encode_clips(trained, clips), (stock - mean) / std, rtol=1e-3, atol=1e-4)


def test_the_decoder_alone_becomes_better_and_the_latents_stay(vae, tmp_path):
    words = f"--out {tmp_path} --steps 2 --clips 2 --batch 4 --start {tmp_path} --decoder-only"
    mine, before = copy.deepcopy(vae).requires_grad_(True), copy.deepcopy(vae.state_dict())
    train_vae.run(train_vae.parse(words.split()), mine, copy.deepcopy(vae))
    after = mine.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert mine.config.latents_std == vae.config.latents_std


# -- the transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [SHORT, DEFAULT])
def test_text_is_conditioned_on_as_the_pipeline_does(vae, length):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build(TINY, tokenizer)
    for param in model.parameters():
        param.data.add_(0.1 * torch.randn_like(param))
    captions = ["a large red circle moving right", "", "a star on stripes"]
    latents, sigma = torch.randn(3, 8, 2, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        mine = model(latents, sigma, tokens.input_ids, tokens.attention_mask, torch.full((3,), length))
        pipe = assemble(vae, tokenizer, model.text_encoder, stock_attention(model.transformer))
        text, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=length)
        stock = pipe.transformer(latents, timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False)[0]
    torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-5)


def test_bf16_products_have_the_gradients_of_a_linear_layer():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 32), torch.randn(5, 7, 64, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    found = torch.autograd.grad(Bf16Linear.apply(x, layer.weight, layer.bias).square().sum(), [x, *layer.parameters()])
    for mine, stock in zip(found, wanted, strict=True):
        assert (mine - stock).norm() < 0.01 * stock.norm()


def test_attention_in_bf16_is_attention():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 8, generator=generator) for _ in range(3))
    mask = torch.randn(2, 1, 1, 7, generator=generator)
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(_attend_in_bf16(query, key, value, mask), stock, rtol=0.02, atol=0.02)


def test_muon_in_bf16_takes_nearly_the_same_step():
    def step(bf16):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(16, 24))
        weight.grad = torch.randn(16, 24)
        before = weight.detach().clone()
        Muon([weight], lr=0.1, bf16=bf16).step()
        return weight.detach() - before

    exact, rounded = step(False), step(True)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).norm() < 0.05 * exact.norm()


def test_micro_batches_add_up_to_the_gradient_of_the_batch():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build(TINY, tokenizer)
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    batch = batch_of(torch.randn(3, 8, 2, 8, 8), ["a red star", "", "a blue ring"], tokenizer)
    found = []
    for micro in (3, 2):
        model.zero_grad()
        loss = backward(model, batch, micro)
        found.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for whole, parts in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)


def test_the_pool_is_a_ring_that_another_machine_takes_up(vae, tmp_path):
    pool = ClipPool(vae, tmp_path / "one", 3, seed=0)
    pool.fill(3)
    pool.grow(2)
    assert len(pool) == 3
    again = ClipPool(vae, tmp_path / "one", 3, seed=0)
    assert again.next == 3, "what was not saved is encoded again"
    elsewhere = ClipPool(vae, tmp_path / "two", 3, seed=0, start=4)
    elsewhere.fill(1)
    assert (torch.from_numpy(elsewhere.latents[1]) == torch.from_numpy(pool.latents[1])).all(), "clip 4 is clip 4"
    latents, shown = pool.draw(4, random.Random(0))
    assert latents.shape == (4, 8, 9, 16, 16) and all(spec in training_specs() for spec in shown)
    every = {pool.spec(number) for number in range(len(training_specs()))}
    assert len(every) == len(training_specs()), "every combination once before any comes again"


def test_a_training_goes_on_here_and_elsewhere_and_becomes_a_stock_pipeline(vae_folder, tmp_path, monkeypatch):
    args = ["--vae", str(vae_folder), *FLAGS.split(), "--steps", "2", "--log-every", "1"]
    first = Run(parse([*args, "--out", str(tmp_path / "a"), "--fresh-start"]))
    train(first)
    assert first.progress.steps == 2 and first.progress.clips == 8
    again = Run(parse([*args, "--out", str(tmp_path / "a")]))
    for mine, saved in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(mine, saved)
    assert again.warm == 2 and len(again.opts[0].state) > 0, "with its momentum"

    with pytest.raises(SkipError, match="holds a training of Shape"):
        Run(parse([*args, "--layers", "3", "--out", str(tmp_path / "a")]))
    elsewhere = Run(parse([*args, "--out", str(tmp_path / "b"), "--start", str(first.file)]))
    assert elsewhere.progress.steps == 2 and elsewhere.warm == 0 and not elsewhere.opts[0].state
    for name, param in elsewhere.model.named_parameters():
        torch.testing.assert_close(param, first.ema.shadow[name], rtol=1e-3, atol=1e-6)
    train(elsewhere)
    assert read_progress(elsewhere.file).steps == 4
    assert len((tmp_path / "b/log.csv").read_text().splitlines()) == 3

    size = export(elsewhere.file, vae_folder, tmp_path / "pipe", steps=2, guidance=2.0)
    assert size == sum(path.stat().st_size for path in (tmp_path / "pipe").rglob("*") if path.is_file())
    call = json.loads((tmp_path / "pipe/generation.json").read_text())
    assert call.pop("fps") == 8
    onwards = Run(parse([*args, "--out", str(tmp_path / "c"), "--start", str(tmp_path / "pipe")]))
    assert not any(str(vae_folder) in path.read_text() for path in (tmp_path / "pipe").rglob("*.json"))
    assert onwards.progress == read_progress(elsewhere.file) and (tmp_path / "pipe" / NOTES).exists()
    for name, param in onwards.model.named_parameters():
        torch.testing.assert_close(param, elsewhere.ema.shadow[name], rtol=1e-3, atol=1e-6)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    stock.set_progress_bar_config(disable=True)
    clip = stock("a red circle", output_type="pt", generator=torch.Generator().manual_seed(0), **call).frames[0]
    assert clip.shape == (FRAMES, 3, 64, 64) and torch.isfinite(clip).all()
    with SpatiotemporalSkipGuidance([1]).apply(stock) as applied:
        stock("a red circle", output_type="pt", **call)
    assert applied.stats.to_dict()["blocks_run"] < applied.stats.to_dict()["blocks_naive"]
    assert type(pipeline(elsewhere.file, vae_folder)) is type(stock)


def test_a_signal_ends_a_training_after_its_step(vae_folder, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    words = ["--vae", str(vae_folder), *FLAGS.split(), "--steps", "3", "--fresh-start", "--out", str(tmp_path)]
    run = Run(parse(words))
    step = run.step

    def stopped(rate):
        signal.raise_signal(signal.SIGTERM)
        return step(rate)

    monkeypatch.setattr(run, "step", stopped)
    train(run)
    assert run.progress.steps == 1 == read_progress(run.file).steps
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_two_processes_take_the_same_steps(vae_folder, tmp_path):
    words = f"--standalone --nproc-per-node 2 {tmp_path / 'two.py'} --vae {vae_folder} {FLAGS} --steps 3 --fresh-start"
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", *words.split(), "--out", str(tmp_path)]
    there = os.environ | {"PYTHONPATH": str(Path(train_vae.__file__).parents[2])}
    subprocess.run(command, check=True, timeout=300, env=there)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first["clips"] == second["clips"] == 12
    assert all(torch.equal(mine, other) for mine, other in zip(first["weights"], second["weights"], strict=True))
    assert first["seed"] != second["seed"], "each draws clips and noise of its own"
    assert first["mean"] == second["mean"] == [1.75], "a quarter of 1 and three of 2"
    assert read_progress(tmp_path / "progress.safetensors").steps == 3
    assert (tmp_path / "rank1" / "pool.json").exists() and not (tmp_path / "rank1" / "state.pt").exists()


TWO = """
import torch
from demos.bundled_model.train_transformer import Run, parse, train

run = Run(parse())
seed = torch.initial_seed()
layer = torch.nn.Linear(1, 1, bias=False)
layer.weight.grad = torch.full((1, 1), 1.0 + run.team.rank)
run.team.average_gradients(layer, 0.75 if run.team.rank else 0.25)
train(run)
found = {"weights": list(run.model.parameters()), "clips": run.progress.clips, "seed": seed}
torch.save(found | {"mean": layer.weight.grad.flatten().tolist()}, run.out / f"{run.team.rank}.pt")
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--prompts 5", "--prompts is no option of an export"),
        ("--weights nowhere", "there are no weights at nowhere"),
        ("", "is there already: choose another folder"),
    ],
)
def test_what_an_export_refuses(tmp_path, capsys, words, said):
    write_progress(tmp_path / "p.safetensors", Ema(torch.nn.Linear(1, 1)), Progress(TINY))
    named = [] if "--weights" in words else ["--weights", str(tmp_path / "p.safetensors")]
    with pytest.raises(SystemExit):
        export_command(["--out", str(tmp_path), *named, *words.split()])
    assert said in capsys.readouterr().err


def test_the_committed_weights_are_refused_by_another_shape(tmp_path):
    model = build(TINY, build_tokenizer())
    write_progress(tmp_path / "p.safetensors", Ema(model), Progress(TINY, steps=7, minutes=1.26))
    found = read_progress(tmp_path / "p.safetensors")
    assert (found.shape, found.steps, found.minutes) == (TINY, 7, 1.3)
    with pytest.raises(SkipError, match="different weights"):
        load_weights(
            tmp_path / "p.safetensors", build(Shape(layers=1, heads=2, head_dim=16, ffn=32), build_tokenizer())
        )


def test_the_probe_is_the_same_every_time(vae):
    torch.manual_seed(3)
    first = Probe(vae, build_tokenizer(), each=1).batch
    torch.manual_seed(4)
    second = Probe(vae, build_tokenizer(), each=1).batch
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_evaluation_takes_any_pipeline(vae_folder, tmp_path, capsys):
    write_progress(tmp_path / "p.safetensors", Ema(build(TINY, build_tokenizer())), Progress(TINY))
    export(tmp_path / "p.safetensors", vae_folder, tmp_path / "pipe", steps=1, guidance=2.0)
    words = f"--model {tmp_path / 'pipe'} --prompts 5 --real 8 --tune 1 --tune-prompts 2 --workers 2 --out"
    evaluate.main([*words.split(), str(tmp_path / "results.json")])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["frames_real"]["same"] > 0.9 and found["accuracy_real"]["motion"] > 0.8, "17 frames suit both judges"
    assert set(found["frames_held_out"]) == {"same", "steady", "shape", "colour", "background"}
    assert found["guidance_scale"] == 1 and found["steps"] == 1
    assert (tmp_path / "samples.png").stat().st_size > 0


# -- the judge of frames --------------------------------------------------------------------------------------------


def test_stability_is_the_share_of_the_commonest_reading():
    readings = torch.tensor([[0, 0, 0, 2], [1, 1, 1, 1], [3, 2, 1, 0]])
    assert stability(readings).tolist() == [0.75, 1.0, 0.25]


def test_the_judge_is_trained_measured_and_loaded(tmp_path, capsys):
    judge_of_frames(["--out", str(tmp_path / "judge.safetensors"), "--steps", "2", "--batch", "2", "--clips", "3"])
    found = json.loads((tmp_path / "judge.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["frames"] == 48 and set(found["accuracy"]) == {"shape", "colour", "background"}
    again = FrameClassifier.load(tmp_path / "judge.safetensors")
    assert not again.training and again.collect.weight.dtype == torch.float32


def test_the_judge_reads_frames_one_by_one():
    judge = FrameClassifier().eval()
    clips = torch.rand(2, 3, 3, 64, 64)
    whole = judge.read(clips, chunk=4)
    assert whole["shape"].shape == (2, 3)
    assert torch.equal(whole["colour"][1], judge.read(clips[1:])["colour"][0])
