"""Thermodynamic functions against quadrature: values by |z| < 4, errors by their spread."""

import csv
import json
from itertools import pairwise

import numpy as np
import openmm.unit as unit
import pymbar
import pytest

from openmm_tsf.analysis import (
    Reference,
    compare_thermodynamics,
    importance_profile,
    importance_thermodynamics,
    load_run,
    write_thermodynamics,
)
from openmm_tsf.analysis.ensemble_checks import heat_capacity
from openmm_tsf.analysis.mbar import Mbar
from openmm_tsf.analysis.thermodynamics import compute_thermodynamics, dihedral_profile
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.units import KB
from tests.support.analysis_runs import BETAS, TEMPERATURES, WELL, assert_calibrated, well_run
from tests.support.fabricate import write_run


def test_functions_of_temperature_are_exact_and_their_errors_calibrated():
    """Correlated in time and between rungs; at rungs and between them."""
    rng, repeats, targets = np.random.default_rng(1), 50, np.array([300.0, 355.0, 600.0])
    exact = np.array([WELL.exact(t) for t in targets])
    z = np.empty((repeats, 3, 3))
    for k in range(repeats):
        energy, phi = WELL.draw(rng, (300, 8), TEMPERATURES, rho=0.6)
        result = compute_thermodynamics(Mbar(energy, BETAS), targets, KB, "phi", phi > 0)
        values = np.stack([result.energy, result.heat_capacity, result.delta_f], axis=1)
        errors = [result.energy_stderr, result.heat_capacity_stderr, result.delta_f_stderr]
        z[k] = (values - exact) / np.stack(errors, axis=1)
    assert_calibrated(z)


def test_profile_is_exact_and_its_band_calibrated():
    rng, repeats, bins, kelvin = np.random.default_rng(2), 50, 6, 350.0
    edges = np.linspace(-np.pi, np.pi, bins + 1)
    exact = np.array([WELL.probability(a, b, kelvin) for a, b in pairwise(edges)])
    z = np.empty((repeats, bins))
    for k in range(repeats):
        energy, phi = WELL.draw(rng, (100, 8), TEMPERATURES, rho=0.5)
        profile = dihedral_profile(Mbar(energy, BETAS), phi, kelvin, KB, bins)
        z[k] = (profile.probability - exact) / profile.probability_stderr
        assert profile.probability.sum() == pytest.approx(1.0)
    assert_calibrated(z)
    np.testing.assert_allclose(profile.edges, edges)
    difference, stderr = profile.free_energy - np.log(exact.max() / exact), profile.stderr
    assert (abs(difference) < 5 * stderr + 5 * stderr.max()).all()
    expected = profile.probability_stderr / profile.probability
    np.testing.assert_allclose(stderr, expected, rtol=1e-12)


def test_profile_equals_pymbar():
    """Independent samples: pymbar's FES by histogram gives the same free energies and errors."""
    rng, bins, kelvin = np.random.default_rng(3), 8, 350.0
    energy, phi = WELL.draw(rng, (400, 4), TEMPERATURES)
    mixed = rng.permuted(np.arange(1600))  # the fabricated rungs are correlated
    for values in (energy, phi):
        values[..., 1] = values[..., 1].ravel()[mixed].reshape(400, 4)
    profile = dihedral_profile(Mbar(energy, BETAS), phi, kelvin, KB, bins)
    flat = np.moveaxis(energy, 2, 0).ravel()
    options = {"solver_protocol": ({"method": "adaptive"},)}
    fes = pymbar.FES(np.outer(BETAS, flat), np.full(3, 1600), mbar_options=options)
    angles, parameters = np.moveaxis(phi, 2, 0).ravel(), {"bin_edges": profile.edges}
    fes.generate_fes(flat / (KB * kelvin), angles, "histogram", histogram_parameters=parameters)
    centres = 0.5 * (profile.edges[1:] + profile.edges[:-1])
    expected = fes.get_fes(centres, reference_point="from-lowest", uncertainty_method="analytical")
    np.testing.assert_allclose(profile.free_energy, expected["f_i"], atol=1e-5)


