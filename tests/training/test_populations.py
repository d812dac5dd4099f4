"""The terms that correct the populations of basins."""

import math

import pytest
import torch

from openmm_tsf.training.basin_populations import Populations

ONE = torch.ones(1, dtype=torch.float64)


def test_data_coefficients_make_log_ratios_of_a_group_equal():
    populations = Populations(ONE.repeat(2), ONE, 1, 0.3, 0.0)
    group = torch.tensor([0, 0, 0, 1, 1])
    level = torch.tensor([-7.0, -7.0, -7.0, 4.0, 4.0], dtype=torch.float64)
    # Groups need not agree: ln(p/q) of each has its own ln Z.
    coefficients, spread = populations.data_coefficients(level, group, 2)
    assert float(coefficients.abs().max()) < 1e-12
    assert spread < 1e-12
    level[0] += 1.5  # the flow has too little here
    coefficients, _ = populations.data_coefficients(level, group, 2)
    expected = 0.3 * torch.tensor([1.0, -0.5, -0.5, 0, 0], dtype=torch.float64) / 5
    assert torch.allclose(coefficients, expected)
    level[3] = math.nan
    assert torch.isfinite(populations.data_coefficients(level, group, 2)[0]).all()


def test_draw_coefficients_are_the_missing_populations():
    """Positive for draws of a basin with too little of the flow; zero where populations agree."""
    ladder = torch.tensor([0.5, 1.0], dtype=torch.float64)
    few, many = torch.tensor([0, 0, 0, 1]).repeat(20), torch.tensor([0, 0, 1, 1]).repeat(20)
    basin = torch.cat([few, many])  # draws of one temperature, then of the other
    level = torch.full((160,), -7.0, dtype=torch.float64)
    under = level + 0.3 * basin  # ln(p/q) larger where the flow has too little
    data = torch.arange(2).repeat_interleave(80)
    same, other = Populations(ladder, ladder, 2, 0.0, 0.6), Populations(ladder, ladder, 2, 0.0, 0.6)
    for _ in range(3000):
        same.update(level, data, basin, level, basin)
        other.update(under, data, basin, under, basin)
        coefficients = other.draw_coefficients(basin)
    assert float(same.missing.abs().max()) < 0.03
    assert torch.allclose(other.basin_fractions[:, 1], torch.tensor([0.25, 0.5]).double())
    assert float(same.draw_coefficients(basin).abs().max()) < 0.02
    # weight / rungs * missing * d ln P: 1/P of a draw in the basin; the mean is left out.
    missing, inverse = other.missing, torch.tensor([[4 / 3, 4.0], [2.0, 2.0]])
    expected = 0.3 / 80 * (missing * inverse - missing.sum(1, keepdim=True))
    assert torch.allclose(coefficients[:80], expected[0][few])
    assert torch.allclose(coefficients[80:], expected[1][many])
    assert torch.allclose(missing[:, 1] - missing[:, 0], torch.full((2,), 0.3).double(), atol=0.03)
    # P_p and P_q sum to one over the basins.
    total = (other.basin_fractions * missing.exp()).sum(1)
    assert torch.allclose(total, torch.ones(2).double())
    assert float(coefficients.view(2, 80).sum(1).abs().max()) < 1e-9


def test_one_draw_is_enough():
    populations = Populations(ONE, ONE, 2, 0.0, 1.0)
    populations.population_ratios[:, 1], populations.basins_met[:] = 0.2, 1.0
    for _ in range(500):
        assert torch.isfinite(populations.draw_coefficients(torch.tensor([1]))).all()


def test_draw_coefficients_have_the_gradient_of_the_populations():
    """E_q[coefficient * ln q] against d ln(P_1/P_0), known for a shifted normal density."""
    populations, n, shift = Populations(ONE, ONE, 2, 0.0, 1.0), 200_000, 0.3
    populations.population_ratios[:, 1], populations.basins_met[:] = 0.2, 1.0
    x = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + shift
    basin = (x > 0).long()
    up = torch.special.ndtr(torch.tensor(shift, dtype=torch.float64))
    populations.basin_fractions = torch.stack([1 - up, up])[None]
    coefficients = populations.draw_coefficients(basin)
    each = coefficients * (x - shift)  # d ln q / d shift
    density = math.exp(-0.5 * shift**2) / math.sqrt(2 * math.pi)
    missing = populations.missing[0]
    assert float(missing[1] - missing[0]) == pytest.approx(0.2)
    expected = density * float(missing[1] / up - missing[0] / (1 - up))
    error = n**0.5 * float(each.std())
    assert abs(float(each.sum()) - expected) < 4 * error
    assert error < 0.02 * expected


@pytest.mark.parametrize("apart", [0.0, -0.4])
def test_populations_are_separated_from_the_quality_within_a_basin(apart):
    """ln(p/q) of data is larger, of draws smaller, where the flow represents a basin less well."""
    generator, populations = torch.Generator().manual_seed(4), Populations(ONE, ONE, 2, 0.0, 1.0)
    measured = []
    for step in range(3000):
        basin = (torch.rand(400, generator=generator) < 0.2).long()
        width = 0.3 + 0.9 * basin.double()
        # q is p times a log-normal factor: KL(p || q) = KL(q || p) = width^2 / 2 in each basin.
        noise = torch.randn(400, generator=generator, dtype=torch.float64) * width
        level = apart * basin.double() - 3.0
        data = level + noise + 0.5 * width**2
        draws = level + noise.flip(0) * width / width.flip(0) - 0.5 * width**2
        populations.update(data, torch.zeros(400).long(), basin, draws, basin)
        if step >= 500:
            ratios = populations.population_ratios[0]
            measured.append(float(ratios[1] - ratios[0]))
    mean, spread = sum(measured) / len(measured), torch.tensor(measured).std()
    assert mean == pytest.approx(apart, abs=0.03)  # by data alone: 0.67 more
    assert 0.01 < float(spread) < 0.25


def test_a_basin_without_draws_is_missing():
    populations = Populations(ONE, ONE, 2, 0.0, 1.0)
    basin, level = torch.tensor([0, 0, 0, 1]), torch.zeros(4).double()
    for _ in range(600):
        populations.update(level, torch.tensor([0, 0, 0, 0]), basin, level, torch.zeros(4).long())
    assert float(populations.missing[0, 1]) == 0.5  # as much as counts
    never = Populations(ONE, ONE, 2, 0.0, 1.0)  # nothing is missing where there is one basin only
    never.update(level, torch.zeros(4).long(), torch.zeros(4).long(), level, basin)
    assert not never.missing.any()
