"""The basins that a training keeps apart, and data that are spread over them."""

import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.frames import FramePicker


@pytest.fixture(scope="module")
def dataset():
    return MDDataset.shipped(tsf.systems.alanine_dipeptide(), stride=10)


def test_basins_are_wells_of_all_slow_torsions(dataset):
    """Phi positive or not, psi in alpha or beta; what is not there has no basin of its own."""
    basins = BasinPartition.find([dataset])
    assert basins.n_basins == 5
    labels = basins.labels(dataset.positions)
    angles = torsion_angles(dataset.positions.numpy(), slow_torsions(dataset.molecule.topology))
    phi, psi = np.degrees(angles["phi"]), np.degrees(angles["psi"])
    rare = int(torch.bincount(labels)[:4].argmin())
    inside = (labels == rare).numpy()
    assert 20 <= inside.sum() < 0.02 * len(labels)
    assert (phi[inside] > -30).all()
    assert (np.abs(psi[inside]) > 75).all()
    populations = basins.populations(dataset.positions)
    assert float(populations.sum()) == pytest.approx(1)
    assert float(populations[rare]) == inside.mean()
    broken = dataset.positions[:3].clone()
    broken[1, 0, 0] = torch.nan
    assert basins.labels(broken)[1] == 4
    assert torch.equal(basins.labels(broken)[[0, 2]], labels[[0, 2]])


def test_few_frames_make_no_basin(dataset):
    labels = BasinPartition.find([dataset]).labels(dataset.positions)
    rare = int(torch.bincount(labels)[:4].argmin())
    some = torch.cat([torch.where(labels != rare)[0], torch.where(labels == rare)[0][:15]])
    fewer = BasinPartition.find([MDDataset(dataset.positions[some], 600.0, dataset.molecule)])
    assert fewer.n_basins == 4
    assert (fewer.labels(dataset.positions[labels == rare]) == 3).double().mean() > 0.9


def test_potentials_on_vectors_have_one_basin():
    x = torch.zeros(30, 2, dtype=torch.float64)
    basins = BasinPartition.find([MDDataset(x, 1.0)])
    assert basins.n_basins == 1
    assert not basins.labels(x).any()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_frames_are_spread_over_the_basins(share):
    """As in the data but for the part that is even; equal within a basin; absent ones stay so."""
    basin = torch.tensor([0] * 90 + [1] * 8 + [3] * 2)
    n = 60_000
    index = FramePicker(basin, share).draw(n, torch.Generator().manual_seed(2))
    drawn = torch.bincount(index, minlength=100).double() / n
    populations = torch.tensor([0.9, 0.08, 0.0, 0.02], dtype=torch.float64)
    even = torch.tensor([1, 1, 0, 1], dtype=torch.float64) / 3
    expected = ((1 - share) * populations + share * even)[basin] / torch.bincount(basin)[basin]
    z = (drawn - expected) / (expected * (1 - expected) / n).sqrt()
    assert float(z.abs().max()) < 4
