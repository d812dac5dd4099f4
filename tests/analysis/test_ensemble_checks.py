"""Tests of the Boltzmann distribution from energies: exact, calibrated, and sharp."""

import numpy as np
import pytest

from openmm_tsf.analysis.ensemble_checks import (
    energy_ratio,
    heat_capacity,
    heat_capacity_difference,
)
from openmm_tsf.analysis.report import disagreements, unsampled
from openmm_tsf.units import KB
from tests.support.analysis_runs import BETAS, WELL, assert_calibrated, energies_far_apart, well_run


def harmonic(rng, shape, kelvin, modes=60, rho=0.0):
    """Energies of harmonic modes at a temperature: Gamma distributed, C_V = modes k/2."""
    radius = rng.chisquare(modes, shape)
    keep = rng.random(shape) < rho
    for i in range(1, len(radius)):
        radius[i] = np.where(keep[i], radius[i - 1], radius[i])
    return 0.5 * KB * kelvin * radius


def both_checks(low, high, cold, hot):
    """The slope of the energy ratio and the difference of heat capacities."""
    betas = 1 / (KB * cold), 1 / (KB * hot)
    return energy_ratio(low, high, betas), heat_capacity_difference(low, high, (cold, hot), KB)


def test_ensemble_checks_are_exact_and_calibrated():
    rng, repeats, modes = np.random.default_rng(8), 50, 60
    z = np.empty((repeats, 3))
    for k in range(repeats):
        low = harmonic(rng, (150, 8), 300.0, modes, rho=0.5)
        high = harmonic(rng, (150, 8), 350.0, modes, rho=0.5)
        slope, difference = both_checks(low, high, 300.0, 350.0)
        capacity = heat_capacity(low, 300.0, KB)
        z[k] = slope.z, (capacity.value - modes / 2 * KB) / capacity.stderr, difference.z
    assert slope.expected == pytest.approx(1 / (KB * 300) - 1 / (KB * 350))
    assert_calibrated(z)


def test_errors_include_correlation_between_rungs():
    """The rungs of the double well share random numbers: independent errors would be far off."""
    rng, repeats = np.random.default_rng(9), 50
    z = np.empty((repeats, 2))
    for k in range(repeats):
        energy, _ = WELL.draw(rng, (150, 8), [300.0, 400.0], rho=0.5)
        z[k] = [check.z for check in both_checks(*np.moveaxis(energy, 2, 0), 300.0, 400.0)]
    assert_calibrated(z)


def test_the_integral_of_the_heat_capacity_is_of_high_order():
    """The end correction is exact where C_V is a cubic in T; here within a part in 10⁴."""
    exact = np.array([WELL.exact(t) for t in (300.0, 400.0)])
    slope = (exact[1, 0] - exact[0, 0]) / 100
    # A quasi-infinite sample: 2000 quantiles of the well alone, no noise.
    levels = (np.arange(2000) + 0.5) / 2000
    quantiles = [np.interp(levels, WELL.cumulative(t), WELL.grid) for t in (300.0, 400.0)]
    low, high = (WELL.potential(phi)[:, None] for phi in quantiles)
    assert WELL.potential(WELL.grid).max() > high.max() > low.max()
    check = heat_capacity_difference(low, high, (300.0, 400.0), KB)
    modes = 0.5 * WELL.MODES * KB
    assert check.value + modes == pytest.approx(slope, rel=2e-3)
    assert abs(check.expected + modes - slope) < 0.2 * abs(exact[:, 1].mean() - slope)


def test_energies_that_do_not_overlap():
    check = energy_ratio(np.tile([0.0, 1.0], (4, 1)), np.full((4, 2), 5.0), (0.4, 0.2))
    assert np.isnan([check.value, check.z]).all()
    with pytest.raises(ValueError, match="low, high"):
        energy_ratio(np.zeros(3), np.zeros(3), (0.4, 0.2))


def test_energies_that_hardly_overlap():
    """The rungs share one iteration, which no slope near the expected one can explain."""
    energy = energies_far_apart([300.0, 600.0])
    energy[:1, :, 0] = energy[:1, :, 1]
    cold, hot = 1 / (KB * 300), 1 / (KB * 600)
    check = energy_ratio(energy[..., 0], energy[..., 1], (cold, hot))
    assert np.isnan([check.value, check.stderr, check.z]).all()
    assert check.expected == pytest.approx(cold - hot)


@pytest.mark.parametrize(("n", "n_walkers", "rho"), [(20, 8, 0.8), (50, 8, 0.95), (50, 200, 1.0)])
def test_short_runs_are_not_called_biased(n, n_walkers, rho):
    """Samplers without bias; the last has 200 walkers that never moved."""
    rng = np.random.default_rng(14)
    for _ in range(20):
        low = harmonic(rng, (n, n_walkers), 300.0, rho=rho)
        high = harmonic(rng, (n, n_walkers), 350.0, rho=rho)
        for check in both_checks(low, high, 300.0, 350.0):
            assert np.isfinite(check.value)
            assert np.isnan(check.z)
            reason = "shorter than 4 correlation" if check.n_eff >= 100 else "effective samples"
            assert reason in check.undecided


def test_the_summary_of_a_short_run_says_so(tmp_path):
    summary = well_run(np.random.default_rng(15), tmp_path / "run", n=20, n_walkers=4).summary()
    for pairs in summary["ensemble_check"].values():
        assert all(check["z"] is None and check["n_eff"] < 100 for check in pairs.values())
    assert all(c["n_eff"] < 100 for c in summary["heat_capacity_kJ_mol_K"].values())
    assert disagreements(summary) == []
    words = unsampled(summary)
    assert any(w.startswith("300.00 K: C_V rests on") for w in words)
    assert sum("cannot be tested on so few effective samples" in w for w in words) == 4


def test_a_rung_at_the_wrong_temperature_is_flagged(tmp_path):
    rng = np.random.default_rng(10)
    sizes = {"n": 300, "n_walkers": 8}
    good = well_run(rng, tmp_path / "good", **sizes).summary()["ensemble_check"]
    bad = well_run(rng, tmp_path / "bad", drawn_at=[330.0, 424.26, 600.0], **sizes)
    pairs = ["300.00-424.26", "424.26-600.00"]
    for name in ("energy_ratio_mol_kJ", "heat_capacity_kJ_mol_K"):
        assert list(good[name]) == pairs
        assert all(abs(check["z"]) < 3 for check in good[name].values())
    wrong, right = bad.summary()["ensemble_check"]["energy_ratio_mol_kJ"].values()
    assert wrong["z"] < -5
    assert abs(right["z"]) < 3
    # The estimate is the temperature of the samples.
    assert abs(wrong["value"] - 1 / (KB * 330.0) + BETAS[1]) < 4 * wrong["stderr"]
