"""Thermodynamic functions against quadrature: values by |z| < 4, claimed errors by their spread."""

import csv
import json
from itertools import pairwise

import numpy as np
import openmm.unit as unit
import pytest
from scipy.stats import chi2

from openmm_tsf.analysis import (
    Reference,
    compare_thermodynamics,
    importance_profile,
    importance_thermodynamics,
    load_run,
    write_thermodynamics,
)
from openmm_tsf.analysis.ensemble_checks import (
    energy_ratio,
    heat_capacity,
    heat_capacity_difference,
)
from openmm_tsf.analysis.mbar import Mbar
from openmm_tsf.analysis.report import disagreements, unsampled
from openmm_tsf.analysis.thermodynamics import compute_thermodynamics, dihedral_profile
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.units import KB
from tests.support.fabricate import DoubleWell, write_run

LADDER = np.array([300.0, 424.26, 600.0])
BETAS = 1 / (KB * LADDER)
WELL = DoubleWell(20_001)


def assert_calibrated(z):
    """z [runs, ...]: no bias, and a spread that the claimed errors explain."""
    n = len(z)
    assert (np.abs(z.mean(axis=0)) < 4 * z.std(axis=0, ddof=1) / np.sqrt(n)).all()
    # The larger of two errors is claimed: a little too large on average, never too small.
    sums = (z**2).sum(axis=0)
    assert (chi2.sf(sums, n) > 1e-4).all(), sums / n
    assert (sums / n > 0.4).all(), sums / n


def fabricated(rng, path, n=60, n_walkers=6, rho=0.3, temperatures=LADDER, drawn_at=None, **config):
    energy, phi = WELL.draw(
        rng, (n, n_walkers), temperatures if drawn_at is None else drawn_at, rho
    )
    write_run(path, temperatures, energy, {"phi": phi, "psi": phi}, **config)
    return load_run(path)


# ------------------------------------------------------------------------ MBAR


def test_functions_of_temperature_are_exact_and_their_errors_calibrated():
    """Correlated in time and between rungs; at rungs and where there is none."""
    rng, repeats, targets = np.random.default_rng(1), 50, np.array([300.0, 355.0, 600.0])
    exact = np.array([WELL.exact(t) for t in targets])
    z = np.empty((repeats, 3, 3))
    for k in range(repeats):
        energy, phi = WELL.draw(rng, (300, 8), LADDER, rho=0.6)
        found = compute_thermodynamics(Mbar(energy, BETAS), targets, KB, "phi", phi > 0)
        values = np.stack([found.energy, found.heat_capacity, found.delta_f], axis=1)
        errors = [found.energy_stderr, found.heat_capacity_stderr, found.delta_f_stderr]
        z[k] = (values - exact) / np.stack(errors, axis=1)
    assert_calibrated(z)


def test_profile_is_exact_and_its_band_calibrated():
    rng, repeats, bins, kelvin = np.random.default_rng(2), 50, 6, 350.0
    edges = np.linspace(-np.pi, np.pi, bins + 1)
    exact = np.array([WELL.probability(a, b, kelvin) for a, b in pairwise(edges)])
    z = np.empty((repeats, bins))
    for k in range(repeats):
        energy, phi = WELL.draw(rng, (100, 8), LADDER, rho=0.5)
        profile = dihedral_profile(Mbar(energy, BETAS), phi, kelvin, KB, bins)
        z[k] = (profile.probability - exact) / profile.probability_stderr
        assert profile.probability.sum() == pytest.approx(1.0)
    assert_calibrated(z)
    np.testing.assert_allclose(profile.edges, edges)
    difference = profile.free_energy - np.log(exact.max() / exact)
    assert (abs(difference) < 5 * profile.stderr + 5 * profile.stderr.max()).all()
    np.testing.assert_allclose(
        profile.stderr, profile.probability_stderr / profile.probability, rtol=1e-12
    )


