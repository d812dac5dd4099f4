"""Comparison of runs with reference data."""

import numpy as np
import pytest

import openmm_tsf.analysis.reference as reference_module
from openmm_tsf.analysis import Reference, compare, load_reference, load_run
from openmm_tsf.analysis.ramachandran import decorrelated_frames, ramachandran_distance
from tests.support.analysis_runs import (
    TEMPERATURES,
    WELL,
    angles_of_two_basins,
    make_reference,
    run_like_reference,
)
from tests.support.fabricate import write_run


def test_an_exact_run_agrees_with_the_reference(tmp_path):
    repeats, rng = 16, np.random.default_rng(10)
    z, p_values, ratios = [], [], []
    for k in range(repeats):
        run = run_like_reference(rng, tmp_path / str(k))
        result = compare(run, make_reference(rng))
        z += [*result.phi_positive.z, *result.energy.z]
        p_values += [result.phi_positive.p_value, result.energy.p_value]
        ratios += [d.total_variation / d.expected_total_variation for d in result.ramachandran]
    assert abs(np.mean(z)) < 4 / np.sqrt(len(z))
    assert 0.75 < np.std(z) < 1.2
    assert min(p_values) > 1e-3
    assert abs(np.mean(p_values) - 0.5) < 0.2
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05)
    assert max(ratios) < 1.3


def test_a_wrong_run_disagrees(tmp_path):
    rng = np.random.default_rng(11)
    run = run_like_reference(rng, tmp_path / "run", p=0.6, temperatures=[300.0, 350.0])
    result = compare(run, make_reference(rng))
    assert (result.temperatures, result.not_compared) == ((300.0,), (350.0,))
    assert result.phi_positive.z[0] > 5
    assert result.phi_positive.p_value < 1e-5
    distance = result.ramachandran[0]
    assert distance.total_variation > 1.5 * distance.floor_total_variation
    assert distance.kl > distance.floor_kl
    other = run_like_reference(rng, tmp_path / "other", temperatures=[310.0])
    with pytest.raises(ValueError, match="none of the run's"):
        compare(other, make_reference(rng))


def test_a_run_that_never_visits_the_basin_cannot_agree(tmp_path):
    rng = np.random.default_rng(12)
    run = run_like_reference(rng, tmp_path / "run", p=0.0)
    compared = compare(run, make_reference(rng)).phi_positive
    # No sample has φ > 0: the error is not known, and z is NaN.
    assert not any(abs(z) < 3 for z in compared.z)
    assert not compared.p_value > 0.01
    summary = run.summary()
    positive = summary["phi_positive"]["300.00"]
    assert (positive["stderr"], positive["n_eff"]) == (None, 0)
    assert summary["delta_F_phi_kT"]["300.00"]["value"] is None


def test_a_reference_of_other_dihedrals_is_not_compared_with(tmp_path):
    rng = np.random.default_rng(17)
    energy, phi = WELL.draw(rng, (30, 4), TEMPERATURES)
    write_run(tmp_path / "run", TEMPERATURES, energy, {"phi2": phi, "psi2": phi})
    reference_energy, angles = WELL.draw(rng, (500, 1), TEMPERATURES)
    reference = Reference(TEMPERATURES, angles[:, 0], angles[:, 0], reference_energy[:, 0], 1.0)
    summary = load_run(tmp_path / "run").summary(reference)
    assert "comparison" not in summary
    (note,) = summary["monitor"]["notes"]
    assert "not compared with the reference" in note
    assert "recorded phi2, psi2" in note


def test_decorrelated_frames():
    rng = np.random.default_rng(13)
    phi, psi = angles_of_two_basins(rng, (2000, 30), rho=0.0)
    assert decorrelated_frames(phi, psi) > 0.85 * phi.size
    # Every frame repeated ten times.
    tenfold = (np.repeat(angles[:200], 10, axis=0) for angles in (phi, psi))
    assert decorrelated_frames(*tenfold) == pytest.approx(200 * 30, rel=0.2)
    distance = ramachandran_distance(phi, psi, phi, psi)
    assert distance.total_variation == distance.kl == 0.0
    single = ramachandran_distance(phi[:1, :1], psi[:1, :1], phi, psi)
    assert np.isnan(single.floor_total_variation)


def test_load_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_module, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="no reference data"):
        load_reference()
    original = make_reference(np.random.default_rng(14), n=50)
    names = ("phi", "psi", "energy")
    arrays = {name: getattr(original, name).astype(np.float32) for name in names}
    arrays |= {"temperatures_K": original.temperatures, "interval_ps": 1.0}
    np.savez(tmp_path / "ala2_reference.npz", **arrays)
    loaded = load_reference()
    np.testing.assert_allclose(loaded.phi, original.phi, rtol=1e-6)
    assert (loaded.rung(424.265), loaded.rung(424.3)) == (1, None)
    # A run that names it is compared with it in its summary.
    name = "ala2_reference.npz"
    run = run_like_reference(np.random.default_rng(15), tmp_path / "run", reference=name)
    summary = run.summary()
    assert summary["comparison"]["ramachandran"].keys() == {"300.00", "424.26", "600.00"}
    assert np.isfinite(summary["comparison"]["phi_positive"]["p_value"])
    np.savez(tmp_path / name, **arrays | {"psi": arrays["psi"][:, :2]})
    with pytest.raises(ValueError, match="psi: expected shape"):
        load_reference()
    del arrays["psi"]
    np.savez(tmp_path / name, **arrays)
    with pytest.raises(ValueError, match="no array 'psi'"):
        load_reference()
