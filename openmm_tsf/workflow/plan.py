"""What a target of precision will cost, by plain replica exchange and with a flow."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from openmm_tsf.analysis.targets import UNITS, Target
from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.frame_numbers import check_enough_frames
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import slow_torsions
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.activity import log_while
from openmm_tsf.utils.validation import check_instance, check_int, check_positive
from openmm_tsf.workflow.duration import in_words, iteration_costs, training_costs
from openmm_tsf.workflow.exchange_plan import ExchangePlan, Observable, plan_exchange
from openmm_tsf.workflow.md_simulation import fastest_platform, seconds_per_step
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.pilot import Pilot, run_pilot
from openmm_tsf.workflow.potential_choice import (
    batch_of,
    open_potential,
    planned_sampling,
    planned_training,
)
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.sample import make_sampler, sampling_threads
from openmm_tsf.workflow.settings import RunSettings
from openmm_tsf.workflow.train import build_flow
from openmm_tsf.workflow.until import observables_of

logger = logging.getLogger(__name__)

#: Statistical inefficiency of a walker in iterations with a flow, of phi > 0 and of energies at the
#: lowest temperature, in default runs of alanine dipeptide: 3.0 to 3.9, and 1.0 to 1.4
#: (examples/results/moves.json). It was 23 for phi > 0, |psi| > 120, which flows draw too rarely,
#: and 9 and 7 with the preset quick.
FLOW_G_OF_STATES, FLOW_G_OF_ENERGIES = 3.5, 1.4
#: Iterations, at the least, of a production whose numbers are called converged.
_LEAST_ITERATIONS = 50
_FRAMES = 2000


@dataclass(frozen=True)
class FlowPlan:
    """A run of this package: MD, training and production until the target is met.

    ``g`` is assumed, and ``largest_g_that_pays`` the one up to which the time is shorter than that
    of plain replica exchange; 0 where none is.
    """

    temperatures: tuple[float, ...]
    n_walkers: int
    n_iterations: int
    g: float
    largest_g_that_pays: float
    energy_evaluations: dict[str, int]
    wall_seconds: dict[str, float]

    @property
    def total_evaluations(self) -> int:
        """The evaluations of all stages."""
        return sum(self.energy_evaluations.values())

    @property
    def total_seconds(self) -> float:
        """The time of all stages."""
        return sum(self.wall_seconds.values())


@dataclass(frozen=True)
class Plan:
    """What a target will cost, predicted from a pilot; see `plan`.

    Numbers that are not known, where the pilot saw no passage into the state or out of it, are NaN.
    """

    target: str
    temperature: float
    value: float
    exchange: ExchangePlan
    flow: FlowPlan
    pilot_evaluations: int
    pilot_seconds: float

    @property
    def flow_pays(self) -> bool | None:
        """Whether the run with a flow takes less time; None where it is not known."""
        if math.isnan(self.exchange.wall_seconds):
            return None
        return self.flow.total_seconds < self.exchange.wall_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON; unknown numbers are None."""
        flow = asdict(self.flow) | {
            "total_evaluations": self.flow.total_evaluations,
            "total_seconds": self.flow.total_seconds,
        }
        exchange = self.exchange.to_dict() | {"seconds_range": self.exchange.seconds_range}
        content = asdict(self) | {"exchange": exchange, "flow": flow, "flow_pays": self.flow_pays}
        return {key: _known(value) for key, value in content.items()}

    def __str__(self) -> str:
        """The plan in words."""
        exchange, flow = self.exchange, self.flow
        quantity = Target.parse(self.target)
        unit = UNITS.get(quantity.quantity, quantity.unit)
        ladder = ", ".join(f"{kelvin:.0f}" for kelvin in exchange.temperatures)
        mean = sum(exchange.rejections) / len(exchange.rejections)
        independent = (
            "an unknown time of"
            if math.isnan(exchange.wall_seconds)
            else f"{0.1 * exchange.g:.1f} ps of"
        )
        lines = [
            f"{self.target}: {quantity.name} at {self.temperature:g} K is "
            + ("unknown" if math.isnan(self.value) else f"about {self.value:.3g} {unit}".rstrip())
            + f" (pilot: {self.pilot_evaluations:,} evaluations, {in_words(self.pilot_seconds)})",
            "",
            f"plain replica exchange: {_count(exchange.energy_evaluations)} evaluations"
            f"{_range(exchange.evaluations_range)}, {_time(exchange.wall_seconds)}",
            f"  {len(exchange.temperatures)} rungs at {ladder} K, {mean:.0%} of the swaps rejected "
            f"(barrier {exchange.barrier:.1f})",
            f"  {exchange.measured_round_trips:.3f} round trips of all replicas every 0.1 ps, "
            f"{exchange.best_round_trips:.3f} at best",
            f"  an independent sample every {independent} each replica{_decided_by(exchange)}",
            "",
            f"with a flow: {flow.total_evaluations:.2g} evaluations, {_time(flow.total_seconds)}",
            *(
                f"  {name}: {flow.energy_evaluations[name]:.2g} evaluations, {in_words(seconds)}"
                for name, seconds in flow.wall_seconds.items()
                if seconds
            ),
            f"  {flow.n_iterations:,} iterations of {flow.n_walkers} walkers at "
            f"{len(flow.temperatures)} temperatures"
            + (", or more: it is unknown how many" if math.isnan(self.value) else ""),
            f"  assumed, not measured: an independent sample takes {flow.g:g} of them, as with the "
            "default preset on",
            "  alanine dipeptide; a flow of another molecule, a shorter training and states that a "
            "flow draws",
            "  too rarely take more, and as many times the evaluations and the time of sampling",
            "",
            self._conclusion(),
        ]
        return "\n".join(lines)

    def _conclusion(self) -> str:
        pays, largest = self.flow_pays, self.flow.largest_g_that_pays
        if pays is None:
            return (
                "whether a flow pays is unknown: the pilot saw no passage into the state or out of "
                "it; give it more --seconds"
            )
        if pays:
            low, high = (t / self.flow.total_seconds for t in self.exchange.seconds_range)
            ratio = self.exchange.wall_seconds / self.flow.total_seconds
            return (
                f"a flow pays, on this assumption: {ratio:.2g} times as fast{_range((low, high))}; "
                f"it is faster as long\nas an independent sample takes fewer than {largest:.2g} "
                "iterations"
            )
        ratio = self.flow.total_seconds / self.exchange.wall_seconds
        if largest > 0:
            return (
                f"a flow does not pay, on this assumption: plain replica exchange is {ratio:.2g} "
                f"times as fast, unless an independent sample takes fewer than {largest:.2g} "
                "iterations"
            )
        return f"a flow does not pay: plain replica exchange is {ratio:.2g} times as fast"


