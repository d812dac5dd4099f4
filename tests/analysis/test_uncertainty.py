"""Means of correlated series: errors against exact answers."""

import numpy as np
import pytest

from openmm_tsf.analysis.uncertainty import covariance_of_means, estimate_mean
from tests.support.fabricate import two_state_chains


@pytest.mark.parametrize(("n", "n_walkers"), [(600, 12), (1500, 2), (3000, 1)])
def test_standard_error_is_calibrated(n, n_walkers):
    p, rho, repeats = 0.2, 0.8, 150
    rng = np.random.default_rng(5)
    chains = two_state_chains(rng, (n, n_walkers, repeats), p, rho)
    estimates = [estimate_mean(chains[:, :, k]) for k in range(repeats)]
    z = np.array([(e.value - p) / e.stderr for e in estimates])
    assert abs(z.mean()) < 4 / np.sqrt(repeats)
    # The larger of two errors: a little too large on average, never much too small.
    assert 0.7 < z.std() < 1.15
    exact = np.sqrt(p * (1 - p) * (1 + rho) / (1 - rho) / (n * n_walkers))
    assert np.median([e.stderr for e in estimates]) == pytest.approx(exact, rel=0.3)


def test_a_state_never_visited_has_no_known_error():
    never, single = estimate_mean(np.zeros((100, 4), dtype=bool)), estimate_mean([[3.0]])
    assert (never.value, never.n_eff, single.value) == (0.0, 0.0, 3.0)
    assert np.isnan([never.stderr, single.stderr]).all()  # NaN cannot pass a z test


def test_walkers_that_never_move_count_once_each():
    estimate = estimate_mean(np.broadcast_to(np.arange(10) % 2 == 0, (400, 10)))
    assert estimate.stderr == pytest.approx(0.5 / 3, rel=0.02)
    assert 8 < estimate.n_eff < 10


def test_few_samples():
    assert np.isfinite(estimate_mean([[0.0, 1.0, 1.0]]).stderr)
    assert np.isfinite(estimate_mean([[0.0], [1.0]]).stderr)


def test_covariance_of_means():
    rng, repeats, n = np.random.default_rng(6), 400, 50
    common = rng.normal(size=(repeats, n, 30, 1))
    series = 0.8 * common + 0.6 * rng.normal(size=(repeats, n, 30, 2))
    error = 1 / np.sqrt(n * 30)
    mean = np.mean([covariance_of_means(s, [error, error]) for s in series], axis=0)
    exact = error**2 * np.array([[1, 0.64], [0.64, 1]])
    np.testing.assert_allclose(mean, exact, rtol=0.05)
    assert np.isnan(covariance_of_means(np.zeros((9, 9, 2)), [error, error])).all()
