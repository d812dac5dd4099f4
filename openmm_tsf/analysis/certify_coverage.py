"""What trajectories never visited, and what a flow does not reach: each judged by the other.

A flow's weighted draws are independent: they tell the population of basins that no walker found, as
far as the flow finds them. Frames tell where the flow's density is too low, as far as walkers have
been there. Neither sees what both miss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.special import expit, gammaincinv, logsumexp  # type: ignore[import-untyped]

from openmm_tsf.analysis.agreement import RARE
from openmm_tsf.analysis.certify_checks import (
    MAX_Z,
    MISSING,
    NOTED,
    PASSED,
    UNDECIDED,
    WRONG,
    Check,
)
from openmm_tsf.analysis.convergence import Assessment, assess_probability
from openmm_tsf.analysis.statistics import Array, reverse_ess
from openmm_tsf.analysis.uncertainty import estimate_mean

Labels = npt.NDArray[np.int64]

#: Of one-sided bounds.
CONFIDENCE = 0.95
_NORMAL = 1.6449
#: Standard error of the ln of the normalisation, above which flow and frames hardly overlap.
MAX_ERROR = 0.5
#: A basin is hardly reached where the flow's density is lower than this at half of its frames, in
#: ln(p/q): twenty times too few draws.
MAX_MEDIAN = 3.0
#: Of a population that is compared.
MAX_RELATIVE_ERROR = 0.25
#: Fewer effective draws say nothing of what is missing.
MIN_ESS = 30.0


@dataclass(frozen=True)
class WeightedPoints:
    """ln(p/q) [...] of conformations, up to a constant, and their basin [..., G] in each group."""

    log_weights: Array
    labels: Labels


@dataclass(frozen=True)
class BasinCoverage:
    """One basin at one temperature, by the frames and by the flow's weighted draws."""

    name: str
    frames: Assessment  # of the population, from the frames alone
    n_draws: int  # of the flow, in this basin
    p: float  # the population by the flow's weights; NaN where they do not overlap the frames'
    stderr: float  # of ln p, where the basin has frames and draws; NaN elsewhere
    low: float  # bounds at 95 %, each one-sided
    high: float
    median_log_weight: float  # of ln(p/q) at the frames; NaN without frames
    unreached: float  # the part of its frames that the flow does not reach; NaN without

    @property
    def visited(self) -> bool:
        """Whether any frame is in the basin."""
        return self.frames.value > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self) | {"frames": self.frames.to_dict(), "visited": self.visited}


@dataclass(frozen=True)
class Coverage:
    """Frames and flow beside each other at one temperature."""

    temperature: float  # K
    n_draws: int
    ess: float  # effective number of the weighted draws (Kish)
    stderr: float  # of the ln of the flow's normalisation, by draws and frames together
    unvisited: float  # the population outside the basins that were visited, by the flow
    unvisited_high: float  # its upper bound at 95 %
    unreached: Assessment  # the population that the flow draws less than once in n_draws frames
    basins: tuple[BasinCoverage, ...]

    @property
    def decided(self) -> bool:
        """Whether flow and frames overlap enough for any statement."""
        return self.stderr <= MAX_ERROR and self.ess >= MIN_ESS

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self) | {
            "unreached": self.unreached.to_dict(),
            "basins": {basin.name: basin.to_dict() for basin in self.basins},
            "decided": self.decided,
        }


def hardly_reached(coverage: Sequence[Coverage]) -> dict[str, float]:
    """Return the basins that a flow draws far too rarely, with the largest median of ln(p/q).

    By the frames of any temperature: the fewer frames of a basin there are at one, the more of them
    came by the flow itself and have low weights. Weighted draws say nothing certain of such basins.
    """
    medians: dict[str, float] = {}
    for each in coverage:
        for basin in each.basins if each.decided else ():
            if basin.median_log_weight > MAX_MEDIAN:
                medians[basin.name] = max(medians.get(basin.name, 0.0), basin.median_log_weight)
    return medians


def check_coverage(coverage: Sequence[Coverage]) -> list[Check]:
    """Check what the frames never visited, and note what the flow does not reach."""
    hardly = hardly_reached(coverage)
    checks = [check for each in coverage for check in _check(each, hardly)]
    for name, median in hardly.items():
        words = (
            f"the flow hardly reaches {name} (ln(p/q) is {median:.1f} at half of its frames): it "
            "tells little of it, and walkers enter it by other moves"
        )
        checks.append(Check("not reached by the flow", "all temperatures", NOTED, words))
    return checks


