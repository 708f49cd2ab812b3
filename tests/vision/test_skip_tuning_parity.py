"""Skip Tuning against the reference's numbers (tests/golden/skip_tuning), resumed towers against whole ones."""

import copy
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.tuning import CONTEXT, MODELS, clip, images, siglip, words
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from skipguide.vision.skip_tuning import ClassSkip, SkipTuner, TuneConfig
from skipguide.vision.skip_tuning.classes import rank
from skipguide.vision.skip_tuning.optimizer import make_optimizer
from skipguide.vision.skip_tuning.samplers import class_batches, random_batches
from skipguide.vision.skip_tuning.schedule import learning_rate
from skipguide.vision.skip_tuning.step import StepModule
from skipguide.vision.skip_tuning.towers import find_towers

pytestmark = pytest.mark.numerics

GOLDEN = Path(__file__).parents[1] / "golden" / "skip_tuning"
CASE = "lskip2_all_lr100"


def read(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def tensors(name):
    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="module")
def inputs():
    return tensors("inputs")


@pytest.fixture
def tuner(inputs):
    model = CLIPModel(CLIPConfig(**read("hf_config.json")))
    model.load_state_dict(tensors("clip_tiny_hf"))
    return SkipTuner(model, lambda texts: inputs["tokens"], [f"class {i}" for i in range(12)], 2, None)


