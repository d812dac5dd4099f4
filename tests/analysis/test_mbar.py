"""MBAR against pymbar and exact answers; its errors by their spread."""

import json

import numpy as np
import openmm.unit as unit
import pymbar
import pytest

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.mbar import Mbar, solve_mbar
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.units import KB
from tests.support.analysis_runs import (
    BETAS,
    GAP,
    TEMPERATURES,
    WELL,
    energies_far_apart,
    phi_of,
    small_run,
    two_state_run,
)
from tests.support.fabricate import write_run


def test_mbar_equals_pymbar():
    """Independent samples: value and error agree with those of pymbar."""
    energy, states = two_state_run(np.random.default_rng(7), n=250, n_walkers=8, rho=0.0)
    beta = 1 / (KB * 350)
    f = solve_mbar(energy, BETAS)
    estimate = Mbar(energy, BETAS, f).reweight(beta).mean(states)
    flat, protocol = np.moveaxis(energy, 2, 0).ravel(), ({"method": "adaptive"},)
    pymbar_mbar = pymbar.MBAR(np.outer(BETAS, flat), np.full(3, 2000), solver_protocol=protocol)
    np.testing.assert_allclose(f, pymbar_mbar.f_k, atol=1e-7)
    inside = np.moveaxis(states, 2, 0).ravel().astype(float)
    with np.errstate(divide="ignore"):  # it takes the logarithm of an observable that is 0
        expected = pymbar_mbar.compute_expectations(inside, u_kn=(beta * flat)[None])
    assert estimate.value == pytest.approx(expected["mu"].item(), rel=1e-7)
    assert estimate.stderr_correlation == pytest.approx(expected["sigma"].item(), rel=0.1)


def test_mbar_on_many_samples_is_solved_on_all_of_them():
    energy, _ = two_state_run(np.random.default_rng(8), n=700, n_walkers=64, rho=0.0)
    f = solve_mbar(energy, BETAS)
    exact = np.log((1 + np.exp(-BETAS[0] * GAP)) / (1 + np.exp(-BETAS * GAP)))
    exact += 2.5 * np.log(BETAS / BETAS[0])
    np.testing.assert_allclose(f, exact, atol=0.02)
    memberships = Mbar(energy, BETAS, f).memberships
    np.testing.assert_allclose(memberships.sum(axis=(0, 1, 2)), 700 * 64, rtol=1e-9)


def test_free_energy_difference_is_exact_and_its_error_calibrated(tmp_path):
    """Correlated chains, at a rung and between rungs."""
    repeats, rng = 40, np.random.default_rng(9)
    temperatures = np.array([300.0, 350.0])
    z = np.empty((repeats, 2))
    for k in range(repeats):
        energy, states = two_state_run(rng, n=150, n_walkers=8, rho=0.7)
        path = write_run(tmp_path / str(k), TEMPERATURES, energy, {"phi": states - 0.5})
        run = load_run(path)
        value, stderr = np.transpose([run.free_energy_positive("phi", t) for t in temperatures])
        z[k] = (value - GAP / (KB * temperatures)) / stderr
    assert (abs(z.mean(axis=0)) < 4 / np.sqrt(repeats)).all()
    assert ((z.std(axis=0) > 0.6) & (z.std(axis=0) < 1.3)).all()


def test_free_energy_difference_from_frames(shared):
    run = load_run(shared[0])

    def positive(trajectory):
        return phi_of(trajectory) > 0

    value, stderr = run.free_energy_difference(positive, temperature=300)
    assert (value, stderr) == pytest.approx(run.free_energy_positive("phi", 300), rel=1e-9)
    assert abs(value - GAP * BETAS[0]) < 4 * stderr
    # More precise than the estimate of the single rung, which uses a third of the samples.
    assert stderr < run.positive("phi", 300).free_energy[1]
    at = run.free_energy_difference(positive, 350 * unit.kelvin)[0]
    assert run.free_energy_difference(positive, 600)[0] < at < value
    never = run.free_energy_difference(lambda t: np.zeros(len(t), dtype=bool), 300)
    assert never == pytest.approx((np.inf, np.nan), nan_ok=True)
    for error, words, indicator, kelvin in (
        (ValueError, r"expected 300\.00 to 600\.00 K, got 90 K: only", positive, 90),
        (TypeError, "truth values", phi_of, 300),
        (ValueError, "expected 240 values", lambda t: positive(t)[1:], 300),
    ):
        with pytest.raises(error, match=words):
            run.free_energy_difference(indicator, kelvin)


def test_one_walker_and_one_rung(tmp_path):
    small_run(tmp_path / "run", n=200, n_walkers=1, temperatures=[300.0])
    run = load_run(tmp_path / "run")
    value, stderr = run.free_energy_difference(lambda t: phi_of(t) > 0, 300)
    single = run.positive("phi", 300)
    assert value == pytest.approx(single.free_energy[0])
    assert stderr == pytest.approx(single.free_energy[1], rel=0.02)
    assert abs(value - GAP * BETAS[0]) < 4 * stderr
    assert run.round_trips().tolist() == [[0]]
    assert run.mixing_matrix().tolist() == [[1.0]]
    assert len(run.trajectory(300, walker=0)) == 200
    json.loads(json.dumps(run.summary(), allow_nan=False))


