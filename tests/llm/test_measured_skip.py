"""MeasuredSkip: the search against one written out by hand on edited copies, its laws, and what it refuses."""

import math

import pytest
import torch
from helpers.llm_zoo import ALL, BY_NAME, VOCAB

from skipguide import SkipError
from skipguide.llm import AdaSkip, MeasuredSkip, SkipOrder, damage

# serial, parallel, sliding windows, the residual inside, no MLP of its own, keys of other layers, router scores
KINDS = ("llama", "gpt2", "gemma2", "bloom", "opt", "phi", "gptneox", "gemma3n", "gemma4", "gptoss")
TEXTS = [torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(n)) for n in range(2)]


def model_of(name="llama"):
    torch.manual_seed(0)
    return BY_NAME[name].build().eval()


@torch.no_grad()
def loss_without(lm, model, numbers):
    """The loss of a copy whose output projections of these sublayers are zero."""
    layers = model.config.num_hidden_layers
    attn, mlp = ([n % layers for n in numbers if (n < layers) == first] for first in (True, False))
    edited = lm.zeroed(model, attn, mlp)
    total = count = 0.0
    for ids in TEXTS:
        logits = edited(input_ids=ids, use_cache=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return total / count


def greedy(lm, model, most):
    """Every sublayer that is left tried at every step."""
    order, losses = [], []
    for _ in range(most):
        left = [n for n in range(2 * model.config.num_hidden_layers) if n not in order]
        tried = {n: loss_without(lm, model, [*order, n]) for n in left}
        order.append(min(tried, key=tried.get))
        losses.append(tried[order[-1]])
    return order, losses


def test_every_loss_is_that_of_an_edited_copy():
    lm = BY_NAME["llama"]
    model = model_of()
    found = MeasuredSkip.calibrate(model, TEXTS, most=5)
    assert found.whole_loss == pytest.approx(loss_without(lm, model, []), abs=1e-5)
    for count in range(1, 6):
        assert found.losses[count - 1] == pytest.approx(loss_without(lm, model, found.order[:count]), abs=1e-5)
    first, losses = greedy(lm, model, 1)
    assert list(found.order[:1]) == first and found.losses[0] == pytest.approx(losses[0], abs=1e-5)
    assert found.alone[6] == pytest.approx(loss_without(lm, model, [6]), abs=1e-5) and len(found.alone) == 8
    assert found.tokens == 2 * 2 * 11 and found.model == "LlamaForCausalLM" and found.seconds > 0


def test_the_search_is_the_greedy_one_where_damage_grows(monkeypatch):
    """Losses that are a sum of fixed rises, and a pair that hurts: every lazy step is the full search's."""
    rises = [0.5, 0.1, 0.4, 0.2, 0.9, 0.3, 0.8, 0.7]

    def loss(numbers):
        return 1 + sum(rises[n] for n in numbers) + (2.0 if {1, 3} <= set(numbers) else 0)

    tried = []
    monkeypatch.setattr(damage._Trials, "start", lambda self, order: loss(order))
    monkeypatch.setattr(damage._Trials, "loss", lambda self, order, n: tried.append(n) or loss([*order, n]))
    found = MeasuredSkip.calibrate(model_of(), TEXTS, most=4)
    expected = []
    for _ in range(4):
        expected.append(min((n for n in range(8) if n not in expected), key=lambda n: loss([*expected, n])))
    assert list(found.order) == expected == [1, 5, 2, 0]
    assert found.losses == pytest.approx([loss(expected[: n + 1]) for n in range(4)])
    assert len(tried) < 8 + 7 + 6 + 5, "not all are tried again"


@pytest.mark.parametrize("lm", [lm for lm in ALL if lm.name in KINDS], ids=repr)
def test_a_trial_from_its_layer_on_is_a_trial_from_the_start(lm, monkeypatch):
    torch.manual_seed(0)
    model = lm.build().eval()
    before = dict(model.named_modules())
    found = MeasuredSkip.calibrate(model, TEXTS[:1], most=2)
    assert dict(model.named_modules()) == before and not any("forward" in m.__dict__ for m in model.modules())
    monkeypatch.setattr(damage._Trials, "_resumable", lambda self: False)
    plain = MeasuredSkip.calibrate(model, TEXTS[:1], most=2)
    assert found.order == plain.order and found.losses == pytest.approx(plain.losses, abs=1e-5)


def test_most_models_are_resumed():
    trial = damage._Trials(model_of(), TEXTS)
    with torch.no_grad():
        trial.start([])
    assert trial.resumes and len(trial.prefixes) == len(TEXTS)


def test_padding_is_not_judged():
    model = model_of()
    ids = TEXTS[0][:, :8]
    padded = {
        "input_ids": torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1),
        "attention_mask": torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1),
    }
    alone, beside = (MeasuredSkip.calibrate(model, [batch], most=1) for batch in (ids, padded))
    assert alone.tokens == beside.tokens == 14
    assert alone.order == beside.order and alone.losses == pytest.approx(beside.losses, abs=1e-4)