def plan(
    target: str,
    molecule: MolecularSystem | None = None,
    settings: RunSettings | None = None,
    *,
    seconds: float = 60.0,
    n_iterations: int | None = None,
    ladder: Sequence[float] | None = None,
    options: RunOptions | None = None,
) -> Plan:
    """Predict what it costs to meet a target of precision, from a pilot of about a minute.

    Plain replica exchange is that of dynamics with steps of 2 fs and a swap every 0.1 ps, with the
    best ladder between the ends of that of `settings`. How often replicas pass into rare states is
    measured above the ladder, and extrapolated (`openmm_tsf.analysis.exchange_model`); the ranges
    hold nine of ten pilots that are drawn from the walkers of this one, and not the errors of that
    model. Steps of 2 fs make energies a few kJ/mol too high. Of the run
    with a flow, MD, steps of training and iterations are timed; how good the flow will be is not
    known before it is trained, and assumed to be as on alanine dipeptide. Compiling, where the run
    would do it, comes on top of the pilot.

    Parameters
    ----------
    target
        As ``"dF(phi) < 0.05 kT"``, at the lowest temperature.
    molecule
        The molecule; alanine dipeptide by default, whose training frames are shipped.
    settings
        The run with a flow; by default the preset ``"default"``.
    seconds
        The time of the pilot.
    n_iterations
        Its length in iterations of 0.1 ps instead, so that a plan does not depend on the clock.
    ladder
        That of plain replica exchange in K, between the same ends; the best one by default.
    options
        Seed and platform, and the observables that the target is about (``observe``).

    Raises
    ------
    ValueError
        If the target is not one, is at another than the lowest temperature or about a torsion that
        the molecule does not have, or the ladder of `settings` has one rung.
    """
    check_instance(molecule, "molecule", MolecularSystem)
    check_instance(settings, "settings", RunSettings)
    check_instance(options, "options", RunOptions)
    seconds = check_positive(seconds, "seconds")
    if n_iterations is not None:
        n_iterations = check_int(n_iterations, "n_iterations", 1)
    options, settings = options or RunOptions(), settings or preset("default")
    shipped = alanine_dipeptide()
    molecule = molecule or shipped
    molecule.check_pose_independent()
    goal, rungs = Target.parse(target, "target"), settings.sampling.temperatures
    if len(rungs) < 2:
        raise ValueError(f"temperatures: expected at least two, got {rungs[0]:g} K")
    observables = observables_of(molecule, options.observe)
    goal.check_for(list(slow_torsions(molecule.topology)), rungs, "target", observables)
    if goal.rung(rungs) != 0:
        raise ValueError(
            f"target: expected one at the lowest temperature, {rungs[0]:g} K, got {target!r}"
        )
    if ladder is not None:
        ladder = as_temperatures(ladder, "ladder")
        if not np.allclose([ladder[0], ladder[-1]], [rungs[0], rungs[-1]], rtol=0, atol=0.01):
            raise ValueError(
                f"ladder: expected one from {rungs[0]:g} to {rungs[-1]:g} K, got {ladder}"
            )
    parts = molecule.topology, molecule.positions
    InternalCoordinates.from_topology(*parts, **molecule.constraint_options)
    seed = options.choose_seed({})
    planned = planned_sampling(settings.sampling) + planned_training(settings.fit)
    with open_potential(
        molecule, options.platform, planned, batch_of(settings.sampling)
    ) as potential:
        length: dict[str, Any] = {"seconds": seconds}
        if n_iterations is not None:
            length = {"n_iterations": n_iterations}
        what = f"pilot of {f'{n_iterations} iterations' if n_iterations else in_words(seconds)}"
        with sampling_threads(), log_while(logger, what):
            pilot = run_pilot(
                molecule, potential, rungs[0], rungs[-1], **length, seed=seed,
                observables=observables,
            )  # fmt: skip
        known, exchange = plan_exchange(pilot, goal, ladder)
        simulate = molecule.fingerprint != shipped.fingerprint
        flow = _plan_flow(molecule, settings, potential, pilot, known, goal, exchange, simulate)
    value = known.mean if math.isfinite(known.samples_needed(goal)) else math.nan
    if goal.quantity == "dF":
        value = math.log1p(-value) - math.log(value) if 0 < value < 1 else math.nan
    return Plan(
        target=str(goal),
        temperature=rungs[0],
        value=value,
        exchange=exchange,
        flow=flow,
        pilot_evaluations=pilot.n_evaluations,
        pilot_seconds=pilot.seconds,
    )


