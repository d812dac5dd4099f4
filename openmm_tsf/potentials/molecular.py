"""What the potentials of an OpenMM System share."""

from abc import abstractmethod

import openmm
import torch
from torch import Tensor

from openmm_tsf.potentials.base import Potential
from openmm_tsf.units import KB


class MolecularPotential(Potential):
    """The potential energy of an OpenMM System: nm, kJ/mol, kJ/(mol nm)."""

    boltzmann_constant = KB

    def energy(self, x: Tensor) -> Tensor:
        """Return the energies [B] in kJ/mol of positions [B, N, 3] in nm, differentiable.

        Forces are computed only if `x` requires a gradient.

        Raises
        ------
        TypeError, ValueError
            If `x` is not a floating-point tensor [B, N, 3] (for TorchPotential, of the potential's
            dtype on its device).
        RuntimeError
            If an OpenMMPotential is closed, or was opened in the parent of a forked process.
        """
        self.check_positions(x)
        if x.requires_grad and torch.is_grad_enabled():
            return self._differentiable_energy(x)
        return self._evaluate(x, with_forces=False)[0]

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies [B] in kJ/mol and forces [B, N, 3] in kJ/(mol nm), detached.

        `x` and errors are those of :meth:`energy`.
        """
        self.check_positions(x)
        energies, forces = self._evaluate(x, with_forces=True)
        assert forces is not None
        return energies, forces

    @abstractmethod
    def _differentiable_energy(self, x: Tensor) -> Tensor:
        """Return the energies [B] with their graph."""

    @abstractmethod
    def _evaluate(self, x: Tensor, with_forces: bool) -> tuple[Tensor, Tensor | None]:
        """Return the detached energies [B], and forces [B, N, 3] if requested."""


def check_system(system: openmm.System) -> None:
    """Refuse anything but a System with particles and without virtual sites."""
    if not isinstance(system, openmm.System):
        raise TypeError(f"system: expected an openmm.System, got {type(system).__name__}")
    if system.getNumParticles() == 0:
        raise ValueError("system: expected at least one particle, got none")
    for index in range(system.getNumParticles()):
        if system.isVirtualSite(index):
            raise ValueError(f"system: virtual sites are not supported, particle {index} is one")