def close(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_features_and_prototypes(tuner, inputs):
    acts = tensors(f"{CASE}.acts")
    texts = tuner.text_prefix()
    close(texts.hidden, acts["text_cached"][:, : texts.hidden.shape[1]])
    close(texts.prototypes, acts["class_prototypes"])
    with torch.no_grad():
        hidden = tuner.towers.image.prefix(inputs["images"], 2)
        close(hidden, acts["image_cached"])
        first = torch.zeros(8, dtype=torch.long)
        out = torch.nn.functional.normalize(tuner.towers.image.suffix(hidden, first, 2), dim=-1)
        close(out, torch.nn.functional.normalize(acts["image_out"], dim=-1))
    close(tuner.logits(list(inputs["test_images"])), acts["zeroshot_logits_test"], 1e-4)
    scores, order = rank(
        torch.nn.functional.normalize(acts["step0.image_features"]), inputs["labels"], acts["class_prototypes"]
    )
    others = [i for i in range(12) if i not in inputs["labels"].tolist()]
    close(scores[others], acts["step0.rank_score"][others])
    assert order[5:].tolist() == read(f"{CASE}.json")["steps"][0]["order"][5:]


def test_loss_gradients_and_three_steps(tuner, inputs):
    acts, grads, after = (tensors(f"{CASE}.{part}") for part in ("acts", "grads", "params3"))
    notes = read(f"{CASE}.json")
    assert sorted(tuner.names) == sorted(notes["trainable"])
    assert sum(p.numel() for p in tuner.parameters().values()) == notes["n_trainable"]
    step = StepModule(tuner.towers, tuner.text_prefix(), 2, 2, None, 1)
    optimizer = make_optimizer(tuner, TuneConfig())
    for group in optimizer.param_groups:
        group["lr"] = notes["lr_text"] if group["tower"] == "text" else notes["lr_image"]
    with torch.no_grad():
        hidden = tuner.towers.image.prefix(inputs["images"], 2)
    for number, wanted in enumerate(notes["steps"]):
        loss, logits = step(hidden, inputs["labels"])
        assert loss.item() == pytest.approx(wanted["loss"], abs=1e-5)
        loss.backward()
        if number == 0:
            close(logits, acts["step0.logits"])
            for name, p in tuner.parameters().items():
                assert (p.grad - grads[f"grad.{name}"]).abs().max() < 1e-5, name
        optimizer.step()
        optimizer.zero_grad()
    for name, p in tuner.parameters().items():
        close(p, after[name], 2e-6)
    tuner.forget_answers()
    close(tuner.logits(list(inputs["test_images"])), acts["after3.logits_test"])


def test_fit_itself_takes_the_same_steps(tuner, inputs, monkeypatch):
    """The loop, not only its parts: one batch of eight per epoch, at constant rates."""
    keep = [0, 3, 5, 7, 11]  # the classes of the batch
    tokens = inputs["tokens"]
    small = SkipTuner(tuner.pretrained, lambda texts: tokens[keep], [f"class {i}" for i in keep], 2, None)
    labels = [keep.index(i) for i in inputs["labels"].tolist()]
    images = list(inputs["images"])
    report = small.fit((images, labels), epochs=1, batch_size=8, lr_text=2e-3, lr_image=5e-4, warmup_epochs=0)
    step = StepModule(tuner.towers, tuner.text_prefix(), 2, 2, None, 1)
    step.texts.hidden, step.texts.where = step.texts.hidden[keep], step.texts.where[keep]
    loss, _ = step(tuner.towers.image.prefix(inputs["images"], 2).detach(), torch.tensor(labels))
    assert report.losses[0] == pytest.approx(loss.item(), abs=1e-5)
    optimizer = make_optimizer(tuner, TuneConfig())
    for group in optimizer.param_groups:
        group["lr"] = 2e-3 if group["tower"] == "text" else 5e-4
    loss.backward()
    optimizer.step()
    for name, p in small.parameters().items():
        close(p, tuner.parameters()[name], 1e-6)


def test_probabilities():
    for case in read("cskip_probabilities.json"):
        found = ClassSkip(case["top_ratio"], case["max_top"], case["lam"]).probabilities(case["num_classes"]).tolist()
        wanted = case["ratios"]
        if len(wanted) < len(found):
            found = found[:60] + found[-3:]
        for ours, theirs in zip(found, wanted, strict=True):
            if theirs is None or theirs != theirs:
                assert ours == 1  # the reference divides zero by zero there, and never keeps that class
            else:
                assert ours == pytest.approx(theirs, abs=1e-7)


def test_seeded_ranks():
    case = read("cskip_seeded_mask.json")
    torch.manual_seed(case["torch_manual_seed"])
    skip = ClassSkip(ratio=case["top_ratio"], decay=case["lam"])
    assert skip.draw(case["num_classes"]).int().tolist() == case["reserve_mask"]


def test_learning_rates():
    cases = read("lr_schedule.json")
    for name, warm in (("base_to_new", 1e-6), ("cross_dataset", 1e-8)):
        rates = cases[name]["lr_per_epoch"]
        peaks = rates[1]
        for epoch, wanted in enumerate(rates):
            found = [learning_rate(epoch, len(rates), peak, warmup=warm) for peak in peaks]
            assert found == pytest.approx(wanted, rel=1e-9)
    rates = next(v for k, v in cases.items() if "few" in k)["lr_per_epoch"]
    found = [learning_rate(e, len(rates), rates[0][0], warmup_epochs=0) for e in range(len(rates))]
    assert found == pytest.approx([r[0] for r in rates], rel=1e-9)


def test_batches_have_the_reference_structure():
    case = read("batch_order.json")
    labels, size = case["labels"], case["batch_size"]
    found = class_batches(labels, size, random.Random(0))
    assert [len(b) for b in found] == [len(b) for b in case["batch_random"]]
    of = [{labels[i] for i in batch} for batch in found]
    assert all(len(classes) == 1 for classes in of)
    theirs = [labels[batch[0]] for batch in case["batch_random"]]
    ours = [next(iter(classes)) for classes in of]
    assert [a == b for a, b in pairwise(ours)] == [a == b for a, b in pairwise(theirs)]
    plain = random_batches(len(labels), size, random.Random(0))
    assert [len(b) for b in plain] == [len(b) for b in case["random"]]
    assert len({i for b in plain for i in b}) == 24


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_resumed_pass_is_the_whole_pass(name, layer):
    model = MODELS[name]()
    towers = find_towers(model)
    pixels, tokens = torch.stack(images(3)), words(["a b", "a much longer text here", "c"])
    short, where = towers.text.crop(tokens)
    assert short.shape[1] == (CONTEXT if name == "siglip" else 7)
    with torch.no_grad():
        image = towers.image.suffix(towers.image.prefix(pixels, layer), torch.zeros(3, dtype=torch.long), layer)
        text = towers.text.suffix(towers.text.prefix(short, layer), where, layer)
        torch.testing.assert_close(image, towers.image.full(pixels), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(text, towers.text.full(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_whole_model(name):
    model = MODELS[name]()
    whole = find_towers(copy.deepcopy(model))
    pixels, tokens = torch.stack(images(3)), words(["a b", "a much longer text", "c"])
    (whole.image.full(pixels).square().sum() + whole.text.full(tokens).sin().sum()).backward()
    wanted = {n: p.grad for n, p in whole.model.named_parameters()}
    towers = find_towers(model)
    short, where = towers.text.crop(tokens)
    with torch.no_grad():
        hidden, texts = towers.image.prefix(pixels, 1), towers.text.prefix(short, 1)
    first = torch.zeros(3, dtype=torch.long)
    (towers.image.suffix(hidden, first, 1).square().sum() + towers.text.suffix(texts, where, 1).sin().sum()).backward()
    names = towers.trained(1, 1)
    assert names
    for n, p in model.named_parameters():
        if n in names:
            torch.testing.assert_close(p.grad, wanted[n], rtol=1e-4, atol=1e-5)
        else:
            assert p.grad is None, n


def test_the_last_block_asks_one_query():
    model = clip()
    seen = []
    last = model.text_model.encoder.layers[-1]
    handles = [
        m.register_forward_hook(lambda m, a, out: seen.append(out.shape)) for m in (last.self_attn.q_proj, last.mlp)
    ]
    towers = find_towers(model)
    tokens, where = towers.text.crop(words(["a b", "c"]))
    towers.text.suffix(towers.text.prefix(tokens, 1), where, 1)
    for handle in handles:
        handle.remove()
    assert seen == [(2, 16), (2, 16)]


def test_old_end_of_text_ids_pool_at_the_largest():
    model = clip()
    model.text_model.eos_token_id = model.text_model.config.eos_token_id = 2
    towers = find_towers(model)
    tokens = words(["a b", "c d e"])
    short, where = towers.text.crop(tokens)
    found = towers.text.suffix(towers.text.prefix(short, 1), where, 1)
    torch.testing.assert_close(found, towers.text.full(tokens), rtol=1e-5, atol=1e-6)


def test_scale_and_bias_are_scalars_that_work_on_any_device():
    towers = find_towers(siglip())
    assert towers.scale().shape == towers.bias().shape == ()
