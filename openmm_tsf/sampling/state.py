"""The walkers, and what a kernel is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class WalkerState:
    """W walkers, each with one replica at every one of R rungs of the temperature ladder.

    Kernels never change a state in place: they return a new one.

    Attributes
    ----------
    x : Tensor
        Configurations [W, R, *event], float64 (nm for molecules).
    velocities : Tensor or None
        Velocities [W, R, *event], float64, nm/ps; None where there is no dynamics.
    energy : Tensor
        Potential energies [W, R], float64.
    replica : Tensor
        Identity (the starting rung) of the replica that now sits at each rung [W, R], int64.
    iteration : int
        Iterations completed.
    """

    x: Tensor
    velocities: Tensor | None
    energy: Tensor
    replica: Tensor
    iteration: int = 0

    @property
    def n_walkers(self) -> int:
        """Number of walkers W."""
        return int(self.energy.shape[0])

    @property
    def n_rungs(self) -> int:
        """Number of rungs R."""
        return int(self.energy.shape[1])

    def evolve(self, **changes: Any) -> Self:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers for a checkpoint."""
        return {
            "x": self.x,
            "velocities": self.velocities,
            "energy": self.energy,
            "replica": self.replica,
            "iteration": self.iteration,
        }

    @classmethod
    def from_state_dict(cls, content: dict[str, Any]) -> Self:
        """The state of a checkpoint."""
        return cls(**content)


@dataclass(frozen=True)
class KernelInfo:
    """What one application of a kernel did; adding two gives totals.

    Attributes
    ----------
    accepted, proposed : Tensor
        Counts, int64: [R] per rung; even-odd swaps [R-1] per adjacent pair; random-pair swaps
        [R, R], in the upper triangle.
    rejected_non_finite : int
        Proposals rejected for a non-finite energy or for leaving the coordinates' domain
        (mirror images not among them).
    mirror_images : int
        Proposals rejected for the wrong handedness.
    n_evaluations : int
        Energies (or energies with forces) asked of the potential.
    outside_domain : int
        Those of `rejected_non_finite` that left the flow's domain: a torsion beyond its branch, a
        bond or an angle that there is not. Of the others, the energy was not finite.
    members : mapping of str to KernelInfo
        Of a kernel made of kernels, what each of them did: its part of the counts.
    """

    accepted: Tensor
    proposed: Tensor
    rejected_non_finite: int = 0
    mirror_images: int = 0
    n_evaluations: int = 0
    outside_domain: int = 0
    members: Mapping[str, "KernelInfo"] = field(default_factory=dict)

    @classmethod
    def zero(cls, counts_shape: tuple[int, ...]) -> "KernelInfo":
        """The neutral element: nothing proposed."""
        zeros = torch.zeros(counts_shape, dtype=torch.int64)
        return cls(zeros, zeros)

    @property
    def acceptance(self) -> Tensor:
        """Accepted over proposed; NaN where nothing was proposed."""
        return self.accepted.double() / self.proposed.double()

    def __add__(self, other: "KernelInfo") -> "KernelInfo":
        return KernelInfo(
            self.accepted + other.accepted,
            self.proposed + other.proposed,
            self.rejected_non_finite + other.rejected_non_finite,
            self.mirror_images + other.mirror_images,
            self.n_evaluations + other.n_evaluations,
            self.outside_domain + other.outside_domain,
            {
                name: sum_of(self.members.get(name), other.members.get(name))
                for name in {**self.members, **other.members}
            },
        )

    def of_member(
        self, name: str, accepted: Tensor | None = None, proposed: Tensor | None = None
    ) -> "KernelInfo":
        """The mixture's counts where this is what its member `name` did, in its own shapes."""
        return replace(
            self,
            accepted=self.accepted if accepted is None else accepted,
            proposed=self.proposed if proposed is None else proposed,
            members={name: self},
        )


def sum_of(first: KernelInfo | None, second: KernelInfo | None) -> KernelInfo:
    """The sum of counts of which one may be missing."""
    if first is None or second is None:
        found = second if first is None else first
        assert found is not None
        return found
    return first + second


def per_rung(accepted: Tensor, n_walkers: int) -> tuple[Tensor, Tensor]:
    """Counts (accepted [R], proposed [R]) from accepted [W, R] bool."""
    total = accepted.sum(dim=0)
    return total, torch.full_like(total, n_walkers)
