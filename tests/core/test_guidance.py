"""The formulas against their definitions, in float64."""

import pytest
import torch

from skipguide import SkipError
from skipguide.guidance import (
    apg,
    cfg,
    project,
    rescale,
    skip_direction,
    solve_uncond,
    stg_direction,
    wan_direction,
    zero_star_scale,
)


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_formulas(predictions):
    u, c, k = predictions
    torch.testing.assert_close(cfg(u, c, 3.0), -2 * u + 3 * c)
    y = cfg(u, c, 3.0)
    torch.testing.assert_close(y + 0.5 * stg_direction(u, c, k, 3.0), -2 * u + 3 * c + 0.5 * c - 0.5 * k)
    torch.testing.assert_close(y + 0.5 * wan_direction(u, c, k, 3.0), y + 0.5 * (y - k))
    assert torch.equal(wan_direction(None, c, k, 1.0), c - k)


def test_a_shift_of_both_branches_survives_any_affine_guidance(predictions):
    u, c, k = predictions
    d = 1.5 * skip_direction(c, k)
    for w in (0.0, 1.0, 7.5, torch.rand(3, 4, 1, dtype=torch.float64)):
        torch.testing.assert_close(cfg(u + d, c + d, w), cfg(u, c, w) + d)


def test_half_precision_differences_are_taken_in_float32():
    c = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert skip_direction(c, c / 3).dtype == torch.float32


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


def test_zero_star_is_the_least_squares_fit_of_u_to_c(predictions):
    u, c, _ = predictions
    a = zero_star_scale(u, c)
    rest = (c - a * u) * u
    torch.testing.assert_close(rest.flatten(1).sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    for other in (a + 1e-3, a - 1e-3):
        assert ((c - other * u).flatten(1).norm(dim=1) > (c - a * u).flatten(1).norm(dim=1)).all()
    torch.testing.assert_close(cfg(a * u, c, 5.0), (1 - 5.0) * a * u + 5.0 * c)
    torch.testing.assert_close(zero_star_scale(2 * u, c) * 2 * u, a * u)
    assert torch.isfinite(zero_star_scale(torch.zeros_like(u), c)).all()
    assert zero_star_scale(u.bfloat16(), c.bfloat16()).dtype == torch.float32


def test_zero_star_and_apg_agree_with_diffusers(predictions):
    """Two implementations by other people; theirs work in float32."""
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

    u, c, _ = (p.float() for p in predictions)
    theirs = cfg_zero_star_scale(c.flatten(1), u.flatten(1)).view(-1, 1, 1)
    torch.testing.assert_close(zero_star_scale(u, c), theirs)
    for eta, norm in ((0.0, 1.5), (1.0, 0.0), (0.3, 2.0)):
        expected = normalized_guidance(c, u, 3.0, None, eta, norm, use_original_formulation=True)
        torch.testing.assert_close(c + 3.0 * apg(c - u, c, eta, norm or None), expected)


def test_rescale_leaves_what_has_no_deviation_as_it_is(predictions):
    c = predictions[1]
    flat = torch.zeros_like(c)
    flat[0] = 3.0
    assert torch.equal(rescale(flat, c, 0.7), flat)
    assert torch.equal(rescale(flat * 0, c, 0.0, "batch"), flat * 0)
    with pytest.raises(SkipError, match="unknown over 'rows'"):
        rescale(c, c, 0.7, "rows")


def test_skip_direction_composes_with_cfg_and_rescale(predictions):
    u, c, k = predictions
    d = skip_direction(c, k)
    assert torch.equal(d, c - k)
    assert apg(d, c, None) is d
    assert torch.equal(apg(d, c, eta=None, norm=2.0), apg(d, c, 1.0, 2.0))
    across = apg(d, c, eta=0.0)
    torch.testing.assert_close((across * c).flatten(1).sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    y = cfg(zero_star_scale(u, c) * u, c, 3.0) + 0.5 * across
    torch.testing.assert_close(rescale(y, c, 1.0).flatten(1).std(1), c.flatten(1).std(1))