def test_it_is_applied_and_taken_off():
    model = model_of()
    found = MeasuredSkip.calibrate(model, TEXTS, most=3)
    ids = TEXTS[0]
    with torch.no_grad():
        whole = model(ids).logits
        with MeasuredSkip(count=2).apply(model, found) as applied:
            model.generate(ids, max_new_tokens=3, do_sample=False)
        assert applied.stats.skipped_fraction == 2 / 8
        assert torch.equal(model(ids).logits, whole)
        with pytest.raises(SkipError, match="left out"), AdaSkip(count=1).apply(model, AdaSkip.calibrate(model, TEXTS)):
            MeasuredSkip.calibrate(model, TEXTS)


def test_what_an_order_allows():
    found = SkipOrder((1, 3, 0), (2.0, 2.1, 2.6), whole_loss=2.0, num_layers=2)
    assert MeasuredSkip(count=3).choose(found).attn == (0, 1)
    assert MeasuredSkip(perplexity_ratio=math.exp(0.11)).choose(found).count == 2
    assert MeasuredSkip(skip_ratio=0.25, phase="decode").plan(found).phase == "decode"
    for skip, words in (
        (MeasuredSkip(count=4), "calibrate with most=4"),
        (MeasuredSkip(perplexity_ratio=2.0), "a larger most"),
        (MeasuredSkip(skip_ratio=0.1), "nothing would be left out"),
    ):
        with pytest.raises(SkipError, match=words):
            skip.choose(found)
    with pytest.raises(SkipError, match="allows none"):
        MeasuredSkip(perplexity_ratio=1.0).choose(SkipOrder((1,), (2.5,), 2.0, 2))
    with pytest.raises(SkipError, match="expected a SkipOrder"):
        MeasuredSkip(count=1).choose([1, 2])


def test_files(tmp_path):
    found = SkipOrder(
        (1, 3), (2.0, 2.1), 2.0, 2, tokens=5, trials=7, seconds=0.5, model="M", alone=(1.0, None, 2.0, 3.0)
    )
    found.save_json(tmp_path / "order.json")
    assert SkipOrder.load_json(tmp_path / "order.json") == found
    skip = MeasuredSkip(perplexity_ratio=1.1, phase="prefill")
    skip.save_json(tmp_path / "skip.json")
    assert MeasuredSkip.load_json(tmp_path / "skip.json") == skip


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "exactly one"),
        ({"count": 1, "skip_ratio": 0.1}, "exactly one"),
        ({"skip_ratio": 1.0}, "below 1"),
        ({"count": 0}, "count"),
        ({"perplexity_ratio": 0.9}, "perplexity_ratio"),
        ({"count": 1, "phase": "both ways"}, "unknown phase"),
    ],
)
def test_wrong_settings(wrong, words):
    with pytest.raises(SkipError, match=words):
        MeasuredSkip(**wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"order": (1, 1)}, "different sublayers"),
        ({"order": (1, 4)}, "order"),
        ({"losses": (1.0,)}, "a loss for each"),
        ({"losses": (1.0, math.nan)}, "losses"),
        ({"num_layers": 0}, "num_layers"),
        ({"alone": (1.0, None)}, "of 4 sublayers alone"),
    ],
)
def test_wrong_orders(wrong, words):
    with pytest.raises(SkipError, match=words):
        SkipOrder(**{"order": (1, 3), "losses": (1.0, 2.0), "whole_loss": 1.0, "num_layers": 2} | wrong)


def test_bad_texts():
    model = model_of()
    for wrong, words in (
        ("text", "a list of batches"),
        ([], "nothing can be measured"),
        ([[5]], "nothing can be measured"),
        ([[5, VOCAB]], "vocabulary"),
    ):
        with pytest.raises(SkipError, match=words):
            MeasuredSkip.calibrate(model, wrong)
    with pytest.raises(SkipError, match="from 0 to 8"):
        MeasuredSkip.calibrate(model, TEXTS, most=9)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(SkipError, match="NaN"):
        MeasuredSkip.calibrate(model, TEXTS)
