"""The Boltzmann distribution that a flow is trained towards, with guards far from the data."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_tsf.coordinates.hydrogen_labels import OVERLAP_STIFFNESS
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.potentials.base import HasSinglePrecision, Potential
from openmm_tsf.training.basins import BasinPartition

#: Weight of a squared step (radians, or relative) outside the domain, in nats. Steep enough that
#: the draws return within about 0.1 rad of the wall; overlapping copies fade out at the same rate.
PENALTY = OVERLAP_STIFFNESS


@dataclass(frozen=True)
class Target:
    """The target density in the network's output space y; of the flow only its fixed layers.

    Energies above `energy_ceiling` (kJ/mol) are softened; `basins` tell points apart. With
    `single_precision`, energies and forces are computed in float32.
    """

    flow: AugmentedFlow
    potential: Potential
    basins: BasinPartition
    energy_ceiling: float
    single_precision: bool = False

    def reduced_energy(self, y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return -ln of the target's density on y [B], up to a constant, and x [B, *event].

        U/kT less ln of the volume element of the flow's fixed layers. Energies are softened above
        the ceiling and a smooth penalty guards the coordinate layer's domain, so that the value
        differs from the true one far from the data: for training only. Where copies of a
        configuration overlap, the penalty is the numerator of their partition weights
        (:meth:`InternalCoordinates.log_partition`), and the denominator is added.
        `y` [B, d] and `tau` [B], T/T_ref, are float64; +inf where the energy is not finite.
        """
        flow, potential = self.flow, self.potential
        total = y.new_full((len(y),), flow.log_multiplicity)
        x = y
        if flow.whitening is not None:
            x, extra = flow.whitening.forward_and_log_det(x)
            total = total + extra
        penalty = torch.zeros_like(total)
        layer = flow.coordinates
        if layer is not None:
            u = x
            x, penalty = layer.forward_regularised(u)
            if not layer.is_constant_log_det:
                total = total + layer.log_abs_det(layer.clamp(u)[0], x)
            penalty = PENALTY * penalty
            if flow.overlap:
                # The fading of the copies is part of the target and scales with temperature.
                penalty = penalty / tau + layer.log_partition_terms(u, tau)[1]
        kt = potential.boltzmann_constant * flow.reference_temperature * tau
        energy = soften(self._energy(x), self.energy_ceiling, kt)
        return energy / kt + penalty - total, x

    def _energy(self, x: Tensor) -> Tensor:
        """Energies [B] of x [B, *event]; in float32 differentiable once, and inf where unknown."""
        if not self.single_precision:
            return self.potential.energy(x)
        assert isinstance(self.potential, HasSinglePrecision)
        at = x.detach()
        energy, forces = self.potential.single_precision_forces(at)
        finite = torch.isfinite(energy) & torch.isfinite(forces).flatten(1).all(dim=1)
        shape = (-1,) + (1,) * (x.ndim - 1)
        # The difference is zero, with the gradient of the energy; none where that is not known.
        difference = torch.where(finite.view(shape), forces, 0.0) * (x - at)
        return torch.where(finite, energy - difference.flatten(1).sum(dim=1), math.inf)


def trains_in_single_precision(potential: Potential, dtype: torch.dtype) -> bool:
    """Return whether energies for training in `dtype` are to be computed in float32.

    Where the network is, that is precise enough for its losses; the validation's are not.
    """
    is_double = isinstance(potential, HasSinglePrecision) and potential.dtype == torch.float64
    return dtype == torch.float32 and is_double


def soften(energy: Tensor, energy_ceiling: float, kt: Tensor) -> Tensor:
    """Return energies [B] that grow only logarithmically above a ceiling: for training only.

    Below the ceiling (kJ/mol) nothing changes; above it U becomes
    ceiling + kT ln(1 + (U - ceiling)/kT), with a continuous first derivative.
    """
    excess = (energy - energy_ceiling).clamp(min=0)
    return torch.where(
        energy > energy_ceiling, energy_ceiling + kt * torch.log1p(excess / kt), energy
    )
