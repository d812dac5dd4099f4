"""The start of equilibrated sampling in production, found from the data.

The means over the first iterations are compared with those of the second half of the run, for
every series that was recorded. Only where one of them differs by more than chance explains is
anything left out, so that a stationary run loses nothing. The transient is then fitted by an
exponential or a step, and as much is left out as makes the expected squared error of the mean
smallest; this is repeated until all series start as they go on.
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
#: Nor does a second half of so few independent samples, if the walkers are few.
_MIN_INDEPENDENT = 50
#: Time constants that are tried for a transient, from half an iteration to twice the run.
_TIMES = 60


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
        The most significant difference between start and second half; None if the run is too short
        to test any (fewer than 20 iterations, or few walkers with few independent samples).
    is_equilibrated
        False if the second half of the run still drifts.
    """

    start: int
    n_iterations: int
    drift: Drift | None = None
    is_equilibrated: bool = True


class RecordedSeries(Sequence[Array]):
    """Energy, then cosine and sine of every dihedral [n, W] of each rung, made when asked for."""

    def __init__(self, energy: Array, dihedrals: npt.NDArray[np.float32]) -> None:
        self._energy, self._dihedrals = energy, dihedrals
        self._per_rung = 1 + 2 * self._dihedrals.shape[3]

    def __len__(self) -> int:
        return self._energy.shape[2] * self._per_rung

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rung, k = divmod(index, self._per_rung)
        if k == 0:
            return self._energy[:, :, rung]
        function = np.cos if k % 2 else np.sin
        return function(self._dihedrals[:, :, rung, (k - 1) // 2], dtype=np.float64)


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
    shapes = {np.shape(each) for each in series}
    if len(shapes) > 1:
        raise ValueError(f"series: expected arrays of one shape, got {sorted(shapes)}")
    n = shapes.pop()[0] if shapes else 0
    drifts = _drifts(series, 0) if n >= MIN_ITERATIONS else []
    if not drifts:
        return BurnIn(0, n)
    first = min(drifts, key=lambda drift: (drift.p_value, -abs(drift.z)))
    start = 0
    while found := [d for d in drifts if d.p_value < FALSE_POSITIVES]:
        start += max(_n_left_out(_rest(series[d.series], start), d) for d in found)
        if start > n // 2:
            return BurnIn(n // 2, n, first, is_equilibrated=False)
        drifts = _drifts(series, start)
    return BurnIn(start, n, first)


def _rest(values: npt.ArrayLike, start: int) -> Array:
    return finite_series(values)[start:]


def _n_left_out(values: Array, drift: Drift) -> int:
    """Return how many iterations of a drifting series to leave out, at least half of the window."""
    late = _Late.from_series(values[len(values) // 2 :])
    if np.isnan(late.g):  # constant since
        return int(np.flatnonzero((values != values[-1]).any(axis=1))[-1]) + 1
    least = max(1, drift.n_iterations // 2)
    error = late.variance * late.g / values.shape[1]
    return max(least, _length_of_transient(values.mean(axis=1), error))


def _windows(n: int) -> list[int]:
    """Return the lengths of the windows at the start that are compared: n/2, n/4, ..., 1."""
    return [n >> k for k in range(1, n.bit_length())]


def _drifts(series: Sequence[npt.ArrayLike], start: int) -> list[Drift]:
    """Return the most significant window of each series that can be tested, from `start` on."""
    drifts = []
    for index, each in enumerate(series):
        values = _rest(each, start)
        late = _Late.from_series(values[len(values) // 2 :])
        if np.ptp(values) == 0.0 or not late.can_be_compared:
            continue
        windows = _windows(len(values))
        tests = [_compare(values[:window], late) for window in windows]
        best = min(range(len(windows)), key=lambda k: (tests[k][1], -abs(tests[k][0])))
        z, p = tests[best]
        drifts.append(Drift(index, windows[best], z, min(1.0, len(series) * len(windows) * p)))
    return drifts


@dataclass(frozen=True)
class _Late:
    """The second half of a series [n, W]: its mean, and how it fluctuates around it."""

    by_walker: Array
    mean: float
    variance: float
    kurtosis: float  # 3 of a normal distribution, 1/p of a rare state
    g: float
    size: int

    @classmethod
    def from_series(cls, values: Array) -> "_Late":
        mean, variance = float(values.mean()), float(values.var())
        kurtosis = float(((values - mean) ** 4).mean() / variance**2) if variance else np.nan
        g = statistical_inefficiency(values)
        if variance:  # the sum of a short series may be far too low; this is that of AR(1)
            lag = float(((values[1:] - mean) * (values[:-1] - mean)).mean() / variance)
            g = max(g, (1 + lag) / max(1 - lag, 1 / len(values)))
        return cls(values.mean(axis=0), mean, variance, kurtosis, g, values.size)

    @property
    def has_many_walkers(self) -> bool:
        return len(self.by_walker) >= _MIN_WALKERS

    @property
    def can_be_compared(self) -> bool:
        # False for NaN, of a constant: nothing says how it fluctuates.
        return self.has_many_walkers or self.size / self.g >= _MIN_INDEPENDENT


def _compare(early: Array, late: _Late) -> tuple[float, float]:
    """Return z and the two-sided p of the mean over a window less that of the second half.

    The error is the less significant of two: from the spread of this difference over walkers, and
    from variance and correlation time of the second half. The former is too small where few
    walkers visited a rare state since, the latter where few did at the start. The spread of few
    walkers says nothing: there the latter alone has the degrees of freedom of the variance of as
    many independent samples as the window has.
    """
    n_walkers = early.shape[1]
    by_walker = early.mean(axis=0) - late.by_walker
    difference = float(by_walker.mean())
    tests = []
    if late.has_many_walkers:
        spread = by_walker.std(ddof=1) / np.sqrt(n_walkers)
        tests.append(_student(difference, float(spread), n_walkers - 1))
    if not np.isnan(late.g):
        n_late = late.size / late.g
        n_early = max(1.0, len(early) / late.g) * n_walkers
        error = float(np.sqrt(late.variance * (1 / n_early + 1 / n_late)))
        freedom = n_late
        if not late.has_many_walkers:
            freedom = min(n_early, n_late) / max(1.0, late.kurtosis - 1)
        tests.append(_student(difference, error, max(1.0, freedom)))
    return max(tests, key=lambda test: test[1])


def _student(difference: float, error: float, freedom: float) -> tuple[float, float]:
    if error == 0.0:
        return (0.0, 1.0) if difference == 0.0 else (float(np.sign(difference) * np.inf), 0.0)
    z = difference / error
    return z, float(2 * stdtr(freedom, -abs(z)))


def _length_of_transient(mean: Array, variance_of_mean: float) -> int:
    """Return how many iterations of a mean over walkers [n] to leave out, for the smallest error.

    c + A exp(-t/τ) is fitted by least squares. What it leaves of the transient is the bias of the
    mean over the rest, whose squared standard error is the variance given (of one iteration, with
    its correlation) over the number of iterations: the sum of the two squares is smallest there.
    Where a step fits better, everything before the step is left out.
    """
    t = np.arange(len(mean))
    centred = mean - mean.mean()
    best, amplitude, tau = 0.0, 0.0, 1.0
    for each in np.geomspace(0.5, 2 * len(mean), _TIMES):
        shape = np.exp(-t / each)
        shape -= shape.mean()
        product, norm = float(shape @ centred), float(shape @ shape)
        if product**2 / norm > best:
            best, amplitude, tau = product**2 / norm, product / norm, float(each)
    left = len(mean) - t
    steps = np.cumsum(centred)[:-1] ** 2 * (1 / t[1:] + 1 / left[1:])  # removed from the squares
    if steps.max() > best:
        return int(np.argmax(steps)) + 1
    decay = np.exp(-t / tau)
    sums = np.cumsum(decay[::-1])[::-1]
    squares = (amplitude * sums / left) ** 2 + variance_of_mean / left
    return int(np.argmin(squares))
