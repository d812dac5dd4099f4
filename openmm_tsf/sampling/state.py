"""The walkers, and the counts of what kernels did with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from openmm_tsf.utils.devices import CPU


@dataclass(frozen=True)
class Latents:
    """Momenta p and latents v = D^-1(x, p) of all walkers, which kernels of an iteration share.

    The momenta (and copies, where a flow's copies overlap) are auxiliary variables. A kernel
    through the flow leaves the joint density of (x, p) invariant, so p need not be drawn anew
    between two of them; any other kernel leaves that of x invariant, and p is drawn from its
    conditional before the next kernel through the flow.

    Attributes
    ----------
    flow
        The flow D.
    x : Tensor
        The configurations that they belong to, the same object as in the state, and as it was:
        see :attr:`is_valid`.
    iteration : int
        The iteration that they belong to: p is drawn anew in every one.
    momenta, v, log_det : Tensor
        p [W, R, m], v [W, R, d + m] and log|J_D| [W, R], float64; the last with ln of the weight of
        the copy where copies overlap.
    """

    flow: object
    x: Tensor
    iteration: int
    momenta: Tensor
    v: Tensor
    log_det: Tensor
    _version: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_version", _count_changes(self.x))

    @property
    def is_valid(self) -> bool:
        """Whether the configurations were not changed in place since, as no kernel should."""
        return _count_changes(self.x) == self._version


def _count_changes(x: Tensor) -> int:
    """Return how often x was changed in place; tensors of inference mode do not count."""
    return 0 if x.is_inference() else x._version


@dataclass(frozen=True)
class WalkerState:
    """W walkers, each with one replica at every one of R rungs of the temperature ladder.

    Kernels do not change a state in place: they return a new one.

    Attributes
    ----------
    x : Tensor
        Configurations [W, R, *event], float64 (nm for molecules).
    velocities : Tensor or None
        Velocities [W, R, *event], float64, nm/ps; None where there is no dynamics. With constraints
        they are of all directions, and dynamics takes the tangent part.
    energy : Tensor
        Potential energies [W, R], float64.
    replica : Tensor
        The replica at each rung, named by the rung at which it started [W, R], int64.
    iteration : int
        The number of iterations completed.
    latents : Latents or None
        What kernels through a flow know of these configurations; None in a state with another x or
        another iteration than theirs, however it was made. Not part of checkpoints.

    Examples
    --------
    Two walkers at three temperatures, on a line:

    >>> import torch
    >>> from openmm_tsf.sampling.kernels import WalkerState
    >>> x = torch.zeros(2, 3, 1).double()
    >>> state = WalkerState(x, None, torch.zeros(2, 3).double(), torch.arange(3).repeat(2, 1))
    >>> state.n_walkers, state.n_rungs
    (2, 3)
    >>> state.evolve(iteration=1).iteration
    1
    """

    x: Tensor
    velocities: Tensor | None
    energy: Tensor
    replica: Tensor
    iteration: int = 0
    latents: Latents | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = self.latents
        if known is not None and (known.x is not self.x or known.iteration != self.iteration):
            object.__setattr__(self, "latents", None)

    @property
    def n_walkers(self) -> int:
        """The number of walkers W."""
        return int(self.energy.shape[0])

    @property
    def n_rungs(self) -> int:
        """The number of rungs R."""
        return int(self.energy.shape[1])

    def evolve(self, **changes: Any) -> Self:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    def state_dict(self) -> dict[str, Any]:
        """Return the fields, for a checkpoint; without latents, which no iteration inherits."""
        return {name: value for name, value in vars(self).items() if name != "latents"}

    @classmethod
    def from_state_dict(cls, content: dict[str, Any]) -> Self:
        """Return the state of a checkpoint."""
        return cls(**content)

    def to(self, device: torch.device) -> Self:
        """Return the walkers on a device."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return self.evolve(**tensors)


@dataclass(frozen=True)
class KernelInfo:
    """What one application of a kernel did; adding two gives totals.

    Attributes
    ----------
    accepted, proposed : Tensor
        Counts, int64: [R] per rung; for even-odd swaps [R-1] per adjacent pair; for other swaps
        [R, R], in the upper triangle.
    rejected_non_finite, mirror_images : int
        Proposals rejected for a non-finite energy or for leaving the coordinates' domain, and for
        the wrong handedness. What a kernel on a GPU returns are tensors, until
        :func:`counts_to_host` brings all of an iteration.
    n_evaluations : int
        The number of energies, or energies with forces, that the potential computed.
    outside_domain : int
        Those of `rejected_non_finite` that left the flow's domain: a torsion beyond its branch, or
        an impossible bond or angle.
    not_reversible : int
        Those of `rejected_non_finite` that constrained dynamics could not follow reversibly: the
        equations of the constraints were not solved, or backwards led elsewhere.
    members : mapping of str to KernelInfo
        The counts of every member of a kernel made of kernels.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.sampling.kernels import KernelInfo
    >>> info = KernelInfo(torch.tensor([2, 1]), torch.tensor([4, 4]), n_evaluations=8)
    >>> total = info + info
    >>> total.acceptance, total.n_evaluations
    (tensor([0.5000, 0.2500], dtype=torch.float64), 16)
    """

    accepted: Tensor
    proposed: Tensor
    rejected_non_finite: int | Tensor = 0
    mirror_images: int | Tensor = 0
    n_evaluations: int = 0
    outside_domain: int | Tensor = 0
    not_reversible: int | Tensor = 0
    members: Mapping[str, "KernelInfo"] = field(default_factory=dict)

    @classmethod
    def zero(cls, counts_shape: tuple[int, ...], device: torch.device = CPU) -> "KernelInfo":
        """Return counts of zero."""
        return cls(*torch.zeros(2, *counts_shape, dtype=torch.int64, device=device))

    @property
    def acceptance(self) -> Tensor:
        """The acceptance: accepted over proposed, NaN where nothing was proposed."""
        return self.accepted.double() / self.proposed.double()

    def __add__(self, other: "KernelInfo") -> "KernelInfo":
        members = dict(self.members)
        for name, info in other.members.items():
            members[name] = members[name] + info if name in members else info
        names = [entry.name for entry in fields(self) if entry.name != "members"]
        totals = {name: getattr(self, name) + getattr(other, name) for name in names}
        return KernelInfo(**totals, members=members)

    def of_member(
        self, name: str, accepted: Tensor | None = None, proposed: Tensor | None = None
    ) -> "KernelInfo":
        """Return the counts of a mixture of which only the member `name` was applied.

        `accepted` and `proposed` replace the member's where the mixture's shapes are others.
        """
        return replace(
            self,
            accepted=self.accepted if accepted is None else accepted,
            proposed=self.proposed if proposed is None else proposed,
            members={name: self},
        )


def counts_to_host(
    infos: Mapping[str, KernelInfo], flags: Sequence[Tensor] = ()
) -> tuple[dict[str, KernelInfo], list[bool]]:
    """Return counts, and bools without dimensions, on the CPU: one copy brings all of a GPU."""
    waiting: list[Tensor] = []
    for info in infos.values():
        _map_counts(info, waiting.append)
    if not waiting and not flags:
        return dict(infos), []
    parts = [part.reshape(-1).to(torch.int64) for part in (*waiting, *flags)]
    packet = torch.cat(parts).cpu().split([len(part) for part in parts])
    arrived = iter(packet)

    def receive(count: Tensor) -> Any:
        values = next(arrived)
        return values.reshape(count.shape).clone() if count.ndim else int(values)

    received = {name: _map_counts(info, receive) for name, info in infos.items()}
    return received, [bool(flag) for flag in arrived]


def _map_counts(info: KernelInfo, function: Callable[[Tensor], Any]) -> KernelInfo:
    """Return the counts with `function` applied to those on a GPU, always in the same order."""
    changes: dict[str, Any] = {}
    for entry in fields(info):
        value = getattr(info, entry.name)
        if entry.name == "members":
            changes["members"] = {name: _map_counts(m, function) for name, m in value.items()}
        elif isinstance(value, Tensor) and value.device.type != "cpu":
            changes[entry.name] = function(value)
    return replace(info, **changes)


def per_rung(accepted: Tensor, n_walkers: int) -> tuple[Tensor, Tensor]:
    """Return the counts (accepted [R], proposed [R]) from accepted [W, R] bool."""
    total = accepted.sum(dim=0)
    return total, torch.full_like(total, n_walkers)
