"""Assessments: what is called converged, and numbers that agree with each other."""

import json

import numpy as np
import pytest
from scipy.stats import binom

from openmm_tsf.analysis.convergence import (
    assess_mean,
    assess_probability,
    assess_variance,
    clopper_pearson,
    count_pieces,
    count_visits,
)
from openmm_tsf.analysis.mixing import drift_between_halves, split_r_hat
from tests.support.correlated import autoregressive
from tests.support.fabricate import two_state_chains


def one_visit(n, n_walkers, first, length):
    """A state that the first walker visits once."""
    inside = np.zeros((n, n_walkers), dtype=bool)
    inside[first : first + length, 0] = True
    return inside


def test_numbers_agree_with_each_other():
    rng = np.random.default_rng(1)
    series = 3.0 + 2.0 * autoregressive(rng, (800, 32), 0.6)
    for assessed, variance in (
        (assess_mean(series), series.var()),
        (assess_variance(series, scale=2.0), (2.0 * (series - series.mean()) ** 2).var()),
    ):
        assert assessed.converged
        assert assessed.n_iterations_needed == 800
        assert assessed.n_eff == pytest.approx(variance / assessed.stderr**2)
        assert 2 * 1.95 < (assessed.high - assessed.low) / assessed.stderr < 2 * 2.3
    assert assess_variance(series, 2.0).value == pytest.approx(2.0 * series.var())
    state = assess_probability(series > 5.0)
    assert state.n_eff == pytest.approx(state.value * (1 - state.value) / state.stderr**2)
    assert state.low < state.value - 1.9 * state.stderr
    assert state.high > state.value + 1.9 * state.stderr
    energy, other = state.free_energy(), assess_probability(series <= 5.0)
    assert energy.value == pytest.approx(np.log(1 / state.value - 1))
    assert energy.low < energy.value < energy.high
    assert [other.value, other.low, other.high] == pytest.approx(
        [1 - state.value, 1 - state.high, 1 - state.low]
    )
    assert other.n_visits == state.n_visits


def test_few_effective_successes_are_not_converged():
    """P = 0.0077 ± 0.0063, "N_eff 191": one and a half effective successes."""
    inside = one_visit(400, 8, 100, 25)
    assessed = assess_probability(inside)
    assert assessed.value == pytest.approx(0.0078, abs=1e-4)
    assert assessed.stderr > 0.0063
    assert assessed.n_visits == 1
    assert not assessed.converged
    assert any("effective successes" in reason for reason in assessed.missing)
    assert any("1 independent visits" in reason for reason in assessed.missing)
    assert assessed.low < 1e-3
    assert assessed.high > 0.04


@pytest.mark.parametrize("length", [1, 2])
def test_two_frames_are_not_799_effective_samples(length):
    inside = one_visit(200, 8, 50, length)
    inside[120 : 122 - length, 3] = True
    assert inside.mean() == pytest.approx(2 / 1600)
    assessed = assess_probability(inside)
    assert assessed.n_eff == pytest.approx(8)
    assert 0.3 < assessed.high < 0.5
    assert assessed.stderr > assessed.value
    assert not assessed.converged
    # The independent samples of another observable, not the frames, say what it is worth.
    assert assess_probability(inside, n_pieces=132.0).n_eff < 132.1
    never = assess_probability(np.zeros_like(inside), n_pieces=132.0)
    assert assess_probability(inside, n_pieces=132.0).high > never.high > 0.02


def test_a_state_never_visited_has_a_bound():
    never = assess_probability(np.zeros((1000, 20), dtype=bool))
    assert (never.value, never.low, never.n_visits) == (0.0, 0.0, 0)
    assert (1 - never.high) ** 20 == pytest.approx(0.05)
    assert np.isnan(never.stderr)
    assert never.missing == ("the state was never visited",)
    always = assess_probability(np.ones((1000, 20), dtype=bool))
    assert (always.value, always.high) == (1.0, 1.0)
    assert always.low == pytest.approx(1 - never.high)
    assert always.missing == ("the state was never left",)
    assert never.free_energy().low == pytest.approx(-always.free_energy().high)
    # Never more than the frames, never fewer than the walkers.
    assert assess_probability(np.zeros((3, 2), dtype=bool), 100.0).n_eff == 6
    assert assess_probability(np.zeros((3, 2), dtype=bool), 0.1).n_eff == 2


def test_a_drift_is_not_converged():
    """Blocks of ⟨U⟩ run from 19.6 to 12.7, in 300 iterations of 32 walkers."""
    rng = np.random.default_rng(4)
    relaxation = np.linspace(19.6, 12.7, 300)[:, None]
    series = relaxation + 12.0 * autoregressive(rng, (300, 32), 0.5)
    assessed = assess_mean(series)
    assert assessed.drift < -5
    assert any(reason.startswith("the second half differs") for reason in assessed.missing)
    # Stationary series are not called so, of one walker or of many.
    for n_walkers in (1, 3, 4, 32):
        z = [drift_between_halves(autoregressive(rng, (300, n_walkers), 0.5)) for _ in range(200)]
        assert np.sum(np.abs(z) > 3) <= 3
        assert 0.6 < np.std(z) < 1.4
    assert drift_between_halves(np.repeat([[0.0], [1.0]], 10, axis=0)) > 3


