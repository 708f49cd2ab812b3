"""Skip Tuning: fitting, repeated, stopped and resumed, in every precision and by two processes."""

import copy
import json
import math

import pytest
import torch
from helpers.tuning import MODELS, NAMES, clip, images, pairs, run, same, state, tuner, words
from helpers.two_processes import run_in_two

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
    with pytest.raises(SkipError, match="config differ"):
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
    with pytest.raises(SkipError, match="templates differ"):
        run(other, checkpoint_dir=tmp_path)


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