def _plan_flow(
    molecule: MolecularSystem,
    settings: RunSettings,
    potential: Potential,
    pilot: Pilot,
    known: Observable,
    target: Target,
    exchange: ExchangePlan,
    simulate: bool,
) -> FlowPlan:
    """Measure MD, training and sampling of a run, and add them up."""
    sampling = settings.sampling
    frames = pilot.frames[:: max(1, len(pilot.frames) // _FRAMES)]
    dataset = MDDataset(frames, sampling.temperatures[-1], molecule)
    try:
        check_enough_frames(dataset, molecule)
    except ValueError as error:
        raise ValueError(
            f"seconds: expected a longer pilot: it has {len(pilot.frames):,} frames for a flow of "
            f"{molecule.n_atoms} atoms to be timed on, too few"
        ) from error
    flow = build_flow(dataset, settings.flow, 1)
    fit = replace(settings.fit, temperatures=sampling.temperatures)
    training, trained = training_costs(flow, dataset, potential, fit)
    with sampling_threads():
        sampler = make_sampler(molecule, flow, sampling, potential, (0, 0), dataset)
        with sampler:
            each, evaluations_each = iteration_costs(sampler, sampling)
    if settings.n_rounds:
        refit = replace(settings.refit, temperatures=sampling.temperatures)
        again = training_costs(flow, dataset, potential, refit)
        training += settings.n_rounds * again[0]
        trained += settings.n_rounds * again[1]
    before_production = sampling.n_tuning
    before_production += settings.n_rounds * (sampling.n_tuning + settings.round_iterations)
    g = FLOW_G_OF_STATES if target.quantity in ("P", "dF") else FLOW_G_OF_ENERGIES
    samples = known.samples_needed(target)
    needed = max(_LEAST_ITERATIONS, 0 if math.isnan(samples) else samples * g / sampling.n_walkers)
    md_steps = (
        settings.md.n_equilibration_steps + settings.md.n_frames * settings.md.steps_per_frame
    )
    md_seconds = 0.0
    if simulate:
        platform = fastest_platform(molecule)
        md_seconds = md_steps * seconds_per_step(molecule, platform, n_steps=200)
    seconds = {
        "md": md_seconds,
        "training": training + getattr(potential, "compile_seconds", 0.0),
        "sampling": each * (before_production + needed),
    }
    left = exchange.wall_seconds - sum(seconds.values()) + each * needed
    largest = left / each * sampling.n_walkers / samples
    return FlowPlan(
        temperatures=sampling.temperatures,
        n_walkers=sampling.n_walkers,
        n_iterations=math.ceil(needed),
        g=g,
        largest_g_that_pays=max(0.0, largest) if math.isfinite(largest) else math.nan,
        energy_evaluations={
            "md": md_steps if simulate else 0,
            "training": round(trained),
            "sampling": round(evaluations_each * (before_production + needed)),
        },
        wall_seconds=seconds,
    )


def _decided_by(exchange: ExchangePlan) -> str:
    if exchange.slowest is None:
        return ""
    n, state = exchange.n_passages, exchange.slowest
    if n == 0:
        return f", decided by visits to {state},\n  of which the pilot saw none: a guess"
    return (
        f", decided by visits to {state},\n  known from {n} passages in the pilot; "
        "more --seconds make it surer"
    )


def _range(values: tuple[float, float]) -> str:
    if any(map(math.isnan, values)):
        return ""
    low, high = (f"{value:.2g}" for value in values)
    return f" ({low} or more)" if high == "inf" else f" ({low} to {high})"


def _count(number: float) -> str:
    return "an unknown number of" if math.isnan(number) else f"{number:.2g}"


def _time(seconds: float) -> str:
    return "an unknown time" if math.isnan(seconds) else in_words(seconds)


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
