"""Is a number converged? Estimates of correlated series with intervals, and what they still lack.

`assess_mean`, `assess_variance` and `assess_probability` take the series [n, W] of W independent
walkers and return an `Assessment`: the estimate, its standard error and 95 % interval, and the
reasons, in words, for which it does not yet count as converged.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, ndtri, stdtrit  # type: ignore[import-untyped]

from openmm_tsf.analysis.mixing import drift_between_halves, split_r_hat
from openmm_tsf.analysis.statistics import (
    MIN_CORRELATION_TIMES,
    MIN_EFFECTIVE_SAMPLES,
    Array,
    finite_series,
    logit_free_energy,
)
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean

#: Intervals hold the true value with this probability.
CONFIDENCE = 0.95
MAX_R_HAT = 1.05
#: Largest |z| of the second half less the first.
MAX_DRIFT = 3.0
#: A probability has a relative error of 25 % with 16 effective successes (or failures).
MIN_EFFECTIVE_SUCCESSES = 16
MIN_VISITS = 50


@dataclass(frozen=True)
class Assessment:
    """An estimate with its error, its 95 % interval, and what it lacks to be converged.

    Numbers that are not known are NaN.
    """

    value: float
    stderr: float
    low: float
    high: float
    #: Variance of the observable over stderr². Of a state that was never seen (or never left):
    #: the independent pieces of the run that the bound rests on.
    n_eff: float
    r_hat: float
    drift: float  # z of the second half of the walkers less the first
    n_visits: int | None  # independent visits to the rarer of the state and its complement
    missing: tuple[str, ...]  # what it lacks, in words; nothing if it is converged
    n_iterations_needed: float | None  # saved iterations in all; None where it cannot be predicted

    @property
    def converged(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and ``converged`` for JSON; numbers that are not known are None."""
        table = dataclasses.asdict(self) | {
            "missing": list(self.missing),
            "converged": self.converged,
        }
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in table.items()
        }

    def free_energy(self) -> "Assessment":
        """Return -ln[p/(1-p)] of a probability p in kT, with the interval of p.

        Its error is that of the delta method; of a state that was never seen the value is infinite
        and `low` a lower bound.

        Examples
        --------
        >>> import numpy as np
        >>> from openmm_tsf.analysis.convergence import assess_probability
        >>> state = assess_probability(np.zeros((500, 30), dtype=bool)).free_energy()
        >>> state.value, round(state.low, 2), state.converged
        (inf, 2.25, False)
        """
        value, stderr = logit_free_energy(self.value, self.stderr)
        with np.errstate(divide="ignore"):
            low, high = (float(np.log1p(-p) - np.log(p)) for p in (self.high, self.low))
        return dataclasses.replace(self, value=value, stderr=stderr, low=low, high=high)


def assess_mean(series: npt.ArrayLike) -> Assessment:
    """Assess the mean of a series [n, W] of W independent walkers, in the units of the series.

    The error is that of `openmm_tsf.analysis.uncertainty.estimate_mean`, the interval Student's,
    with the degrees of freedom of the spread of the walkers.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.convergence import assess_mean
    >>> energy = np.random.default_rng(1).normal(-59.0, 12.0, size=(400, 16))
    >>> assessed = assess_mean(energy)
    >>> assessed.converged, assessed.low < -59.0 < assessed.high
    (True, True)
    """
    values = finite_series(series)
    estimate = estimate_mean(values)
    half = _student_quantile(estimate) * estimate.stderr
    low, high = estimate.value - half, estimate.value + half
    return _assess(estimate, values, (low, high))


