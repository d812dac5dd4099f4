from dataclasses import astuple
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from openmm_tsf.analysis import statistics as st
from openmm_tsf.analysis.mixing import mixing_matrix, relaxation, round_trips, split_r_hat
from tests.support.fabricate import two_state_chains


def test_n_eff_and_logit():
    assert st.n_eff(0.2, 0.04) == pytest.approx(100.0)
    assert st.n_eff(0.0, 0.0) == 0.0
    assert st.n_eff(0.2, np.nan) == 0.0
    exact = np.log(49.0), 0.002 / (0.02 * 0.98)
    assert st.logit_free_energy(0.02, 0.002) == pytest.approx(exact)
    assert st.logit_free_energy(0.0, np.nan)[0] == np.inf
    assert st.logit_free_energy(1.0, 0.1)[0] == -np.inf
    assert np.isnan(st.logit_free_energy(0.0, 0.1)[1])


def test_ess_of_a_shifted_gaussian():
    """q = N(0, 1), p = N(a, 1): both sizes are exp(-a²), whatever the constant."""
    rng, shift, repeats = np.random.default_rng(1), 0.7, 100

    def log_weights(x):
        return shift * x + 3.0

    reverse = [st.reverse_ess(log_weights(rng.normal(size=2000))) for _ in range(repeats)]
    forward = [st.forward_ess(log_weights(rng.normal(size=2000) + shift)) for _ in range(repeats)]
    for estimates in (reverse, forward):
        values = np.array([e.fraction for e in estimates])
        # The estimators are ratios: a bias of order 1/N comes with the statistical error.
        tolerance = 4 * values.std(ddof=1) / np.sqrt(repeats) + 5 / 2000
        assert abs(values.mean() - np.exp(-(shift**2))) < tolerance


def test_ess_limits_and_errors():
    even = st.reverse_ess(np.full(10, -1e5))
    assert (even.fraction, even.largest_weight, even.n_samples) == pytest.approx((1.0, 0.1, 10))
    one = st.reverse_ess([0.0, -np.inf, -np.inf, -np.inf])
    assert (one.fraction, one.largest_weight) == (pytest.approx(0.25), 1.0)
    assert st.forward_ess([5.0, 5.0]).fraction == pytest.approx(1.0)


def test_log_mean_weight_and_its_error():
    """Lognormal weights have E[w] = exp(μ + σ²/2): z is standard normal over repeated samples."""
    rng, mu, sigma = np.random.default_rng(2), -3.0, 0.5
    pairs = [st.log_mean_weight(rng.normal(mu, sigma, 500)) for _ in range(400)]
    z = np.array([(value - mu - sigma**2 / 2) / stderr for value, stderr in pairs])
    assert abs(z.mean()) < 4 / np.sqrt(400) + 0.03  # half of the error is the bias of ln
    assert 1 - 4 / np.sqrt(800) < z.std() < 1 + 4 / np.sqrt(800)
    value, stderr = st.log_mean_weight([1e4, -np.inf])
    assert (value, stderr) == (pytest.approx(1e4 - np.log(2.0)), pytest.approx(1.0))
    assert np.isnan(st.log_mean_weight([2.0])[1])


def test_forward_ess_sees_a_dropped_mode():
    """The model covers half of the target: reverse samples cannot know, forward samples do."""
    assert st.reverse_ess(np.zeros(1000)).fraction == pytest.approx(1.0)
    assert st.forward_ess(np.r_[np.zeros(500), np.full(500, 12.0)]).fraction < 1e-4


def test_torus_histogram_is_periodic_and_normalised():
    phi = np.array([-np.pi, np.pi, 3 * np.pi, 0.01])
    psi = np.array([0.01, 0.01, 0.01, -0.01])
    p = st.torus_histogram(phi, psi, bins=4)
    assert p.sum() == pytest.approx(1.0)
    assert p[0, 2] == pytest.approx(0.75)
    assert p[2, 1] == pytest.approx(0.25)
    assert st.torus_histogram(phi, psi, 4, weights=[0, 0, 0, 2.0])[2, 1] == pytest.approx(1.0)
    just_below = np.nextafter(-np.pi, -4.0)
    assert st.torus_histogram([just_below], [0.01], 4).sum() == 1.0


