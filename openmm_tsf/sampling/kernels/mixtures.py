"""Kernels made of kernels: one of several drawn at random, and one on some rungs only."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Generator, Tensor

from openmm_tsf.sampling.kernels.base import Closable, Kernel, check_name
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.devices import DeviceConstants
from openmm_tsf.utils.validation import list_items, unwrap_scalar


class _Mixture(DeviceConstants):
    """What both share: members with their settings and states.

    The sampler tunes and records the step sizes of `members` by their counts in ``KernelInfo``.
    """

    members: tuple[Kernel, ...]
    name: str
    _counts_shape: tuple[int, ...]

    def __init__(self, members: Sequence[Kernel], name: str) -> None:
        for member in members:
            if not isinstance(member, Kernel):
                raise TypeError(f"kernels: expected kernels, got {type(member).__name__}")
        self.members, self.name = tuple(members), check_name(name)

    @property
    def exact(self) -> bool:
        """Whether every member is free of time-step errors."""
        return all(member.exact for member in self.members)

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """The shape of the counts."""
        return self._counts_shape

    def _members(self) -> dict[str, Any]:
        described = [{"name": m.name, "exact": m.exact, **m.settings()} for m in self.members]
        return {"members": described}

    def state_dict(self) -> dict[str, Any]:
        """Return the members' states by name."""
        return {member.name: member.state_dict() for member in self.members}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for member in self.members:
            member.load_state_dict(content[member.name])

    def close(self) -> None:
        """Close the members that hold Contexts or threads. Calling it twice is allowed."""
        for member in self.members:
            if isinstance(member, Closable):
                member.close()


class OneOf(_Mixture):
    """One of several kernels in each call, drawn for all walkers by fixed weights.

    The draw does not depend on the walkers, so the mixture leaves invariant what its members do
    (Tierney 1994, section 2.4). Even-odd swaps among the members alternate by their calls.

    Parameters
    ----------
    kernels
        Kernels with distinct names, for one ladder, with counts of one shape: all per rung, for
        example, or all per pair.
    weights, name
        The probabilities of the kernels up to a factor, equal if None; the name in counts.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import DoubleWell
    >>> potential, ladder = DoubleWell(0.1, -1.0, 0.3), (1.0, 2.0)
    >>> flow = tsf.TemperatureSteerableFlow(1, 1, 1, (4,))
    >>> walk = tsf.kernels.FlowWalk(flow, potential, ladder)
    >>> draw = tsf.kernels.FlowIndependence(flow, potential, ladder)
    >>> tsf.kernels.OneOf([walk, draw], weights=[3, 1]).weights
    (0.75, 0.25)
    """

    def __init__(
        self,
        kernels: Sequence[Kernel],
        weights: Sequence[float] | None = None,
        name: str = "one_of",
    ) -> None:
        super().__init__(list(kernels), name)
        if not self.members:
            raise ValueError("kernels: expected at least one, got none")
        names = [member.name for member in self.members]
        if len(set(names)) < len(names):
            raise ValueError(f"kernels: expected distinct names, got {names}")
        first = self.members[0]
        self.temperatures, self._counts_shape = first.temperatures, first.counts_shape
        for member in self.members[1:]:
            for what in ("temperatures", "counts_shape"):
                if getattr(member, what) != getattr(first, what):
                    raise ValueError(
                        f"kernels: expected the {what} of {first.name}, {getattr(first, what)}, "
                        f"got {getattr(member, what)} of {member.name}"
                    )
        items = [1.0] * len(names) if weights is None else list_items(weights) or ()
        given = [unwrap_scalar(weight) for weight in items]
        if len(given) != len(names) or not all(_is_positive(weight) for weight in given):
            raise ValueError(
                f"weights: expected {len(names)} positive numbers, one for each kernel, "
                f"got {weights!r}"
            )
        self.weights = tuple(float(weight) / math.fsum(given) for weight in given)

    def __call__(self, state: WalkerState, generator: Generator) -> tuple[WalkerState, KernelInfo]:
        """Draw a member and apply it to all walkers; a GPU is waited for, to know which."""
        weights = torch.tensor(self.weights, dtype=torch.float64, device=generator.device)
        member = self.members[int(torch.multinomial(weights, 1, generator=generator))]
        state, info = member(state, generator)
        return state, info.of_member(member.name)

    def settings(self) -> dict[str, Any]:
        """Return the choices made, those of the members included."""
        return {"kernel": "OneOf", "weights": list(self.weights), **self._members()}


