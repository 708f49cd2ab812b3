"""SkipNet's demo: pictures of wires lead where their labels say, and pictures of its blocks are in order."""

import pytest
import torch
from helpers.wired_skipnet import tiny

from demos.skipnet.pictures import draw_blocks_against, draw_by_blocks, draw_history, saliency, spearman
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


CUDA = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_pictures_are_in_order(device):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 5)
    blocks = torch.tensor([3, 1, 2, 5, 4, 4], device=device)
    draw_by_blocks(axes, torch.rand(6, 1, 8, 8, device=device), blocks, [str(n) for n in range(6)])
    shown = [int(axis.get_title().split()[0]) for axis in axes]
    assert shown == sorted(shown) and shown[0] == 1 and shown[-1] == 5
    assert draw_blocks_against(axes[0], blocks.float() ** 2, blocks, "value", bins=3) == pytest.approx(1.0)
    draw_history(axes[:3], [{"step": 1, "cross_entropy": 1.0, "accuracy": 0.5, "computation": 1.0}] * 2)
    plt.close(figure)
    assert spearman(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([3.0, 1.0, 1.0])) == pytest.approx(-1.0)
    net, images = tiny().to(device), torch.rand(3, 3, 10, 10, device=device)
    assert saliency(net, images).shape == (3,) and all(p.grad is None for p in net.parameters())
    with pytest.raises(SkipError, match="differentiable"):
        saliency(lambda x: torch.ones(3, 2, device=device, requires_grad=True), images)  # type: ignore[arg-type]