def test_profile_is_pymbars_own():
    """Independent samples: pymbar's FES by histogram gives the same free energies and errors."""
    import pymbar

    rng, bins, kelvin = np.random.default_rng(3), 8, 350.0
    energy, phi = WELL.draw(rng, (400, 4), LADDER)
    mixed = rng.permuted(np.arange(1600))  # the rungs of our fabricated walkers move together
    energy[..., 1] = energy[..., 1].ravel()[mixed].reshape(400, 4)
    phi[..., 1] = phi[..., 1].ravel()[mixed].reshape(400, 4)
    ours = dihedral_profile(Mbar(energy, BETAS), phi, kelvin, KB, bins)
    flat = np.moveaxis(energy, 2, 0).ravel()
    fes = pymbar.FES(
        np.outer(BETAS, flat),
        np.full(3, 1600),
        mbar_options={"solver_protocol": ({"method": "adaptive"},)},
    )
    fes.generate_fes(
        flat / (KB * kelvin),
        np.moveaxis(phi, 2, 0).ravel(),
        fes_type="histogram",
        histogram_parameters={"bin_edges": ours.edges},
    )
    centres = 0.5 * (ours.edges[1:] + ours.edges[:-1])
    theirs = fes.get_fes(centres, reference_point="from-lowest", uncertainty_method="analytical")
    np.testing.assert_allclose(ours.free_energy, theirs["f_i"], atol=1e-5)


def test_a_bin_that_was_never_visited():
    energy, phi = WELL.draw(np.random.default_rng(4), (50, 4), LADDER)
    profile = dihedral_profile(Mbar(energy, BETAS), np.abs(phi), 300.0, KB, 4)
    assert np.isposinf(profile.free_energy[:2]).all()
    assert np.isnan(profile.stderr[:2]).all()
    assert profile.kish[:2].tolist() == [0.0, 0.0]
    assert profile.free_energy.min() == 0.0
    with pytest.raises(ValueError, match="bins: expected an integer of at least 1, got 0"):
        dihedral_profile(Mbar(energy, BETAS), phi, 300.0, KB, 0)


def test_one_rung_is_its_own_average():
    energy, phi = WELL.draw(np.random.default_rng(5), (200, 4), [300.0], rho=0.5)
    found = compute_thermodynamics(Mbar(energy, BETAS[:1]), [300.0], KB, "phi", phi > 0)
    own = heat_capacity(energy[..., 0], 300.0, KB)
    assert found.energy[0] == pytest.approx(energy.mean())
    assert found.energy_stderr[0] == pytest.approx(estimate_mean(energy[..., 0]).stderr)
    assert found.heat_capacity[0] == pytest.approx(own.value)
    assert found.heat_capacity_stderr[0] == pytest.approx(own.stderr)
    assert found.kish[0] == pytest.approx(800)


# -------------------------------------------------------------- weighted draws


def uniform_draws(rng, n, kelvin, modes_at=500.0):
    """From φ uniform and harmonic modes at another temperature: log weights, energies, φ."""
    phi = rng.uniform(-np.pi, np.pi, n)
    modes = 0.5 * KB * modes_at * rng.chisquare(WELL.MODES, n)
    energy = WELL.potential(phi) + modes
    return -energy / (KB * kelvin) + modes / (KB * modes_at) + 12.0, energy, phi


def test_importance_sampling_is_exact_and_its_errors_calibrated():
    rng, repeats, kelvin = np.random.default_rng(6), 60, 380.0
    z, sizes = np.empty((repeats, 3)), np.empty((repeats, 2))
    for k in range(repeats):
        log_weights, energy, phi = uniform_draws(rng, 4000, kelvin)
        found = importance_thermodynamics(log_weights, energy, kelvin, KB, phi > 0)
        estimates = np.array([found.energy, found.heat_capacity, found.delta_f])
        z[k] = (estimates[:, 0] - WELL.exact(kelvin)) / estimates[:, 1]
        sizes[k] = found.ess.fraction, found.ess_stderr
    assert_calibrated(z)
    # The exact fraction: (∫ p)² / ∫ p²/q, modes and dihedral apart.
    v = np.exp(-WELL.potential(WELL.grid) / (KB * kelvin))
    dihedral = np.trapezoid(v, WELL.grid) ** 2 / np.trapezoid(v**2, WELL.grid) / (2 * np.pi)
    ratio = kelvin / 500.0  # of Gaussians, per mode: sqrt(r (2 - r))
    exact = dihedral * (ratio * (2 - ratio)) ** (WELL.MODES / 2)
    assert_calibrated((sizes[:, 0] - exact) / sizes[:, 1])


