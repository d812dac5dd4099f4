"""Whether frames are in equilibrium under a System's torques, about each bond that turns.

A rotation about a bond, by the dihedral phi, keeps volumes. So in the Boltzmann ensemble of the
potential energy U, integration by parts gives

    <f(phi) dU/dphi> = kT <f'(phi)>

for every periodic f; here cosines and sines. No bond and no angle changes, so this tells other
torsions, charges and solvents, to which :mod:`openmm_tsf.systems.configurational_temperature` is
blind. It holds within each basin, whatever the basins' populations.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

from openmm_tsf.coordinates.measures import dihedrals_of
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.systems.configurational_temperature import evenly_spaced
from openmm_tsf.systems.consistency import pair_label
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB
from openmm_tsf.utils.topology import bonds_of, neighbours_of

Array = NDArray[np.float64]

#: Blocks of frames for the standard error, each of at least ten frames.
_N_BLOCKS = 32
_LEAST_FRAMES = 10 * _N_BLOCKS
#: Frames that are used, times the square of the number of atoms: a few seconds. Of 22 atoms they
#: are 16 500, which tell two models of implicit solvent apart (0.1 to 0.2 kT).
_PAIRS_IN_ALL = 8_000_000


class TorqueDeviation(NamedTuple):
    """The largest deviation of a mean torque from its value in equilibrium."""

    bond: str  #: the atoms that the rotation is about
    torque: float  #: in kT per radian
    n_errors: float  #: in standard errors, absolute


def measure_torques(
    molecule: MolecularSystem, positions: torch.Tensor, temperature: float
) -> TorqueDeviation | None:
    """Return the most significant deviation of the mean torques in frames [F, N, 3] (nm).

    None without a bond that turns, or with fewer than 320 frames.
    """
    rotations = _rotations(molecule)
    n = min(len(positions), max(_PAIRS_IN_ALL // molecule.n_atoms**2, _LEAST_FRAMES))
    if n < _LEAST_FRAMES or not rotations:
        return None
    frames = evenly_spaced(positions, n)
    settings = {"Threads": "1", "DeterministicForces": "true"}
    with OpenMMPotential(molecule.system, "CPU", settings, n_contexts=1) as potential:
        forces = potential.energy_and_forces(frames)[1].numpy() / (KB * temperature)
    deviations = []
    for quartet, side in rotations:
        first, last = quartet[1:3]
        atoms = torch.tensor([quartet], dtype=torch.int64, device="cpu")
        phi = dihedrals_of(frames, atoms).numpy().reshape(-1)
        x = frames.numpy()
        axis = x[:, last] - x[:, first]
        axis /= np.linalg.norm(axis, axis=1, keepdims=True)
        displacement = np.cross(axis[:, None], x[:, side] - x[:, [last]])
        gradient = -(forces[:, side] * displacement).sum(axis=(1, 2))
        for torque, errors in _compare(phi, gradient):
            deviations.append(
                TorqueDeviation(pair_label(molecule.topology, (first, last)), torque, errors)
            )
    return max(deviations, key=lambda deviation: deviation.n_errors)


def _compare(phi: Array, gradient: Array) -> list[tuple[float, float]]:
    """Return the deviation for each function of phi [F], and its number of standard errors."""
    values = [gradient]
    for k in (1, 2, 3):
        values.append(np.cos(k * phi) * gradient + k * np.sin(k * phi))
        values.append(np.sin(k * phi) * gradient - k * np.cos(k * phi))
    result = []
    for value in values:
        blocks = np.array([block.mean() for block in np.array_split(value, _N_BLOCKS)])
        error = max(blocks.std(ddof=1) / _N_BLOCKS**0.5, value.std() / len(value) ** 0.5)
        result.append((float(value.mean()), float(abs(value.mean()) / error) if error > 0 else 0.0))
    return result


def _rotations(molecule: MolecularSystem) -> list[tuple[list[int], list[int]]]:
    """Return a dihedral about each bond that turns, and the atoms beyond the bond that move."""
    bonds, n_atoms = bonds_of(molecule.topology), molecule.n_atoms
    neighbours = neighbours_of(molecule.topology)
    rotations = []
    for index, (b, c) in enumerate(bonds.tolist()):
        if min(len(neighbours[b]), len(neighbours[c])) < 2:
            continue
        others = np.delete(bonds, index, axis=0)
        graph = coo_array((np.ones(len(others)), others.T), shape=(n_atoms, n_atoms))
        part = connected_components(graph, directed=False)[1]
        if part[b] == part[c]:
            continue  # in a ring
        if (part == part[c]).sum() > (part == part[b]).sum():
            b, c = c, b
        side = [atom for atom in np.flatnonzero(part == part[c]).tolist() if atom != c]
        first = next(atom for atom in neighbours[b] if atom != c)
        last = next(atom for atom in neighbours[c] if atom != b)
        quartet = [first, b, c, last]
        rotations.append((quartet, side))
    return rotations
