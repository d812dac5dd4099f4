"""A term of the energy: the counterpart of one Force of OpenMM."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import openmm
from torch import Tensor, nn

from openmm_tsf.potentials.forces.pairs import Batch


class Term(nn.Module, ABC):
    """The energy of one Force; constants are float64 buffers, converted by ``Module.to``.

    The energy is a pure function of its arguments in torch operations, without branches on values,
    so that it can be differentiated to any order, traced and compiled. A subclass is constructed
    from a Force and the pairs of the System's particles.
    """

    def register(self, **constants: Tensor) -> None:
        """Register constants as buffers."""
        for name, value in constants.items():
            self.register_buffer(name, value)

    @abstractmethod
    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the energies [B] in kJ/mol; `parameters` are the System's global ones, scalars."""


class NotCovered(ValueError):
    """A Force, or a `feature` in it such as ``"a cutoff"``, has no counterpart in torch."""

    def __init__(self, force: openmm.Force, feature: str | None) -> None:
        type_name, name = type(force).__name__, force.getName()
        label = type_name if name == type_name else f"{type_name} named {name!r}"
        part = "" if feature is None else f"{feature} in "
        super().__init__(f"system: TorchPotential does not cover {part}{label}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (str(self),)


def _restored(message: str) -> NotCovered:
    """Return a copy in another process, to which the Force is not sent."""
    error = NotCovered.__new__(NotCovered)
    error.args = (message,)
    return error
