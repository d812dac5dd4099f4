"""Energies in float32 for training."""

import torch

import openmm_tsf as tsf
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.losses import whiten
from openmm_tsf.training.target import Target, trains_in_single_precision
from openmm_tsf.training.target_points import Points
from tests.support.path_training import toy


def test_energies_in_float32_are_those_in_float64():
    """Far below a kT, and gradients to float32's rounding; no energy is no gradient."""
    molecule = tsf.systems.alanine_dipeptide()
    frames = tsf.MDDataset.shipped(molecule, stride=100)
    flow = tsf.TemperatureSteerableFlow.from_dataset(frames, n_blocks=1, hidden=(4,), overlap=True)
    potential, basins = molecule.potential(), BasinPartition.find([frames])
    y = whiten(flow, frames.positions[:20], 1.0, torch.Generator().manual_seed(1))[0]
    y[0] = torch.nan
    tau = torch.full((len(y),), 0.5, dtype=torch.float64)
    exact, single = (
        Points.at(Target(flow, potential, basins, 1e4, is_single), y, tau)
        for is_single in (False, True)
    )
    error = (single.reduced_energy - exact.reduced_energy)[1:].abs()
    assert 0 < float(error.max()) < 1e-3
    difference = (single.gradient - exact.gradient)[1:].norm(dim=1)
    assert bool((difference < 1e-4 * exact.gradient[1:].norm(dim=1)).all())
    assert not torch.isfinite(single.reduced_energy[0])
    assert torch.equal(single.gradient[0].isnan(), exact.gradient[0].isnan())
    assert trains_in_single_precision(potential, torch.float32)
    assert not trains_in_single_precision(potential, torch.float64)
    assert not trains_in_single_precision(toy()[0], torch.float32)
