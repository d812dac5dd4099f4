"""Handedness of tetrahedral centres.

The energy does not depend on it, so a proposal could change it unnoticed: it is part of the domain.
A sibling's offset about the bond between a centre and its angle partner has the sign of a triple
product of three of the centre's substituents.
"""

import torch
from torch import Tensor

from openmm_tsf.coordinates.zmatrix import ZMatrix
from openmm_tsf.utils.geometry import cross, dot

#: A tetrahedral centre of the reference flatter than this (sine of the offset) has no handedness.
FLAT_TOLERANCE = 0.05


def reference_handedness(zmatrix: ZMatrix, torsions: Tensor) -> Tensor:
    """Return the sign of the sine of each dihedral [N-3] at a tetrahedral centre, 0 elsewhere.

    A centre that is flat in the reference is refused (its atoms are named).
    """
    sine = torsions.sin()
    tetrahedral = torch.as_tensor(zmatrix.tetrahedral, dtype=torch.bool, device="cpu")[3:]
    for flat in (tetrahedral & (sine.abs() < FLAT_TOLERANCE)).nonzero()[:, 0].tolist():
        atoms = f"{zmatrix.describe(flat + 3)} lie in one plane"
        expected = "tetrahedral centres with a handedness"
        raise ValueError(f"positions: expected {expected}, but {atoms}")
    return torch.where(tetrahedral, sine.sign(), torch.zeros_like(sine))


def is_mirrored(x: Tensor, rows: Tensor, handedness: Tensor) -> Tensor:
    """Whether any of the rows' centres in x [B, N, 3] has the other handedness: bool [B].

    `rows` [n, 4] are Z-matrix rows at tetrahedral centres, `handedness` [n] is +1 or -1.
    """
    atom, centre, partner, primary = rows.T
    xt = x.permute(2, 1, 0).contiguous()
    middle = xt[:, centre]
    to_partner, to_primary = xt[:, partner] - middle, xt[:, primary] - middle
    # The sign is that of minus the sine of the offset.
    volume = dot(cross(to_partner, to_primary), xt[:, atom] - middle)
    return (volume * handedness[:, None] >= 0).any(0)
