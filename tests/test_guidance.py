"""The formulas against their definitions, in float64."""

import pytest
import torch

from skipguide import SkipError
from skipguide.guidance import apg, cfg, project, rescale, skip_delta, solve_uncond, stg, wan_delta


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_formulas(predictions):
    u, c, k = predictions
    torch.testing.assert_close(cfg(u, c, 3.0), -2 * u + 3 * c)
    torch.testing.assert_close(stg(u, c, k, 3.0, 0.5), -2 * u + 3 * c + 0.5 * c - 0.5 * k)
    y = -2 * u + 3 * c
    torch.testing.assert_close(y + wan_delta(u, c, k, 3.0, 0.5), y + 0.5 * (y - k))


def test_a_shift_of_both_branches_survives_any_affine_guidance(predictions):
    u, c, k = predictions
    d = skip_delta(c, k, 1.5)
    for w in (0.0, 1.0, 7.5, torch.rand(3, 4, 1, dtype=torch.float64)):
        torch.testing.assert_close(cfg(u + d, c + d, w), cfg(u, c, w) + d)


def test_half_precision_differences_are_taken_in_float32():
    c = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert skip_delta(c, c / 3, 1.0).dtype == torch.float32


def test_solving_for_the_unconditional_branch(predictions):
    _, c, y = predictions
    torch.testing.assert_close(cfg(solve_uncond(y, c, 5.0), c, 5.0), y)
    with pytest.raises(SkipError, match="no weight"):
        solve_uncond(y, c, 1.0)


def test_rescale(predictions):
    _, c, y = predictions
    y = 4 * y
    assert torch.equal(rescale(y, c, 0.0), y)
    full = rescale(y, c, 1.0)
    torch.testing.assert_close(full.flatten(1).std(1), c.flatten(1).std(1))
    torch.testing.assert_close(rescale(y, c, 1.0, "batch").std(), c.std())
    torch.testing.assert_close(rescale(y, c, 0.7, "batch"), y * (0.7 * c.std() / y.std() + 0.3))


def test_projection_and_apg(predictions):
    c, d, _ = predictions
    parallel, rest = project(d, c)
    torch.testing.assert_close(parallel + rest, d)
    inner = (rest * c).flatten(1).sum(1)
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-12, rtol=0)
    torch.testing.assert_close(apg(d, c, eta=1.0), d)
    torch.testing.assert_close(apg(d, c), rest)
    bounded = apg(d, c, eta=1.0, norm=2.0)
    assert (bounded.flatten(1).norm(dim=1) <= 2.0 + 1e-12).all()
    torch.testing.assert_close(apg(d, c, eta=1.0, norm=1e6), d)
