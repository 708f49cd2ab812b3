"""Skip Tuning: which classes a step leaves out."""

import torch
from helpers.tuning import NAMES, clip, images, tuner, words
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide.vision.skip_tuning import ClassSkip, SkipTuner
from skipguide.vision.skip_tuning.classes import choose
from skipguide.vision.skip_tuning.step import StepModule


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
