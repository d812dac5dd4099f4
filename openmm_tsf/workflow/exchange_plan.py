"""What a target of precision costs by plain replica exchange of dynamics, from a pilot."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.convergence import MIN_EFFECTIVE_SUCCESSES, MIN_VISITS
from openmm_tsf.analysis.exchange_model import PassageSamples, populations, state_inefficiency
from openmm_tsf.analysis.ladder import (
    cheapest_ladder,
    communication_barrier,
    ladder_rejections,
    round_trip_rate,
)
from openmm_tsf.analysis.statistics import MIN_EFFECTIVE_SAMPLES, Array, statistical_inefficiency
from openmm_tsf.analysis.targets import Target
from openmm_tsf.workflow.pilot import N_STEPS, Pilot

#: Pilots that are drawn from the walkers of the one that was run, and the part of what they
#: predict that lies in the range.
_RESAMPLES, _IN_RANGE = 100, 0.9
#: A well that makes up this part of a state's variance is the one that it lies in.
_EXPLAINED = 0.3


@dataclass(frozen=True)
class Observable:
    """What a pilot knows of the observable whose mean a target is about.

    Attributes
    ----------
    mean, variance
        At the lowest temperature.
    asymptotic_variance
        The squared standard error of its mean times the iterations of replica exchange.
    explained
        The part of the variance that is between the state and its complement.
    slowest
        The state whose visits decide it; None where the energy does.
    n_passages
        How often the pilot's replicas passed into that state or out of it, the rarer of the two.
    resample
        What it would be of as many walkers of the pilot, drawn with replacement.
    """

    mean: float
    variance: float
    asymptotic_variance: float
    explained: float
    slowest: str | None
    n_passages: int | None
    resample: Callable[[np.random.Generator], "Observable"] | None = None

    @property
    def g(self) -> float:
        """The statistical inefficiency in iterations of replica exchange."""
        return self.asymptotic_variance / self.variance if self.variance > 0 else math.nan

    def samples_needed(self, target: Target) -> float:
        """Return the independent samples that meet a target.

        NaN where the pilot never saw the state, or no replica passed into it and out of it.
        """
        p = self.mean
        is_state = target.quantity in ("P", "dF")
        if not self.variance > 0 or (is_state and (not 0.0 < p < 1.0 or self.n_passages == 0)):
            return math.nan
        tolerance = target.tolerance * (abs(p) if target.relative else 1.0)
        least = float(MIN_EFFECTIVE_SAMPLES)
        if is_state:
            least = max(least, max(MIN_VISITS, MIN_EFFECTIVE_SUCCESSES) / min(p, 1.0 - p))
        if target.quantity == "dF":
            tolerance *= p * (1.0 - p)
        return max(least, self.variance / tolerance**2) if tolerance > 0 else math.nan


@dataclass(frozen=True)
class ExchangePlan:
    """Plain replica exchange with one ladder.

    ``barrier`` is Λ, the sum of rejections over a fine ladder. Round trips are those of all
    replicas of a ladder in an iteration of 0.1 ps: at best, with energies that are independent from
    swap to swap, and as the pilot's replicas made them on its own ladder, in proportion. Ranges,
    of the evaluations and of the independent samples needed, hold nine of ten pilots that are drawn
    from the walkers of this one.
    """

    temperatures: tuple[float, ...]
    rejections: tuple[float, ...]
    barrier: float
    best_round_trips: float
    measured_round_trips: float
    g: float
    slowest: str | None
    n_passages: int | None
    energy_evaluations: float
    evaluations_range: tuple[float, float]
    samples_range: tuple[float, float]
    wall_seconds: float

    @property
    def seconds_range(self) -> tuple[float, float]:
        """The range of the time, by that of the evaluations."""
        each = self.wall_seconds / self.energy_evaluations
        return (each * self.evaluations_range[0], each * self.evaluations_range[1])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def plan_exchange(
    pilot: Pilot, target: Target, ladder: Sequence[float] | None = None
) -> tuple[Observable, ExchangePlan]:
    """Predict what a target at the lowest temperature costs by plain replica exchange.

    With the ladder in K, or the one that makes the most round trips per evaluation.
    """
    rejection = pilot.rejection()
    low, high = pilot.temperatures[0], pilot.temperatures[-1]
    ladder = cheapest_ladder(rejection, low, high) if ladder is None else tuple(ladder)
    rejections = ladder_rejections(rejection, ladder)
    mixing = pilot.mixing()
    known = _slowest(_observables(pilot, target, ladder, rejections, mixing), target)
    each = len(ladder) * N_STEPS
    evaluations = known.samples_needed(target) * known.g * each
    samples_range, iterations_range = _ranges(known, target)
    rate = round_trip_rate(rejections)
    return known, ExchangePlan(
        temperatures=ladder,
        rejections=tuple(map(float, rejections)),
        barrier=communication_barrier(rejection, low, high),
        best_round_trips=rate,
        measured_round_trips=mixing * rate,
        g=known.g,
        slowest=known.slowest,
        n_passages=known.n_passages,
        energy_evaluations=evaluations,
        evaluations_range=(each * iterations_range[0], each * iterations_range[1]),
        samples_range=samples_range,
        wall_seconds=evaluations * pilot.seconds_per_evaluation,
    )


def _ranges(known: Observable, target: Target) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ranges of the independent samples and of the iterations that are needed."""
    samples = known.samples_needed(target)
    if known.resample is None or math.isnan(samples):
        return (math.nan, math.nan), (math.nan, math.nan)
    rng = np.random.default_rng(1)
    drawn = [known.resample(rng) for _ in range(_RESAMPLES)]
    needed = np.array([each.samples_needed(target) for each in drawn])
    iterations = needed * [each.g for each in drawn]
    ranges = []
    for values in (needed, iterations):
        # A pilot without a passage predicts nothing: the costs have no upper bound then.
        values = np.where(np.isnan(values), np.inf, values)
        tails = (0.5 * (1 - _IN_RANGE), 0.5 * (1 + _IN_RANGE))
        low, high = np.quantile(values, tails, method="nearest")
        ranges.append((float(low), float(high)))
    return ranges[0], ranges[1]