def test_distances():
    p, q = np.array([[0.5, 0.5], [0.0, 0.0]]), np.array([[0.25, 0.5], [0.25, 0.0]])
    assert st.total_variation(p, p) == 0.0
    assert st.total_variation(p, q) == pytest.approx(0.25)
    assert st.total_variation([1.0, 0.0], [0.0, 1.0]) == 1.0
    assert st.kl_divergence(p, q) == pytest.approx(0.5 * np.log(2.0), abs=1e-8)
    expected = -0.25 * np.log(2.0) + 0.25 * np.log(0.25 / 1e-10)
    assert st.kl_divergence(q, p) == pytest.approx(expected, abs=1e-7)


def test_error_of_the_effective_sample_size():
    """Against the exact exp(-a²), and against the spread of the estimates."""
    rng, shift, repeats = np.random.default_rng(21), 0.5, 200
    logs = [shift * rng.normal(size=4000) for _ in range(repeats)]
    exact = np.exp(-(shift**2))
    z = [(st.reverse_ess(v).fraction - exact) / st.reverse_ess_stderr(v) for v in logs]
    assert abs(np.mean(z)) < 4 / np.sqrt(repeats)
    assert 0.8 < np.std(z) < 1.2
    assert np.isnan(st.reverse_ess_stderr([1.0]))
    assert st.reverse_ess_stderr([1.0, 1.0]) == 0.0


def test_weighted_mean_against_an_exact_answer():
    rng, repeats = np.random.default_rng(2), 300
    z = []
    for _ in range(repeats):
        x = rng.normal(size=500)
        mean, stderr = st.weighted_mean(x, 0.4 * x - 7.0)  # exact: 0.4
        z.append((mean - 0.4) / stderr)
    assert abs(np.mean(z)) < 4 / np.sqrt(repeats)
    assert 0.85 < np.std(z) < 1.15


def test_between_walker_stderr():
    series = np.array([[0.0, 2.0, 4.0], [2.0, 4.0, 6.0]])
    assert st.between_walker_stderr(series) == pytest.approx(2.0 / np.sqrt(3))
    assert np.isnan(st.between_walker_stderr(series[:, :1]))


def test_group_means():
    series = np.arange(14.0).reshape(7, 2)
    np.testing.assert_allclose(st.group_means(series, 2), [6.0, 7.0])
    # Three blocks of two iterations each; the first iteration is left over.
    np.testing.assert_allclose(st.group_means(series, 6), [3, 4, 7, 8, 11, 12])
    assert len(st.group_means(series, 1000)) == 14
    assert st.group_means(series[..., None], 6).shape == (6, 1)


@pytest.mark.parametrize(("n", "n_walkers", "rho"), [(400, 5, 0.7), (300, 1, 0.0), (57, 3, 0.99)])
def test_statistical_inefficiency_is_pymbars(n, n_walkers, rho):
    from pymbar.timeseries import statistical_inefficiency_multiple

    series = two_state_chains(np.random.default_rng(3), (n, n_walkers), 0.3, rho).astype(float)
    assert np.ptp(series) > 0
    expected = min(statistical_inefficiency_multiple(list(series.T)), n)
    assert st.statistical_inefficiency(series) == pytest.approx(expected, rel=1e-9)


def test_statistical_inefficiency_against_an_exact_answer():
    rho, repeats = 0.8, 60
    rng = np.random.default_rng(4)
    chains = [two_state_chains(rng, (2000, 8), 0.2, rho) for _ in range(repeats)]
    values = [st.statistical_inefficiency(chain) for chain in chains]
    # Cutting the sum at the first zero biases it a little; at this length by less than 3 %.
    exact = (1 + rho) / (1 - rho)
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / np.sqrt(repeats) + 0.03 * exact


def test_statistical_inefficiency_limits():
    assert np.isnan(st.statistical_inefficiency(np.ones((10, 3))))
    stuck = np.broadcast_to(np.array([0.0, 1.0]), (500, 2))
    assert st.statistical_inefficiency(stuck) == pytest.approx(500, rel=0.01)
    assert st.statistical_inefficiency([[0.0, 1.0]]) == 1.0
    assert st.statistical_inefficiency([[0.0], [1.0]]) == 1.0


