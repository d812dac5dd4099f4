"""Comparison of runs with reference data."""

import numpy as np
import pytest
from scipy.stats import chi2

import openmm_tsf.analysis.reference as reference_module
from openmm_tsf.analysis import (
    Reference,
    compare_with_reference,
    load_reference,
    load_run,
    write_thermodynamics,
)
from openmm_tsf.analysis.comparison import (
    comparable_temperatures,
    compare_thermodynamics,
    hotelling,
)
from openmm_tsf.analysis.ramachandran import decorrelated_frames, ramachandran_distance
from openmm_tsf.analysis.report import describe
from tests.support.analysis_runs import (
    TEMPERATURES,
    WELL,
    angles_of_two_basins,
    make_reference,
    run_like_reference,
    well_run,
)
from tests.support.fabricate import write_run


def test_an_exact_run_agrees_with_the_reference(tmp_path):
    repeats, rng = 16, np.random.default_rng(10)
    z, p_values, ratios = [], [], []
    for k in range(repeats):
        run = run_like_reference(rng, tmp_path / str(k))
        result = compare_with_reference(run, make_reference(rng))
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
    result = compare_with_reference(run, make_reference(rng))
    assert (result.temperatures, result.not_compared) == ((300.0,), (350.0,))
    assert result.phi_positive.z[0] > 5
    assert result.phi_positive.p_value < 1e-5
    distance = result.ramachandran[0]
    assert distance.total_variation > 1.5 * distance.floor_total_variation
    assert distance.kl > distance.floor_kl
    other = run_like_reference(rng, tmp_path / "other", temperatures=[310.0])
    with pytest.raises(ValueError, match="and none between"):
        compare_with_reference(other, make_reference(rng))


def test_a_run_that_never_visits_the_basin_cannot_agree(tmp_path):
    rng = np.random.default_rng(12)
    run = run_like_reference(rng, tmp_path / "run", p=0.0)
    compared = compare_with_reference(run, make_reference(rng)).phi_positive
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


def well_reference(rng, temperatures, n=4000):
    energy, phi = WELL.draw(rng, (n, 1), temperatures)
    return Reference(temperatures, phi[:, 0], phi[:, 0], energy[:, 0], 1.0)


def test_a_run_without_a_common_rung_is_reweighted_to_the_temperatures_of_the_reference(tmp_path):
    """Right runs agree and a wrong one does not; the errors are those of MBAR."""
    rng, z, p_values = np.random.default_rng(21), [], []
    for k in range(16):
        run = well_run(rng, tmp_path / str(k), n=120, temperatures=[280.0, 390.0, 520.0, 640.0])
        reference = well_reference(rng, np.array([250.0, 330.0, 450.0, 600.0, 700.0]), 1000)
        assert comparable_temperatures(run, reference) == (330.0, 450.0, 600.0)
        result = compare_with_reference(run, reference)
        assert result.by_mbar
        assert (result.not_compared, result.ramachandran) == ((280.0, 390.0, 520.0, 640.0), ())
        expected = run.mbar().reweight(run.beta(450.0)).mean(run.dihedral_at_all_rungs("phi") > 0)
        assert result.phi_positive.run[1] == expected
        z += [*result.phi_positive.z, *result.energy.z]
        p_values += [result.phi_positive.p_value, result.energy.p_value]
    assert abs(np.mean(z)) < 6 / np.sqrt(len(z))  # three temperatures are not independent
    assert 0.6 < np.std(z) < 1.3
    assert min(p_values) > 1e-3
    ladder, drawn_at = [310.0, 420.0], [340.0, 460.0]
    sizes = {"n": 120, "n_walkers": 24}
    wrong = well_run(rng, tmp_path / "wrong", temperatures=ladder, drawn_at=drawn_at, **sizes)
    (result,) = compare_with_reference(
        wrong, well_reference(rng, np.array([300.0, 350.0, 500.0]))
    ).energy.z
    assert abs(result) > 4


