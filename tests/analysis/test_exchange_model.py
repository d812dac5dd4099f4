"""The model of replicas that pass in and out of a state, beside simulations of it."""

import numpy as np
import pytest

from openmm_tsf.analysis.exchange_model import (
    Passages,
    populations,
    simulate_swaps,
    state_inefficiency,
)
from openmm_tsf.analysis.ladder import round_trip_rate
from openmm_tsf.analysis.mixing import round_trips
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.units import KB

LADDER = np.array([300.0, 424.0, 600.0])
BETAS = 1 / (KB * LADDER)
REJECTIONS = np.array([0.5, 0.3])
GAP, BARRIER = 6.0, 20.0  # kJ/mol


def arrhenius(betas, out_at_600=0.02):
    """Rates in and out [R, 2] of a state that lies GAP above, P = 0.1 at 600 K."""
    x = np.asarray(betas) - BETAS[-1]
    out = out_at_600 * np.exp(-BARRIER * x)
    return np.stack([out * np.exp(-GAP * x) / 9, out], axis=1)


RATES = arrhenius(BETAS)


def simulate(rng, n, n_walkers, rates=RATES, rejections=REJECTIONS):
    """Truth values and replicas [n, W, R] of replica exchange: passages, then swaps.

    A swap between a replica inside and one outside is accepted less often, by detailed balance.
    """
    n_rungs, p = len(rates), populations(rates)
    inside = rng.random((n_walkers, n_rungs)) < p
    replica = np.tile(np.arange(n_rungs), (n_walkers, 1))
    odds = p / (1 - p)
    truth = np.empty((n, n_walkers, n_rungs), dtype=bool)
    labels = np.empty((n, n_walkers, n_rungs), dtype=int)
    for t in range(n):
        rate = np.where(inside, rates[:, 1], rates[:, 0])
        inside = inside ^ (rng.random(inside.shape) < rate)
        for k in range(t % 2, n_rungs - 1, 2):
            a, b = inside[:, k], inside[:, k + 1]
            ratio = (odds[k] / odds[k + 1]) ** (b.astype(int) - a)
            accepted = rng.random(n_walkers) < (1 - rejections[k]) * np.minimum(1, ratio)
            for array in (inside, replica):
                low, high = array[:, k].copy(), array[:, k + 1].copy()
                array[:, k] = np.where(accepted, high, low)
                array[:, k + 1] = np.where(accepted, low, high)
        truth[t], labels[t] = inside, replica
    return truth, labels


@pytest.fixture(scope="module")
def simulated():
    return simulate(np.random.default_rng(1), 4000, 256)


def test_the_inefficiency_is_that_of_the_simulation(simulated):
    truth, _ = simulated
    for rung in (0, 2):
        estimate = estimate_mean(truth[:, :, rung])
        predicted = state_inefficiency(RATES, REJECTIONS, rung=rung)
        assert predicted == pytest.approx(estimate.g, rel=0.15)
        spread = estimate.n_samples * estimate.stderr_groups**2 / estimate.variance
        assert predicted == pytest.approx(spread, rel=0.4)  # 4 standard errors of 256 walkers


def test_slower_swaps_and_no_swaps():
    alone = state_inefficiency(RATES[:1], [])
    k = RATES[0].sum()
    assert alone == pytest.approx(2 / k - 1)
    fast, slow, slowest = (state_inefficiency(RATES, REJECTIONS, m) for m in (1.0, 0.1, 1e-9))
    assert fast < slow < slowest
    assert slowest == pytest.approx(alone, rel=1e-3)
    assert state_inefficiency(RATES, [1.0, 1.0]) == pytest.approx(alone)


def test_rates_of_counted_passages(simulated):
    passages = Passages.count(*simulated, BETAS)
    difference = passages.energy_difference()
    assert difference == pytest.approx(GAP, abs=1.0)
    fitted = passages.rates(BETAS, difference)
    np.testing.assert_allclose(np.log(fitted), np.log(RATES), atol=0.25)
    np.testing.assert_allclose(populations(fitted)[0], populations(RATES)[0], rtol=0.2)


def test_hot_passages_tell_the_rates_of_a_cold_ladder():
    """Passages at temperatures above the ladder, extrapolated."""
    rng = np.random.default_rng(2)
    hot_kelvin = np.array([750.0, 960.0])
    hot_betas = 1 / (KB * hot_kelvin)
    truth, _ = simulate(rng, 2000, 64, arrhenius(hot_betas), np.array([1.0]))
    still = np.broadcast_to(np.arange(2), truth.shape)
    fitted = Passages.count(truth, still, hot_betas).rates(BETAS, GAP)
    np.testing.assert_allclose(np.log(fitted), np.log(RATES), atol=0.7)
    np.testing.assert_allclose(populations(fitted), populations(RATES), rtol=0.25)


def test_recrossings_are_no_passages():
    inside = np.zeros((100, 1, 1), dtype=bool)
    inside[20:22] = inside[40:80] = True
    inside[50:52] = False
    still = np.zeros(inside.shape, dtype=int)
    assert Passages.count(inside, still, [1.0], shortest=5).counts.tolist() == [[1.0, 1.0]]
    assert Passages.count(inside, still, [1.0]).counts.tolist() == [[3.0, 3.0]]
    assert Passages.count(inside, still, [1.0]).exposure.tolist() == [[59.0, 40.0]]


def test_a_replica_is_followed_over_rungs():
    # Replica 1, inside, walks from rung 1 to rung 0 and leaves the state there.
    replica = np.array([[[0, 1]], [[1, 0]], [[1, 0]]])
    inside = np.array([[[False, True]], [[True, False]], [[False, False]]])
    counts = Passages.count(inside, replica, [2.0, 1.0]).counts
    assert counts.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_without_a_passage_half_of_one_is_taken():
    still = np.zeros((1000, 1, 1), dtype=int)
    rates = Passages.count(still.astype(bool), still, [0.4]).rates([0.4], 0.0)
    assert rates[0, 0] == pytest.approx(0.5 / 999)


def test_simulated_swaps_make_the_round_trips_of_the_formula():
    rejections = [0.4, 0.5, 0.6]
    labels = simulate_swaps(rejections, 4000, 16, seed=3)
    measured = round_trips(labels).sum() / (4000 * 16)
    assert measured == pytest.approx(round_trip_rate(rejections), rel=0.05)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"inside: expected truth values \[n, W, R\]"):
        Passages.count(np.zeros((3, 1, 1)), np.zeros((3, 1, 1), dtype=int), [1.0])
    with pytest.raises(ValueError, match="rates, rejections: expected"):
        state_inefficiency(RATES, [0.5])
