"""The basins of a molecule: the sign of its first phi."""

import mdtraj
import numpy as np
import torch
from torch import Tensor

from openmm_tsf.systems.molecule import MolecularSystem


def basin_labels(molecule: MolecularSystem | None, x: Tensor) -> Tensor:
    """Return the basin of each x [B, *event], int64 [B]: 1 where the first phi is positive.

    It is 0 for molecules without a phi, potentials on R^d, and rows that are not finite.
    """
    if molecule is None or not any(name.startswith("phi") for name in molecule.dihedrals):
        return torch.zeros(len(x), dtype=torch.int64, device="cpu")
    quartet = next(q for name, q in molecule.dihedrals.items() if name.startswith("phi"))
    positions = x.detach().cpu().numpy().astype(np.float32)
    finite = np.isfinite(positions).all(axis=(1, 2))
    labels = np.zeros(len(x), dtype=np.int64)
    if finite.any():
        frames = mdtraj.Trajectory(positions[finite], molecule.mdtraj_topology)
        labels[finite] = mdtraj.compute_dihedrals(frames, [quartet])[:, 0] > 0
    return torch.from_numpy(labels)
