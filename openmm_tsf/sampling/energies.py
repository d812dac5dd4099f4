"""Energies of walkers from potentials of another dtype or on another device."""

import torch
from torch import Tensor

from openmm_tsf.potentials.base import HasSinglePrecision, Potential


def energy(potential: Potential, x: Tensor) -> Tensor:
    """Return energies [B] of x [B, *event], converted to the potential's dtype and device.

    The energies have the dtype and device of x and are differentiable if the potential's are.
    """
    return potential.energy(_converted(potential, x)).to(x)


def energy_and_forces(potential: Potential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return detached energies [B] and forces [B, *event]; see :func:`energy`."""
    energies, forces = potential.energy_and_forces(_converted(potential, x))
    return energies.to(x), forces.to(x)


def single_precision_forces(potential: Potential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return energies [B] and forces [B, *event] computed in float32; see :func:`energy`."""
    assert isinstance(potential, HasSinglePrecision)
    energies, forces = potential.single_precision_forces(_converted(potential, x))
    return energies.to(x), forces.to(x)


def device_of(potential: Potential, x: Tensor) -> torch.device:
    """Return the potential's ``device`` if it has one, otherwise that of x."""
    return getattr(potential, "device", x.device)


def _converted(potential: Potential, x: Tensor) -> Tensor:
    return x.to(device_of(potential, x), getattr(potential, "dtype", x.dtype))
