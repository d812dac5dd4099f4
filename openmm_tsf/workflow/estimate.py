"""How long a whole run will take, told before any of it is run."""

from dataclasses import replace

import numpy as np
import openmm
import torch

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.load import place_for_sampling
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.frame_numbers import least_frames
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.workflow.duration import (
    WORTH_MEASURING,
    is_worth_measuring,
    iteration_seconds,
    training_seconds,
)
from openmm_tsf.workflow.md_simulation import fastest_platform, seconds_per_step
from openmm_tsf.workflow.potential_choice import planned_sampling, planned_training
from openmm_tsf.workflow.sample import make_sampler, sampling_threads
from openmm_tsf.workflow.settings import RunSettings
from openmm_tsf.workflow.stage import Stage
from openmm_tsf.workflow.train import build_flow

#: Dynamics of a moment, only to have conformations to measure on.
_STEPS_PER_FRAME, _STEPS_BEFORE = 10, 200
_FRICTION_PER_PS, _TIMESTEP_PS = 10.0, 0.001


def planned_evaluations(settings: RunSettings) -> int:
    """Return the number of energy evaluations of a whole run but its MD, roughly."""
    rounds = settings.n_rounds
    return (
        planned_sampling(settings.sampling)
        + rounds * planned_sampling(settings.sampling, settings.round_iterations)
        + planned_training(settings.fit)
        + rounds * planned_training(settings.refit)
    )


def is_run_worth_measuring(settings: RunSettings, least: int = WORTH_MEASURING) -> bool:
    """Return whether a run takes far longer than it takes to measure a few of its steps."""
    lengths = settings.fit.n_steps, settings.sampling.n_iterations
    return is_worth_measuring(planned_evaluations(settings), *lengths, least=least)


def tell_duration(
    stage: Stage,
    settings: RunSettings,
    potential: Potential,
    dataset: MDDataset | None = None,
    flow: AugmentedFlow | None = None,
) -> str | None:
    """Measure a few steps of MD, training and sampling; log and record the time of all.

    Before MD is run, without frames and a flow, training and sampling are measured on conformations
    of a moment's dynamics. A measurement that fails is logged, and ends no run. Returned is the
    platform on which MD was measured, if it was told.
    """
    ladder, sampling = settings.sampling.temperatures, settings.sampling
    platform: str | None = None
    measured: str | None = None
    with stage.costs.measuring("training", potential):
        md = 0.0
        if dataset is None:
            threads = stage.options.threads or 1
            platform = stage.options.platform or fastest_platform(stage.molecule, threads)
            n_steps = settings.md.n_equilibration_steps
            n_steps += settings.md.n_frames * settings.md.steps_per_frame
            md = n_steps * seconds_per_step(stage.molecule, platform, threads)
            dataset = momentary_frames(stage.molecule, settings.md.temperature)
        if flow is None:
            flow = place_for_sampling(build_flow(dataset, settings.flow, 1), stage.device)
        training = training_seconds(
            flow, dataset, potential, replace(settings.fit, temperatures=ladder)
        )
        if settings.n_rounds:
            refit = replace(settings.refit, temperatures=ladder)
            training += settings.n_rounds * training_seconds(flow, dataset, potential, refit)
        with sampling_threads():
            sampler = make_sampler(stage.molecule, flow, sampling, potential, (0, 0), dataset)
            each = iteration_seconds(sampler, sampling)
        n = sampling.n_tuning + sampling.n_iterations
        n += settings.n_rounds * (sampling.n_tuning + settings.round_iterations)
        stage.tell_duration(md=md, training=training, sampling=each * n)
        measured = platform
    return measured


def momentary_frames(molecule: MolecularSystem, temperature: float) -> MDDataset:
    """Return just enough conformations to make a flow from, of some picoseconds of dynamics.

    They are to measure times on, and nothing else.
    """
    integrator = openmm.LangevinMiddleIntegrator(temperature, _FRICTION_PER_PS, _TIMESTEP_PS)
    integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatformByName("CPU")
    properties = {"Threads": "1", "DeterministicForces": "true"}
    context = openmm.Context(molecule.system, integrator, platform, properties)
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=200)
    context.setVelocitiesToTemperature(temperature, 1)
    integrator.step(_STEPS_BEFORE)
    frames = []
    for _ in range(least_frames(molecule)):
        integrator.step(_STEPS_PER_FRAME)
        state = context.getState(positions=True)
        frames.append(np.asarray(state.getPositions(asNumpy=True)._value))
    positions = torch.from_numpy(np.array(frames))
    return MDDataset(positions, temperature, molecule, name="a moment's dynamics")
