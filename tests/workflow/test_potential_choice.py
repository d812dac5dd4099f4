"""Which potential a run uses."""

import logging
from dataclasses import replace

import openmm
import pytest
import torch

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.flows.load import place_for_sampling
from openmm_tsf.potentials.base import describe_potential
from openmm_tsf.potentials.blocks import compiled_block_size
from openmm_tsf.potentials.forces.base import NotCovered
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.kernels.schedule import SequenceSettings, default_kernels
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.training import FitSettings
from openmm_tsf.workflow.duration import describe_plan
from openmm_tsf.workflow.estimate import momentary_frames, planned_evaluations
from openmm_tsf.workflow.potential_choice import (
    batch_of,
    open_potential,
    planned_sampling,
    reopen_potential,
    tell_precision,
)
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.sample import flow_block, kernels_of
from openmm_tsf.workflow.settings import SamplingSettings
from openmm_tsf.workflow.train import build_flow
from tests.support.simulated_cuda import CUDA, simulated_cuda


def test_planned_evaluations_include_dynamics():
    numbers = {"n_walkers": 5, "n_iterations": 70, "n_tuning": 10, "temperatures": (300.0, 600.0)}
    without = SamplingSettings(**numbers, n_independent=2, local_interval=0)
    often = SamplingSettings(**numbers, n_independent=2, local_interval=4)
    of_dynamics = planned_sampling(often) - planned_sampling(without)
    assert of_dynamics == 5 * 2 * 80 // 4 * (SequenceSettings().local_steps + 1)


@pytest.mark.parametrize("batch", [192, 12_288, 100_001])
def test_blocks_on_a_gpu_follow_the_batch(molecule, batch):
    """Compiled programs are used from a quarter of their block on, and hold few copies."""
    with simulated_cuda(), open_potential(molecule, None, 10**7, batch, device=CUDA) as potential:
        assert potential.compile_requested
        memory = potential.memory
    for dtype in (torch.float64, torch.float32):
        block = compiled_block_size(molecule.n_atoms, dtype, CUDA, memory)
        n_blocks = -(-batch // block)
        assert batch >= block / 4
        assert n_blocks <= -(-batch // 8192)
        assert n_blocks * block <= 1.01 * batch or block <= 2 * max(384, batch)


def test_a_resumed_potential_on_a_gpu_has_the_block_that_it_had(molecule):
    batch = batch_of(preset("default").sampling) * 16
    with simulated_cuda(), open_potential(molecule, None, 10**7, batch, device=CUDA) as first:
        recorded = describe_potential(first)
        with reopen_potential(molecule, recorded, None, 0, batch, CUDA) as again:
            assert again.memory == first.memory
            assert again.compile_requested


def test_the_preset_of_a_gpu_has_more_draws_and_walkers_and_everything_else_fits(molecule):
    """On the simulated device: its blocks, its kernels, and what is planned."""
    settings, default = preset("gpu"), preset("default")
    assert settings.flow == default.flow
    assert settings.fit.kl_batch_size % len(settings.sampling.temperatures) == 0
    assert settings.fit.n_chains >= 2 * settings.fit.kl_batch_size
    assert settings.fit.batch_size / settings.fit.kl_batch_size == pytest.approx(0.5, abs=0.01)
    batch = batch_of(settings.sampling)
    assert batch == 12_288
    planned = planned_evaluations(settings)
    assert planned > 10 * planned_evaluations(default)
    assert "of 4096 walkers at 3 temperatures" in describe_plan(settings, False)
    frames = MDDataset.shipped(molecule, stride=400)
    small = build_flow(frames, replace(settings.flow, n_blocks=1, hidden=(4,)), 1)
    with simulated_cuda(), open_potential(molecule, None, planned, batch, device=CUDA) as potential:
        assert potential.compile_requested
        flow = place_for_sampling(small, CUDA)
        names = [k.kernel.name for k in kernels_of(settings.sampling, molecule, flow, potential)]
        assert names == ["local", "flow_independent", "swap_steered", "swap_plain"]
        assert flow_block(settings.sampling.n_walkers, 3, CUDA) == batch


def test_one_conformation_after_the_other_is_told_where_there_is_a_gpu(caplog):
    """By a platform, by a Force without a counterpart in torch, and of dynamics."""
    molecule, words = alanine_dipeptide(), "one conformation after the other"
    other = alanine_dipeptide()
    other.system.addForce(openmm.CMMotionRemover())
    other.system.addForce(openmm.CustomCVForce("0"))
    settings = SequenceSettings(n_flow_independent=0, n_flow_walk=0, swap="plain")
    with simulated_cuda():
        flow = TemperatureSteerableFlow(2, 2, 1, (4,)).to("cuda")
        for system, platform in ((molecule, "Reference"), (other, None)):
            caplog.clear()
            with open_potential(system, platform, 10**7, 192, device=CUDA) as potential:
                assert caplog.text.count(words) == 1
                masses = torch.tensor(system.dynamics_masses)
                default_kernels(potential, flow, (300.0, 600.0), masses, settings)
        assert "one walker after the other, although the flow is on cuda:0" in caplog.text
        with pytest.raises(NotCovered, match="CustomCVForce"):
            ParallelTempering(other, flow, (300.0, 600.0), 4)


def test_the_choice_of_energies_is_told_with_its_reason(molecule, caplog):
    caplog.set_level(logging.INFO, logger="openmm_tsf")
    slow = alanine_dipeptide("ff96-obc1")
    for system, platform, planned, words in (
        (molecule, "Reference", 10**7, ["energies by OpenMM on Reference, as was chosen"]),
        (molecule, None, 10**7, ["compiled where it can be: about 10,000,000 energies are planned",
                                 "torch.float64, cpu, compiled", "training in float32"]),
        (molecule, None, 10**4, ["OpenMM's Contexts: about 10,000 energies are planned, too few"]),
        (slow, None, 10**4, ["OpenMM is slow at", "torch.float64, cpu, eager"]),
    ):  # fmt: skip
        caplog.clear()
        with open_potential(system, platform, planned, 64) as potential:
            tell_precision(potential, FitSettings(lambda_max=0.5))
        assert all(any(each in line for line in caplog.messages) for each in words), caplog.messages
    caplog.clear()
    tell_precision(potential, FitSettings(lambda_max=0.0))
    assert not caplog.messages


def test_conformations_to_measure_times_on(molecule):
    """Enough for a flow, all of them conformations of the molecule; nothing is random."""
    frames = momentary_frames(molecule, 600.0)
    assert len(frames) == 81
    energies = frames.with_energies(molecule.potential(kind="torch")).energies
    assert float(energies.std()) > 5.0
    assert torch.equal(momentary_frames(molecule, 600.0).positions, frames.positions)
