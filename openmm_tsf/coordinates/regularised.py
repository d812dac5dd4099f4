"""Internal coordinates of any u, with a finite geometry and a penalty: for training only."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_tsf.coordinates.chirality import Chirality
from openmm_tsf.coordinates.penalties import branch_penalty, clamp_bonds_and_angles
from openmm_tsf.coordinates.poses import PosedConformations


class RegularisedCoordinates(PosedConformations):
    """Base class of :class:`InternalCoordinates`: its methods that are finite for any u."""

    metric: str
    chirality: Chirality
    reference_bonds: Tensor
    _free: Tensor
    _linear: Tensor

    @abstractmethod
    def _split(self, u: Tensor, dim: int = 1) -> Sequence[Tensor]:
        """Bonds, angles and dihedrals of u."""

    def regularise(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Clamp u [B, d] to where the geometry is finite; return a penalty for the violation.

        For training only: proposals of a sampler outside the domain are rejected. Bonds are clamped
        to 0.3 of the reference's coordinate or more, |cos theta| to 0.999 or less. The penalty [B]
        is the sum of squared violations: bonds relative to the reference's, cosines (relative to
        0.01 where a group is linear), dihedrals beyond their branch in radians, and centres that
        are mirrored (1 for a mirror image). Zero with zero gradient inside, continuously
        differentiable.
        """
        clamped, penalty = self.clamp(u)
        return clamped, penalty + self.chirality.penalty(self._build(clamped))

    def clamp(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`regularise`, without the penalty for handedness, which takes conformations."""
        self._check_u(u)
        bonds, angles, torsions = self._split(u)
        cuts, reference = self.branch_cuts, (self.reference_bonds[self._free], self._linear)
        bonds, angles, penalty = clamp_bonds_and_angles(bonds, angles, *reference, self.metric)
        penalty = penalty + branch_penalty(torsions, cuts)
        if len(self.labelling):
            penalty = penalty + self.labelling.penalty(torsions, cuts)
        return torch.cat((bonds, angles, torsions), dim=1), penalty

    def forward_regularised(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Conformations x [B, N, 3] and penalty [B] of :meth:`regularise`, finite for any u."""
        clamped, penalty = self.clamp(u)
        x = self._build(clamped)
        return x, penalty + self.chirality.penalty(x)
