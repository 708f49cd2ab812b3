"""Pictures of SkipNet's blocks are in order, and its saliency leaves no gradients."""

import pytest
import torch
from helpers.wired_skipnet import tiny

from demos.skipnet.pictures import draw_blocks_against, draw_by_blocks, draw_history, saliency, spearman
from skipguide import SkipError

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