def test_importance_sampling_leaves_out_what_has_no_weight():
    log_weights, energy, phi = uniform_draws(np.random.default_rng(7), 2000, 300.0)
    outside = np.arange(2000) % 3 == 0
    log_weights[outside], energy[outside], phi[outside] = -np.inf, np.nan, np.inf
    found = importance_thermodynamics(log_weights, energy, 300.0, KB, phi > 0)
    kept = ~outside
    same = importance_thermodynamics(log_weights[kept], energy[kept], 300.0, KB, phi[kept] > 0)
    assert (found.energy, found.heat_capacity) == (same.energy, same.heat_capacity)
    assert found.delta_f == same.delta_f
    assert found.ess.fraction == pytest.approx(same.ess.fraction * kept.mean())
    profile = importance_profile(log_weights, phi, 300.0, 5)
    edges = profile.edges
    exact = [WELL.probability(a, b, 300.0) for a, b in pairwise(edges)]
    assert (abs(profile.probability - exact) < 4 * profile.probability_stderr).all()
    assert np.isnan(importance_thermodynamics(log_weights, energy, 300.0, KB).delta_f).all()
    for bad, words in (
        ((np.full(3, -np.inf), np.zeros(3)), "log_weights"),
        ((np.zeros(3), np.zeros(2)), r"energy: expected shape \(3,\), got \(2,\)"),
        ((np.zeros(3), np.array([0.0, np.inf, 0.0])), "energy: expected finite"),
        ((np.zeros(3), np.zeros(3), np.zeros(3)), "inside: expected truth values"),
    ):
        with pytest.raises(ValueError, match=words):
            importance_thermodynamics(*bad[:2], 300.0, KB, *bad[2:])


# -------------------------------------------------------------- ensemble checks


def harmonic(rng, shape, kelvin, modes=60, rho=0.0):
    """Energies of harmonic modes at a temperature: Gamma distributed, C_V = modes k/2."""
    radius = rng.chisquare(modes, shape)
    keep = rng.random(shape) < rho
    for i in range(1, len(radius)):
        radius[i] = np.where(keep[i], radius[i - 1], radius[i])
    return 0.5 * KB * kelvin * radius


def test_ensemble_checks_are_exact_and_calibrated():
    rng, repeats, modes = np.random.default_rng(8), 50, 60
    z = np.empty((repeats, 3))
    for k in range(repeats):
        low = harmonic(rng, (150, 8), 300.0, modes, rho=0.5)
        high = harmonic(rng, (150, 8), 350.0, modes, rho=0.5)
        slope = energy_ratio(low, high, (1 / (KB * 300), 1 / (KB * 350)))
        capacity = heat_capacity(low, 300.0, KB)
        difference = heat_capacity_difference(low, high, (300.0, 350.0), KB)
        z[k] = slope.z, (capacity.value - modes / 2 * KB) / capacity.stderr, difference.z
    assert slope.expected == pytest.approx(1 / (KB * 300) - 1 / (KB * 350))
    assert_calibrated(z)


def test_the_slope_knows_of_rungs_that_move_together():
    """The double well's rungs share their random numbers: errors without that are far off."""
    rng, repeats = np.random.default_rng(9), 50
    z = np.empty((repeats, 2))
    for k in range(repeats):
        energy, _ = WELL.draw(rng, (150, 8), [300.0, 400.0], rho=0.5)
        low, high = np.moveaxis(energy, 2, 0)
        z[k, 0] = energy_ratio(low, high, (1 / (KB * 300), 1 / (KB * 400))).z
        z[k, 1] = heat_capacity_difference(low, high, (300.0, 400.0), KB).z
    assert_calibrated(z)


