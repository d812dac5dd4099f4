"""Bounds on what was never visited or not reached, against exactly known populations."""

import numpy as np
import pytest
from scipy.stats import norm

from openmm_tsf.analysis.certify_checks import MISSING, PASSED, UNDECIDED, WRONG
from openmm_tsf.analysis.certify_coverage import (
    WeightedPoints,
    check_coverage,
    hardly_reached,
    measure_coverage,
)

NAMES = ("left", "middle", "right")
CENTRES = np.array([-12.0, 0.0, 12.0])
#: Of the target, normal distributions of width 1; the flow has width 1.2 and other weights.
POPULATIONS = np.array([0.60, 0.37, 0.03])
CONSTANT = 12.3


def mixture(x, weights, width):
    return (weights * norm.pdf(x[..., None], CENTRES, width)).sum(axis=-1)


def draw(rng, shape, weights, width):
    return CENTRES[rng.choice(3, size=shape, p=weights)] + width * rng.normal(size=shape)


def points(x, of_flow, width=1.2):
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(mixture(x, POPULATIONS, 1.0)), np.log(mixture(x, of_flow, width))
    labels = np.digitize(x, [-6.0, 6.0])
    return WeightedPoints(log_p - log_q + CONSTANT, labels[..., None])


def compare(rng, visited=POPULATIONS, of_flow=(0.4, 0.4, 0.2), n_draws=3000, shape=(150, 8)):
    """Frames of the target with other populations `visited`, beside draws of a flow."""
    frames = draw(rng, shape, np.asarray(visited) / np.sum(visited), 1.0)
    draws = points(draw(rng, n_draws, of_flow, 1.2), of_flow)
    return measure_coverage(300.0, NAMES, draws, points(frames, of_flow), n_draws, 1000.0)


def statuses(coverage, name):
    return [check.status for check in check_coverage([coverage]) if check.name == name]


def test_populations_and_normalisation_are_exact():
    rng = np.random.default_rng(1)
    z = []
    for _ in range(30):
        coverage = compare(rng)
        pairs = zip(coverage.basins, POPULATIONS, strict=True)
        z.append([np.log(basin.p / p) / basin.stderr for basin, p in pairs])
        assert coverage.decided
        # All points are weighed with the normalised densities.
        middle = coverage.basins[1].median_log_weight
        assert middle == pytest.approx(np.log(0.37 * 1.2 / 0.4) - 0.07, abs=0.15)
    spread = np.array(z).std(axis=0)
    assert (np.abs(np.mean(z, axis=0)) < 4 * spread / np.sqrt(30)).all()
    assert ((spread > 0.5) & (spread < 1.3)).all()


@pytest.mark.parametrize("of_flow", [(0.4, 0.4, 0.2), (0.5, 0.497, 0.003)])
def test_bounds_of_a_basin_that_was_never_visited(of_flow):
    """Upper and lower bounds hold in 95 % of the cases, each."""
    rng, n = np.random.default_rng(2), 40
    low = high = total = 0
    for _ in range(n):
        coverage = compare(rng, (0.6, 0.37, 0.0), of_flow, n_draws=1500)
        right = coverage.basins[2]
        assert not right.visited
        low += right.low <= POPULATIONS[2]
        high += right.high >= POPULATIONS[2]
        total += coverage.unvisited_high >= POPULATIONS[2]
    assert min(low, high, total) >= 35


def test_a_missing_basin_is_wrong_and_the_complete_twin_passes():
    rng = np.random.default_rng(3)
    missing = compare(rng, (0.6, 0.37, 0.0))
    assert WRONG in statuses(missing, "never visited")
    (words,) = [c.words for c in check_coverage([missing]) if c.status == WRONG]
    assert words.startswith("right was never visited; by the flow's weighted draws it holds 0.03")
    complete = compare(rng)
    assert {check.status for check in check_coverage([complete])} == {PASSED}


def test_a_short_trajectory_may_lack_a_basin():
    """So few independent frames need not have seen it: it is missing, but nothing is wrong."""
    rng = np.random.default_rng(4)
    of_flow = (0.4, 0.4, 0.2)
    frames = draw(rng, (40, 1), (0.62, 0.38, 0.0), 1.0)
    draws = points(draw(rng, 3000, of_flow, 1.2), of_flow)
    coverage = measure_coverage(300.0, NAMES, draws, points(frames, of_flow), 3000, 40.0)
    assert statuses(coverage, "never visited") == [MISSING, PASSED]


def test_wrong_populations_are_found():
    rng = np.random.default_rng(5)
    assert statuses(compare(rng, (0.3, 0.67, 0.03)), "populations by the flow") == [WRONG]
    assert statuses(compare(rng), "populations by the flow") == [PASSED]


def test_what_the_flow_does_not_reach():
    """A flow without the basin: its frames would not be drawn once, and it bounds nothing."""
    rng = np.random.default_rng(6)
    coverage = compare(rng, of_flow=(0.5, 0.5, 0.0), n_draws=1000, shape=(2000, 8))
    right = coverage.basins[2]
    assert right.n_draws == 0
    assert coverage.unreached.low < 0.03 < coverage.unreached.high + 0.003
    assert list(hardly_reached([coverage])) == ["right"]
    assert right.unreached > 0.5
    assert any("hardly reaches right" in check.words for check in check_coverage([coverage]))


def test_without_overlap_nothing_is_decided():
    rng = np.random.default_rng(7)
    draws = WeightedPoints(rng.normal(-900.0, 30.0, 500), np.zeros((500, 1), dtype=np.int64))
    frames = WeightedPoints(rng.normal(0.0, 3.0, (50, 4)), np.zeros((50, 4, 1), dtype=np.int64))
    coverage = measure_coverage(300.0, ("all",), draws, frames, 500)
    assert not coverage.decided
    (check,) = check_coverage([coverage])
    assert check.status == UNDECIDED
    assert "hardly overlap" in check.words
