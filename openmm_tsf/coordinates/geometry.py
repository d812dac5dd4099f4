"""Batched vector geometry, components first: vectors are [3, ..., B].

The batch comes last so that every elementary operation runs over contiguous memory.
"""

import math

import torch
from torch import Tensor

from openmm_tsf.utils.geometry import cross, dot

TWO_PI = 2.0 * math.pi


def norm(a: Tensor) -> Tensor:
    """Lengths [..., B]."""
    return torch.sqrt(dot(a, a))


def dihedral(to_atom: Tensor, axis: Tensor, to_partner: Tensor) -> Tensor:
    """Dihedral angles in (-pi, pi], IUPAC sign (Pure Appl. Chem. 40, 291, 1974).

    `axis` points from the angle partner to the bond partner, `to_atom` from there to the atom,
    `to_partner` from the angle partner to the torsion partner or any point of that half plane.
    """
    normal = cross(axis, to_atom)
    sine = -norm(axis) * dot(to_partner, normal)
    cosine = dot(cross(axis, to_partner), normal)
    return torch.atan2(sine, cosine)


def wrap(angle: Tensor, cut: Tensor) -> Tensor:
    """`angle` shifted by a multiple of 2 pi onto the branch [cut, cut + 2 pi)."""
    wrapped = cut + torch.remainder(angle - cut, TWO_PI)
    # Rounding may give the open end of the branch.
    return torch.where(wrapped >= cut + TWO_PI, wrapped - TWO_PI, wrapped).maximum(cut)


Frame = tuple[Tensor, Tensor, Tensor]


def next_frame(
    frame: Frame, minus_cos: Tensor, sin: Tensor, cos_phi: Tensor, sin_phi: Tensor
) -> Frame:
    """Return the frame of an atom from the frame of the atom that it is bonded to.

    A frame (e1, e2, e3) is right-handed: e1 points from the angle partner to the bond partner, e2
    to the side of the torsion partner. The new e1 is the direction of the new bond, the new e2
    points to the side of the old angle partner. No division: exact for any angle. `frame` has
    vectors [3, n, B]; cosines and sines of the angle and the dihedral are [n, B].
    """
    e1, e2, e3 = frame
    side = cos_phi * e2 + sin_phi * e3
    return (minus_cos * e1 + sin * side, minus_cos * side - sin * e1, cos_phi * e3 - sin_phi * e2)


def axes_of(first: Tensor, second: Tensor, third: Tensor) -> Frame:
    """Right-handed axes of three points [3, B]: e1 to the second, e2 towards the third."""
    e1 = second - first
    e1 = e1 / norm(e1)
    e2 = third - second
    e2 = e2 - dot(e1, e2) * e1
    e2 = e2 / norm(e2)
    return e1, e2, cross(e1, e2)