@pytest.mark.parametrize(
    ("ladder", "compared"),
    [
        ([300.0, 600.0], ("300.00", "600.00")),
        ([305.0, 345.0], ()),
        ([450.0], ()),
        ([650.0, 800.0, 900.0], ()),
        ([200.0, 305.0], ("300.00",)),
        ([290.0, 410.0, 430.0, 700.0], ("300.00", "424.26", "600.00")),
    ],
)
def test_every_ladder_has_a_summary_a_report_and_figures(tmp_path, ladder, compared):
    rng = np.random.default_rng(22)
    run = well_run(rng, tmp_path / "run", n=30, temperatures=ladder)
    reference = well_reference(rng, TEMPERATURES, 300)
    summary = run.summary(reference)
    z = summary["comparison"]["phi_positive"]["z"] if compared else {}
    assert (tuple(z), "comparison" in summary) == (compared, bool(compared))
    text = describe(summary)
    common = 300.0 in ladder
    assert ("by MBAR at 300.00" in text) == bool(compared and not common)
    assert ("nor one between its rungs" in text) == (not compared)
    assert ("comparison" in summary) == bool(compared)
    assert summary["verdict"]["status"] in ("not yet", "converged")
    within = [f"{t:.2f}" for t in TEMPERATURES if ladder[0] <= t <= ladder[-1]]
    assert list(compare_thermodynamics(run, reference).get("delta_F_phi_kT", {})) == within


@pytest.mark.parametrize(
    "ladder", [[450.0], pytest.param([310.0, 320.0, 333.0], marks=pytest.mark.slow), [310.0, 480.0]]
)
def test_every_ladder_has_figures(tmp_path, ladder):
    rng = np.random.default_rng(23)
    run = well_run(rng, tmp_path / "run", n=30, temperatures=ladder)
    reference = well_reference(rng, TEMPERATURES, 300)
    run.plot(tmp_path / "ramachandran.png", reference)
    content = write_thermodynamics(run, tmp_path, reference)
    assert len(content["reference"]) == 3
    assert bool(content["z"]) == (ladder[-1] == 480.0)


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
    np.savez(tmp_path / name, **arrays | {"psi": arrays["psi"][..., :2]})
    with pytest.raises(ValueError, match="psi: expected shape"):
        load_reference()
    del arrays["psi"]
    np.savez(tmp_path / name, **arrays)
    with pytest.raises(ValueError, match="no array 'psi'"):
        load_reference()


@pytest.mark.parametrize("ladder", [TEMPERATURES, [320.0, 400.0, 560.0]])
def test_tiny_runs_do_not_disagree_by_chance(tmp_path, ladder):
    """Nor do runs whose walkers hardly move; a difference in a long run still is one."""
    rng = np.random.default_rng(24)
    reference = well_reference(rng, TEMPERATURES)
    for k, (n, n_walkers, rho) in enumerate(
        [(4, 2, 0.0), (4, 2, 0.8), (8, 2, 0.5), (16, 2, 0.9), (30, 4, 0.95), (100, 2, 0.97)] * 2
    ):
        sizes = {"n": n, "n_walkers": n_walkers, "rho": rho, "temperatures": ladder}
        summary = well_run(rng, tmp_path / str(k), **sizes).summary(reference)
        verdict = summary["verdict"]
        assert (verdict["status"], verdict["wrong"]) == ("not yet", [])
        assert any("before it is converged" in line for line in verdict["undecided"])
    hotter = {"temperatures": ladder, "drawn_at": [1.08 * t for t in ladder]}
    wrong = well_run(rng, tmp_path / "wrong", n=200, **hotter).summary(reference)["verdict"]
    assert wrong["status"] == "wrong"
    assert any("<U> differs from the reference" in line for line in wrong["wrong"])


def test_p_values_of_few_groups_are_those_of_hotelling():
    """Of exact normal means, whose covariance is estimated from 12 groups, 1 % are below 1 %."""
    rng, size, groups, p = np.random.default_rng(25), 3, 12, []
    for _ in range(4000):
        means = rng.normal(size=(groups, size)) @ [[1.0, 0.8, 0.5], [0, 0.6, 0.3], [0, 0, 0.2]]
        centre, covariance = means.mean(axis=0), np.cov(means, rowvar=False) / groups
        p.append(hotelling(float(centre @ np.linalg.solve(covariance, centre)), size, groups))
    assert np.mean(np.array(p) < 0.01) == pytest.approx(0.01, abs=0.005)
    assert np.mean(p) == pytest.approx(0.5, abs=0.02)
    assert hotelling(9.0, 3, 10**6) == pytest.approx(chi2.sf(9.0, 3), rel=1e-4)
    assert np.isnan(hotelling(9.0, 3, 3))


