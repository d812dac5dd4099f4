"""The start of equilibrated sampling: planted drifts are found, stationary runs lose nothing."""

import numpy as np
import pytest
from scipy.signal import lfilter

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.burn_in import MIN_ITERATIONS, BurnIn, find_start
from openmm_tsf.analysis.plots.diagnostics import plot_diagnostics
from openmm_tsf.analysis.plots.style import extent
from tests.support.analysis_runs import TEMPERATURES, make_reference, phi_of, two_state_run
from tests.support.fabricate import chain_positions, two_state_chains, write_run


def autoregressive(rng, n, n_walkers, rho):
    """Stationary AR(1) [n, W] of unit variance: g = (1 + rho) / (1 - rho)."""
    noise = rng.normal(size=(n, n_walkers)) * np.sqrt(1 - rho**2)
    noise[0] /= np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], noise, axis=0)


def stationary_series(rng, n, n_walkers, rho):
    """What a run records: energies, and dihedrals with rare states."""
    states = [two_state_chains(rng, (n, n_walkers), p, rho) for p in (0.3, 0.02, 0.002)]
    return [autoregressive(rng, n, n_walkers, rho) for _ in range(3)] + states


@pytest.mark.parametrize(("n", "n_walkers"), [(200, 1), (300, 3), (100, 16)])
@pytest.mark.parametrize("rho", [0.0, 0.8, 0.97])
def test_a_stationary_run_loses_nothing(n, n_walkers, rho):
    rng = np.random.default_rng(1)
    starts = [find_start(stationary_series(rng, n, n_walkers, rho)).start for _ in range(25)]
    assert np.count_nonzero(starts) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("n", "n_walkers"), [(200, 4), (1000, 2), (400, 16), (600, 64)])
@pytest.mark.parametrize("rho", [0.0, 0.8, 0.95, 0.99, 0.998])
def test_false_positives_are_rare(n, n_walkers, rho):
    """Below 2 in 100, also where walkers are shorter than their correlation time."""
    rng = np.random.default_rng(2)
    starts = [find_start(stationary_series(rng, n, n_walkers, rho)).start for _ in range(150)]
    assert np.count_nonzero(starts) <= 7  # of Poisson's distribution of mean 3: one in 100


@pytest.mark.parametrize(
    ("n", "n_walkers", "rho", "amplitude", "tau"),
    [
        (1000, 64, 0.8, 1.0, 30),
        (400, 16, 0.0, 3.0, 10),
        (2000, 2, 0.0, 2.0, 50),
        (60, 8, 0.0, 4, 4),
    ],
)
def test_a_planted_drift_is_left_out(n, n_walkers, rho, amplitude, tau):
    """Its bias, several standard errors, becomes less than a half; most of the run is kept."""
    rng = np.random.default_rng(3)
    transient = amplitude * np.exp(-np.arange(n) / tau)
    error = np.sqrt((1 + rho) / (1 - rho) / n_walkers / n)
    assert transient.mean() > 2 * error
    left = []
    for _ in range(5):
        series = stationary_series(rng, n, n_walkers, rho)
        series[1] = series[1] - transient[:, None]
        found = find_start(series)
        assert found.is_equilibrated
        assert tau / 2 < found.start < 10 * tau
        assert found.drift.series == 1
        assert found.drift.z < -4
        assert found.drift.p_value < 0.01
        left.append(transient[found.start :].mean())
    assert np.mean(left) < 0.5 * error


def test_a_state_that_empties_is_found():
    """All walkers start in a state that holds a tenth: its population is what drifts."""
    rng = np.random.default_rng(4)
    states = two_state_chains(rng, (400, 32), 0.1, 0.9)
    inside = states | (rng.geometric(1 / 15, size=32) > np.arange(400)[:, None])
    found = find_start([rng.normal(size=(400, 32)), inside])
    assert found.is_equilibrated
    assert 30 < found.start < 150


def test_a_run_that_drifts_to_its_end_is_not_equilibrated():
    noise = np.random.default_rng(5).normal(size=(300, 16))
    found = find_start([noise + np.linspace(0, 2, 300)[:, None]])
    assert (found.start, found.is_equilibrated) == (150, False)


def test_degenerate_series():
    assert find_start([]).start == 0
    constant = np.ones((100, 8))
    assert find_start([0.1 * constant]) == BurnIn(0, 100)
    step = np.where(np.arange(100) < 10, 2.0, 1.0)[:, None] * constant
    assert find_start([step]).start == 10
    steep = np.linspace(9, 0, MIN_ITERATIONS - 1)[:, None] * np.ones(8)
    assert find_start([steep]).start == 0  # too short to tell
    with pytest.raises(ValueError, match="series: expected arrays of one shape"):
        find_start([constant, constant[1:]])
    with pytest.raises(ValueError, match="series: expected finite values"):
        find_start([constant * np.nan])


