"""The zoo: small molecules, odd peptides and variants of a System: accepted, placed, evaluated."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.potentials import OpenMMPotential, Potential, TorchPotential
from openmm_tsf.systems.equivalent_hydrogens import equivalent_hydrogens
from openmm_tsf.systems.molecule import MolecularSystem
from tests.support import zoo
from tests.support.molecules import random_rotation
from tests.support.torch_cases import errors, reference_values
from tests.support.zoo_variants import ETHANOL, NOT_COVERED, VARIANTS, variant

NAMES = (*zoo.SMALL, *zoo.PEPTIDES)


def distances(x: torch.Tensor) -> torch.Tensor:
    """Return the distances [F, N (N-1) / 2] between atoms."""
    return torch.stack([torch.pdist(frame) for frame in x])


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("metric", ["volume", "polar"])
def test_coordinates(name, metric):
    """Hot frames are in the domain, come back from their coordinates, and keep their handedness."""
    specimen = zoo.specimen(name)
    layer = InternalCoordinates.from_topology(specimen.topology, specimen.positions, metric)
    frames = zoo.hot_frames(name)
    if metric == "volume":  # polar coordinates have no Jacobian where an angle is straight
        frames = np.concatenate([specimen.positions[None], frames])
    assert not zoo.has_inverted_centre(frames, specimen).any(), (
        "the case itself: an inverted centre"
    )
    x = torch.tensor(frames)
    u, log_det = layer.inverse_and_log_det(x)
    assert log_det.isfinite().all(), f"{int((~log_det.isfinite()).sum())} frames are outside"
    assert layer.in_domain(u).all()
    back, forward_log_det = layer.forward_and_log_det(u)
    torch.testing.assert_close(distances(back), distances(x), rtol=1e-9, atol=0)
    torch.testing.assert_close(layer.place(u, like=x), x, rtol=0, atol=1e-9)
    torch.testing.assert_close(forward_log_det, -log_det, rtol=0, atol=1e-9)
    assert bool((log_det == log_det[0]).all()) == (metric == "volume")
    assert not layer.is_mirror_image(x).any()
    mirrored = torch.tensor(frames * [1.0, 1.0, -1.0])
    is_inverted = torch.tensor(zoo.has_inverted_centre(mirrored.numpy(), specimen))
    assert bool(is_inverted.any()) == (zoo.volumes(frames, specimen).size > 0)
    assert layer.is_mirror_image(mirrored)[is_inverted].all()
    _, log_det = layer.inverse_and_log_det(mirrored[is_inverted])
    assert (log_det == -torch.inf).all()


def test_energies(name):
    """They are OpenMM's, in any pose."""
    specimen = zoo.specimen(name)
    check_energies(specimen.molecule().potential("torch"), specimen, zoo.hot_frames(name)[::5])


def check_energies(potential: Potential, specimen: zoo.Specimen, frames: np.ndarray) -> None:
    """Assert that energies and forces are the Reference platform's, and move with the molecule."""
    x = torch.tensor(frames)
    expected = reference_values(specimen.system, x)
    energies, forces = potential.energy_and_forces(x)
    assert max(errors((energies, forces), expected)) < 1e-7
    turn = torch.tensor(random_rotation(np.random.default_rng(1)))
    moved = potential.energy_and_forces(x @ turn.T + 0.7)
    assert max(errors(moved, (energies, forces @ turn.T))) < 1e-7


def test_identity_and_dihedrals(name):
    """The same molecule in every conformation; backbone dihedrals only where there are some."""
    specimen = zoo.specimen(name)
    molecule = specimen.molecule()
    assert sorted(molecule.dihedrals) == specimen.dihedrals.split()
    bonds = {frozenset(a.index for a in bond) for bond in specimen.topology.bonds()}
    for atoms in molecule.dihedrals.values():
        assert all(frozenset(pair) in bonds for pair in pairwise(atoms))
    for frame in zoo.hot_frames(name)[::10]:
        other = MolecularSystem(specimen.system, specimen.topology, frame)
        assert other.fingerprint == molecule.fingerprint
        assert other.dihedrals == molecule.dihedrals


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    """Accepted, with OpenMM's energies: by torch where it covers every Force."""
    specimen = variant(name)
    base = "ethanol" if name in ETHANOL else "capped_GLY"
    frames = zoo.hot_frames(base)[::10]
    molecule = specimen.molecule()
    assert sorted(molecule.dihedrals) == specimen.dihedrals.split()
    potential = molecule.potential()
    assert type(potential) is (OpenMMPotential if name in NOT_COVERED else TorchPotential)
    check_energies(potential, specimen, frames)
    # The coordinates do not depend on the Forces, only the equivalence of hydrogens does.
    layer = InternalCoordinates.from_topology(
        specimen.topology, specimen.positions, equivalent=equivalent_hydrogens(molecule)
    )
    x = torch.tensor(frames)
    u, log_det = layer.inverse_and_log_det(x)
    assert (log_det == 0).all()
    torch.testing.assert_close(layer.place(u, like=x), x, rtol=0, atol=1e-9)