def _check(coverage: Coverage, hardly: Mapping[str, float]) -> list[Check]:
    """Return the checks of one temperature; `hardly` is from `hardly_reached`."""
    where = f"{coverage.temperature:.2f} K"
    if not coverage.decided:
        words = (
            "what was never visited cannot be told: frames and draws of the flow hardly overlap "
            f"({coverage.ess:.1f} effective draws of {coverage.n_draws:,}, an error of "
            f"{coverage.stderr:.2g} in ln Z); a better flow decides"
        )
        return [Check("never visited", where, UNDECIDED, words)]
    checks = [
        _check_unvisited(basin, where, basin.name in hardly)
        for basin in coverage.basins
        if not basin.visited
    ]
    words = (
        f"by the flow, what was never visited holds at most {coverage.unvisited_high:.2g} (95 %), "
        "as far as the flow reaches"
    )
    numbers = {"p": coverage.unvisited, "high": coverage.unvisited_high}
    checks.append(Check("never visited", where, PASSED, words, numbers))
    unreached = coverage.unreached
    words = (
        f"frames that the flow would not draw once in {coverage.n_draws:,} hold "
        f"{unreached.value:.2g}, at most {unreached.high:.2g} (95 %)"
    )
    numbers = {"p": unreached.value, "high": unreached.high}
    checks.append(Check("not reached by the flow", where, PASSED, words, numbers))
    return [*checks, *_check_populations(coverage, where)]


def _check_populations(coverage: Coverage, where: str) -> list[Check]:
    """Compare populations by the number of frames with those by weights within each basin.

    Only where both are known to a quarter, and the flow reaches the basin: with little overlap the
    weights of finitely many draws and frames agree with the number of frames too easily.
    """
    wrong, largest = [], 0.0
    for basin in coverage.basins:
        by_frames = basin.frames.stderr / basin.frames.value if basin.visited else np.nan
        error = float(np.hypot(by_frames, basin.stderr))
        known = by_frames <= MAX_RELATIVE_ERROR and basin.stderr <= MAX_RELATIVE_ERROR
        if not known or basin.median_log_weight > MAX_MEDIAN:
            continue
        among_visited = basin.p / (1.0 - coverage.unvisited)
        z = float(np.log(basin.frames.value / among_visited) / error)
        largest = max(largest, abs(z))
        if abs(z) >= MAX_Z:
            wrong.append(
                f"{basin.name} has {basin.frames.value:.3g} of the frames, and holds "
                f"{among_visited:.3g} by the weights of frames and draws in it ({z:+.1f} errors)"
            )
    if wrong:
        words = f"basins are not populated as the flow tells: {'; '.join(wrong)}"
        return [Check("populations by the flow", where, WRONG, words)]
    words = f"basins are populated as the flow tells, to {largest:.1f} errors"
    return [Check("populations by the flow", where, PASSED, words)]


def _check_unvisited(basin: BasinCoverage, where: str, hardly: bool) -> Check:
    """Judge a basin without frames by its population in the flow's weighted draws."""
    interval = f"{basin.p:.2g} ({basin.low:.2g} to {basin.high:.2g}, 95 % each)"
    words = f"{basin.name} was never visited; by the flow's weighted draws it holds {interval}"
    numbers = {"p": basin.p, "low": basin.low, "high": basin.high, "n_draws": basin.n_draws}
    if basin.low > max(basin.frames.high, RARE):
        words += f", by its absence from the frames at most {basin.frames.high:.2g}: it is missing"
        return Check("never visited", where, WRONG, words, numbers)
    if hardly:
        words += ", but the flow hardly reaches it"
    status = PASSED if basin.high < RARE and not hardly else MISSING
    return Check("never visited", where, status, words, numbers)


def measure_coverage(
    temperature: float,
    basins: Sequence[str],
    draws: WeightedPoints,
    frames: WeightedPoints,
    n_draws: int,
    n_pieces: float | None = None,
) -> Coverage:
    """Compare weighted draws of a flow with frames, basin by basin.

    The normalisation of the weights is that of draws and frames together, in the basins that were
    visited (Bennett's acceptance ratio), so that a flow which draws some of them too rarely does
    not make the others look too populated.

    Parameters
    ----------
    temperature
        In K.
    basins
        Their names, to which labels refer.
    draws
        Of the flow, [D], those in the domain of its coordinates; weights are -inf where p = 0.
    frames
        Of the trajectories, [n, W]; weights are +inf where q = 0.
    n_draws
        The number of draws with those outside the domain.
    n_pieces
        Independent pieces of the trajectory, see `assess_probability`.
    """
    is_known = np.isin(draws.labels, np.unique(frames.labels)).all(axis=-1)
    known, other = draws.log_weights[is_known], draws.log_weights[~is_known]
    log_z, stderr = _normalisation(known, frames.log_weights)
    has_weight = np.isfinite(draws.log_weights).any()
    ess = reverse_ess(draws.log_weights).fraction * len(draws.log_weights) if has_weight else 0.0
    n_known = max(len(known), 1)
    # Relative to the population of the basins that were visited.
    scale = log_z + np.log(n_known)
    ratio, _, high = _bounds(other - scale, ess, stderr)
    # ln(p/q), both normalised over the whole space.
    excess = frames.log_weights - (scale - np.log(n_draws) + np.log1p(ratio))
    missed = excess > np.log(n_draws)
    by_weights = _populations(draws, frames)
    table = []
    for k, name in enumerate(basins):
        inside, drawn = (frames.labels == k).any(axis=-1), (draws.labels == k).any(axis=-1)
        if k in by_weights:
            value, error = by_weights[k]
            width = np.exp(_NORMAL * error)
            bounds = value, value / width, value * width
        elif inside.any():  # frames and draws of the basin do not overlap
            bounds, error = (np.nan, 0.0, 1.0 + ratio), np.nan
        else:
            bounds, error = _bounds(draws.log_weights[drawn] - scale, ess, stderr), np.nan
        p, low, top = (bound / (1.0 + ratio) for bound in bounds)
        visited = bool(inside.any())
        table.append(
            BasinCoverage(
                name=name,
                frames=assess_probability(inside, n_pieces),
                n_draws=int(drawn.sum()),
                p=p,
                stderr=error,
                low=low,
                high=min(top, 1.0),
                median_log_weight=float(np.median(excess[inside])) if visited else np.nan,
                unreached=float(missed[inside].mean()) if visited else np.nan,
            )
        )
    return Coverage(
        temperature=temperature,
        n_draws=n_draws,
        ess=ess,
        stderr=stderr,
        unvisited=ratio / (1.0 + ratio),
        unvisited_high=high / (1.0 + high) if np.isfinite(high) else 1.0,
        unreached=assess_probability(missed, n_pieces),
        basins=tuple(table),
    )


