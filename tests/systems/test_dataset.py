"""Datasets: which frames are accepted, the blocked split and the basins."""

import mdtraj
import openmm.unit as unit
import pytest
import torch

from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.systems.dataset import MDDataset


@pytest.fixture(scope="module")
def dataset(molecule):
    return MDDataset.shipped(molecule, stride=100)


@pytest.fixture
def frames(dataset, molecule):
    return mdtraj.Trajectory(dataset.positions.numpy(), molecule.mdtraj_topology)


def test_shipped_frames(dataset, molecule):
    assert len(dataset) == 400
    assert dataset.temperature == 600
    assert dataset.positions.dtype == torch.float64
    with OpenMMPotential(molecule.system, platform="Reference", n_contexts=1) as potential:
        energies = dataset.with_energies(potential).energies
    # Equipartition of a nearly harmonic molecule: <U> - U_min is about (3N-6)/2 kT.
    assert 0 < energies.mean() < 60
    assert energies.std() == pytest.approx((30**0.5) * 600 * 0.0083145, rel=0.2)


def test_split_is_blocked_and_complete(dataset):
    train, validation, test = dataset.split()
    assert (len(train), len(validation), len(test)) == (320, 40, 40)
    together = torch.cat([train.positions, validation.positions, test.positions])
    assert len(together.flatten(1).unique(dim=0)) == len(dataset)
    # The first block of ten: 32 frames to train on, four to validate, four to test.
    assert torch.equal(validation.positions[:4], dataset.positions[32:36])


def test_load_any_trajectory(dataset, frames, molecule, tmp_path):
    for name in ("a.dcd", "a.nc"):
        frames.save(str(tmp_path / name))
        again = MDDataset.load(tmp_path / name, molecule, 600)
        # The molecule diffuses far from the origin, where the spacing of float32 is 4e-6 nm.
        assert (again.positions - dataset.positions).abs().max() < 1e-5
    twice = [tmp_path / "a.dcd"] * 2
    assert len(MDDataset.load(twice, molecule, 600, skip=100, stride=7)) == 100


def test_refused_frames(dataset, frames, molecule, tmp_path):
    frames.save_xtc(str(tmp_path / "a.xtc"))
    frames.atom_slice(range(10)).save_dcd(str(tmp_path / "b.dcd"))
    frames.save_dcd(str(tmp_path / "c.dcd"))
    for error, message, name in (
        (ValueError, "XTC", "a.xtc"),
        (FileNotFoundError, "no such trajectory", "missing.dcd"),
        (ValueError, "cannot read", "b.dcd"),
        (ValueError, "no frames left", "c.dcd"),
    ):
        with pytest.raises(error, match=message):
            MDDataset.load(tmp_path / name, molecule, 600, skip=10**6)
    broken = dataset.positions.clone()
    broken[5] = torch.nan
    for message, *arguments in (
        ("positive temperature", dataset.positions, -300),
        (r"positions: expected shape \[F, 22, 3\]", dataset.positions[:, :4], 300, molecule),
        ("the first is frame 5", broken, 300, molecule),
    ):
        with pytest.raises(ValueError, match=message):
            MDDataset(*arguments)
    with pytest.raises(ValueError, match="too few to split"):
        dataset[:5].split()
    overlapping = dataset.positions.clone()
    overlapping[7, 3] = overlapping[7, 4]
    with (
        OpenMMPotential(molecule.system, platform="Reference", n_contexts=1) as potential,
        pytest.raises(ValueError, match="the first is frame 7"),
    ):
        MDDataset(overlapping, 600, molecule).with_energies(potential)


def test_chains_are_held_out_whole(dataset):
    chains = torch.arange(20).repeat(20)
    parts = MDDataset(dataset.positions, 600, chains=chains).split()
    names = [set(part.chains.tolist()) for part in parts]
    assert [len(part) for part in names] == [16, 2, 2]
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    with pytest.raises(ValueError, match="chains: expected at least 3"):
        MDDataset(dataset.positions, 600, chains=chains % 2).split()
    with pytest.raises(ValueError, match="chains: expected shape"):
        MDDataset(dataset.positions, 600, chains=chains[:5])


def test_quantities(dataset, molecule):
    angstrom = dataset.positions.numpy() * 10 * unit.angstrom
    again = MDDataset(angstrom, 600 * unit.kelvin, molecule)
    assert (again.positions - dataset.positions).abs().max() < 1e-12
