"""Populations of a state at two rungs against the energies: exact, calibrated, and sharp."""

import numpy as np
import pytest

from openmm_tsf.analysis.ensemble_checks import basin_ratio, energy_ratio
from openmm_tsf.units import KB
from tests.support.analysis_runs import WELL, assert_calibrated, energies_far_apart

LADDER = (300.0, 400.0)
BETAS = tuple(1 / (KB * kelvin) for kelvin in LADDER)


def draw(rng, shape=(400, 16), rho=0.5):
    """Energies [n, W] of both rungs and whether φ > 0 in them."""
    energy, phi = WELL.draw(rng, shape, LADDER, rho)
    return (*np.moveaxis(energy, 2, 0), *np.moveaxis(phi > 0, 2, 0))


def leave_out(rng, energy, inside, fraction):
    """Replace samples inside a state by samples outside of it: a state that is hardly entered."""
    gone = inside & (rng.random(inside.shape) < fraction)
    other = rng.choice(energy[~inside], gone.sum())
    energy, inside = energy.copy(), inside.copy()
    energy[gone], inside[gone] = other, False
    return energy, inside


def exact_ratio():
    low, high = (WELL.probability(0.0, np.pi, kelvin) for kelvin in LADDER)
    return np.log(high / low)


def test_the_expected_ratio_is_exact_and_calibrated():
    rng, z = np.random.default_rng(1), []
    for _ in range(50):
        check = basin_ratio(*draw(rng), BETAS)
        assert check.undecided is None
        z.append((check.z, (check.expected - exact_ratio()) / check.stderr))
    z = np.array(z)
    assert_calibrated(z[:, :1])
    assert np.abs(z).max() < 4
    assert abs(z[:, 1].mean()) < 0.5


@pytest.mark.parametrize("rung", [0, 1])
def test_a_rung_that_hardly_enters_a_state_is_found(rung):
    rng = np.random.default_rng(2)
    data = list(draw(rng))
    fair = basin_ratio(*data, BETAS)
    data[rung], data[2 + rung] = leave_out(rng, data[rung], data[2 + rung], 0.8)
    check = basin_ratio(*data, BETAS)
    assert (check.z > 5) if rung == 0 else (check.z < -5)
    # What is expected does not depend on how often the state was visited.
    assert check.expected == pytest.approx(exact_ratio(), abs=0.2)
    assert abs(fair.z) < 4
    # Nor do the energies alone see it: those of the samples that remain are of the right kind.
    assert abs(energy_ratio(*data[:2], BETAS).z) < 5


@pytest.mark.parametrize("rung", [0, 1])
def test_a_rung_that_never_entered_a_state_has_a_bound(rung):
    rng = np.random.default_rng(3)
    data = list(draw(rng, (800, 8)))
    data[rung], data[2 + rung] = leave_out(rng, data[rung], data[2 + rung], 1.0)
    many, few = (basin_ratio(*data, BETAS, n_pieces) for n_pieces in (1000.0, None))
    assert many.bound == ("lower", "upper")[rung]
    assert (many.z > 5) if rung == 0 else (many.z < -5)
    assert many.undecided is None
    # Eight independent walkers may miss it.
    assert few.z == 0.0
    for check in (many, few):
        assert check.expected == pytest.approx(exact_ratio(), abs=0.3)


def test_rare_visits_are_undecided():
    rng = np.random.default_rng(4)
    low, high, _, _ = draw(rng)
    inside = np.zeros(low.shape, dtype=bool)
    inside[100:103, 5] = True
    check = basin_ratio(low, high, inside, np.roll(inside, 7, axis=0), BETAS)
    assert np.isnan(check.z)
    assert np.isfinite([check.value, check.expected, check.stderr]).all()
    assert check.undecided == "1 effective samples inside the state, fewer than 16"


def test_states_without_visits_or_overlap():
    rng = np.random.default_rng(5)
    low, high, inside, _ = draw(rng)
    for state, reason in ((inside & False, "never visited"), (inside | True, "never left")):
        check = basin_ratio(low, high, state, state, BETAS)
        assert reason in check.undecided
        assert np.isnan([check.value, check.stderr, check.expected, check.z]).all()
    apart = np.moveaxis(energies_far_apart([300.0, 600.0]), 2, 0)
    halves = rng.random(apart.shape) < 0.5
    check = basin_ratio(*apart, *halves, (1 / (KB * 300), 1 / (KB * 600)))
    assert "do not overlap" in check.undecided
    assert np.isnan(check.z)
    with pytest.raises(ValueError, match="low, high: expected energies"):
        basin_ratio(low[0], high[0], inside[0], inside[0], BETAS)
    with pytest.raises(ValueError, match="inside_low: expected truth values"):
        basin_ratio(low, high, 1.0 * inside, 1.0 * inside, BETAS)
    with pytest.raises(ValueError, match="low, high: expected energies of one shape"):
        basin_ratio(low, high[:3], inside, inside, BETAS)


def test_few_samples_that_are_far_off_are_wrong():
    """A slope of 0.03 where 0.117 is expected, from few samples: no error explains it."""
    rng = np.random.default_rng(6)
    betas = 1 / (KB * 300.0), 1 / (KB * 424.26)
    repeat = np.repeat(np.arange(3), 10)  # three independent energies in each walker
    low = 0.5 * KB * 300.0 * rng.chisquare(200, (3, 32))[repeat]
    high = 0.5 * KB * 320.0 * rng.chisquare(200, (3, 32))[repeat]
    check = energy_ratio(low, high, betas)
    assert check.undecided is not None
    assert 50 < check.n_eff < 100
    assert check.z < -5
    assert abs((check.value - check.expected) / check.stderr) > abs(check.z)  # conservative
    fair = 0.5 * KB * 424.26 * rng.chisquare(200, (3, 32))[repeat]
    assert np.isnan(energy_ratio(low, fair, betas).z)