def test_the_integral_of_the_heat_capacity_is_of_high_order():
    """Its end correction: exact where C_V is a cubic in T; here within a part in 10⁴."""
    exact = np.array([WELL.exact(t) for t in (300.0, 400.0)])
    slope = (exact[1, 0] - exact[0, 0]) / 100
    grid, v = WELL.grid, WELL.potential(WELL.grid)
    # A quasi-infinite sample: 2000 quantiles of the well alone, no noise.
    levels = (np.arange(2000) + 0.5) / 2000
    low, high = (
        WELL.potential(np.interp(levels, WELL._cumulative(t), grid))[:, None]
        for t in (300.0, 400.0)
    )
    assert v.max() > high.max() > low.max()
    check = heat_capacity_difference(low, high, (300.0, 400.0), KB)
    modes = 0.5 * WELL.MODES * KB
    assert check.value + modes == pytest.approx(slope, rel=2e-3)
    trapezoid = exact[:, 1].mean()
    assert abs(check.expected + modes - slope) < 0.2 * abs(trapezoid - slope)


def test_energies_that_do_not_overlap():
    check = energy_ratio(np.tile([0.0, 1.0], (4, 1)), np.full((4, 2), 5.0), (0.4, 0.2))
    assert np.isnan(check.value)
    assert np.isnan(check.z)
    assert not abs(check.z) < 3
    with pytest.raises(ValueError, match="low, high"):
        energy_ratio(np.zeros(3), np.zeros(3), (0.4, 0.2))


def far_apart(temperatures, modes=1000):
    """Energies [100, 4, K] of many modes: rungs far apart share nothing but what is put there."""
    rng = np.random.default_rng(0)
    return 0.5 * KB * np.asarray(temperatures) * rng.chisquare(modes, (100, 4, len(temperatures)))


def test_energies_that_hardly_overlap():
    """The rungs share one iteration, which no slope near the expected one can explain."""
    energy = far_apart([300.0, 600.0])
    energy[:1, :, 0] = energy[:1, :, 1]
    check = energy_ratio(energy[..., 0], energy[..., 1], (1 / (KB * 300), 1 / (KB * 600)))
    assert np.isnan([check.value, check.stderr, check.z]).all()
    assert check.expected == pytest.approx(1 / (KB * 300) - 1 / (KB * 600))


def test_mbar_of_rungs_that_do_not_overlap():
    """Each block of rungs is known from its own samples; what lies between blocks is not."""
    kelvins = np.array([300.0, 303.0, 1200.0])
    energy = far_apart(kelvins, modes=4000)
    mbar, near = Mbar(energy, 1 / (KB * kelvins)), Mbar(energy[..., :2], 1 / (KB * kelvins[:2]))
    for kelvin in (300.0, 301.5, 303.0):
        found = mbar.reweight(1 / (KB * kelvin)).mean(energy)
        same = near.reweight(1 / (KB * kelvin)).mean(energy[..., :2])
        assert (found.value, found.stderr) == pytest.approx((same.value, same.stderr), rel=1e-6)
    hot = mbar.reweight(1 / (KB * 1200.0)).mean(energy)
    own = estimate_mean(energy[..., 2])
    assert (hot.value, hot.stderr) == pytest.approx((own.value, own.stderr), rel=1e-6)
    # The temperature whose samples would lie where the two blocks have equal weights.
    border = 1 / (KB * np.sqrt(303.0 * 1200.0))
    weights = [mbar.reweight(b).weights[..., 2].sum() for b in np.linspace(0.7, 1.3, 301) * border]
    middle = (np.linspace(0.7, 1.3, 301) * border)[np.argmin(np.abs(np.array(weights) - 0.5))]
    between = mbar.reweight(middle).mean(energy)
    assert np.isfinite(between.value)
    assert np.isnan([between.stderr, between.n_independent]).all()


