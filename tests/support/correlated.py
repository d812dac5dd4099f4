"""Correlated series with known distributions."""

import numpy as np
from scipy.signal import lfilter


def autoregressive(rng, shape, rho):
    """Return stationary series [n, W] of variance 1 and autocorrelation rho**lag."""
    noise = rng.normal(size=shape)
    noise[1:] *= np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], noise, axis=0)


def alternating(rng, shape, leave, lengths, warm_up):
    """Return truth values [n, W]: visits of given lengths, entered with probability 1/`leave`.

    `lengths` maps the generator and a number to as many lengths. The first `warm_up` iterations
    are left out: the rest is stationary where visits are shorter.
    """
    n, n_walkers = shape
    inside = np.zeros((warm_up + n, n_walkers), dtype=bool)
    for walker in inside.T:
        # More visits than fit.
        outside = rng.geometric(1 / leave, size=4 * (warm_up + n) // leave + 50)
        within = lengths(rng, outside.size)
        starts = np.cumsum(outside + within) - within
        for start, length in zip(starts, within, strict=True):
            walker[start : start + length] = True
    return inside[warm_up:]


class Pareto:
    """Lengths with P(length >= k) = k**-index up to `longest`."""

    def __init__(self, index, longest):
        self.index, self.longest = index, longest
        self.mean = np.sum(np.arange(1.0, longest + 1) ** -index)

    def __call__(self, rng, size):
        return np.minimum(rng.random(size) ** (-1 / self.index), self.longest).astype(int)