def test_round_trips_by_hand():
    rung_of = np.array(
        [
            [0, 1, 2],  # replica 0 starts at the bottom, replica 2 at the top
            [1, 0, 2],
            [2, 0, 1],  # 0 has reached the top
            [1, 2, 0],  # 2 has come down from the top, but had never been at the bottom
            [0, 2, 1],  # 0 is back: one trip
            [2, 0, 1],  # 1 went bottom, top, bottom: one trip
            [0, 1, 2],  # 0 once more; 2 is at the top again
            [1, 2, 0],  # 2: one trip
        ]
    )
    replica = np.argsort(rung_of, axis=1)[:, None, :]
    assert round_trips(replica).tolist() == [[2, 1, 1]]
    both = np.concatenate([replica, np.broadcast_to(np.arange(3), replica.shape)], axis=1)
    assert round_trips(both).tolist() == [[2, 1, 1], [0, 0, 0]]
    assert round_trips(np.zeros((5, 2, 1), dtype=int)).tolist() == [[0], [0]]
    assert round_trips(np.zeros((0, 2, 3), dtype=int)).tolist() == [[0, 0, 0]] * 2


def test_mixing_matrix_by_hand():
    replica = np.array([[0, 1], [1, 0], [1, 0], [1, 0], [0, 1]])[:, None, :]
    np.testing.assert_allclose(mixing_matrix(replica), [[0.5, 0.5], [0.5, 0.5]])
    three = np.array([[0, 1, 2], [1, 0, 2], [1, 2, 0]])[:, None, :]
    # Replica 0: 0 → 1 → 2; replica 1: 1 → 0 → 0; replica 2: 2 → 2 → 1.
    expected = [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]
    np.testing.assert_allclose(mixing_matrix(three), expected)
    assert np.isnan(mixing_matrix(replica[:1])).all()


WRONG = [
    *((st.reverse_ess, (bad,), "log_weights") for bad in ([], [np.nan], [np.inf, 0.0], [-np.inf])),
    (st.reverse_ess, ([-np.inf, -np.inf],), "log_weights"),
    (st.forward_ess, ([0.0, -np.inf],), "density zero"),
    (st.logit_free_energy, (1.5, 0.1), r"\[0, 1\]"),
    (st.torus_histogram, (np.zeros(4), np.zeros(2)), "equally many"),
    (st.total_variation, ([[0.5, 0.5]], [0.5, 0.5]), "equal shapes"),
    (st.kl_divergence, ([0.5, 0.5], [1.0, 1.0]), "sum to one"),
    (st.weighted_mean, ([1.0], [0.0, 0.0]), "values"),
    (st.between_walker_stderr, (np.zeros(3),), "series"),
    (st.statistical_inefficiency, ([[np.nan, 1.0]],), "finite"),
    (st.statistical_inefficiency, (np.zeros((0, 2)),), "non-empty"),
    (round_trips, (np.zeros((3, 2), dtype=int),), "replica: expected integers"),
    (round_trips, (np.zeros((3, 1, 2)),), "replica: expected integers"),
    (round_trips, (np.zeros((3, 1, 2), dtype=int),), "replica: expected a permutation"),
    (relaxation, (np.zeros((2, 3)),), "matrix: expected shape"),
    (relaxation, ([[0.5, 0.1], [0.1, 0.5]],), "sum to one"),
    (split_r_hat, ([[np.nan, 1.0]],), "finite"),
    (split_r_hat, (np.zeros(3),), "non-empty"),
]


@pytest.mark.parametrize(("function", "arguments", "words"), WRONG)
def test_wrong_arguments_are_refused(function, arguments, words):
    with pytest.raises(ValueError, match=words):
        function(*arguments)


