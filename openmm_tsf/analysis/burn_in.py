"""The start of equilibrated sampling in production, found from the data.

The means over the first iterations are compared with those of the second half of the run, for
every series that was recorded. Only where one of them differs by more than chance explains is
anything left out, so that a stationary run loses nothing. How much is left out is then chosen by
the marginal standard error rule on means over blocks (MSER: White, Simulation 69, 323 (1997)),
until the remaining series start as they go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr  # type: ignore[import-untyped]

from openmm_tsf.analysis.statistics import Array, finite_series, statistical_inefficiency

#: The probability of finding a drift in a stationary run, over all series and windows, is below.
FALSE_POSITIVES = 0.01
#: Shorter runs have no second half to compare with: nothing is left out of them.
MIN_ITERATIONS = 20
#: With fewer walkers their spread does not tell the error of a difference.
_MIN_WALKERS = 8
#: The rule is applied to the means over this many blocks, each of at least one iteration.
_BLOCKS = 100


@dataclass(frozen=True)
class Drift:
    """The difference between the start of one series and the second half of the run.

    Attributes
    ----------
    series
        The index of the series.
    n_iterations
        The length of the window at the start whose mean differs most significantly.
    z
        The difference, start less second half, over its standard error.
    p_value
        The probability of such a difference somewhere in a stationary run: that of this series and
        window times the number of series and windows.
    """

    series: int
    n_iterations: int
    z: float
    p_value: float


@dataclass(frozen=True)
class BurnIn:
    """The first equilibrated iteration of a run, and what was found before it.

    Attributes
    ----------
    start
        The number of saved iterations to leave out: 0 where no drift was found; half of the run
        where it is not equilibrated.
    n_iterations
        The number of saved iterations in all.
    drift
        The most significant difference between start and second half; None if nothing was tested.
    is_equilibrated
        Whether the second half starts as it goes on.
    """

    start: int
    n_iterations: int
    drift: Drift | None = None
    is_equilibrated: bool = True


def find_start(series: Sequence[npt.ArrayLike]) -> BurnIn:
    """Return from which iteration on the series [n, W] of W independent walkers are stationary.

    Raises
    ------
    ValueError
        If the series are not all finite and of one shape.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.burn_in import find_start
    >>> noise = np.random.default_rng(1).normal(size=(400, 16))
    >>> find_start([noise]).start
    0
    >>> 20 <= find_start([noise + 5 * np.exp(-np.arange(400) / 10)[:, None]]).start <= 60
    True
    """
    values = [finite_series(each) for each in series]
    shapes = {each.shape for each in values}
    if len(shapes) > 1:
        raise ValueError(f"series: expected arrays of one shape, got {sorted(shapes)}")
    n = shapes.pop()[0] if shapes else 0
    if n < MIN_ITERATIONS:
        return BurnIn(0, n)
    drifts = _drifts(values)
    first = min(drifts, key=lambda drift: (drift.p_value, -abs(drift.z)))
    start = 0
    while found := [d for d in drifts if d.p_value < FALSE_POSITIVES]:
        rest = [values[d.series][start:].mean(axis=1) for d in found]
        start += max(_marginal_standard_error_rule(mean) for mean in rest)
        if start > n // 2:
            return BurnIn(n // 2, n, first, is_equilibrated=False)
        drifts = _drifts([each[start:] for each in values])
    return BurnIn(start, n, first)


def _windows(n: int) -> list[int]:
    """Return the lengths of the windows at the start that are compared: n/2, n/4, ..., 1."""
    return [n >> k for k in range(1, n.bit_length())]


def _drifts(series: Sequence[Array]) -> list[Drift]:
    """Return the most significant window of each series."""
    windows = _windows(len(series[0]))
    n_tests = len(series) * len(windows)
    drifts = []
    for index, values in enumerate(series):
        tests = [_compare(values, window) for window in windows]
        best = min(range(len(windows)), key=lambda k: tests[k][1])
        z, p = tests[best]
        drifts.append(Drift(index, windows[best], z, min(1.0, n_tests * p)))
    return drifts


def _compare(values: Array, window: int) -> tuple[float, float]:
    """Return z and the two-sided p of the mean over a window less that of the second half.

    The error is the less significant of two: from the spread of this difference over walkers, and
    from variance and correlation time of the second half. The former is too small where few
    walkers visited a rare state since, the latter where few did at the start.
    """
    n, n_walkers = values.shape
    late = values[n // 2 :]
    by_walker = values[:window].mean(axis=0) - late.mean(axis=0)
    difference = float(by_walker.mean())
    tests = []
    if n_walkers >= _MIN_WALKERS:
        spread = by_walker.std(ddof=1) / np.sqrt(n_walkers)
        tests.append(_student(difference, float(spread), n_walkers - 1))
    g = statistical_inefficiency(late)
    if np.isnan(g):  # constant since: nothing says how it fluctuates
        return tests[0] if tests else (0.0, 1.0)
    n_late = late.size / g
    n_early = max(1.0, window / g) * n_walkers
    variance = late.var() * (1 / n_early + 1 / n_late)
    tests.append(_student(difference, float(np.sqrt(variance)), max(1.0, n_late - 1)))
    return max(tests, key=lambda test: test[1])


def _student(difference: float, error: float, freedom: float) -> tuple[float, float]:
    if error == 0.0:
        return (0.0, 1.0) if difference == 0.0 else (float(np.sign(difference) * np.inf), 0.0)
    z = difference / error
    return z, float(2 * stdtr(freedom, -abs(z)))


def _marginal_standard_error_rule(mean: Array) -> int:
    """Return how many iterations of a mean over walkers [n] to leave out, at least one."""
    length = max(1, len(mean) // _BLOCKS)
    n_blocks = len(mean) // length
    blocks = mean[len(mean) - n_blocks * length :].reshape(n_blocks, length).mean(axis=1)
    left = np.arange(n_blocks, 0, -1)
    sums, squares = (np.cumsum(a[::-1])[::-1] for a in (blocks, blocks**2))
    # The squared standard error of the mean over the blocks that are left, as if independent.
    error = (squares - sums**2 / left) / left**2
    keep = n_blocks - 5  # a mean over few blocks has a small error by chance
    return max(1, int(np.argmin(error[:keep])) * length)