def test_walkers_that_differ_are_not_converged():
    """Split-R̂ 1.63: walkers of different means, with ever so many effective samples."""
    rng = np.random.default_rng(5)
    for n_walkers in (64, 512):
        series = 1.3 * rng.normal(size=n_walkers) + autoregressive(rng, (300, n_walkers), 0.5)
        assessed = assess_mean(series)
        assert assessed.r_hat > 1.3
        assert any(reason.startswith("split-R-hat") for reason in assessed.missing)
    assert assessed.n_eff > 100
    # Of a variance: walkers that agree about it differ in their means.
    shifted = np.where(np.arange(64) % 2, 3.0, -3.0) + rng.normal(size=(300, 64))
    assert assess_variance(shifted).r_hat > 1.3


def test_unknown_errors_are_not_converged():
    for assessed in (
        assess_mean(np.full((100, 4), 2.0)),
        assess_mean([[1.0]]),
        assess_variance(np.full((100, 4), 2.0)),
        assess_probability(np.array([[True]])),
        assess_probability(np.array([[True], [False]])),
    ):
        assert not assessed.converged
        table = json.loads(json.dumps(assessed.to_dict(), allow_nan=False))
        assert table["converged"] is False
        assert table["missing"]
    assert assess_mean([[1.0]]).to_dict()["stderr"] is None


def test_the_iterations_needed_are_predicted():
    rng = np.random.default_rng(6)
    chains = two_state_chains(rng, (6000, 8), 0.02, 0.8)
    short = assess_probability(chains[:500])
    assert not short.converged
    needed = short.n_iterations_needed
    assert 500 < needed < 6000
    assert assess_probability(chains[: int(1.5 * needed)]).converged


def test_visits():
    inside = np.zeros((12, 3), dtype=bool)
    inside[[0, 1, 4, 9], 0] = True  # outside for 2 and for 4 iterations
    inside[6:, 2] = True
    assert [count_visits(inside, g) for g in (1.0, 2.0, 3.9, 4.0, np.nan)] == [4, 3, 3, 2, 4]
    assert [count_visits(~inside, g) for g in (0.0, 1.0)] == [5, 3]
    assert count_visits(np.zeros((5, 2), dtype=bool), 1.0) == 0


def test_pieces_are_those_of_the_slowest_series():
    rng = np.random.default_rng(7)
    fast, slow = (autoregressive(rng, (1000, 16), rho) for rho in (0.1, 0.9))
    assert count_pieces(fast) == pytest.approx(16_000 * 0.9 / 1.1, rel=0.3)
    assert count_pieces(fast, slow, np.zeros((1000, 16))) == pytest.approx(16_000 / 19, rel=0.4)
    assert count_pieces(np.zeros((1000, 16))) == 16


def test_clopper_pearson():
    for successes, n in ((3, 20), (10, 50), (19, 20)):
        low, high = clopper_pearson(successes / n, n)
        assert binom.sf(successes - 1, n, low) == pytest.approx(0.025)
        assert binom.cdf(successes, n, high) == pytest.approx(0.025)
    assert clopper_pearson(0.0, 10)[0] == 0.0
    assert clopper_pearson(1.0, 10)[1] == 1.0


def test_refusals():
    with pytest.raises(TypeError, match="inside: expected truth values, got float64"):
        assess_probability(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="n_pieces: expected a finite number, got nan"):
        assess_probability(np.zeros((4, 2), dtype=bool), np.nan)
    with pytest.raises(ValueError, match="series: expected finite values"):
        assess_mean([[np.nan, 1.0]])
    with pytest.raises(ValueError, match="scale: expected a positive number, got -1"):
        assess_variance([[0.0, 1.0]], scale=-1)
    with pytest.raises(ValueError, match="p, n: expected"):
        clopper_pearson(0.5, 0.0)
    with pytest.raises(ValueError, match="inside: expected truth values"):
        count_visits(np.zeros((4, 2)), 1.0)
    with pytest.raises(ValueError, match="series: expected at least one"):
        count_pieces()


def test_r_hat_of_rare_states_that_mix():
    """Most walkers never enter; that alone is no disagreement."""
    inside = two_state_chains(np.random.default_rng(8), (1000, 64), 0.002, 0.5)
    assert split_r_hat(inside) < 1.01


def test_what_too_few_iterations_cannot_tell_is_said_in_words():
    one = assess_mean(np.random.default_rng(1).normal(size=(1, 200)))
    assert "split-R-hat is not known" in one.missing
    assert "whether its halves agree is not known" in one.missing
    assert not any("nan" in reason for reason in one.missing)