def _populations(draws: WeightedPoints, frames: WeightedPoints) -> dict[int, tuple[float, float]]:
    """Return p and the standard error of ln p of each basin whose frames and draws overlap.

    All such basins of a group are together as populated as they are with frames. The weights in a
    basin give its normalisation, and the number of draws its share of q: the number of frames in it
    does not enter.
    """
    result: dict[int, tuple[float, float]] = {}
    for group in range(frames.labels.shape[-1]):
        log_z: dict[int, float] = {}
        variance: dict[int, float] = {}
        n_frames = 0
        for k in np.unique(frames.labels[..., group]).tolist():
            of_draws = draws.log_weights[draws.labels[:, group] == k]
            of_frames = frames.log_weights[frames.labels[..., group] == k]
            mean, error = _normalisation(of_draws, of_frames[:, None])
            if np.isfinite(error):
                log_z[k] = mean + np.log(len(of_draws))
                variance[k] = error**2 + 1.0 / len(of_draws)
                n_frames += len(of_frames)
        total = _log_sum(np.array(list(log_z.values())))
        shares = {k: float(np.exp(value - total)) for k, value in log_z.items()}
        for k, share in shares.items():
            others = sum(shares[j] ** 2 * variance[j] for j in shares if j != k)
            p = share * n_frames / frames.log_weights.size
            result[k] = p, float(np.sqrt((1.0 - share) ** 2 * variance[k] + others))
    return result


def _normalisation(draws: Array, frames: Array) -> tuple[float, float]:
    """Return ln of the mean weight of draws [D] of the frames' basins, and its standard error.

    Bennett, J. Comput. Phys. 22, 245 (1976): draws of q and frames [n, W] of p, both in the same
    basins. The error includes the correlation of the frames; infinite without overlap.
    """
    finite = np.concatenate([draws[np.isfinite(draws)], frames[np.isfinite(frames)]])
    if not len(draws) or not np.isfinite(draws).any() or not np.isfinite(frames).any():
        return 0.0, np.inf
    shift = np.log(frames.size / len(draws))

    def score(log_z: float) -> float:
        of_draws = expit(draws - log_z + shift).sum()
        return float(of_draws - expit(-(frames - log_z + shift)).sum())

    edge = 50.0 + abs(shift)
    log_z = float(brentq(score, finite.min() - edge, finite.max() + edge, xtol=1e-8))
    f, g = expit(draws - log_z + shift), expit(frames - log_z + shift)
    information = float((f * (1 - f)).sum() + (g * (1 - g)).sum())
    error = estimate_mean(g).stderr
    variance = len(draws) * f.var() + (frames.size * error) ** 2
    known = information > 0 and np.isfinite(variance)
    return log_z, float(np.sqrt(variance) / information) if known else np.inf


def _bounds(log_weights: Array, ess: float, stderr: float) -> tuple[float, float, float]:
    """Return the sum of weights of independent draws, with one-sided bounds at 95 %.

    The bounds are Poisson's for the effective number of draws k = (sum w)²/(sum w²), scaled (Bohm
    and Zech, Nucl. Instrum. Methods A 748, 1 (2014)), widened by `stderr` of the normalisation. No
    draw at all: less than 3 of `ess` effective ones.
    """
    total = _log_sum(log_weights)
    if not np.isfinite(total):
        return 0.0, 0.0, -np.log(1 - CONFIDENCE) / ess if ess > 0 else np.inf
    k = float(np.exp(2 * total - _log_sum(2 * log_weights)))
    low, high = gammaincinv(k, 1 - CONFIDENCE) / k, gammaincinv(k + 1, CONFIDENCE) / k
    widths = [np.hypot(np.log(factor), _NORMAL * stderr) for factor in (low, high)]
    value = float(np.exp(total))
    return value, float(value * np.exp(-widths[0])), float(value * np.exp(widths[1]))


def _log_sum(log_weights: Array) -> float:
    return float(logsumexp(log_weights)) if len(log_weights) else -np.inf
