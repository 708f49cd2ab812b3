"""Pictures of wires: each leads where its label says, turned and recoloured too."""

import pytest
import torch

from demos.skipnet.wires import COLOURS, WIRE, make_wires, turn_and_recolour
from skipguide import SkipError


def follow(image):
    """Walk along the wire from the white cell, without looking at anything else: the colour and the steps."""
    lit = image.sum(0) > 0
    (place,) = (image == 1).all(0).nonzero().tolist()
    here, before, steps = tuple(place), None, 0
    while True:
        around = [(here[0] + dy, here[1] + dx) for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        ahead = [p for p in around if p != before and min(p) >= 0 and max(p) < len(lit) and lit[p]]
        if not ahead:
            break
        assert len(ahead) == 1, "a wire has no branches and touches no other"
        before, here, steps = here, ahead[0], steps + 1
    return int((image[:, here[0], here[1]] == COLOURS).all(1).nonzero()), steps


def test_wires_lead_where_the_label_says():
    wires = make_wires(60, 10, 9, seed=4)
    for image, label, length in zip(wires.images, wires.labels, wires.lengths, strict=True):
        assert follow(image) == (int(label), int(length))
        for colour in COLOURS:  # all four colours are in every image: nothing short of the wire tells them apart
            assert int((image == colour[:, None, None]).all(0).sum()) == 1
        plain = (image == WIRE).all(0)
        assert int((image.sum(0) > 0).sum()) == int(plain.sum()) + 5
    assert torch.equal(make_wires(60, 10, 9, seed=4).images, wires.images)
    assert not torch.equal(make_wires(60, 10, 9, seed=5).images, wires.images)
    assert set(wires.labels.tolist()) == {0, 1, 2, 3} and int(wires.lengths.max()) > 5


def test_augmentation_keeps_the_task():
    wires = make_wires(40, 10, 6, seed=4)
    for seed in range(4):
        images, labels = turn_and_recolour(wires.images, wires.labels, torch.Generator().manual_seed(seed))
        assert [follow(image) for image in images] == list(zip(labels.tolist(), wires.lengths.tolist(), strict=True))
        assert not torch.equal(labels, wires.labels)


def test_wires_that_cannot_be_drawn():
    for wrong, got in (
        ({"count": 0}, "0, 12, 12"),
        ({"count": 1, "size": 7}, "1, 7, 12"),
        ({"count": 1, "longest": 0}, "1, 12, 0"),
    ):
        with pytest.raises(SkipError, match=rf"count >= 1, size >= 8 and longest >= 1; got {got}$"):
            make_wires(**wrong)
    assert make_wires(1, 8, 1).images.shape == (1, 3, 8, 8)
