"""Temperature ladders: rejections of swaps between any two temperatures, and where rungs belong.

Swaps are taken as alternating between even and odd pairs of neighbours; r is the rejection of a
pair. Syed, Bouchard-Côté, Deligiannidis and Doucet, J. R. Stat. Soc. B 84, 321 (2022): with many
rungs their sum tends to the communication barrier Λ, which does not depend on the ladder, and at
best 1/(2 + 2 Σ r/(1-r)) round trips are made in an iteration, by all replicas together. The rate is
highest for equal rejections; per evaluation it is with about 2Λ rungs, where somewhat more than
half of the swaps are rejected.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.mbar import Mbar
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_between

#: The rejection [0, 1) of swaps between two temperatures in K.
Rejection = Callable[[float, float], float]

#: Intervals of the grid on which local rejections are added up.
_GRID = 48
_MOST_RUNGS = 64
#: Samples that rejections are computed from, evenly spaced.
_MOST_SAMPLES = 10_000
#: Rungs in K have as many digits as names of trajectories.
_DIGITS = 2


def swap_rejection(
    difference_a: npt.ArrayLike,
    difference_b: npt.ArrayLike,
    weights_a: npt.ArrayLike | None = None,
    weights_b: npt.ArrayLike | None = None,
) -> float:
    """Return the mean rejection of swaps of independent samples of two distributions a and b.

    A swap is accepted with probability min(1, exp[h(x_b) - h(x_a)]), h = -ln(b/a) up to a constant:
    for two temperatures (1/kT_b - 1/kT_a) U.

    Parameters
    ----------
    difference_a, difference_b
        h of samples of a and of b.
    weights_a, weights_b
        Their weights, up to a constant factor; equal by default.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.ladder import swap_rejection
    >>> energy = np.random.default_rng(1).exponential(size=(2, 20_000)) * [[1.0], [2.0]]  # kT
    >>> h_a, h_b = (1 / 2 - 1 / 1) * energy
    >>> round(swap_rejection(h_a, h_b), 2)  # 1/3 exactly
    0.33
    """
    h_a, h_b = (np.asarray(h, dtype=np.float64).ravel() for h in (difference_a, difference_b))
    p = _normalised(weights_a, h_a, "difference_a")
    q = _normalised(weights_b, h_b, "difference_b")
    order = np.argsort(h_b)
    h_b, q = h_b[order], q[order]
    rank = np.searchsorted(h_b, h_a)  # samples of b below are accepted now and then, others always
    always = 1.0 - np.concatenate([[0.0], np.cumsum(q)])[rank]
    with np.errstate(divide="ignore"):
        below = np.concatenate([[-np.inf], np.logaddexp.accumulate(np.log(q) + h_b)])[rank]
    return float(np.clip(1.0 - p @ (always + np.exp(below - h_a)), 0.0, 1.0))


def _normalised(weights: npt.ArrayLike | None, like: Array, name: str) -> Array:
    if like.size == 0 or not np.isfinite(like).all():
        raise ValueError(f"{name}: expected finite numbers, got {like.size} of them")
    if weights is None:
        return np.full(like.size, 1.0 / like.size)
    values = np.asarray(weights, dtype=np.float64).ravel()
    if values.shape != like.shape or not (values >= 0).all() or not values.sum() > 0:
        raise ValueError(f"{name}: expected as many weights of at least 0, got {values.shape}")
    return np.asarray(values / values.sum())


def energy_rejection(mbar: Mbar, boltzmann_constant: float) -> Rejection:
    """Return the rejection of plain swaps as a function of two temperatures within a ladder.

    From the samples of all rungs, reweighted to each of the two temperatures.
    """
    weights: dict[float, Array] = {}
    stride = -(-mbar.energy.size // _MOST_SAMPLES)
    energy = mbar.energy[::stride].ravel()

    def rejection(kelvin_a: float, kelvin_b: float) -> float:
        betas = [1.0 / (boltzmann_constant * kelvin) for kelvin in (kelvin_a, kelvin_b)]
        for kelvin, beta in zip((kelvin_a, kelvin_b), betas, strict=True):
            if kelvin not in weights:
                weights[kelvin] = mbar.reweight(beta).weights[::stride].ravel()
        h = (betas[1] - betas[0]) * energy
        return swap_rejection(h, h, weights[kelvin_a], weights[kelvin_b])

    return rejection


def ladder_rejections(rejection: Rejection, temperatures: Sequence[float]) -> Array:
    """Return the rejection [R-1] of each pair of neighbours of a ladder in K."""
    return np.array([rejection(a, b) for a, b in pairwise(temperatures)])


def communication_barrier(rejection: Rejection, low: float, high: float) -> float:
    """Return Λ between two temperatures in K: the sum of the rejections on a fine grid."""
    return float(_cumulative_barrier(rejection, low, high)[1][-1])


def round_trip_rate(rejections: npt.ArrayLike) -> float:
    """Return the best number of round trips of all replicas in an iteration: 1/(2 + 2 Σ r/(1-r)).

    Examples
    --------
    >>> from openmm_tsf.analysis.ladder import round_trip_rate
    >>> round_trip_rate([0.5, 0.5, 0.5])
    0.125
    """
    r = np.asarray(rejections, dtype=np.float64)
    if (r >= 1.0).any():
        return 0.0
    return float(1.0 / (2.0 + 2.0 * np.sum(r / (1.0 - r))))


def _cumulative_barrier(rejection: Rejection, low: float, high: float) -> tuple[Array, Array]:
    """Return a geometric grid in K and the barrier below each of its temperatures."""
    grid = np.geomspace(low, high, _GRID + 1)
    local = [rejection(a, b) for a, b in pairwise(grid.tolist())]
    return grid, np.concatenate([[0.0], np.cumsum(local)])


def equal_rejection_ladder(
    rejection: Rejection, low: float, high: float, n_rungs: int
) -> tuple[float, ...]:
    """Return the ladder in K of so many rungs whose intervals have equal parts of the barrier."""
    grid, barrier = _cumulative_barrier(rejection, low, high)
    return _place(grid, barrier, n_rungs)


def _place(grid: Array, barrier: Array, n_rungs: int) -> tuple[float, ...]:
    levels = np.linspace(0.0, barrier[-1], n_rungs)[1:-1]
    # Where samples are few, rejections of neighbouring grid points may vanish.
    rising = barrier + 1e-12 * np.arange(len(barrier))
    inner = np.exp(np.interp(levels, rising, np.log(grid)))
    return (float(grid[0]), *(round(float(t), _DIGITS) for t in inner), float(grid[-1]))


def choose_ladder(
    rejection: Rejection, low: float, high: float, most_rejected: float
) -> tuple[float, ...]:
    """Return the shortest ladder of equal rejections none of which exceeds `most_rejected`.

    Parameters
    ----------
    rejection
        The rejection of swaps between two temperatures, for instance of `energy_rejection`.
    low, high
        The ends of the ladder in K.
    most_rejected
        A number between 0 and 1.

    Raises
    ------
    ValueError
        If 64 rungs would not be enough.

    Examples
    --------
    Swaps between harmonic oscillators, 30 of them:

    >>> import numpy as np
    >>> from openmm_tsf.analysis.ladder import choose_ladder, swap_rejection
    >>> chi = np.random.default_rng(1).chisquare(60, (2, 10_000)) / 2
    >>> def rejection(a, b):
    ...     return swap_rejection(*((a / b - 1) * chi * [[1], [b / a]]))
    >>> [round(kelvin) for kelvin in choose_ladder(rejection, 300, 600, 0.5)]
    [300, 357, 424, 505, 600]
    """
    low, high = as_temperature(low, "low"), as_temperature(high, "high")
    most_rejected = check_between(most_rejected, "most_rejected", 0.0, 1.0)
    if not low < high:
        raise ValueError(f"low, high: expected ascending temperatures, got {low:g}, {high:g} K")
    grid, barrier = _cumulative_barrier(rejection, low, high)
    for n_rungs in range(2, _MOST_RUNGS + 1):
        ladder = _place(grid, barrier, n_rungs)
        if ladder_rejections(rejection, ladder).max() <= most_rejected:
            return ladder
    raise ValueError(
        f"low, high: expected a ladder of at most {_MOST_RUNGS} rungs, {low:g} to {high:g} K has a "
        f"barrier of {barrier[-1]:.1f}"
    )


def cheapest_ladder(rejection: Rejection, low: float, high: float) -> tuple[float, ...]:
    """Return the ladder of equal rejections with the most round trips per evaluation."""
    grid, barrier = _cumulative_barrier(rejection, low, high)
    most = min(_MOST_RUNGS, int(np.ceil(3.0 * barrier[-1])) + 3)
    ladders = [_place(grid, barrier, n) for n in range(2, most + 1)]
    rates = [round_trip_rate(ladder_rejections(rejection, each)) / len(each) for each in ladders]
    return ladders[int(np.argmax(rates))]