def test_a_bin_that_was_never_visited():
    energy, phi = WELL.draw(np.random.default_rng(4), (50, 4), TEMPERATURES)
    profile = dihedral_profile(Mbar(energy, BETAS), np.abs(phi), 300.0, KB, 4)
    assert np.isposinf(profile.free_energy[:2]).all()
    assert np.isnan(profile.stderr[:2]).all()
    assert profile.kish[:2].tolist() == [0.0, 0.0]
    assert profile.free_energy.min() == 0.0
    with pytest.raises(ValueError, match="bins: expected an integer of at least 1, got 0"):
        dihedral_profile(Mbar(energy, BETAS), phi, 300.0, KB, 0)


def test_one_rung_is_averaged_directly():
    energy, phi = WELL.draw(np.random.default_rng(5), (200, 4), [300.0], rho=0.5)
    result = compute_thermodynamics(Mbar(energy, BETAS[:1]), [300.0], KB, "phi", phi > 0)
    capacity = heat_capacity(energy[..., 0], 300.0, KB)
    (row,) = result.rows()
    assert row["energy_kJ_mol"] == pytest.approx(energy.mean())
    assert row["energy_stderr"] == pytest.approx(estimate_mean(energy[..., 0]).stderr)
    columns = row["heat_capacity_kJ_mol_K"], row["heat_capacity_stderr"], row["kish"]
    assert columns == pytest.approx((*capacity.pair, 800))


def uniform_draws(rng, n, kelvin, modes_at=500.0):
    """Log weights, energies and φ of draws: φ uniform, harmonic modes at another temperature."""
    phi = rng.uniform(-np.pi, np.pi, n)
    modes = 0.5 * KB * modes_at * rng.chisquare(WELL.MODES, n)
    energy = WELL.potential(phi) + modes
    return -energy / (KB * kelvin) + modes / (KB * modes_at) + 12.0, energy, phi


def test_importance_sampling_is_exact_and_its_errors_calibrated():
    rng, repeats, kelvin = np.random.default_rng(6), 60, 380.0
    z, sizes = np.empty((repeats, 3)), np.empty((repeats, 2))
    for k in range(repeats):
        log_weights, energy, phi = uniform_draws(rng, 4000, kelvin)
        result = importance_thermodynamics(log_weights, energy, kelvin, KB, phi > 0)
        estimates = np.array([result.energy, result.heat_capacity, result.delta_f])
        z[k] = (estimates[:, 0] - WELL.exact(kelvin)) / estimates[:, 1]
        sizes[k] = result.ess.fraction, result.ess_stderr
    assert_calibrated(z)
    # The exact fraction (∫ p)² / ∫ p²/q, of the modes and of the dihedral separately.
    v = np.exp(-WELL.potential(WELL.grid) / (KB * kelvin))
    dihedral = np.trapezoid(v, WELL.grid) ** 2 / np.trapezoid(v**2, WELL.grid) / (2 * np.pi)
    ratio = kelvin / 500.0  # of Gaussians, per mode: sqrt(r (2 - r))
    exact = dihedral * (ratio * (2 - ratio)) ** (WELL.MODES / 2)
    assert_calibrated((sizes[:, 0] - exact) / sizes[:, 1])


def test_importance_sampling_leaves_out_what_has_no_weight():
    log_weights, energy, phi = uniform_draws(np.random.default_rng(7), 2000, 300.0)
    outside = np.arange(2000) % 3 == 0
    log_weights[outside], energy[outside], phi[outside] = -np.inf, np.nan, np.inf
    result = importance_thermodynamics(log_weights, energy, 300.0, KB, phi > 0)
    kept = ~outside
    same = importance_thermodynamics(log_weights[kept], energy[kept], 300.0, KB, phi[kept] > 0)
    for field in ("energy", "heat_capacity", "delta_f"):
        assert getattr(result, field) == getattr(same, field)
    assert result.ess.fraction == pytest.approx(same.ess.fraction * kept.mean())
    profile = importance_profile(log_weights, phi, 300.0, 5)
    exact = [WELL.probability(a, b, 300.0) for a, b in pairwise(profile.edges)]
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


