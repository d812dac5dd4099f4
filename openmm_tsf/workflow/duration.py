"""How long a stage will take, measured on a few of its steps before it starts."""

import logging
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.potentials.base import HasSinglePrecision, Potential
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.energies import device_of
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitSettings
from openmm_tsf.training.target import trains_in_single_precision
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.utils.activity import log_while
from openmm_tsf.utils.threads import torch_threads
from openmm_tsf.workflow.settings import RunSettings, SamplingSettings

logger = logging.getLogger(__name__)

#: Seconds and energy evaluations [2].
Costs = npt.NDArray[np.float64]

#: Shorter stages, in energy evaluations or steps of MD, are over before they are measured.
WORTH_MEASURING = 20_000
#: Longer ones take at least ten times as long as it takes to measure them.
LEAST_STEPS = 100
_FRAMES = 500
_STEPS = 2


def is_worth_measuring(
    planned: int, n_steps: int = 0, n_iterations: int = 0, *, least: int = WORTH_MEASURING
) -> bool:
    """Return whether work takes far longer than to measure it: energy evaluations or steps."""
    return planned >= least or max(n_steps, n_iterations) >= LEAST_STEPS


def training_seconds(
    flow: AugmentedFlow, dataset: MDDataset, potential: Potential, settings: FitSettings
) -> float:
    """Return the time of a training, roughly; see `training_costs`."""
    return training_costs(flow, dataset, potential, settings)[0]


def training_costs(
    flow: AugmentedFlow, dataset: MDDataset, potential: Potential, settings: FitSettings
) -> tuple[float, float]:
    """Measure steps of a training on some frames; return the time and evaluations of all; roughly.

    Nothing of the training itself changes. Where energies are compiled, they are compiled here.
    """
    with log_while(logger, "measuring a few steps of training"):
        return _training_costs(flow, dataset, potential, settings)


def _training_costs(
    flow: AugmentedFlow, dataset: MDDataset, potential: Potential, settings: FitSettings
) -> tuple[float, float]:
    few, n_chains = dataset[:: max(1, len(dataset) // _FRAMES)], settings.n_chains
    if n_chains:
        n_chains = max(1, 2 * (settings.kl_batch_size // len(settings.temperatures or (0.0,))))
    x = few.positions.to(device_of(potential, few.positions))
    potential.energy(x)  # compiles
    if trains_in_single_precision(potential, settings.dtype):
        assert isinstance(potential, HasSinglePrecision)
        potential.single_precision_forces(x)
    else:
        potential.energy_and_forces(x)
    now = torch.get_num_threads()
    with torch_threads(max(1, now // 2) if settings.estimator == "path" else now):
        meter = CostMeter(potential)
        trainer = Trainer(flow, [few], potential, replace(settings, n_chains=n_chains), 0)
        total = meter.read() * np.array([len(dataset) / len(few), 1.0])
        n, early = settings.n_steps, round(settings.ramp[0] * settings.n_steps)
        total += step_costs(trainer, 0, meter)[1] * early
        first, each = step_costs(trainer, n, meter)
        total += each * (n - early)
        if n_chains:  # the first step with energies brought them to their temperatures
            total += (first - each) * settings.n_chains / n_chains
        meter.read()
        trainer.validate()
        total += meter.read() * (1 + n // settings.validate_interval)
    return float(total[0]), float(total[1])


class CostMeter:
    """Time and evaluations since the last reading."""

    def __init__(self, potential: Potential) -> None:
        self._potential = potential
        self._last = self._now()

    def _now(self) -> Costs:
        return np.array([time.perf_counter(), self._potential.n_evaluations], dtype=np.float64)

    def read(self) -> Costs:
        """Return both [2], and start again."""
        last, self._last = self._last, self._now()
        return self._last - last


def step_costs(trainer: Trainer, step: int, meter: CostMeter) -> tuple[Costs, Costs]:
    """Return the costs [2] of a first step, and of each further one, as if at the given step."""
    costs = []
    for _ in range(1 + _STEPS):
        trainer.step = step
        meter.read()
        trainer.train_step()
        costs.append(meter.read())
    return costs[0], np.mean(costs[1:], axis=0)


def iteration_costs(sampler: ParallelTempering, settings: SamplingSettings) -> tuple[float, float]:
    """Return the time and the evaluations of an iteration on average, of a new sampler."""
    with log_while(logger, "measuring a few iterations of sampling"):
        sampler.run(1, progress=False)  # all kernels once: what is compiled is compiled here
        interval = max(1, settings.local_interval)
        n = interval * -(-_STEPS // interval)  # dynamics as often as in production
        before, start = sampler.potential.n_evaluations, time.perf_counter()
        sampler.run(n, progress=False)
        seconds = (time.perf_counter() - start) / n
    return seconds, (sampler.potential.n_evaluations - before) / n


def iteration_seconds(sampler: ParallelTempering, settings: SamplingSettings) -> float:
    """Return the time of an iteration on average, of a new sampler."""
    return iteration_costs(sampler, settings)[0]


def describe_plan(settings: RunSettings, simulate: bool) -> str:
    """Return what a run is going to do, in words."""
    sampling = settings.sampling
    parts = []
    if simulate:
        md = settings.md
        parts.append(f"MD of {md.n_equilibration_steps + md.n_frames * md.steps_per_frame:,} steps")
    parts.append(f"training of {settings.fit.n_steps:,} steps")
    if settings.n_rounds:
        parts.append(
            f"{settings.n_rounds} x ({sampling.n_tuning} + {settings.round_iterations} iterations "
            f"of sampling, training of {settings.refit.n_steps:,} steps)"
        )
    parts.append(
        f"{sampling.n_tuning} + {sampling.n_iterations:,} iterations of {sampling.n_walkers} "
        f"walkers at {len(sampling.temperatures)} temperatures; analysis"
    )
    return ", then ".join(parts)


def in_words(seconds: float) -> str:
    """Return a time of which the first digit is known."""
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1.0, float(f'{seconds:.1g}')):.0f} s"
