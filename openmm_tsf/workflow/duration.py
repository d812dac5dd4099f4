"""How long a stage will take, measured on a few of its steps before it starts."""

import logging
import time
from dataclasses import replace

import torch

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.potentials.base import HasSinglePrecision, Potential
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitSettings
from openmm_tsf.training.target import trains_in_single_precision
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.utils.threads import torch_threads
from openmm_tsf.workflow.settings import RunSettings, SamplingSettings

logger = logging.getLogger(__name__)

#: Shorter stages, in energy evaluations or steps of MD, are over before they are measured.
WORTH_MEASURING = 20_000
_FRAMES = 500
_STEPS = 2


def training_seconds(
    flow: AugmentedFlow, dataset: MDDataset, potential: Potential, settings: FitSettings
) -> float:
    """Measure steps of a training on some of the frames, and return the time of all; roughly.

    Nothing of the training itself changes. Where energies are compiled, they are compiled here.
    """
    logger.info("measuring a few steps of training")
    few, n_chains = dataset[:: max(1, len(dataset) // _FRAMES)], settings.n_chains
    if n_chains:
        n_chains = max(1, 2 * (settings.kl_batch_size // len(settings.temperatures or (0.0,))))
    potential.energy(few.positions)  # compiles
    if trains_in_single_precision(potential, settings.dtype):
        assert isinstance(potential, HasSinglePrecision)
        potential.single_precision_forces(few.positions)
    else:
        potential.energy_and_forces(few.positions)
    now = torch.get_num_threads()
    with torch_threads(max(1, now // 2) if settings.estimator == "path" else now):
        start = time.perf_counter()
        trainer = Trainer(flow, [few], potential, replace(settings, n_chains=n_chains), 0)
        seconds = (time.perf_counter() - start) * len(dataset) / len(few)
        n, early = settings.n_steps, round(settings.ramp[0] * settings.n_steps)
        seconds += step_seconds(trainer, 0)[1] * early
        first, each = step_seconds(trainer, n)
        seconds += each * (n - early)
        if n_chains:  # the first step with energies brought them to their temperatures
            seconds += (first - each) * settings.n_chains / n_chains
        start = time.perf_counter()
        trainer.validate()
        seconds += (time.perf_counter() - start) * (1 + n // settings.validate_interval)
    return seconds


def step_seconds(trainer: Trainer, step: int) -> tuple[float, float]:
    """Return the time of a first step, and of each further one, as if at the given step."""
    times = []
    for _ in range(1 + _STEPS):
        trainer.step = step
        start = time.perf_counter()
        trainer.train_step()
        times.append(time.perf_counter() - start)
    return times[0], sum(times[1:]) / _STEPS


def iteration_costs(sampler: ParallelTempering, settings: SamplingSettings) -> tuple[float, float]:
    """Return the time and the evaluations of an iteration on average, of a new sampler."""
    logger.info("measuring a few iterations of sampling")
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
