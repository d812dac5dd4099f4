"""Wasserstein distances W2 between two samples of equally many points, by exact assignment."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from openmm_tsf.analysis.statistics import Array


def energy_wasserstein(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Return the 2-Wasserstein distance of two samples [n] of numbers, in their unit.

    On the line the optimal coupling joins equal ranks.

    Raises
    ------
    ValueError
        If the samples are empty, not finite, or of different sizes.

    Examples
    --------
    >>> from openmm_tsf.analysis.transport import energy_wasserstein
    >>> energy_wasserstein([3.0, 1.0, 2.0], [2.5, 4.5, 3.5])  # shifted by 1.5
    1.5
    """
    x, y = _pair(first, second, 1)
    return float(np.sqrt(np.mean((np.sort(x) - np.sort(y)) ** 2)))


def torus_wasserstein(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Return the 2-Wasserstein distance of two samples [n, D] of D angles, in rad.

    The squared distance of two points is the sum of the squares of the differences of their angles,
    each the shorter way around the circle: the "torus W2" of published Boltzmann generators
    (arXiv:2502.18462). The optimal assignment is exact; time grows as n³, memory as n².

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.transport import torus_wasserstein
    >>> round(torus_wasserstein([[3.1, 0.0]], [[-3.1, 0.0]]), 4)
    0.0832
    """
    x, y = _pair(first, second, 2)
    cost = np.zeros((len(x), len(y)))
    for a, b in zip(x.T, y.T, strict=True):  # one angle at a time, to bound the memory
        difference = np.remainder(a[:, None] - b[None, :] + np.pi, 2.0 * np.pi) - np.pi
        cost += np.square(difference, out=difference)
    return _assign(cost)


def euclidean_wasserstein(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Return the 2-Wasserstein distance of two samples [n, D] of points, in their unit.

    Exact, as `torus_wasserstein`.

    Examples
    --------
    >>> from openmm_tsf.analysis.transport import euclidean_wasserstein
    >>> euclidean_wasserstein([[0.0, 0.0], [1.0, 0.0]], [[1.0, 2.0], [0.0, 2.0]])
    2.0
    """
    x, y = _pair(first, second, 2)
    cost = np.zeros((len(x), len(y)))
    for a, b in zip(x.T, y.T, strict=True):
        cost += (a[:, None] - b[None, :]) ** 2
    return _assign(cost)


def _pair(first: Any, second: Any, n_dimensions: int) -> tuple[Array, Array]:
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if x.shape != y.shape or x.ndim != n_dimensions or x.size == 0:
        expected = "[n]" if n_dimensions == 1 else "[n, D]"
        raise ValueError(
            f"first, second: expected two samples {expected}, got shapes {x.shape}, {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("first, second: expected finite numbers")
    return x, y


def _assign(cost: Array) -> float:
    """Return the root of the mean squared distance of the best assignment, of squares [n, n]."""
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))