@pytest.mark.parametrize(("n", "n_walkers", "rho"), [(20, 8, 0.8), (50, 8, 0.95), (50, 200, 1.0)])
def test_short_runs_are_not_called_biased(n, n_walkers, rho):
    """Of a right sampler; the last has 200 walkers that never moved."""
    rng = np.random.default_rng(14)
    for _ in range(20):
        low = harmonic(rng, (n, n_walkers), 300.0, rho=rho)
        high = harmonic(rng, (n, n_walkers), 350.0, rho=rho)
        slope = energy_ratio(low, high, (1 / (KB * 300), 1 / (KB * 350)))
        difference = heat_capacity_difference(low, high, (300.0, 350.0), KB)
        for check in (slope, difference):
            assert np.isfinite(check.value)
            assert not check.n_eff >= 100
            assert np.isnan(check.z)


def test_the_summary_of_a_short_run_says_so(tmp_path):
    run = fabricated(np.random.default_rng(15), tmp_path / "run", n=20, n_walkers=4)
    summary = run.summary()
    for pairs in summary["ensemble_check"].values():
        assert all(check["z"] is None and check["n_eff"] < 100 for check in pairs.values())
    assert all(c["n_eff"] < 100 for c in summary["heat_capacity_kJ_mol_K"].values())
    assert disagreements(summary) == []
    words = unsampled(summary)
    assert any(w.startswith("300.00 K: C_V rests on") for w in words)
    assert sum("cannot be tested on so few effective samples" in w for w in words) == 4


def test_independent_samples_of_mbar_estimates():
    """Variance/SE² at the target temperature; of one rung, those of its own mean."""
    energy, _ = WELL.draw(np.random.default_rng(16), (200, 4), LADDER, rho=0.5)
    own = estimate_mean(energy[..., 0])
    alone = Mbar(energy[..., :1], BETAS[:1]).reweight(BETAS[0]).mean(energy[..., :1])
    assert alone.n_independent == pytest.approx(own.n_independent)
    assert own.n_independent == pytest.approx(energy[..., 0].var() / own.stderr**2)
    found = Mbar(energy, BETAS).reweight(BETAS[1]).mean(energy)
    assert found.n_samples == energy.size
    assert found.variance == pytest.approx(energy[..., 1].var(), rel=0.15)
    assert found.n_independent == pytest.approx(found.variance / found.stderr**2)


def test_a_rung_at_the_wrong_temperature_is_flagged(tmp_path):
    rng = np.random.default_rng(10)
    sizes = {"n": 300, "n_walkers": 8}
    good = fabricated(rng, tmp_path / "good", **sizes).summary()["ensemble_check"]
    bad = fabricated(rng, tmp_path / "bad", drawn_at=[330.0, 424.26, 600.0], **sizes)
    wrong = bad.summary()["ensemble_check"]
    pairs = ["300.00-424.26", "424.26-600.00"]
    for name in ("energy_ratio_mol_kJ", "heat_capacity_kJ_mol_K"):
        assert list(good[name]) == pairs
        assert all(abs(check["z"]) < 3 for check in good[name].values())
    ratio = wrong["energy_ratio_mol_kJ"]
    assert ratio[pairs[0]]["z"] < -5
    assert abs(ratio[pairs[1]]["z"]) < 3
    # What it found is the temperature that the samples have.
    found = ratio[pairs[0]]
    expected = 1 / (KB * 330.0) - BETAS[1]
    assert abs(found["value"] - expected) < 4 * found["stderr"]


# ------------------------------------------------------------------------- runs


