"""Skip Tuning: fitting, stopped, resumed, ended by what is not finite; the methods it is compared with."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from helpers.tuning import MODELS, NAMES, clip, images, pairs, run, same, state, tuner, words
from helpers.two_processes import run_in_two

from demos.skip_tuning.baselines import METHODS, build, linear_probe
from skipguide.errors import SkipError
from skipguide.vision.skip_tuning import ClassSkip, SkipTuner


@pytest.mark.parametrize("name", MODELS)
def test_fit_changes_only_its_own_copy(name):
    model = MODELS[name]()
    before = state(model)
    t, report = run(tuner(model, classes=ClassSkip()))
    assert same(before, state(model))
    assert all(p.grad is None for p in model.parameters())
    after = t.model.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and changed <= set(t.names)
    assert report.exactness < 1e-5
    assert 0 < report.extraction_seconds < report.seconds
    assert report.cache_bytes > 0 and report.peak_bytes > 0
    assert report.trained == sum(p.numel() for p in t.parameters().values()) < report.total
    assert json.loads(json.dumps(report.to_dict()))["steps"] == 4


def test_fit_lowers_the_loss_and_raises_accuracy():
    t, report = run(epochs=12)
    assert report.losses[-1] < report.losses[0] - 0.2
    assert t.evaluate(pairs()).accuracy > tuner().evaluate(pairs()).accuracy


def test_a_run_is_its_seed():
    first, again, other = run()[0], run()[0], run(seed=2)[0]
    assert same(state(first.model), state(again.model))
    assert not same(state(first.model), state(other.model))


def test_views_are_augmented_and_cached():
    seen = []

    def noisy(pixels):
        seen.append(1)
        return pixels + torch.randn_like(pixels)

    first = tuner()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(first, epochs=4, views=2, augment=noisy)
    assert torch.equal(before, torch.get_rng_state())
    cached = len(seen)
    seen.clear()
    run(epochs=4, views="per_epoch", augment=noisy)
    assert cached < len(seen)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    wanted = run(epochs=4)[0]
    from skipguide.vision.skip_tuning import fit

    saved = fit.Checkpoint.save

    def killed(self, optimizer, epoch, losses):
        saved(self, optimizer, epoch, losses)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit.Checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(epochs=4, checkpoint_dir=tmp_path)
    monkeypatch.undo()
    t, report = run(epochs=4, checkpoint_dir=tmp_path)
    assert report.resumed_from == 2 and len(report.losses) == 4
    assert same(state(wanted.model), state(t.model))
    with pytest.raises(SkipError, match=r"config\.epochs was 4 and is 5"):
        run(epochs=5, checkpoint_dir=tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(SkipError, match="damaged"):
        run(epochs=4, checkpoint_dir=tmp_path)


def test_half_precision_weights_become_fp32_masters():
    model = clip().to(torch.bfloat16)
    t, _ = run(tuner(model))
    assert {p.dtype for p in t.parameters().values()} == {torch.float32}
    assert {p.dtype for p in t.merge().parameters()} == {torch.bfloat16}
    assert torch.bfloat16 == next(model.parameters()).dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_half_precision_models_predict_and_train(name, dtype):
    model = MODELS[name]()
    want = tuner(model).logits(images(4))
    t = tuner(copy.deepcopy(model).to(dtype))
    torch.testing.assert_close(t.logits(images(4)), want, atol=0.1, rtol=0.05)
    assert len(t.predict(images(1)[0])) == 4
    for precision in ("auto", "bf16"):
        _, report = run(tuner(copy.deepcopy(model).to(dtype)), precision=precision)
        assert all(map(math.isfinite, report.losses))
    narrow = tuner(copy.deepcopy(model).to(dtype), trainable=lambda name: "fc2" in name)
    run(narrow)
    assert {p.requires_grad for p in narrow.model.parameters()} == {True, False}
    assert 0 <= narrow.evaluate(pairs()).accuracy <= 1


def test_a_stopped_run_leaves_no_old_classifier(monkeypatch):
    from skipguide.vision.skip_tuning import fit as module

    t = tuner()
    t.predict(images(1)[0])
    batches = module.batches

    def stop(labels, config, epoch, accelerator):
        if epoch:
            raise KeyboardInterrupt
        return batches(labels, config, epoch, accelerator)

    monkeypatch.setattr(module, "batches", stop)
    with pytest.raises(KeyboardInterrupt):
        run(t)
    found = t.classifier()
    t._classifiers.clear()
    assert torch.equal(found, t.classifier())


def test_a_run_with_other_prompts_does_not_go_on(tmp_path):
    run(checkpoint_dir=tmp_path)
    other = SkipTuner(clip(), words, NAMES, 1, None, templates="my {}")
    with pytest.raises(SkipError, match=r"templates was \['a {}'\] and is \['my {}'\]"):
        run(other, checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, torch\nfrom helpers import tuning as here\n"
        "t, report = here.run(batch_size=2)\n"
        "torch.save(t.parameters(), sys.argv[1] + torch.distributed.get_rank().__str__())\n"
        "torch.distributed.destroy_process_group()\n"
    )
    run_in_two(script, tmp_path / "rank")
    zero, one = (torch.load(tmp_path / f"rank{r}", weights_only=False) for r in range(2))
    assert all(torch.equal(zero[name], one[name]) for name in zero)
    start = dict(clip().named_parameters())
    assert any(not torch.equal(zero[name], start[name]) for name in zero)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_prefix_leaves_the_device():
    t, report = run(tuner(device="cuda"))
    assert report.peak_kind == "max_memory_allocated"
    assert t.model.text_model.encoder.layers[0].mlp.fc1.weight.device.type == "cpu"
    assert t.model.text_model.encoder.layers[2].mlp.fc1.weight.device.type == "cuda"
    assert t.evaluate(pairs()).count == 8


def weights(of):
    return {name: p.detach().clone() for name, p in of.parameters().items()}


def fit_briefly(which, pictures=None, **more):
    more = {"epochs": 2, "lr_text": 1e-2, "lr_image": 1e-2, "warmup_lr": 1e-3, "progress": False} | more
    return which.fit((pictures or images(8), pairs()[1]), **more)


def overflowing(place):
    """Images of which one is finite and too large for the norms of the tower, so that its features are NaN."""
    return [p * 1e30 if i == place else p for i, p in enumerate(images(8))]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loss_that_is_not_finite_leaves_the_weights(optimizer):
    which = tuner()
    before = weights(which)
    with pytest.raises(SkipError, match="epoch 0 has a loss of nan after 0 steps"):
        fit_briefly(which, overflowing(7), optimizer=optimizer, batch_size=8)
    assert same(before, weights(which))
    assert all(p.grad is None for p in which.parameters().values())
    fit_briefly(which, optimizer=optimizer)  # goes on as usual
    assert not same(before, weights(which))


def test_the_steps_before_are_kept():
    """A run that breaks in its third epoch has the weights of one that was stopped there."""
    broken, stopped = tuner(), tuner()
    settings = {"epochs": 3, "views": "per_epoch"}
    with pytest.raises(SkipError, match=r"epoch 2 has a loss of nan after \d+ steps, whose weights are kept"):
        fit_briefly(broken, augment=spoil_the_third_epoch(), **settings)
    with pytest.raises(StopIteration):
        fit_briefly(stopped, augment=spoil_the_third_epoch(StopIteration), **settings)
    assert same(weights(broken), weights(stopped))


def spoil_the_third_epoch(error=None):
    """An augmentation that gives what overflows, or raises."""
    seen = []
    before = 2 + 2 * (1 + 8)  # two that are compared, then per epoch one for its size and all

    def change(image):
        seen.append(1)
        if len(seen) > before and error is not None:
            raise error
        return image * 1e30 if len(seen) > before else image

    return change


def test_gradients_that_are_not_finite_leave_the_weights():
    which = tuner()
    parameter = next(iter(which.parameters().values()))
    parameter.register_hook(lambda grad: grad * torch.inf)
    before = weights(which)
    with pytest.raises(SkipError, match="epoch 0 has gradients whose norm is not finite after 0 steps"):
        fit_briefly(which)
    assert same(before, weights(which))


def test_pixels_that_are_not_finite_are_named():
    for broken in (torch.nan, torch.inf):
        pictures = images(8)
        pictures[3] = torch.full_like(pictures[3], broken)
        with pytest.raises(SkipError, match="finite pixels"):
            fit_briefly(tuner(), pictures)
        with pytest.raises(SkipError, match="finite pixels"):
            tuner().predict(pictures[3])


@pytest.mark.parametrize("name", METHODS)
def test_baselines_train_what_they_say(name):
    model = clip()
    before = state(model)
    t = build(name, model, words, NAMES, templates="a {}")
    t.fit(pairs(), epochs=1, lr_text=1e-2, lr_image=1e-2, progress=False)
    assert same(before, state(model))
    if METHODS[name].lora:
        assert all("lora_" in n for n in t.names)
        assert len(t.names) == 2 * 3 * 4
    else:
        first = any("layers.0." in n for n in t.names)
        assert first is not METHODS[name].layers
    assert (t.class_skip is not None) is METHODS[name].classes


def test_linear_probe_separates():
    x = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    y = (x[:, 0] > 0).long()
    assert (linear_probe(x, y, 2, 1e-5)(x).argmax(1) == y).float().mean() > 0.95


def test_committed_benchmark():
    """Bars follow from the measurements; no clock is looked at here."""
    path = Path(__file__).parents[2] / "demos" / "benchmarks" / "skip_tuning.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["settings"]["size"] == "b16"
    rows = found["classes"]["100"]["rows"]
    assert (
        found["bars"]["time_to_reference_100"]["value"] == found["classes"]["100"]["time_to_reference"]["median"] <= 0.5
    )
    memory = rows["ours"]["peak_bytes"] / rows["full"]["peak_bytes"]
    assert found["bars"]["memory_to_full_100"]["value"] == round(memory, 4) <= 1 / 3
    assert "extrapolated" in found["classes"]["1000"]["rows"]["full"]