def test_mbar_of_rungs_that_do_not_overlap():
    """Each block of rungs is known from its samples; what lies between blocks is not."""
    kelvins = np.array([300.0, 303.0, 1200.0])
    energy = energies_far_apart(kelvins, modes=4000)
    mbar, near = Mbar(energy, 1 / (KB * kelvins)), Mbar(energy[..., :2], 1 / (KB * kelvins[:2]))
    for kelvin in (300.0, 301.5, 303.0):
        estimate = mbar.reweight(1 / (KB * kelvin)).mean(energy)
        same = near.reweight(1 / (KB * kelvin)).mean(energy[..., :2])
        assert estimate.pair == pytest.approx(same.pair, rel=1e-6)
    hot = mbar.reweight(1 / (KB * 1200.0)).mean(energy)
    assert hot.pair == pytest.approx(estimate_mean(energy[..., 2]).pair, rel=1e-6)
    # The temperature whose samples would lie where the two blocks have equal weights.
    betas = np.linspace(0.7, 1.3, 301) / (KB * np.sqrt(303.0 * 1200.0))
    weights = [mbar.reweight(beta).weights[..., 2].sum() for beta in betas]
    middle = betas[np.argmin(np.abs(np.array(weights) - 0.5))]
    between = mbar.reweight(middle).mean(energy)
    assert np.isfinite(between.value)
    assert np.isnan([between.stderr, between.n_independent]).all()


def test_independent_samples_of_mbar_estimates():
    """Variance/SE² at the target temperature; for one rung, that of its mean."""
    energy, _ = WELL.draw(np.random.default_rng(16), (200, 4), TEMPERATURES, rho=0.5)
    single = estimate_mean(energy[..., 0])
    alone = Mbar(energy[..., :1], BETAS[:1]).reweight(BETAS[0]).mean(energy[..., :1])
    assert alone.n_independent == pytest.approx(single.n_independent)
    assert single.n_independent == pytest.approx(energy[..., 0].var() / single.stderr**2)
    estimate = Mbar(energy, BETAS).reweight(BETAS[1]).mean(energy)
    assert estimate.n_samples == energy.size
    assert estimate.variance == pytest.approx(energy[..., 1].var(), rel=0.15)
    assert estimate.n_independent == pytest.approx(estimate.variance / estimate.stderr**2)


@pytest.mark.parametrize(
    "samples",
    [
        [((0, 0, 2), 1e12), ((5, 1, 0), 3e7), ((9, 3, 1), 2e9)],  # clashes, at every rung
        [((3, 2, 0), -1e9)],  # and the contrary
        [(np.s_[:60, :, 2], 1e8)],  # three quarters of the samples of a rung
    ],
)
def test_mbar_of_energies_far_from_all_others_equals_pymbar(samples):
    energy, _ = two_state_run(np.random.default_rng(11), n=80, n_walkers=4)
    for index, value in samples:
        energy[index] = value
    flat, protocol = np.moveaxis(energy, 2, 0).ravel(), ({"method": "adaptive"},)
    expected = pymbar.MBAR(np.outer(BETAS, flat), np.full(3, 320), solver_protocol=protocol).f_k
    np.testing.assert_allclose(solve_mbar(energy, BETAS), expected, rtol=0, atol=1e-7)


def test_a_run_with_a_clash_is_analysed(tmp_path):
    energy, phi, psi = small_run(tmp_path / "small")
    energy[4, 1, 2] = 1e10
    write_run(tmp_path / "run", TEMPERATURES, energy, {"phi": phi, "psi": psi})
    run, without = (load_run(tmp_path / name, start=0) for name in ("run", "small"))
    assert run.free_energy_positive("phi", 300) == pytest.approx(
        without.free_energy_positive("phi", 300), rel=0.02
    )
    json.loads(json.dumps(run.summary(), allow_nan=False))
    run.plot(tmp_path / "plot.png")
    run.plot_thermodynamics(tmp_path / "thermodynamics.png")


def test_mbar_of_one_sample_and_of_equal_energies():
    np.testing.assert_allclose(solve_mbar(np.array([[[-5.0, 20.0, 90.0]]]), BETAS)[0], 0.0)
    np.testing.assert_allclose(solve_mbar(np.full((5, 2, 3), 1e8), BETAS), 1e8 * (BETAS - BETAS[0]))


@pytest.mark.parametrize("rung", [0, 1, 2])
def test_mbar_of_a_rung_that_holds_clashes_only(rung):
    """As in the first samples of a poor flow: the equations of MBAR are still solved."""
    energy, _ = two_state_run(np.random.default_rng(12), n=50, n_walkers=4)
    energy[..., rung] = 1e7 + np.random.default_rng(13).normal(size=(50, 4))
    memberships = Mbar(energy, BETAS).memberships
    np.testing.assert_allclose(memberships.sum(axis=(0, 1, 2)), 200.0, rtol=1e-9)