def assess_variance(series: npt.ArrayLike, scale: float = 1.0) -> Assessment:
    """Assess the variance of a series [n, W] of W independent walkers, times `scale`.

    The heat capacity var(U)/(k T²) has the scale 1/(k T²). The interval is one of the logarithm: a
    variance is positive, and its estimate skewed. R̂ and drift are those of the squared deviations
    from the mean of all samples; R̂ that of the series where it is larger.
    """
    values = finite_series(series)
    if not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    squares = scale * (values - values.mean()) ** 2
    estimate = estimate_mean(squares)
    factor = math.nan
    if estimate.stderr > 0:  # not for NaN
        with np.errstate(over="ignore"):
            factor = float(np.exp(_student_quantile(estimate) * estimate.stderr / estimate.value))
    interval = estimate.value / factor, estimate.value * factor
    return _assess(estimate, squares, interval, r_hat=split_r_hat(values))


def assess_probability(inside: npt.ArrayLike, n_pieces: float | None = None) -> Assessment:
    """Assess the probability of a state from truth values [n, W] of W independent walkers.

    The interval is Clopper and Pearson's (exact, binomial) for the effective samples p(1-p)/SE²,
    fewer where the walkers' spread is poorly known: Korn and Graubard, Survey Methodology 24, 193
    (1998). The correlation time of a state is not known from fewer than 50 independent visits:
    then all samples count as no more than `n_pieces` independent ones. A state that was never seen
    (never left) has a bound at 95 % from that number.

    Parameters
    ----------
    inside : array of bool [n, W]
        Whether each walker was in the state.
    n_pieces : float, optional
        The number of independent samples that the run has by its slowest other observable, see
        `count_pieces`; by default the number of walkers, and never taken as less.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.convergence import assess_probability
    >>> never = assess_probability(np.zeros((500, 30), dtype=bool))
    >>> never.value, round(never.high, 3), never.missing
    (0.0, 0.095, ('the state was never visited',))
    """
    truth = np.asarray(inside)
    if truth.dtype != np.bool_:
        raise TypeError(f"inside: expected truth values, got {truth.dtype}")
    values = finite_series(truth)
    n_walkers = float(values.shape[1])
    pieces = n_walkers if n_pieces is None else max(float(n_pieces), n_walkers)
    if not math.isfinite(pieces):
        raise ValueError(f"n_pieces: expected a finite number, got {n_pieces}")
    pieces = min(pieces, float(values.size))
    estimate = estimate_mean(values)
    p = estimate.value
    if p in (0.0, 1.0):
        return _assess_unseen(estimate, values, pieces)
    visits = count_visits(truth if p <= 0.5 else ~truth, estimate.g)
    known = estimate.n_eff  # if the correlation time is
    normal = float(ndtri(0.5 + 0.5 * CONFIDENCE))
    n = known * (normal / _student_quantile(estimate)) ** 2
    if visits < MIN_VISITS:
        n = min(n, pieces)
        estimate = dataclasses.replace(
            estimate, stderr=max(estimate.stderr, math.sqrt(p * (1.0 - p) / pieces))
        )
    longest = _next_longest_visit(truth, estimate.g), _next_longest_visit(~truth, estimate.g)
    high = _upper_limit(p, n, (1.0 - p) * longest[0] / values.size)
    low = 1.0 - _upper_limit(1.0 - p, n, p * longest[1] / values.size)
    return _assess(estimate, values, (low, high), visits, known)


def _assess_unseen(estimate: MeanEstimate, values: Array, pieces: float) -> Assessment:
    """Bound the probability of a state that was never seen, or never left, from one side."""
    bound = 1.0 - (1.0 - CONFIDENCE) ** (1.0 / pieces)
    never = estimate.value == 0.0
    return Assessment(
        value=estimate.value,
        stderr=math.nan,
        low=0.0 if never else 1.0 - bound,
        high=bound if never else 1.0,
        n_eff=pieces,
        r_hat=math.nan,
        drift=math.nan,
        n_visits=0,
        missing=("the state was never visited" if never else "the state was never left",),
        n_iterations_needed=None,
    )


