"""Handedness of tetrahedral centres.

The energy does not depend on it, so a proposal could change it unnoticed: it is part of the domain.

A centre with four neighbours has four triples of bonds, each of which spans a signed volume. In
small rings, and in hot conformations, one triple may pass through its plane although the centre is
not inverted. So all four are compared with the reference at once, by the scalar product of the four
volumes with those of the reference: one there, minus one in its mirror image. It is positive if no
triple has changed its sign, negative if all four have, and triples that are nearly flat in the
reference hardly count. It is computed from positions, also for internal coordinates: where a bond
of the centre closes a ring, angles at the centre do not tell where all its neighbours are.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from openmm_tsf.utils.geometry import cross, dot
from openmm_tsf.utils.validation import require_array, require_entry

#: A centre of which no three unit bonds span a volume larger than this has no handedness.
FLAT_TOLERANCE = 0.05

#: Ratio of the sum of four squared lengths to the power 3/2 and the volume that three of them span,
#: in a regular tetrahedron.
_REGULAR = 6.0 * 3.0**0.5
_TETRAHEDRAL_ELEMENTS = frozenset({"B", "C", "N", "Si", "P", "S", None})


def is_tetrahedral(n_neighbours: int, element: str | None) -> bool:
    """Whether an atom has four neighbours and an element that is then tetrahedral."""
    return n_neighbours == 4 and element in _TETRAHEDRAL_ELEMENTS


def find_centres(neighbours: Sequence[Sequence[int]], elements: Sequence[str | None]) -> np.ndarray:
    """Return the tetrahedral atoms, each with its neighbours in ascending order, int [C, 5]."""
    centres = [
        [atom, *sorted(bonded)]
        for atom, (bonded, element) in enumerate(zip(neighbours, elements, strict=True))
        if is_tetrahedral(len(bonded), element)
    ]
    return np.array(centres, dtype=np.int64).reshape(-1, 5)


def triple_volumes(bonds: Tensor) -> Tensor:
    """Volumes [4, C, B] that the triples of four bonds [3, 4, C, B] span.

    They have one sign if the centre is inside the tetrahedron of its neighbours.
    """
    a, b, c, d = bonds.unbind(1)
    ab, cd = cross(a, b), cross(c, d)
    return torch.stack((dot(ab, c), -dot(ab, d), dot(cd, a), -dot(cd, b)))


def handedness_signs(positions: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the handedness of each centre [C, 5] in positions [N, 3]: 1, -1, or 0 in a plane.

    The sign of the sum of the volumes: the same in all conformations of a molecule, while that of
    a single triple is not.
    """
    unit, _ = _reference_volumes(positions, centres)
    return np.asarray(unit.sum(dim=0).sign().to(torch.int64).numpy())


