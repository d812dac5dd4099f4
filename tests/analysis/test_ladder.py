"""Rejections of swaps between any two temperatures, and ladders from them."""

from itertools import pairwise

import numpy as np
import pytest

from openmm_tsf.analysis.ladder import (
    cheapest_ladder,
    choose_ladder,
    communication_barrier,
    energy_rejection,
    equal_rejection_ladder,
    ladder_rejections,
    round_trip_rate,
    swap_rejection,
)
from openmm_tsf.analysis.mbar import Mbar

MODES = 60  # harmonic, k = 1: U is chi² of 60 degrees of freedom times T/2
LADDER = np.geomspace(300.0, 600.0, 5)


def test_rejections_are_those_of_all_pairs():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=50), rng.normal(0.5, 2.0, size=70)
    p, q = rng.random(50), rng.random(70)
    accepted = np.minimum(1.0, np.exp(b[None, :] - a[:, None]))
    expected = 1 - (p[:, None] * q * accepted).sum() / (p.sum() * q.sum())
    assert np.isclose(swap_rejection(a, b, p, q), expected, rtol=1e-12)
    assert np.isclose(swap_rejection(a, b), 1 - accepted.mean(), rtol=1e-12)
    assert swap_rejection(a - 2000, b - 2000) == pytest.approx(1 - accepted.mean(), rel=1e-9)


def test_bad_samples_are_refused():
    with pytest.raises(ValueError, match="difference_a: expected finite numbers"):
        swap_rejection([np.nan], [0.0])
    with pytest.raises(ValueError, match="difference_b: expected as many weights"):
        swap_rejection([0.0], [0.0], None, [1.0, 2.0])


@pytest.fixture(scope="module")
def rejection():
    rng = np.random.default_rng(2)
    energy = 0.5 * LADDER * rng.chisquare(MODES, (1500, 2, len(LADDER)))
    return energy_rejection(Mbar(energy, 1 / LADDER), boltzmann_constant=1.0)


def exact(a, b):
    """The rejection of harmonic modes between two temperatures, by many draws."""
    rng = np.random.default_rng(5)
    chi = rng.chisquare(MODES, (2, 200_000)) / 2
    h = a / b - 1
    return swap_rejection(h * chi[0], h * chi[1] * b / a)


def test_reweighted_energies_give_the_rejections_between_any_temperatures(rejection):
    for pair in ((300, 330), (330, 424), (300, 600), (450.5, 600)):
        assert rejection(*pair) == pytest.approx(exact(*pair), abs=0.015)


def test_the_barrier_is_that_of_harmonic_modes(rejection):
    # Λ = ∫ σ(U)/√π dβ = sqrt(C/(π k)) ln(T_high/T_low) for normal energies
    expected = np.sqrt(MODES / (2 * np.pi)) * np.log(2)
    assert communication_barrier(rejection, 300, 600) == pytest.approx(expected, rel=0.03)
    halves = communication_barrier(rejection, 300, 420) + communication_barrier(rejection, 420, 600)
    assert halves == pytest.approx(expected, rel=0.03)


def test_ladders_have_equal_rejections(rejection):
    for n_rungs in (3, 5, 8):
        ladder = equal_rejection_ladder(rejection, 300.0, 600.0, n_rungs)
        assert (ladder[0], ladder[-1], len(ladder)) == (300.0, 600.0, n_rungs)
        rejected = ladder_rejections(rejection, ladder)
        assert np.ptp(rejected) < 0.05
        # Equal heat capacity: a geometric ladder.
        ratios = [b / a for a, b in pairwise(ladder)]
        assert np.ptp(ratios) < 0.04


def test_the_shortest_ladder_below_a_rejection(rejection):
    ladder = choose_ladder(rejection, 300, 600, 0.5)
    assert ladder_rejections(rejection, ladder).max() <= 0.5
    shorter = equal_rejection_ladder(rejection, 300.0, 600.0, len(ladder) - 1)
    assert ladder_rejections(rejection, shorter).max() > 0.5
    assert choose_ladder(rejection, 300, 600, 1.0) == (300.0, 600.0)


def test_the_cheapest_ladder_makes_the_most_round_trips(rejection):
    best = cheapest_ladder(rejection, 300.0, 600.0)
    rates = {
        n: round_trip_rate(
            ladder_rejections(rejection, equal_rejection_ladder(rejection, 300.0, 600.0, n))
        )
        / n
        for n in range(2, 9)
    }
    assert max(rates, key=rates.get) == len(best)


def test_bad_ends_are_refused(rejection):
    with pytest.raises(ValueError, match="low, high: expected ascending temperatures"):
        choose_ladder(rejection, 600, 300, 0.5)
    with pytest.raises(ValueError, match="most_rejected"):
        choose_ladder(rejection, 300, 600, 1.5)
    with pytest.raises(ValueError, match="expected a ladder of at most 64 rungs"):
        choose_ladder(lambda a, b: 1.0, 300, 600, 0.5)


def test_round_trips_of_a_ladder_without_exchange():
    assert round_trip_rate([0.0, 0.0]) == 0.5
    assert round_trip_rate([0.5, 1.0]) == 0.0
