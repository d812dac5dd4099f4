"""Energies of walkers from potentials that live in another dtype or on another device."""

import torch
from torch import Tensor

from openmm_tsf.potentials.base import Potential


def energy(potential: Potential, x: Tensor) -> Tensor:
    """Energies [B] of configurations x [B, *event], in the dtype and on the device of x.

    A potential with attributes ``dtype`` and ``device`` (:class:`openmm_tsf.TorchPotential`) is
    given x in these; others take x as it is. Differentiable as far as the potential is.
    """
    return potential.energy(_as_taken(potential, x)).to(x)


def energy_and_forces(potential: Potential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Detached energies [B] and forces [B, *event]; see :func:`energy`."""
    energies, forces = potential.energy_and_forces(_as_taken(potential, x))
    return energies.to(x), forces.to(x)


def device_of(potential: Potential, x: Tensor) -> torch.device:
    """Where the potential computes, for x: its own ``device`` if it has one, else that of x."""
    return getattr(potential, "device", x.device)


def _as_taken(potential: Potential, x: Tensor) -> Tensor:
    return x.to(device_of(potential, x), getattr(potential, "dtype", x.dtype))
