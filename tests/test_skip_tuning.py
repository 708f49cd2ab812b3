"""Skip Tuning: laws of the towers, class skipping, caches, fitting, adapters, bad input, the command."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, SiglipConfig, SiglipModel

from skipguide.assets import bundled
from skipguide.cli import main
from skipguide.errors import SkipError
from skipguide.vision.skip_tuning import ClassSkip, SkipTuner, TuneConfig, few_shot, split_base_new
from skipguide.vision.skip_tuning.baselines import METHODS, build, linear_probe
from skipguide.vision.skip_tuning.cache import FeatureCache, prune
from skipguide.vision.skip_tuning.classes import choose
from skipguide.vision.skip_tuning.samplers import class_batches
from skipguide.vision.skip_tuning.step import StepModule
from skipguide.vision.skip_tuning.towers import find_towers

NAMES = ["red circle", "blue star", "green cross", "pink moon"]
CONTEXT, END = 12, 49


def config(**more):
    shared = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    text = {"vocab_size": 50, "max_position_embeddings": CONTEXT, "bos_token_id": 48, "eos_token_id": END}
    return {
        "text_config": shared | text | {"pad_token_id": 1, "projection_size": 16} | more,
        "vision_config": shared | {"image_size": 16, "patch_size": 8} | more,
    }


def clip(seed=0, **more):
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(**config(**more), projection_dim=8)).eval()


def siglip():
    torch.manual_seed(0)
    return SiglipModel(SiglipConfig(**config())).eval()


def open_clip_model():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": CONTEXT, "vocab_size": 50, "width": 16, "heads": 2, "layers": 3}
    return open_clip.CLIP(8, vision, text).eval()


MODELS = {"clip": clip, "siglip": siglip, "open_clip": open_clip_model}


def words(texts):
    """A tokenizer: one id per word, the end, then padding to the context."""
    rows = []
    for text in texts:
        ids = [48, *(2 + hash_of(word) % 44 for word in text.split()), END]
        rows.append(ids + [1] * (CONTEXT - len(ids)))
    return torch.tensor(rows)


def hash_of(word):
    return sum((i + 1) * ord(letter) for i, letter in enumerate(word))


def images(count=8, seed=0):
    return list(torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))


def pairs(per_class=2):
    return images(4 * per_class), [i for i in range(4) for _ in range(per_class)]


def tuner(model=None, skip=1, classes=None, **more):
    return SkipTuner(model or clip(), words, NAMES, skip, classes, templates="a {}", **more)


def run(which=None, **more):
    more = {"epochs": 2, "lr_text": 1e-2, "lr_image": 1e-2, "warmup_lr": 1e-3, "progress": False} | more
    done = which or tuner()
    return done, done.fit(pairs(), **more)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# towers


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


# class skipping


@given(st.integers(1, 200), st.floats(0.05, 1.0), st.integers(1, 60), st.floats(0.01, 2.0))
@settings(max_examples=60, deadline=None)
def test_probabilities_are_probabilities(classes, ratio, most, decay):
    skip = ClassSkip(ratio, most, decay)
    p = skip.probabilities(classes)
    assert torch.isfinite(p).all()
    assert (p >= 0).all() and (p <= 1).all()
    assert (p.diff() <= 1e-12).all()
    assert (p[: skip.certain(classes)] == 1).all()
    assert p[0] == 1


def test_labels_of_the_batch_are_never_dropped():
    order = torch.arange(10).flip(0)
    ranks = torch.zeros(10, dtype=torch.bool)
    assert choose(order, ranks, torch.tensor([7, 0, 7, 3])).tolist() == [0, 3, 7]


def test_a_step_with_every_label_counts_every_label():
    t = tuner(classes=ClassSkip(ratio=1.5, max=1))
    step = StepModule(t.towers, t.text_prefix(), 1, 1, t.class_skip, 1)
    with torch.no_grad():
        hidden = t.towers.image.prefix(torch.stack(images(4)), 1)
        loss, logits = step(hidden, torch.arange(4))
        plain = StepModule(t.towers, t.text_prefix(), 1, 1, None, 1)(hidden, torch.arange(4))
    torch.testing.assert_close(logits, plain[1])
    torch.testing.assert_close(loss, plain[0])


def test_classes_that_are_left_out_are_not_computed():
    t = SkipTuner(clip(), words, [f"c{chr(97 + i)}" for i in range(20)], 1, ClassSkip(ratio=0.2), templates="a {}")
    rows = []
    handle = t.towers.text.blocks[1].register_forward_hook(lambda m, a, out: rows.append(len(out)))
    step = StepModule(t.towers, t.text_prefix(), 1, 1, t.class_skip, 1)
    step(t.towers.image.prefix(torch.stack(images(1)), 1), torch.tensor([3]))
    handle.remove()
    assert rows[-1] == len(step.kept) < 10
    assert 3 in step.kept.tolist()


def test_ranks_are_drawn_once_or_every_step():
    for resample, count in (("run", 1), ("step", 6)):
        t = SkipTuner(
            clip(), words, [f"c{chr(97 + i)}" for i in range(20)], 1, ClassSkip(0.2, decay=2, resample=resample)
        )
        step = StepModule(t.towers, t.text_prefix(), 1, 1, t.class_skip, 1)
        drawn = set()
        for _ in range(12):
            step(t.towers.image.prefix(torch.stack(images(1)), 1), torch.tensor([3]))
            drawn.add(tuple(step.ranks.tolist()))
        assert (len(drawn) == 1) if count == 1 else (len(drawn) >= count)


def test_few_classes_stay_finite():
    for count in (1, 2, 3):
        t = SkipTuner(clip(), words, NAMES[:count], 1, ClassSkip(), templates="a {}")
        report = t.fit((images(count), list(range(count))), epochs=1, progress=False)
        assert all(loss == loss for loss in report.losses)


# fitting


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


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_every_cache_gives_the_same_weights(place, tmp_path):
    assert same(state(run()[0].model), state(run(cache=place, cache_dir=tmp_path)[0].model))


def test_views_are_augmented_and_cached():
    seen = []

    def noisy(pixels):
        seen.append(1)
        return pixels + torch.randn_like(pixels)

    before = torch.get_rng_state()
    run(epochs=4, views=2, augment=noisy)
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


def test_scale_and_bias_are_scalars_that_work_on_any_device():
    towers = find_towers(siglip())
    assert towers.scale().shape == towers.bias().shape == ()


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


def test_data_that_cannot_be_meant():
    t = tuner()
    for ask, message in (
        (lambda: t.predict([]), "at least one image"),
        (lambda: t.predict(torch.rand(2, 3, 16, 16)), r"\[3, H, W\] of one image"),
        (lambda: t.evaluate((images(2), ["pink moon"] * 2), ["purple rain"]), "'purple rain'; the data has none"),
        (lambda: t.evaluate((images(2), [0.5, 1.0])), "whole numbers"),
    ):
        with pytest.raises(SkipError, match=message):
            ask()
    assert t.evaluate((images(2), [0.0, 1.0])).count == 2
    braces = SkipTuner(clip(), words, NAMES, templates="a {} {x}")
    assert braces.texts(["cat"]) == ["a cat {x}"]


def test_two_processes_agree(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        "import torch, test_skip_tuning as here\n"
        "t, report = here.run(batch_size=2)\n"
        "torch.save(t.parameters(), sys.argv[1] + torch.distributed.get_rank().__str__())\n"
        "torch.distributed.destroy_process_group()\n"
    )
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    jobs = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "rank")],
            env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    for job in jobs:
        _, complaint = job.communicate(timeout=400)
        assert job.returncode == 0, complaint
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


# data


def folder(tmp_path, names=("red_circle", "blue star"), count=3):
    for i, name in enumerate(names):
        (tmp_path / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (40, 32), (60 * k + 40, 100 * i, 10)).save(tmp_path / name / f"{k}.png")
    return tmp_path


def test_a_folder_in_five_lines(tmp_path):
    data = folder(tmp_path / "photos")
    asset = bundled("tiny-clip")
    model, processor = CLIPModel.from_pretrained(asset), CLIPProcessor.from_pretrained(asset)
    t = SkipTuner(model, processor, ["blue star", "red circle"])
    t.fit(data, epochs=3, lr_text=1e-3, lr_image=1e-3, progress=False)
    stock = t.merge()
    assert type(stock) is CLIPModel
    image = Image.open(data / "blue star" / "0.png")
    best = t.predict(image, topk=1)
    inputs = processor(text=t.texts(), images=image, return_tensors="pt", padding=True)
    shares = stock(**inputs).logits_per_image.softmax(1)[0]
    assert best[0][1] == pytest.approx(shares.max().item(), abs=1e-4)
    assert best[0][0] == t.classnames[int(shares.argmax())]


def test_datasets_of_pairs_and_names():
    class Pairs:
        classes = NAMES

        def __len__(self):
            return 8

        def __getitem__(self, i):
            return images()[i], i // 2

    accuracy = tuner().evaluate(pairs()).accuracy
    assert tuner().evaluate(Pairs()).accuracy == accuracy
    named = (images(), [NAMES[i // 2] for i in range(8)])
    assert tuner().evaluate(named).accuracy == accuracy


def test_few_shot_draws_the_same_for_the_same_seed():
    labels = [i % 5 for i in range(40)]
    chosen = few_shot(labels, 3, seed=4)
    assert chosen == few_shot(labels, 3, seed=4) != few_shot(labels, 3, seed=5)
    assert sorted(labels[i] for i in chosen) == sorted([*range(5)] * 3)
    import random

    for batch in class_batches(labels, 3, random.Random(0)):
        assert len({labels[i] for i in batch}) == 1


def test_base_and_new(tmp_path):
    base, new = split_base_new(NAMES)
    t = SkipTuner(clip(), words, base, 1, templates="a {}")
    all_images = (images(), [NAMES[i // 2] for i in range(8)])
    table = t.evaluate_base_new(all_images, new)
    assert table.base == t.evaluate(all_images, base).accuracy
    assert table.h <= max(table.base, table.new)
    table.save(tmp_path / "t.csv")
    table.save(tmp_path / "t.md")
    assert (tmp_path / "t.csv").read_text().startswith("label,base,new,h\n")
    with pytest.raises(SkipError, match="exists"):
        table.save(tmp_path / "t.csv")
    with pytest.raises(SkipError, match="both hold"):
        t.evaluate_base_new(all_images, base)


def test_templates_are_averaged():
    t = tuner()
    one, two = t.classifier(templates="a {}"), t.classifier(templates="the {}")
    both = t.classifier(templates=["a {}", "the {}"])
    torch.testing.assert_close(both, torch.nn.functional.normalize(one + two, dim=-1))


# what comes out


def test_adapter_round_trip(tmp_path):
    t, _ = run(tuner(classes=ClassSkip(0.4)))
    t.save_adapter(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.json", "adapter.safetensors"]
    again = SkipTuner.from_adapter(clip(), words, tmp_path / "a")
    assert again.class_skip == t.class_skip and again.classnames == NAMES and again.templates == ["a {}"]
    assert same(state(t.model), state(again.model))
    with pytest.raises(SkipError, match="exists"):
        t.save_adapter(tmp_path / "a")
    with pytest.raises(SkipError, match="another model"):
        tuner(clip(seed=1)).load_adapter(tmp_path / "a")
    with pytest.raises(SkipError, match="pass the same skip_layers"):
        tuner(skip=2).load_adapter(tmp_path / "a")


def test_a_half_written_adapter_replaces_nothing(tmp_path, monkeypatch):
    t, _ = run()
    t.save_adapter(tmp_path)
    good = (tmp_path / "adapter.safetensors").read_bytes()
    from skipguide.vision.skip_tuning import adapter

    def dies(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(adapter, "save_file", dies)
    with pytest.raises(OSError, match="disk full"):
        t.save_adapter(tmp_path, overwrite=True)
    assert (tmp_path / "adapter.safetensors").read_bytes() == good
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "adapter.safetensors").write_bytes(good[:100])
    with pytest.raises(SkipError, match="damaged"):
        tuner().load_adapter(tmp_path)


def test_interpolation_and_merge():
    t, _ = run()
    tuned = state(t.model)
    start = state(t.pretrained)
    assert same(state(t.interpolate(0).model), start)
    half = state(t.interpolate(0.5).model)
    name = t.names[0]
    torch.testing.assert_close(half[name], (tuned[name] + start[name]) / 2)
    assert same(state(t.interpolate(1).model), tuned)
    merged = t.merge()
    assert same(state(merged), tuned) and type(merged) is CLIPModel
    with pytest.raises(SkipError, match="alpha"):
        t.interpolate(1.5)


def test_push_uploads_the_adapter(monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def create_repo(self, repo_id, **more):
            seen["repo"] = repo_id

        def upload_folder(self, repo_id, folder_path, **more):
            seen["files"] = sorted(p.name for p in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    run()[0].push_to_hub("me/adapter")
    assert seen == {"repo": "me/adapter", "files": ["adapter.json", "adapter.safetensors"]}


# baselines


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


# caches


def test_cache_on_disk_is_reused_and_checked(tmp_path):
    run(cache="disk", cache_dir=tmp_path)
    (home,) = tmp_path.glob("features-*")
    stamp = (home / "features-00000.safetensors").stat().st_mtime_ns
    run(cache="disk", cache_dir=tmp_path)
    assert (home / "features-00000.safetensors").stat().st_mtime_ns == stamp
    run(tuner(clip(seed=1)), cache="disk", cache_dir=tmp_path)
    assert len(list(tmp_path.glob("features-*"))) == 2
    file = home / "features-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 255
    file.write_bytes(bytes(data))
    with pytest.raises(SkipError, match="was changed"):
        run(cache="disk", cache_dir=tmp_path)
    run(cache="disk", cache_dir=tmp_path, cache_refresh=True)
    index = json.loads((home / "index.json").read_text())
    index["parts"]["model"] = "another"
    (home / "index.json").write_text(json.dumps(index))
    with pytest.raises(SkipError, match="stale"):
        run(cache="disk", cache_dir=tmp_path)
    (home / "index.json").write_text("{")
    with pytest.raises(SkipError, match="damaged"):
        run(cache="disk", cache_dir=tmp_path)
    assert not list(tmp_path.glob(".partial*"))


def test_cache_with_other_features_is_stale(tmp_path):
    def build_with(value):
        return FeatureCache.build(
            lambda places: torch.full((len(places), 2, 3), value),
            5,
            place="disk",
            device=torch.device("cpu"),
            batch=2,
            folder=tmp_path,
            parts={"row_bytes": 24},
            progress=False,
        )

    assert not build_with(1.0).reused
    assert build_with(1.0).reused
    with pytest.raises(SkipError, match="stale"):
        build_with(2.0)


def test_caches_are_bounded(tmp_path):
    with pytest.raises(SkipError, match="cache_limit"):
        run(cache_limit=100)
    with pytest.raises(SkipError, match="cache_dir"):
        run(cache="disk")
    for i in range(3):
        home = tmp_path / f"features-{i}"
        home.mkdir()
        (home / "x").write_bytes(b"0" * 100)
        os.utime(home, (i, i))
    prune(tmp_path, 200)
    assert sorted(h.name for h in tmp_path.iterdir()) == ["features-1", "features-2"]


# bad input


@pytest.mark.parametrize("layer", [-1, 3, 99, True, 1.5, {"image": 1}, {"image": 1, "text": 7}])
def test_layers_out_of_range(layer):
    with pytest.raises(SkipError, match="skip_layers"):
        tuner(skip=layer)


@pytest.mark.parametrize("names", [[], "cat", ["cat", ""], ["cat", "cat"], ["a_b", "a b"], ["cat", None], ["cat", "_"]])
def test_bad_class_names(names):
    with pytest.raises(SkipError, match="class"):
        SkipTuner(clip(), words, names, 1)


def test_bad_data(tmp_path):
    with pytest.raises(SkipError, match="'pink moon' has none"):
        tuner().fit((images(6), [0, 0, 1, 1, 2, 2]))
    with pytest.raises(SkipError, match="at least 5 images"):
        run(shots=5)
    with pytest.raises(SkipError, match="labels from 0 to 3"):
        tuner().fit((images(2), [0, 7]))
    with pytest.raises(SkipError, match="as many labels"):
        tuner().fit((images(3), [0]))
    with pytest.raises(SkipError, match="no folder"):
        tuner().fit(tmp_path / "missing")
    with pytest.raises(SkipError, match="one folder of images per class"):
        tuner().fit(tmp_path)
    with pytest.raises(SkipError, match="processor"):
        tuner().predict(Image.new("RGB", (16, 16)))
    with pytest.raises(SkipError, match=r"finite loss|finite weights"):
        run(lr_text=1e18, lr_image=1e18, epochs=3)


def test_bad_models():
    with pytest.raises(SkipError, match="dropout"):
        tuner(clip(attention_dropout=0.1))
    with pytest.raises(SkipError, match="CLIPModel"):
        tuner(torch.nn.Linear(2, 2))
    broken = clip()
    broken.text_model.encoder.layers[2].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(SkipError, match="finite"):
        run(tuner(broken))


def test_a_model_that_does_something_else_is_noticed():
    model = clip()
    model.vision_model.encoder.layers[2].register_forward_hook(lambda m, a, out: out + torch.arange(16))
    with pytest.raises(SkipError, match="resumed pass"):
        run(tuner(model))


@pytest.mark.parametrize(
    "settings_",
    [{"epochs": 0}, {"lr_text": -1}, {"views": 0}, {"cache": "moon"}, {"precision": "int8"}, {"warmup_epochs": -1}],
)
def test_bad_settings(settings_):
    with pytest.raises(SkipError):
        TuneConfig(**settings_)


@pytest.mark.parametrize("settings_", [{"ratio": 0}, {"max": 0}, {"decay": 0}, {"resample": "never"}])
def test_bad_class_skip(settings_):
    with pytest.raises(SkipError):
        ClassSkip(**settings_)


@pytest.mark.parametrize("template", ["no place", "{} {}", []])
def test_bad_templates(template):
    with pytest.raises(SkipError, match="template"):
        SkipTuner(clip(), words, NAMES, 1, templates=template)


def test_examples_in_docstrings():
    import doctest

    from skipguide.vision.skip_tuning import classes, results, samplers, schedule
    from skipguide.vision.skip_tuning import config as settings_module
    from skipguide.vision.skip_tuning import tuner as tuner_module

    for module in (classes, results, samplers, schedule, settings_module, tuner_module):
        done = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
        assert done.attempted and not done.failed, module.__name__


# the command


def test_command(tmp_path, capsys):
    data = folder(tmp_path / "photos")
    out = tmp_path / "adapter"
    assert main(["clip", "tune", str(data), "-o", str(out), "--epochs", "2", "--merge", str(tmp_path / "whole")]) == 0
    assert "parameters trained" in capsys.readouterr().out
    assert main(["clip", "tune", str(data), "-o", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["clip", "eval", str(data), "--adapter", str(out)]) == 0
    assert "of 6 images" in capsys.readouterr().out
    assert main(["clip", "predict", str(data / "blue star" / "0.png"), "--adapter", str(out), "--topk", "1"]) == 0
    assert "%" in capsys.readouterr().out
    assert main(["clip", "eval", str(data), "--model", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    folder(tmp_path / "more", ("pink moon", "red circle"))
    folder(tmp_path / "photos2", ("pink moon", "red circle", "blue star", "green bar"))
    assert main(["clip", "eval", str(tmp_path / "photos2"), "--adapter", str(out), "--base-new"]) == 0
    assert "| Base | New | H |" in capsys.readouterr().out
    assert main(["clip", "predict", str(data / "blue star" / "0.png")]) == 2
    assert "--classes" in capsys.readouterr().err


def test_committed_benchmark():
    """Bars follow from the measurements; no clock is looked at here."""
    path = Path(__file__).parents[1] / "demos" / "benchmarks" / "skip_tuning.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["settings"]["size"] == "b16"
    rows = found["classes"]["100"]["rows"]
    assert (
        found["bars"]["time_to_reference_100"]["value"] == found["classes"]["100"]["time_to_reference"]["median"] <= 0.5
    )
    memory = rows["ours"]["peak_bytes"] / rows["full"]["peak_bytes"]
    assert found["bars"]["memory_to_full_100"]["value"] == round(memory, 4) <= 1 / 3
    assert "extrapolated" in found["classes"]["1000"]["rows"]["full"]
