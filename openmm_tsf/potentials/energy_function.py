"""The energy of a System as one function of positions and global parameters."""

from collections.abc import Iterable, Mapping

import openmm
from torch import Tensor, nn

from openmm_tsf.potentials.forces.pairs import AllPairs, Batch
from openmm_tsf.potentials.forces.registry import global_parameters, read_forces


class SystemEnergy(nn.Module):
    """The sum of the terms of a System's Forces, those in `force_groups` or all.

    `default_parameters` are the System's global parameters with their values.
    """

    def __init__(self, system: openmm.System, force_groups: Iterable[int] | None = None) -> None:
        super().__init__()
        self.pairs = AllPairs(system.getNumParticles())
        self.forces = read_forces(system, self.pairs, force_groups)
        self.terms = nn.ModuleList(force.term for force in self.forces)
        self.default_parameters = global_parameters(system)

    def forward(self, y: Tensor, *parameters: Tensor) -> Tensor:
        """Return the energies [B] of positions [3, N, B]: differentiated, traced and compiled."""
        batch, named = Batch(y, self.pairs), self._named(parameters)
        energy = y.new_zeros(y.shape[-1])
        for force in self.forces:
            energy = energy + force.term.energy(batch, named)
        return energy

    def of_force(self, index: int, y: Tensor, *parameters: Tensor) -> Tensor:
        """Return the energies [B] of one Force, by its index in the System."""
        term = next(force.term for force in self.forces if force.index == index)
        return term.energy(Batch(y, self.pairs), self._named(parameters))

    def _named(self, parameters: Iterable[Tensor]) -> Mapping[str, Tensor]:
        return dict(zip(self.default_parameters, parameters, strict=True))
