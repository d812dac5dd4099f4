"""Potential energies: x [B, *event] to U [B], differentiable."""

from openmm_tsf.potentials.base import Potential
from openmm_tsf.potentials.mixed_double_well import MixedDoubleWell
from openmm_tsf.potentials.openmm_potential import OpenMMPotential
from openmm_tsf.potentials.torch_potential import TorchPotential
from openmm_tsf.potentials.toy import DoubleWell, GaussianWell

__all__ = [
    "DoubleWell",
    "GaussianWell",
    "MixedDoubleWell",
    "OpenMMPotential",
    "Potential",
    "TorchPotential",
]
