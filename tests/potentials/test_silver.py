"""Silver clusters: ASE's energies and forces, derivatives, symmetries, the wall."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.support
from openmm_tsf.potentials import SilverCluster
from openmm_tsf.units import KB
from tests.support.non_finite import check_non_finite_rows

#: By tests/support/silver_ase.py: eV and Å.
ASE = json.loads((Path(tests.support.__file__).parent / "silver_ase.json").read_text())
EV = 96.4853321
CASES = [*ASE["isomers"].values(), *ASE["others"]]


def displaced(n_rows, seed=0, width=0.03):
    octahedron = torch.tensor(ASE["isomers"]["octahedron"]["positions"], dtype=torch.float64) / 10
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n_rows, 6, 3, generator=generator, dtype=torch.float64)
    return octahedron + width * noise


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_energies_and_forces_are_those_of_ase(case):
    x = torch.tensor(case["positions"], dtype=torch.float64)[None] / 10
    silver = SilverCluster(x.shape[1], wall_radius=1.0)
    energies, forces = silver.energy_and_forces(x)
    # ASE drops pairs beyond 5.88 Å, whose energies are below 1e-5 eV.
    np.testing.assert_allclose(energies / EV, [case["energy"]], rtol=1e-7, atol=1e-6)
    expected = np.array(case["forces"])[None]
    np.testing.assert_allclose(forces / (10 * EV), expected, rtol=1e-6, atol=2e-5)


def test_derivatives():
    silver = SilverCluster(6, wall_radius=0.2)
    x = displaced(3).requires_grad_()
    assert torch.autograd.gradcheck(silver.energy, (x,))
    assert torch.autograd.gradgradcheck(silver.energy, (x,), atol=1e-3)
    energies, forces = silver.energy_and_forces(x)
    h = 1e-6
    for atom, axis in ((0, 0), (3, 1), (5, 2)):
        shift = torch.zeros_like(x)
        shift[:, atom, axis] = h
        with torch.no_grad():
            slope = (silver.energy(x + shift) - silver.energy(x - shift)) / (2 * h)
        torch.testing.assert_close(forces[:, atom, axis], -slope, rtol=1e-5, atol=1e-4)
    for row, energy in zip(x.detach(), energies, strict=True):  # rows do not know of each other
        torch.testing.assert_close(silver.energy(row[None])[0], energy)
    torch.testing.assert_close(forces.sum(dim=1), torch.zeros(3, 3).double(), atol=1e-8, rtol=0)
    torques = torch.linalg.cross(x.detach(), forces).sum(dim=1)
    torch.testing.assert_close(torques, torch.zeros(3, 3).double(), atol=1e-8, rtol=0)


def test_symmetries():
    silver, x = SilverCluster(6, wall_radius=0.22), displaced(4)
    energy = silver.energy(x)
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    for changed in (
        x @ rotation, -x, x + torch.tensor([0.3, -5.0, 1.0]),
        x[:, torch.randperm(6, generator=generator)],
    ):  # fmt: skip
        torch.testing.assert_close(silver.energy(changed), energy, rtol=1e-12, atol=1e-8)


def test_wall():
    """Half of k times the squared distance beyond it, for an atom that feels nothing else."""
    free, walled = SilverCluster(2, wall_radius=100.0), SilverCluster(2, 0.4, 3000.0)
    x = torch.zeros(2, 2, 3).double()
    x[0, 1, 0], x[1, 1, 0] = 0.6, 2.0  # 0.3 and 1 nm from the centroid
    added = walled.energy(x) - free.energy(x)
    torch.testing.assert_close(added, torch.tensor([0.0, 2 * 0.5 * 3000 * 0.36]).double())
    # Two isolated atoms have the energy of two isolated atoms.
    torch.testing.assert_close(free.energy(x)[1], torch.tensor(2 * 2.96 * EV).double())


def test_non_finite_rows_and_precision():
    for dtype in (torch.float32, torch.float64):
        silver = SilverCluster(6)
        check_non_finite_rows(silver, displaced(4).to(dtype))
        x = displaced(1).to(dtype)
        x[0, 4] = 1e30 if dtype == torch.float32 else 1e200  # one atom far away
        energies, forces = silver.energy_and_forces(x)
        assert (energies == torch.inf).all()
        assert not forces.any()
    assert silver.boltzmann_constant == KB
    together, forces = silver.energy_and_forces(torch.zeros(1, 6, 3).double())
    assert together.isfinite().all()
    assert together > 1e5
    assert not forces.any()
    single = silver.energy(displaced(4).float()).double()
    torch.testing.assert_close(single, silver.energy(displaced(4)), rtol=1e-4, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1,), "n_atoms: expected"),
        ((6, 0.0), "wall_radius: expected"),
        ((6, 0.4, -1.0), "wall_stiffness: expected"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        SilverCluster(*arguments)


def test_bad_positions():
    silver = SilverCluster(6)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, \(6, 3\)\]"):
        silver.energy(torch.zeros(2, 5, 3))
    with pytest.raises(TypeError, match="x: expected a floating"):
        silver.energy(torch.zeros(2, 6, 3, dtype=torch.int64))