def clopper_pearson(p: float, n: float) -> tuple[float, float]:
    """Return the exact 95 % interval of a probability estimated as p from n independent samples.

    Clopper and Pearson, Biometrika 26, 404 (1934); n, and the successes p n, may be any positive
    numbers.

    Examples
    --------
    >>> from openmm_tsf.analysis.convergence import clopper_pearson
    >>> [round(bound, 4) for bound in clopper_pearson(0.2, 10)]
    [0.0252, 0.5561]
    """
    if not (0.0 <= p <= 1.0 and n > 0):
        raise ValueError(f"p, n: expected a probability and a positive number, got {p}, {n}")
    successes, tail = p * n, 0.5 * (1.0 - CONFIDENCE)
    failures = n - successes
    low = float(betaincinv(successes, failures + 1.0, tail)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1.0, failures, 1.0 - tail)) if failures > 0 else 1.0
    return low, high


def _upper_limit(p: float, n: float, longest: float) -> float:
    """Return the upper limit of a probability from n effective samples, whose visits vary.

    `longest` is what the longest visit contributes to p. Fay and Feuer, Stat. Med. 16, 791 (1997):
    the limit is that of the data with one more such visit. It is Clopper and Pearson's where no
    visit counts more than one effective sample.
    """
    weight = max(longest, 1.0 / n)
    if p + weight >= 1.0:
        return 1.0
    successes = (p + weight) ** 2 / (p / n + weight**2)
    failures = successes / (p + weight) - successes + 1.0
    return float(betaincinv(successes, failures, 0.5 + 0.5 * CONFIDENCE))


def _next_longest_visit(inside: npt.NDArray[np.bool_], g: float) -> float:
    """Return a length that the longest visit has in a run of three times as many.

    From V lengths, extrapolated along the line of log length over log rank through the ranks 1 and
    √V: visits that were not seen have a probability of at most 3/V (95 %).
    """
    walker, iteration = np.nonzero(inside.T)
    new = (np.diff(walker) != 0) | (np.diff(iteration) - 1 > g)
    borders = np.flatnonzero(np.concatenate([[True], new, [True]]))
    lengths = np.sort(np.diff(borders))[::-1]
    rank = round(math.sqrt(lengths.size))
    if rank < 3:
        return float(lengths[0])
    steps = math.log(3.0) / math.log(rank)
    return float(lengths[0] * (lengths[0] / lengths[rank - 1]) ** steps)


def count_visits(inside: npt.ArrayLike, g: float) -> int:
    """Count the independent visits to a state in truth values [n, W] of W independent walkers.

    The first visit of each walker counts, and each that comes after the walker was outside for
    longer than g, the statistical inefficiency in saved iterations (taken as 1 where it is NaN).
    """
    truth = np.asarray(inside)
    if truth.dtype != np.bool_ or truth.ndim != 2 or truth.size == 0:
        raise ValueError(
            f"inside: expected truth values [n, W], got {truth.dtype} of shape {truth.shape}"
        )
    walker, iteration = np.nonzero(truth.T)
    if walker.size == 0:
        return 0
    outside = np.diff(iteration) - 1
    longest = 1.0 if math.isnan(g) else g
    return int(1 + ((np.diff(walker) != 0) | (outside > longest)).sum())


def count_pieces(*series: npt.ArrayLike, angles: Iterable[npt.ArrayLike] = ()) -> float:
    """Return the number of independent samples that a run has by its slowest known observable.

    That is the smallest number of effective samples over series [n, W] of the same walkers (of
    energies, states that were visited, cosine and sine of each of the `angles`, in rad), at least
    W; constant series tell nothing and are left out.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.convergence import assess_probability, count_pieces
    >>> energy = np.random.default_rng(1).normal(size=(500, 30))
    >>> pieces = count_pieces(energy)
    >>> 12_000 < pieces < 16_000
    True
    >>> assess_probability(np.zeros((500, 30), dtype=bool), pieces).high < 3e-4
    True
    """
    circular = [f(np.asarray(angle, np.float64)) for angle in angles for f in (np.cos, np.sin)]
    arrays = [finite_series(each) for each in (*series, *circular)]
    if not arrays:
        raise ValueError("series: expected at least one, got none")
    estimates = [estimate_mean(values) for values in arrays]
    known = [e.n_independent for e in estimates if not math.isnan(e.n_independent)]
    n_walkers = max(values.shape[1] for values in arrays)
    return max(float(n_walkers), min(known, default=0.0))


