"""Which potential a run uses."""

import logging

import pytest
import torch

from openmm_tsf.potentials.blocks import compiled_block_size
from openmm_tsf.sampling.kernels.schedule import SequenceSettings
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.training import FitSettings
from openmm_tsf.workflow.estimate import momentary_frames
from openmm_tsf.workflow.potential_choice import (
    batch_of,
    open_potential,
    planned_sampling,
    tell_precision,
)
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.settings import SamplingSettings
from tests.support.simulated_cuda import CUDA, simulated_cuda


def test_planned_evaluations_include_dynamics():
    numbers = {"n_walkers": 5, "n_iterations": 70, "n_tuning": 10, "temperatures": (300.0, 600.0)}
    without = SamplingSettings(**numbers, n_independent=2, local_interval=0)
    often = SamplingSettings(**numbers, n_independent=2, local_interval=4)
    of_dynamics = planned_sampling(often) - planned_sampling(without)
    assert of_dynamics == 5 * 2 * 80 // 4 * (SequenceSettings().local_steps + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_on_a_gpu_pay_for_the_presets(molecule, dtype):
    """Compiled programs are used from a quarter of their block on."""
    batch = batch_of(preset("default").sampling)
    with simulated_cuda(), open_potential(molecule, None, 10**7, batch, device=CUDA) as potential:
        assert potential.compile_requested
        block = compiled_block_size(molecule.n_atoms, dtype, CUDA, potential.memory)
    assert batch >= block / 4
    assert block % batch == 0


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