@pytest.mark.parametrize("energy", [1e4, 1e10])
def test_a_clash_at_the_start_is_left_out_and_no_more_than_a_quarter(energy):
    series = np.random.default_rng(0).normal(size=(60, 4))
    series[4, 1] += energy
    found = find_start([series])
    assert found.start in range(0 if energy < 1e5 else 5, 16)
    assert found.is_equilibrated


N_BAD = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A good run, and the same with a bad start before it."""
    folder, rng = tmp_path_factory.mktemp("burn_in"), np.random.default_rng(6)
    energy, states = two_state_run(rng, n=60 + N_BAD, n_walkers=8)
    energy[:N_BAD] += 60.0
    states[:N_BAD] = True
    phi = np.where(states, 1.0, -1.0) + 0.2 * rng.normal(size=states.shape)
    psi, replica = (
        rng.uniform(-3, 3, states.shape),
        rng.permuted(np.broadcast_to(np.arange(3), states.shape), axis=2),
    )
    for name, first in (("bad", 0), ("good", N_BAD)):
        angles = {"phi": phi[first:], "psi": psi[first:]}
        parts = energy[first:], angles, replica[first:], chain_positions(phi[first:])
        write_run(folder / name, TEMPERATURES, *parts)
    return folder


def test_every_output_leaves_out_a_bad_start(runs, tmp_path):
    bad = load_run(runs / "bad")
    assert N_BAD <= bad.start <= N_BAD + 10
    assert bad.burn_in.is_equilibrated
    good = load_run(runs / "good", start=bad.start - N_BAD)
    reference = make_reference(np.random.default_rng(7), n=400)
    assert bad.n_used == good.n_used == len(bad.energy)
    for name in ("energy", "dihedrals", "replica"):
        np.testing.assert_array_equal(getattr(bad, name), getattr(good, name))
    np.testing.assert_array_equal(bad.iteration, good.iteration + N_BAD)
    for a, b in zip(
        bad.u_kn() + bad.ramachandran(300), good.u_kn() + good.ramachandran(300), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for options in ({}, {"walker": 3, "stride": 7}):
        a, b = (run.trajectory(300, **options) for run in (bad, good))
        np.testing.assert_array_equal(a.xyz, b.xyz)
        np.testing.assert_array_equal(a.time, b.time + N_BAD)
    assert bad.thermodynamics().rows() == good.thermodynamics().rows()
    assert np.array_equal(bad.profile("phi", 300).probability, good.profile("phi", 300).probability)
    pairs = [run.free_energy_difference(lambda t: phi_of(t) > 0, 350) for run in (bad, good)]
    assert pairs[0] == pairs[1]
    a, b = (run.summary(reference) for run in (bad, good))
    others = {
        "n_iterations", "burn_in", "energy_evaluations", "wall_seconds", "production",
        "round_trips", "mixing_matrix", "replica_relaxation", "rejected_non_finite",
        "mirror_images", "efficiency", "acceptance",
    }  # fmt: skip
    assert {"monitor", "comparison", "ensemble_check", "energy_kJ_mol"} <= a.keys() - others
    # The iterations and the wall time that are still needed count those of the start.
    predicted = [summary["verdict"].pop("predicted") for summary in (a, b)]
    assert predicted[0]["n_iterations"] == predicted[1]["n_iterations"] + N_BAD
    for key in a.keys() - others:
        if key != "monitor":
            assert a[key] == b[key], key
    assert a["monitor"]["basins"] == b["monitor"]["basins"]
    # Costs and exchange of replicas are those of all iterations.
    assert a["n_iterations"] == 60 + N_BAD
    assert a["production"]["energy_evaluations"] == 100 * (60 + N_BAD)
    np.testing.assert_array_equal(
        bad.mixing_matrix(), load_run(runs / "bad", start=0).mixing_matrix()
    )
    # Without the rule the numbers are wrong.
    kept = load_run(runs / "bad", start=0)
    assert kept.mean_energy(300).value > good.mean_energy(300).value + 8
    assert f"without the first {bad.start}" in extent(bad)
    assert "without" not in extent(kept)
    plot_diagnostics(bad, tmp_path / "diagnostics.png")


def test_the_summary_says_what_is_left_out(runs):
    said = load_run(runs / "bad").summary()["burn_in"]
    assert (said["chosen"], said["is_equilibrated"]) == ("found", True)
    assert said["start"] + said["n_used"] == 60 + N_BAD
    assert said["drift"]["series"].startswith(("U at", "cos phi", "sin phi"))
    assert load_run(runs / "good").summary()["burn_in"]["start"] == 0
    given = load_run(runs / "bad", start=5).summary()["burn_in"]
    assert (given["start"], given["n_used"], given["chosen"]) == (5, 55 + N_BAD, "given")


@pytest.mark.parametrize("start", [-1, 60, 1.5, "3"])
def test_a_start_must_lie_within_the_run(runs, start):
    with pytest.raises((ValueError, TypeError), match="start: expected an integer"):
        load_run(runs / "good", start=start)