class OnRungs(_Mixture):
    """A kernel on some rungs of the ladder only; the others stay as they are.

    The kernel is made for the temperatures of its rungs (the attribute ``rungs``), and nothing is
    computed for the others. A swap may exchange rungs that are not neighbours in the whole ladder.
    Counts are per rung [R] if the kernel's are, otherwise a matrix [R, R] (upper triangle).

    Parameters
    ----------
    kernel
        The kernel; its ``temperatures`` are those of the rungs.
    temperatures, name
        The whole ladder, K; the name in counts, by default the kernel's with the rungs' numbers.


    Examples
    --------
    >>> from openmm_tsf.potentials.toy import GaussianWell
    >>> from openmm_tsf.sampling.kernels import CartesianHMC, OnRungs
    >>> import torch
    >>> hmc = CartesianHMC(GaussianWell(torch.eye(2).double()), [2.0, 4.0], masses=1.0)
    >>> hot = OnRungs(hmc, temperatures=[1.0, 2.0, 3.0, 4.0])
    >>> hot.rungs, hot.name
    ((1, 3), 'hmc_on_1_3')
    """

    def __init__(self, kernel: Kernel, temperatures: Any, name: str | None = None) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(f"kernel: expected a kernel, got {type(kernel).__name__}")
        self.temperatures = as_temperatures(temperatures)
        missing = [t for t in kernel.temperatures if t not in self.temperatures]
        if missing:
            raise ValueError(
                f"kernel: expected temperatures of the ladder {self.temperatures}, got {missing} "
                f"of {kernel.name}"
            )
        self.rungs = tuple(self.temperatures.index(t) for t in kernel.temperatures)
        self.rung_index = torch.tensor(self.rungs, dtype=torch.int64, device="cpu")
        if name is None:
            name = f"{kernel.name}_on_{'_'.join(map(str, self.rungs))}"
        super().__init__([kernel], name)
        n_rungs, n_all = len(self.rungs), len(self.temperatures)
        shape = tuple(kernel.counts_shape)
        if shape not in ((n_rungs,), (n_rungs - 1,), (n_rungs, n_rungs)):
            raise ValueError(
                f"kernel: expected counts by rung [{n_rungs}], neighbours [{n_rungs - 1}] or pairs "
                f"[{n_rungs}, {n_rungs}], got {shape} of {kernel.name}"
            )
        self._counts_shape = (n_all,) if shape == (n_rungs,) else (n_all, n_all)

    def __call__(self, state: WalkerState, generator: Generator) -> tuple[WalkerState, KernelInfo]:
        """Apply the kernel to the walkers of its rungs."""
        kernel, velocities = self.members[0], state.velocities
        rungs = self.on_device("rung_index", state.x.device)
        part = state.evolve(
            x=state.x[:, rungs],
            velocities=None if velocities is None else velocities[:, rungs],
            energy=state.energy[:, rungs],
            replica=state.replica[:, rungs],
        )
        end, info = kernel(part, generator)
        if velocities is not None and end.velocities is not None:
            velocities = velocities.index_copy(1, rungs, end.velocities)
        new = state.evolve(
            x=state.x.index_copy(1, rungs, end.x),
            velocities=velocities,
            energy=state.energy.index_copy(1, rungs, end.energy),
            replica=state.replica.index_copy(1, rungs, end.replica),
        )
        counts = self._spread(info.accepted), self._spread(info.proposed)
        return new, info.of_member(kernel.name, *counts)

    def _spread(self, counts: Tensor) -> Tensor:
        """Return the kernel's counts at their rungs of the whole ladder."""
        spread = counts.new_zeros(self.counts_shape)
        rungs = self.on_device("rung_index", counts.device)
        if len(self.counts_shape) == 1:
            spread[rungs] = counts
        elif counts.ndim == 1:
            spread[rungs[:-1], rungs[1:]] = counts
        else:
            spread[rungs[:, None], rungs[None, :]] = counts
        return spread

    def settings(self) -> dict[str, Any]:
        """Return the choices made, those of the kernel included."""
        return {"kernel": "OnRungs", "rungs": list(self.rungs), **self._members()}


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and float(value) > 0