def test_of_a_run(tmp_path):
    run = well_run(np.random.default_rng(11), tmp_path / "run")
    table = run.thermodynamics()
    kelvins = table.temperatures.tolist()
    assert table.dihedral == "phi"
    assert set(TEMPERATURES) <= set(kelvins)
    assert kelvins == sorted(set(kelvins))
    some = run.thermodynamics([350 * unit.kelvin, 300])
    np.testing.assert_allclose(some.temperatures, [350, 300])
    for one in (350.0, np.float64(350), np.array(350), 350 * unit.kelvin):
        alone = run.thermodynamics(one)
        assert (alone.temperatures, alone.energy) == ([350.0], some.energy[:1])
    array = run.thermodynamics(unit.Quantity(np.array([350.0, 300.0]), unit.kelvin))
    np.testing.assert_array_equal(array.energy, some.energy)
    for error, words, arguments in (
        (ValueError, "temperatures: expected at least one", ([],)),
        (TypeError, "expected a number in kelvin, got 'hot'", ("hot",)),
        (ValueError, r"expected 300\.00 to 600\.00 K, got 1500 K: only", ([1500],)),
        (ValueError, "chi", ([300], "chi")),
    ):
        with pytest.raises(error, match=words):
            run.thermodynamics(*arguments)
    assert some.delta_f[1] == pytest.approx(run.free_energy_positive("phi", 300)[0], rel=1e-9)
    capacity = run.energies(300).var() / (KB * 300**2)
    assert run.heat_capacity(300).value == pytest.approx(capacity, rel=1e-9)
    half = run.phi_profile(350, bins=10).probability[5:].sum()
    assert np.log((1 - half) / half) == pytest.approx(some.delta_f[0], abs=1e-5)


def test_files(tmp_path):
    rng = np.random.default_rng(12)
    run = well_run(rng, tmp_path / "run")
    kelvins = [300.0, 356.76, 600.0, 800.0]
    energy, phi = WELL.draw(rng, (2000, 1), kelvins)
    reference = Reference(kelvins, phi[:, 0], phi[:, 0], energy[:, 0], interval_ps=1.0)
    content = write_thermodynamics(run, tmp_path, reference)
    assert json.loads((tmp_path / "thermodynamics.json").read_text()) == content
    with open(tmp_path / "thermodynamics.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == content["functions"] == run.thermodynamics().rows()
    assert (tmp_path / "thermodynamics.png").stat().st_size > 10_000
    assert content["profiles"].keys() == {"300.00", "424.26", "600.00"}
    assert [row["temperature_K"] for row in content["reference"]] == kelvins
    assert content["z"] == compare_thermodynamics(run, reference)
    for z in content["z"].values():
        assert z.keys() == {"300.00", "356.76", "600.00"}  # 800 K is outside the ladder
        assert all(abs(value) < 4 for value in z.values())


def test_files_without_phi_or_ladder(tmp_path):
    energy, _ = WELL.draw(np.random.default_rng(13), (40, 3), [300.0])
    run = load_run(write_run(tmp_path / "one", [300.0], energy))
    content = write_thermodynamics(run, tmp_path / "one")
    assert len(content["functions"]) == 1
    assert content["profiles"] == {}
    assert not any("delta_F" in name for name in content["functions"][0])
    with pytest.raises(ValueError, match="no phi"):
        run.phi_profile(300)
    empty = load_run(write_run(tmp_path / "empty", TEMPERATURES, np.empty((0, 4, 3))))
    with pytest.raises(ValueError, match="no complete segment yet"):
        empty.thermodynamics()
