"""What a Force of OpenMM becomes: a term of the energy."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import openmm
from torch import Tensor, nn

from openmm_tsf.potentials.forces.geometry import Frame


class Term(nn.Module, ABC):
    """One Force as a sum over a batch; constants are float64 buffers, moved by ``Module.to``.

    The energy is a pure function of its arguments in torch operations, without branches on values,
    so that it can be differentiated to any order, traced and compiled.
    """

    @abstractmethod
    def energy(self, frame: Frame, parameters: Mapping[str, Tensor]) -> Tensor:
        """Energies [B] in kJ/mol.

        Parameters
        ----------
        frame
            The conformations, batch last.
        parameters
            The System's global parameters, scalars of the batch's dtype.
        """


class NotCovered(ValueError):
    """Something in a Force that has no counterpart here.

    Parameters
    ----------
    force
        The Force.
    what
        What in it, for example ``"a cutoff (CutoffNonPeriodic)"``; None for all of it.
    """

    def __init__(self, force: openmm.Force, what: str | None) -> None:
        kind, name = type(force).__name__, force.getName()
        named = kind if name == kind else f"{kind} named {name!r}"
        part = "" if what is None else f"{what} in "
        super().__init__(f"system: TorchPotential does not cover {part}{named}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (str(self),)


def _restored(message: str) -> NotCovered:
    """A copy in another process, where the Force is not."""
    error = NotCovered.__new__(NotCovered)
    error.args = (message,)
    return error
