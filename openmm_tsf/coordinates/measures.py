"""Bonds, angles, dihedrals and pose of Cartesian positions, by the rows of a Z-matrix."""

import torch
from torch import Tensor

from openmm_tsf.coordinates.geometry import axes_of, dihedral, norm
from openmm_tsf.utils.geometry import cross, dot


def bonds_angles_dihedrals(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bonds [N-1, B] in nm, cosines and sines of the angles [N-2, B], dihedrals [N-3, B] of x.

    Dihedrals are in (-pi, pi]; x [B, N, 3] in nm.
    """
    xt = x.permute(2, 1, 0).contiguous()
    atom, bonded, angle, partner = rows.T
    to_atom = xt[:, atom[1:]] - xt[:, bonded[1:]]
    r = norm(to_atom)
    to_angle = xt[:, angle[2:]] - xt[:, bonded[2:]]
    product = dot(to_atom[:, 1:], to_angle)
    area = norm(cross(to_atom[:, 1:], to_angle))
    length = r[1:] * norm(to_angle)
    to_partner = xt[:, partner[3:]] - xt[:, angle[3:]]
    dihedrals = dihedral(to_atom[:, 2:], -to_angle[:, 1:], to_partner)
    cosine = (product / length).clamp(-1.0, 1.0)  # of atoms in line, rounding may give more
    return r, cosine, area / length, dihedrals


def dihedrals_of(x: Tensor, quartets: Tensor) -> Tensor:
    """Dihedral angles [n, B] in (-pi, pi] of quartets of atoms [n, 4] in x [B, N, 3]."""
    xt = x.permute(2, 1, 0)
    atom, bonded, angle, partner = xt[:, quartets.T].unbind(1)
    return dihedral(atom - bonded, bonded - angle, partner - angle)


def pose_of(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation [B, 3, 3] (axes as columns) and translation [B, 3] of x [B, N, 3]."""
    first, second, third = x[:, rows[:3, 0]].permute(1, 2, 0)
    return torch.stack(axes_of(first, second, third)).permute(2, 1, 0), first.T