def neighbour_swaps(rng, n, n_walkers, n_rungs, accepted):
    """Labels [n, W, R]: each iteration one random neighbouring pair, swapped with a probability.

    One replica's walk has the matrix 1 - accepted/(R-1) L with L the Laplacian of a path.
    """
    labels = np.tile(np.arange(n_rungs), (n, n_walkers, 1))
    walkers = np.arange(n_walkers)
    for before, now in pairwise(labels):
        pair = rng.integers(0, n_rungs - 1, n_walkers)
        swapped = rng.random(n_walkers) < accepted
        now[:] = before
        now[walkers, pair] = before[walkers, pair + swapped]
        now[walkers, pair + 1] = before[walkers, pair + 1 - swapped]
    return labels


@pytest.mark.parametrize(("n_rungs", "accepted"), [(2, 0.3), (3, 0.5), (5, 0.8)])
def test_relaxation_against_an_exact_answer(n_rungs, accepted):
    exact = 1 - accepted / (n_rungs - 1) * 2 * (1 - np.cos(np.pi / n_rungs))
    rng = np.random.default_rng(22)
    labels = [neighbour_swaps(rng, 400, 20, n_rungs, accepted) for _ in range(12)]
    values = np.array([relaxation(mixing_matrix(each)).second_eigenvalue for each in labels])
    assert abs(values.mean() - exact) < 4 * values.std(ddof=1) / np.sqrt(12) + 1e-3


def test_relaxation_limits():
    walk = [[0.9, 0.1], [0.1, 0.9]]
    assert astuple(relaxation(walk)) == pytest.approx((0.8, 5.0))
    assert astuple(relaxation(np.eye(3))) == (1.0, np.inf)
    for nothing in ([[1.0]], np.full((3, 3), np.nan)):
        assert np.isnan(astuple(relaxation(nothing))).all()
    # One way round: the symmetrised matrix still has uniform stationary probabilities.
    assert relaxation(np.roll(np.eye(3), 1, axis=1)).second_eigenvalue == pytest.approx(-0.5)


def test_split_r_hat_by_hand():
    """Four halves of a truth value: the classic formula, since scores of two values are affine."""
    series = np.array([[0, 1, 0, 0, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 0]], dtype=bool).T
    halves = np.concatenate([series[:4], series[4:]], axis=1).astype(float)
    within, between = halves.var(axis=0, ddof=1).mean(), 4 * halves.mean(axis=0).var(ddof=1)
    expected = np.sqrt((3 / 4 * within + between / 4) / within)
    assert split_r_hat(series) == pytest.approx(expected)
    assert split_r_hat(series[::-1]) == pytest.approx(expected)


def test_split_r_hat_sees_what_it_should():
    rng = np.random.default_rng(23)
    same = rng.normal(size=(2000, 8))
    # Ranks: any monotone map leaves the part of the values as it is, heavy tails included.
    for values in (same, np.exp(3 * same), rng.standard_cauchy((2000, 8))):
        assert split_r_hat(values) == pytest.approx(1.0, abs=0.005)
    shift, n = np.array([0.0, 1.0]), 100_000
    pair = rng.normal(size=(n, 2)) + shift
    # Normal with a common variance 1 and means apart by 1; scores of nearly normal values.
    exact = np.sqrt(1 + np.var([0, 0, 1, 1], ddof=1))
    assert split_r_hat(pair) == pytest.approx(exact, rel=0.02)
    assert split_r_hat(same * np.where(np.arange(8) < 4, 1.0, 3.0)) > 1.1  # folded
    assert split_r_hat(same + np.linspace(0, 3, 2000)[:, None]) > 1.1  # a common drift: split
    assert split_r_hat(np.broadcast_to([0.0, 1.0], (100, 2))) == np.inf
    assert np.isnan(split_r_hat(np.ones((50, 3))))
    assert np.isnan(split_r_hat(same[:3]))
    assert split_r_hat(same[:, :1]) == pytest.approx(1.0, abs=0.02)


def test_students_deviates_as_normal_ones():
    for t in (-3.0, 0.5, 5.0):
        assert st.as_normal(t, 1e9) == pytest.approx(t)
        assert stats.norm.sf(st.as_normal(t, 4.0)) == pytest.approx(stats.t.sf(t, 4.0))
    assert 37 < st.as_normal(1e9, 200.0) < 38
    assert st.as_normal(-np.inf, 3.0) == -st.as_normal(np.inf, 3.0)
