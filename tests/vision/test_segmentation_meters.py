"""Meters of segmentation count over the whole set, whatever its batches."""

import pytest
import torch
import torch.nn.functional as F

from skipguide.errors import SkipError
from skipguide.vision.segmentation import ClassMeter, MaskMeter


def test_meters_count_over_the_set():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 3, 5, 7), torch.rand(6, 3, 5, 7) > 0.6
    whole, parts = MaskMeter(3), MaskMeter(3)
    whole.update(logits, target)
    for at in (slice(0, 1), slice(1, 6)):
        parts.update(logits[at], target[at])
    assert torch.equal(whole.iou, parts.iou)
    found = logits > 0
    for c in range(3):
        both, either = int((found & target)[:, c].sum()), int((found | target)[:, c].sum())
        assert whole.iou[c].item() == pytest.approx(both / either)
        assert whole.dice[c].item() == pytest.approx(2 * both / (both + either))
    with pytest.raises(SkipError, match="NaN"):
        whole.update(logits * float("nan"), target)
    with pytest.raises(SkipError, match="expected logits"):
        whole.update(logits[:, :2], target[:, :2])
    with pytest.raises(SkipError, match="threshold"):
        MaskMeter(1, threshold=1.5)


def test_class_meter_both_ways():
    truth = torch.tensor([[[0, 0, 1, 255]], [[1, 1, 1, 1]]])
    found = torch.tensor([[[0, 1, 1, 0]], [[1, 1, 2, 1]]])
    meter = ClassMeter(4)
    for row in range(2):
        meter.update(found[row : row + 1], truth[row : row + 1])
    # over the set: class 0 1/2; class 1 4/6; class 2 0/1; class 3 nowhere
    assert meter.mean_iou == pytest.approx((1 / 2 + 4 / 6 + 0) / 3)
    # per batch: (1/2 + 1/2)/2, then 3/4; class 2 does not occur and is forgiven
    assert meter.challenge_miou == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert meter.accuracy == pytest.approx(5 / 7)
    logits = F.one_hot(found, 4).permute(0, 3, 1, 2).float()
    again = ClassMeter(4)
    again.update(logits, truth)
    assert torch.equal(again.confusion, meter.confusion)
    assert again.challenge_miou != pytest.approx(meter.challenge_miou), "that measure depends on the batch size"
    with pytest.raises(SkipError, match=r"expected classes 0\.\.3"):
        meter.update(torch.tensor([4]), torch.tensor([0]))
    with pytest.raises(SkipError, match="shape"):
        meter.update(found[0], truth)