def _slowest(candidates: Iterator[Observable], target: Target) -> Observable:
    """Return what decides the error.

    The population of a state is not known from a pilot that started elsewhere, but from the rates
    of the well that it lies in.
    """
    known = list(candidates)
    if target.quantity in ("P", "dF") and any(each.explained > _EXPLAINED for each in known):
        return max(known, key=lambda each: each.explained)
    return max(known, key=lambda each: each.asymptotic_variance)


def _observables(
    pilot: Pilot, target: Target, ladder: tuple[float, ...], rejections: Array, mixing: float
) -> Iterator[Observable]:
    """Yield what the observable is if the visits to each well of a torsion decide, or none does."""
    bends = {name: pilot.others[name] for name in pilot.bends}
    series = target.series(pilot.energy, {**pilot.angles, **bends}, pilot.others)
    if target.quantity == "C_V":
        scale = pilot.boltzmann_constant * pilot.temperatures[0] ** 2
        series = (series - series[:, :, 0].mean()) ** 2 / scale
    lowest = series[:, :, 0]

    def without_state(walkers: npt.NDArray[np.int64]) -> Observable:
        values = lowest[:, walkers]
        mean, variance = float(values.mean()), float(values.var())
        g = statistical_inefficiency(values) if variance > 0 else 0.0
        return Observable(mean, variance, variance * g, 0.0, None, None, drawn)

    def drawn(rng: np.random.Generator) -> Observable:
        return without_state(rng.integers(lowest.shape[1], size=(lowest.shape[1],)))

    yield without_state(np.arange(lowest.shape[1]))
    for torsion in pilot.angles:
        wells = pilot.wells(torsion)
        labels = wells.labels(pilot.angles[torsion])
        for index, name in enumerate(wells.names):
            inside = labels == index
            parts = _split(series, inside)
            if parts is None:
                continue

            def is_inside(angles: Array, well: int = index) -> npt.NDArray[np.bool_]:
                return np.asarray(wells.labels(angles) == well)  # noqa: B023 (used at once)

            passages = pilot.passages(torsion, is_inside)
            mean, difference, _ = parts
            residual = lowest - np.where(inside[:, :, 0], mean + difference, mean)
            g_fast = statistical_inefficiency(residual) if residual.std() > 0 else 1.0
            well = _Well(name, pilot.betas(ladder), rejections, mixing, parts, g_fast)
            yield well.observable(passages)


@dataclass(frozen=True)
class _Well:
    """What an observable is by the visits to a well, and how fast it changes within either side."""

    name: str
    betas: Array
    rejections: Array
    mixing: float
    parts: tuple[float, float, tuple[float, float]]
    g_fast: float

    def observable(self, passages: PassageSamples) -> Observable:
        """Return what it is by these passages."""
        rates = passages.rates(self.betas)
        p = float(populations(rates)[0])
        mean, difference, within = self.parts
        slow = p * (1.0 - p) * difference**2
        fast = (1.0 - p) * within[0] + p * within[1]
        g_slow = state_inefficiency(rates, self.rejections, self.mixing)
        return Observable(
            mean=mean + p * difference,
            variance=slow + fast,
            asymptotic_variance=slow * g_slow + fast * self.g_fast,
            explained=slow / (slow + fast) if slow + fast > 0 else 0.0,
            slowest=self.name,
            n_passages=passages.total.fewest,
            resample=lambda rng: self.observable(passages.resampled(rng)),
        )


def _split(
    series: Array, inside: npt.NDArray[np.bool_]
) -> tuple[float, float, tuple[float, float]] | None:
    """Return the mean [lowest rung] outside, inside less outside, and variances out and in.

    The latter two of the lowest rung that has samples inside; None if none has both kinds.
    """
    lowest = series[:, :, 0][~inside[:, :, 0]]
    if lowest.size == 0:
        return None
    for rung in range(series.shape[2]):
        truth, values = inside[:, :, rung], series[:, :, rung]
        if truth.any() and not truth.all():
            difference = float(values[truth].mean() - values[~truth].mean())
            return (
                float(lowest.mean()),
                difference,
                (float(lowest.var()), float(values[truth].var())),
            )
    return None