def _student_quantile(estimate: MeanEstimate) -> float:
    """Return the half width of the 95 % interval in standard errors."""
    return float(stdtrit(max(estimate.dof, 1.0), 0.5 + 0.5 * CONFIDENCE))


def _assess(
    estimate: MeanEstimate,
    values: Array,
    interval: tuple[float, float],
    visits: int | None = None,
    expected_n_eff: float | None = None,
    r_hat: float = math.nan,
) -> Assessment:
    """Judge an estimate from the series [n, W] that it is the mean of.

    Predictions rest on `expected_n_eff`, the effective samples that more visits would confirm.
    """
    n = len(values)
    n_eff = estimate.n_independent
    growing = n_eff if expected_n_eff is None else expected_n_eff
    r_hat = float(np.fmax(split_r_hat(values), r_hat))
    drift = drift_between_halves(values)
    lacks: list[tuple[str, float]] = []  # reasons, and by how much the run is to grow

    def require(enough: bool, reason: str, factor: float) -> None:
        if not enough:
            lacks.append((reason, factor))

    if not estimate.stderr > 0:  # also for NaN
        lacks.append(("the error is not known", math.nan))
        return _build(estimate, interval, n_eff, r_hat, drift, visits, lacks, n)
    require(
        n_eff >= MIN_EFFECTIVE_SAMPLES,
        f"{n_eff:.3g} effective samples, fewer than {MIN_EFFECTIVE_SAMPLES}",
        MIN_EFFECTIVE_SAMPLES / growing,
    )
    require(
        n >= MIN_CORRELATION_TIMES * estimate.g,
        f"walkers are shorter than {MIN_CORRELATION_TIMES} correlation times "
        f"({n} saved iterations, g = {estimate.g:.3g})",
        MIN_CORRELATION_TIMES * estimate.g / n,
    )
    if visits is not None:
        rarer = min(estimate.value, 1.0 - estimate.value)
        what = "successes" if rarer == estimate.value else "failures"
        require(
            rarer * n_eff >= MIN_EFFECTIVE_SUCCESSES,
            f"{rarer * n_eff:.2g} effective {what}, fewer than {MIN_EFFECTIVE_SUCCESSES}",
            MIN_EFFECTIVE_SUCCESSES / (rarer * growing),
        )
        require(
            visits >= MIN_VISITS,
            f"{visits} independent visits, fewer than {MIN_VISITS}",
            MIN_VISITS / max(visits, 1),
        )
    excess = (r_hat**2 - 1.0) / (MAX_R_HAT**2 - 1.0)  # falls as 1/n
    agreement = f"split-R-hat {r_hat:.3g}, more than {MAX_R_HAT}"
    halves = f"the second half differs from the first by {drift:+.1f} standard errors"
    require(
        r_hat <= MAX_R_HAT, "split-R-hat is not known" if math.isnan(r_hat) else agreement, excess
    )
    require(
        abs(drift) < MAX_DRIFT,
        "whether its halves agree is not known" if math.isnan(drift) else halves,
        2.0,  # the present run would be the part to leave out
    )
    return _build(estimate, interval, n_eff, r_hat, drift, visits, lacks, n)


def _build(
    estimate: MeanEstimate,
    interval: tuple[float, float],
    n_eff: float,
    r_hat: float,
    drift: float,
    visits: int | None,
    lacks: list[tuple[str, float]],
    n: int,
) -> Assessment:
    factor = max((each for _, each in lacks), default=1.0)
    predictable = all(math.isfinite(each) for _, each in lacks)
    return Assessment(
        value=estimate.value,
        stderr=estimate.stderr,
        low=interval[0],
        high=interval[1],
        n_eff=n_eff,
        r_hat=r_hat,
        drift=drift,
        n_visits=visits,
        missing=tuple(reason for reason, _ in lacks),
        n_iterations_needed=float(math.ceil(n * factor)) if predictable else None,
    )