def test_of_a_run(tmp_path):
    run = fabricated(np.random.default_rng(11), tmp_path / "run")
    table = run.thermodynamics()
    assert table.dihedral == "phi"
    assert set(LADDER) <= set(table.temperatures)
    assert (np.diff(table.temperatures) > 0).all()
    some = run.thermodynamics([350 * unit.kelvin, 300])
    np.testing.assert_allclose(some.temperatures, [350, 300])
    for one in (350.0, np.float64(350), np.array(350), 350 * unit.kelvin):
        alone = run.thermodynamics(one)
        assert (alone.temperatures, alone.energy) == ([350.0], some.energy[:1])
    array = run.thermodynamics(unit.Quantity(np.array([350.0, 300.0]), unit.kelvin))
    np.testing.assert_array_equal(array.energy, some.energy)
    with pytest.raises(ValueError, match="temperatures: expected at least one"):
        run.thermodynamics([])
    with pytest.raises(TypeError, match="expected a number in kelvin, got 'hot'"):
        run.thermodynamics("hot")
    assert some.delta_f[1] == pytest.approx(run.free_energy_positive("phi", 300)[0], rel=1e-9)
    assert run.heat_capacity(300).value == pytest.approx(
        run.energies(300).var() / (KB * 300**2), rel=1e-9
    )
    profile = run.phi_profile(350, bins=10)
    half = profile.probability[5:].sum()
    assert np.log((1 - half) / half) == pytest.approx(some.delta_f[0], abs=1e-5)
    with pytest.raises(ValueError, match=r"expected 300\.00 to 600\.00 K, got 610 K"):
        run.thermodynamics([610])
    with pytest.raises(ValueError, match="chi"):
        run.thermodynamics([300], dihedral="chi")


def test_a_reference_of_other_dihedrals_is_not_compared_with(tmp_path):
    rng = np.random.default_rng(17)
    energy, phi = WELL.draw(rng, (30, 4), LADDER)
    write_run(tmp_path / "run", LADDER, energy, {"phi2": phi, "psi2": phi})
    theirs, angles = WELL.draw(rng, (500, 1), LADDER)
    reference = Reference(LADDER, angles[:, 0], angles[:, 0], theirs[:, 0], 1.0)
    summary = load_run(tmp_path / "run").summary(reference)
    assert "comparison" not in summary
    (note,) = summary["monitor"]["notes"]
    assert "not compared with the reference" in note
    assert "recorded phi2, psi2" in note


def test_files(tmp_path):
    rng = np.random.default_rng(12)
    run = fabricated(rng, tmp_path / "run")
    energy, phi = WELL.draw(rng, (2000, 1), [300.0, 356.76, 600.0, 800.0])
    reference = Reference(
        [300.0, 356.76, 600.0, 800.0], phi[:, 0], phi[:, 0], energy[:, 0], interval_ps=1.0
    )
    content = write_thermodynamics(run, tmp_path, reference)
    assert json.loads((tmp_path / "thermodynamics.json").read_text()) == content
    with open(tmp_path / "thermodynamics.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == content["functions"] == run.thermodynamics().rows()
    assert (tmp_path / "thermodynamics.png").stat().st_size > 10_000
    assert content["profiles"].keys() == {"300.00", "424.26", "600.00"}
    assert [row["temperature_K"] for row in content["reference"]] == [300.0, 356.76, 600.0, 800.0]
    assert content["z"] == compare_thermodynamics(run, reference)
    for z in content["z"].values():
        assert z.keys() == {"300.00", "356.76", "600.00"}  # 800 K is outside the ladder
        assert all(abs(value) < 4 for value in z.values())


def test_files_without_phi_or_ladder(tmp_path):
    rng = np.random.default_rng(13)
    energy, _ = WELL.draw(rng, (40, 3), [300.0])
    write_run(tmp_path / "one", [300.0], energy)
    run = load_run(tmp_path / "one")
    content = write_thermodynamics(run, tmp_path / "one")
    assert len(content["functions"]) == 1
    assert content["profiles"] == {}
    assert not any("delta_F" in name for name in content["functions"][0])
    with pytest.raises(ValueError, match="no phi"):
        run.phi_profile(300)
    write_run(tmp_path / "empty", LADDER, np.empty((0, 4, 3)))
    with pytest.raises(ValueError, match="no complete segment yet"):
        load_run(tmp_path / "empty").thermodynamics()
