"""Which potential a run uses."""

import pytest
import torch

from openmm_tsf.potentials.blocks import compiled_block_size
from openmm_tsf.sampling.kernels.schedule import SequenceSettings
from openmm_tsf.workflow.potential_choice import batch_of, open_potential, planned_sampling
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
