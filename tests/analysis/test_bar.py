"""Free-energy differences of two ensembles, against exact ones and pymbar's."""

import math

import numpy as np
import pytest
from pymbar.other_estimators import bar

from openmm_tsf.analysis.bar import estimate_difference


def normal(rng, shape, k):
    return rng.normal(size=shape) / math.sqrt(k)


def work(x, stiffness=3.0):
    """The energy of the second well less that of the first, k = 1."""
    return 0.5 * (stiffness - 1.0) * x**2


@pytest.mark.parametrize("shape_b", [(300, 6), (40, 9)])
def test_the_difference_is_pymbars_and_the_exact_one(shape_b):
    rng = np.random.default_rng(3)
    a, b = work(normal(rng, (300, 6), 1.0)), work(normal(rng, shape_b, 3.0))
    difference = estimate_difference(a, b)
    peer = bar(a.ravel(), -b.ravel())
    assert difference.value == pytest.approx(peer["Delta_f"], abs=1e-6)
    assert difference.stderr == pytest.approx(peer["dDelta_f"], rel=0.3)  # spread of few walkers
    assert abs(difference.value - 0.5 * math.log(3.0)) < 4 * difference.stderr
    assert 0.5 < difference.overlap < 1.0


def test_the_error_is_that_of_many_estimates_of_correlated_series():
    """Samples that repeat eight times: pymbar's error would be too small by sqrt(8)."""
    rng, values, errors = np.random.default_rng(4), [], []
    for _ in range(200):
        a = np.repeat(work(normal(rng, (40, 8), 1.0)), 8, axis=0)
        b = np.repeat(work(normal(rng, (40, 8), 3.0)), 8, axis=0)
        difference = estimate_difference(a, b)
        values.append(difference.value)
        errors.append(difference.stderr)
    spread, mean_error = np.std(values), np.sqrt(np.mean(np.square(errors)))
    assert 0.85 < mean_error / spread < 1.35
    z = (np.mean(values) - 0.5 * math.log(3.0)) / (spread / math.sqrt(200))
    assert abs(z) < 4


def test_infinite_energies_have_no_weight():
    """A wall at 0 in B takes half of A's samples: the difference is ln 2."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(400, 8))
    a, b = np.where(x > 0, 0.0, np.inf), np.zeros((400, 8))
    difference = estimate_difference(a, b)
    assert abs(difference.value - math.log(2.0)) < 4 * difference.stderr < 0.1


def test_ensembles_without_overlap_have_no_known_error():
    difference = estimate_difference(np.full((5, 2), np.inf), np.zeros((5, 2)))
    assert math.isnan(difference.value)
    assert difference.overlap == 0.0


@pytest.mark.parametrize("bad", [np.zeros(4), np.full((2, 2), np.nan), np.zeros((0, 3))])
def test_what_is_no_series_is_refused(bad):
    with pytest.raises(ValueError, match="work_in_b: expected"):
        estimate_difference(np.zeros((2, 2)), bad)
