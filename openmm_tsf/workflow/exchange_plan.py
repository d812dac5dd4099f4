"""What a target of precision costs by plain replica exchange of dynamics, from a pilot."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.convergence import MIN_EFFECTIVE_SUCCESSES, MIN_VISITS
from openmm_tsf.analysis.exchange_model import populations, state_inefficiency
from openmm_tsf.analysis.ladder import (
    cheapest_ladder,
    communication_barrier,
    ladder_rejections,
    round_trip_rate,
)
from openmm_tsf.analysis.statistics import MIN_EFFECTIVE_SAMPLES, Array, statistical_inefficiency
from openmm_tsf.analysis.targets import Target
from openmm_tsf.workflow.pilot import N_STEPS, Pilot

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
    """

    mean: float
    variance: float
    asymptotic_variance: float
    explained: float
    slowest: str | None
    n_passages: int | None

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
    """Plain replica exchange with the ladder that makes the most round trips per evaluation.

    ``barrier`` is Λ, the sum of rejections over a fine ladder. Round trips are those of all
    replicas of a ladder in an iteration of 0.1 ps: at best, with energies that are independent from
    swap to swap, and as the pilot's replicas made them on its own ladder, in proportion.
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
    wall_seconds: float

    @property
    def factor(self) -> float:
        """How far off the costs may be, as a factor either way (one standard error).

        That of a population from n passages in and n out; 1 where no state decides, infinite where
        no passage was seen.
        """
        if self.slowest is None or self.n_passages is None:
            return 1.0
        return math.exp(math.sqrt(2.0 / self.n_passages)) if self.n_passages else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def plan_exchange(pilot: Pilot, target: Target) -> tuple[Observable, ExchangePlan]:
    """Predict what a target at the lowest temperature costs by plain replica exchange."""
    rejection = pilot.rejection()
    low, high = pilot.temperatures[0], pilot.temperatures[-1]
    ladder = cheapest_ladder(rejection, low, high)
    rejections = ladder_rejections(rejection, ladder)
    mixing = pilot.mixing()
    known = _slowest(_observables(pilot, target, ladder, rejections, mixing), target)
    iterations = known.samples_needed(target) * known.g
    evaluations = iterations * len(ladder) * N_STEPS
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
        wall_seconds=evaluations * pilot.seconds_per_evaluation,
    )


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
    series = target.series(pilot.energy, pilot.angles)
    if target.quantity == "C_V":
        scale = pilot.boltzmann_constant * pilot.temperatures[0] ** 2
        series = (series - series[:, :, 0].mean()) ** 2 / scale
    lowest = series[:, :, 0]
    variance = float(lowest.var())
    g = statistical_inefficiency(lowest) if variance > 0 else math.nan
    if variance > 0:
        pieces = variance * g
        yield Observable(float(lowest.mean()), variance, pieces, 0.0, None, None)
    else:
        yield Observable(float(lowest.mean()), 0.0, 0.0, 0.0, None, None)
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

            passages, energy_difference = pilot.passages(torsion, is_inside)
            rates = passages.rates(pilot.betas(ladder), energy_difference)
            p = float(populations(rates)[0])
            mean, difference, within = parts
            slow = p * (1.0 - p) * difference**2
            fast = (1.0 - p) * within[0] + p * within[1]
            residual = lowest - np.where(inside[:, :, 0], mean + difference, mean)
            g_fast = statistical_inefficiency(residual) if residual.std() > 0 else 1.0
            yield Observable(
                mean=mean + p * difference,
                variance=slow + fast,
                asymptotic_variance=slow * state_inefficiency(rates, rejections, mixing)
                + fast * g_fast,
                explained=slow / (slow + fast) if slow + fast > 0 else 0.0,
                slowest=name,
                n_passages=passages.fewest,
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