def is_flat(positions: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Whether each centre [C, 5] lies in one plane with its neighbours in positions [N, 3]."""
    unit, _ = _reference_volumes(positions, centres)
    return np.asarray((unit.abs().amax(dim=0) < FLAT_TOLERANCE).numpy())


def _reference_volumes(positions: np.ndarray, centres: np.ndarray) -> tuple[Tensor, Tensor]:
    """Volumes [4, C] of unit bonds, and of bonds in nm, in positions [N, 3]."""
    bonds = _bonds(
        torch.from_numpy(np.array(positions, dtype=np.float64))[None], torch.from_numpy(centres)
    )
    unit = bonds / torch.sqrt(dot(bonds, bonds))
    return triple_volumes(unit)[..., 0], triple_volumes(bonds)[..., 0]


def _bonds(x: Tensor, centres: Tensor) -> Tensor:
    """Bonds [3, 4, C, B] from centres [C, 5] to their neighbours in x [B, N, 3]."""
    xt = x.permute(2, 1, 0).contiguous()
    return xt[:, centres[:, 1:].T] - xt[:, centres[:, :1].T]


class Chirality(nn.Module):
    """The tetrahedral centres of a molecule, and their handedness in a reference conformation.

    Parameters
    ----------
    centres
        Atoms, each with its four neighbours, int [C, 5].
    weights
        Factors [C, 4] of the volumes of :func:`triple_volumes` (nm^3): their sum is 1 in the
        reference.
    """

    centres: Tensor
    weights: Tensor

    def __init__(self, centres: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    @classmethod
    def from_reference(
        cls, centres: np.ndarray, positions: np.ndarray, names: Sequence[str]
    ) -> Self:
        """Return the handedness of centres [C, 5] in a conformation [N, 3] in nm.

        ValueError if a centre is flat there (it is named, by the `names` of the atoms).
        """
        unit, volumes = _reference_volumes(positions, centres)
        for atom in centres[is_flat(positions, centres), 0]:
            atoms = f"{names[atom]} and its four neighbours lie in one plane"
            expected = "tetrahedral centres with a handedness"
            raise ValueError(f"positions: expected {expected}, but {atoms}")
        # Lengths of the reference, so that the comparison needs none: unit / volumes.
        lengths = torch.where(volumes == 0, 0.0, unit / volumes)
        return cls(torch.from_numpy(centres), (unit * lengths / unit.square().sum(dim=0)).T)

    def __len__(self) -> int:
        return len(self.centres)

    def averaged_over(self, groups: Sequence[Sequence[int]]) -> Self:
        """Return this with one weight for triples that differ by equivalent neighbours alone.

        The handedness is then the same for all labels. `groups` are neighbours of a centre each;
        where weights of a group differ in sign, they are left as they are.
        """
        weights = self.weights.clone()
        for group in groups:
            atoms = torch.tensor(group, dtype=torch.int64, device=self.centres.device)
            is_member = torch.isin(self.centres[:, 1:], atoms)
            for centre in (is_member.sum(dim=1) == len(group)).nonzero().flatten().tolist():
                left_out = is_member[centre].flip(0)  # the first triple is without the last
                of_group = weights[centre, left_out]
                if bool((of_group > 0).all() | (of_group < 0).all()):
                    weights[centre, left_out] = of_group.mean()
        return type(self)(self.centres, weights)

    def similarity(self, x: Tensor) -> Tensor:
        """Agreement [C, B] of each centre in x [B, N, 3] with the reference, 1 if it is the same.

        The mirror image has the negative number.
        """
        return self._similarity(_bonds(x, self.centres))

    def _similarity(self, bonds: Tensor) -> Tensor:
        a, b, c, d = bonds.unbind(1)
        one, two, three, four = self.weights.T[..., None]
        # The weighted sum of `triple_volumes`.
        volumes = dot(cross(a, b), one * c - two * d)
        return volumes + dot(cross(c, d), three * a - four * b)

    def is_mirrored(self, x: Tensor) -> Tensor:
        """Whether any centre in x [B, N, 3] has the other handedness: bool [B]; NaN has not."""
        return (self.similarity(x) <= 0).any(0)

    def penalty(self, x: Tensor) -> Tensor:
        """Sum of squared violations [B] of the handedness in x [B, N, 3], for training only.

        Relative to a power of the lengths of bonds, so that it is bounded: 1 for a regular
        tetrahedron that is mirrored.
        """
        if x.device.type == "cpu" and not bool(self.is_mirrored(x.detach()).any()):
            return x.new_zeros(len(x))  # without the gradient of zeros
        bonds = _bonds(x, self.centres)
        largest = self.weights.abs().sum(dim=1)[:, None] * dot(bonds, bonds).sum(dim=0).pow(1.5)
        violation = torch.relu(-_REGULAR * self._similarity(bonds) / largest)
        return violation.square().sum(dim=0)

    def to_config(self) -> dict[str, Any]:
        """Return lists from which :meth:`from_config` rebuilds this."""
        return {"atoms": self.centres.tolist(), "weights": self.weights.tolist()}

    @classmethod
    def from_config(cls, config: Any, n_atoms: int) -> Self:
        """Rebuild this, for a molecule of `n_atoms`; ValueError for anything else."""
        n_centres = len(require_entry(config, "atoms", list))
        centres = require_array(config, "atoms", "i", n_centres, 5).astype(np.int64)
        if ((centres < 0) | (centres >= n_atoms)).any():
            raise ValueError(f"atoms: expected atoms below {n_atoms}, got {centres.tolist()}")
        weights = torch.from_numpy(require_array(config, "weights", "if", n_centres, 4))
        return cls(
            torch.from_numpy(centres.reshape(-1, 5)), weights.to(torch.float64).reshape(-1, 4)
        )