@pytest.mark.parametrize("n_walkers", [1, 20])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_wrong_population_is_wrong_against_a_reference_of_any_number_of_walkers(
    tmp_path, n_walkers, p
):
    """Also where the run never visits what the reference has, 0.3."""
    rng = np.random.default_rng(21)
    shape = (3000 // n_walkers, n_walkers, len(TEMPERATURES))
    phi, psi = angles_of_two_basins(rng, shape)
    reference = Reference(TEMPERATURES, phi, psi, rng.normal(size=shape), 1.0)
    run = run_like_reference(rng, tmp_path / "run", p=p)
    compared = compare_with_reference(run, reference).phi_positive
    assert (np.array(compared.z) < -4).all()
    verdict = run.summary(reference)["verdict"]
    assert verdict["status"] == "wrong"
    assert any("P(phi > 0) differs from the reference" in words for words in verdict["wrong"])


def energies_and_slow_state(rng, path, n, inside):
    """A run whose energies and psi are independent samples, with a given state phi > 0."""
    shape = (n, inside.shape[1], len(TEMPERATURES))
    phi = np.where(np.broadcast_to(inside[..., None], shape), 1.0, -1.5)
    phi = phi + 0.3 * rng.normal(size=shape)
    psi = rng.uniform(-np.pi, np.pi, shape)
    return load_run(write_run(path, TEMPERATURES, rng.normal(size=shape), {"phi": phi, "psi": psi}))


def reference_of_a_state(rng, p, n=800):
    shape = (n, 40, len(TEMPERATURES))
    phi, _ = angles_of_two_basins(rng, shape, p)
    return Reference(
        TEMPERATURES, phi, rng.uniform(-np.pi, np.pi, shape), rng.normal(size=shape), 1.0
    )


@pytest.mark.parametrize("n_visits", [0, 1, 5])
def test_a_run_too_short_for_its_visits_to_be_counted_is_not_wrong(tmp_path, n_visits):
    """Some 500 independent samples, of which 0.07 should be in the state: fewer than 50 visits."""
    rng = np.random.default_rng(31)
    inside = np.zeros((40, 16), dtype=bool)
    inside[7, :n_visits] = True
    run = energies_and_slow_state(rng, tmp_path / "run", 40, inside)
    reference = reference_of_a_state(rng, 0.07)
    assert 300 < run.n_pieces < 50 / 0.075
    assert np.isnan(compare_with_reference(run, reference).phi_positive.z).all()
    verdict = run.summary(reference)["verdict"]
    assert (verdict["status"], verdict["wrong"]) == ("not yet", [])
    reason = "never visited" if not n_visits else f"{n_visits} independent visits, fewer than 50"
    assert any("P(phi > 0): " in line and reason in line for line in verdict["missing"])
    assert not any("standard errors" in line for line in verdict["warnings"])


@pytest.mark.parametrize(("p", "n"), [(0.02, 2000), (0.07, 400)])
def test_a_long_run_that_left_a_basin_early_and_never_came_back_is_wrong(tmp_path, p, n):
    rng = np.random.default_rng(32)
    inside = np.zeros((n, 16), dtype=bool)
    inside[:4, :2] = True  # two of 16 walkers started there
    run = energies_and_slow_state(rng, tmp_path / "run", n, inside)
    reference = reference_of_a_state(rng, p)
    assert (np.array(compare_with_reference(run, reference).phi_positive.z) < -5).all()
    verdict = run.summary(reference)["verdict"]
    assert verdict["status"] == "wrong"
    assert any("P(phi > 0) differs from the reference" in words for words in verdict["wrong"])


def test_few_visits_are_no_difference_by_mbar_either(tmp_path):
    rng = np.random.default_rng(33)
    inside = np.zeros((25, 16), dtype=bool)
    inside[7, 0] = True
    run = energies_and_slow_state(rng, tmp_path / "run", 25, inside)
    full = reference_of_a_state(rng, 0.07)
    reference = Reference(
        TEMPERATURES[:2] + 20.0,
        *(getattr(full, name)[..., :2] for name in ("phi", "psi", "energy")),
        1.0,
    )
    result = compare_with_reference(run, reference)
    assert result.by_mbar
    assert np.isnan(result.phi_positive.z).all()


def test_a_reference_that_never_visits_a_basin_of_the_run_disagrees(tmp_path):
    """Its bound rests on its independent samples, not on its number of walkers."""
    rng = np.random.default_rng(22)
    shape = (3000, 1, len(TEMPERATURES))
    phi, psi = angles_of_two_basins(rng, shape, p=0.0)
    reference = Reference(TEMPERATURES, phi, psi, rng.normal(size=shape), 1.0)
    compared = compare_with_reference(
        run_like_reference(rng, tmp_path / "run"), reference
    ).phi_positive
    assert (np.array(compared.z) > 5).all()
