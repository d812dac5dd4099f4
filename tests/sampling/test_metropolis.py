"""The Metropolis rule."""

import numpy as np
import pytest
import torch

from openmm_tsf.metropolis import metropolis
from openmm_tsf.utils.random import seeded_generator


def test_metropolis_accepts_and_rejects_extremes():
    current = torch.zeros(7, dtype=torch.float64)
    inf, nan = float("inf"), float("nan")
    proposed = torch.tensor([1e300, -1e300, nan, inf, -inf, 0.0, 800.0], dtype=torch.float64)
    for seed in range(20):
        generator = seeded_generator(seed)
        accepted, non_finite = metropolis(current, proposed, generator)
        assert accepted.tolist() == [True, False, False, False, False, True, True]
        assert non_finite.tolist() == [False, False, True, True, True, False, False]


def test_metropolis_has_the_right_probability():
    n = 100_000
    current = torch.full((n,), 3.0, dtype=torch.float64)
    accepted, _ = metropolis(current, current - 0.7, seeded_generator(1))
    p = np.exp(-0.7)
    assert abs(float(accepted.double().mean()) - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_metropolis_draws_the_same_numbers_whatever_the_values():
    after = []
    for value in (0.0, float("nan")):
        generator = seeded_generator(2)
        metropolis(torch.zeros(5), torch.full((5,), value), generator)
        after.append(generator.get_state())
    assert torch.equal(*after)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_metropolis_refuses_a_walker_that_cannot_be_there(bad):
    current = torch.tensor([0.0, bad])
    with pytest.raises(ValueError, match=r"current: expected finite .* row 1"):
        metropolis(current, torch.zeros(2), torch.Generator())


def test_metropolis_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="proposed: expected log-weights of shape"):
        metropolis(torch.zeros(3), torch.zeros(3, 1), torch.Generator())
