"""Moves through a flow of replicas that a host keeps, each at one temperature of a ladder."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from openmm_tsf.hosts.constrained import ConstrainedReplicas
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies as evaluate
from openmm_tsf.sampling.kernels.base import Kernel, SteerableMap, device_of_map
from openmm_tsf.sampling.kernels.crank_nicolson import FlowCrankNicolson
from openmm_tsf.sampling.kernels.flow import FlowIndependence
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.state import KernelInfo, WalkerState, counts_to_host
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.validation import check_float, check_int

#: Counts (accepted, proposed) by rung [R], or by pair of rungs [R, R].
Counts = tuple[NDArray[np.int64], NDArray[np.int64]]
_TOTALS = ("rejected_non_finite", "mirror_images", "outside_domain", "n_evaluations")


class ReplicaMoves:
    """Independence and Crank-Nicolson moves, and steered swaps, of n replicas in one batch.

    A replica outside the flow's domain (a mirror image, or one with a non-finite energy) stays as
    it is and takes part in no swap; no move leads there. All moves leave the Boltzmann distribution
    of every rung invariant, restricted to the domain and therefore also as it is.

    Parameters
    ----------
    flow, potential
        The flow and the energy.
    temperatures
        The ladder of R rungs, ascending, K. Several replicas may be at the same rung.
    n_independent, n_crank_nicolson, beta
        Proposals of a replica in each call of :meth:`move`, and the share of noise in the second.
    n_steered
        Sweeps over neighbouring rungs in each call of :meth:`exchange`, alternately over the pairs
        (0, 1), (2, 3), ... and (1, 2), (3, 4), ....

    Attributes
    ----------
    constrained : ConstrainedReplicas or None
        What keeps replicas on their constraints; None without. Moves expect positions on them.
    """

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        n_independent: int = 1,
        n_crank_nicolson: int = 1,
        beta: float = 0.5,
        n_steered: int = 1,
    ) -> None:
        self.flow, self.potential = flow, potential
        self.temperatures = as_temperatures(temperatures)
        self.n_independent = check_int(n_independent, "n_independent", least=0)
        self.n_crank_nicolson = check_int(n_crank_nicolson, "n_crank_nicolson", least=0)
        self.n_steered = check_int(n_steered, "n_steered", least=0)
        self.beta, self.device = check_float(beta, "beta"), device_of_map(flow)
        self.constrained = ConstrainedReplicas.from_flow(flow)
        self.counts: dict[str, Counts] = {}
        self.totals = {"replicas_outside": 0} | dict.fromkeys(_TOTALS, 0)
        self._checked: tuple[Tensor, Tensor] | None = None  # positions, which are in the domain
        self._kernels: dict[tuple[int, ...], tuple[list[Kernel], list[Kernel]]] = {}
        every_rung = tuple(range(len(self.temperatures)))
        moves, swaps = self._kernels_of(every_rung)
        for kernel in (*moves, *swaps):  # counts of zero, and errors now
            self._add(kernel.name, every_rung, KernelInfo.zero(kernel.counts_shape))

    def make_moves(self, temperatures: tuple[float, ...]) -> list[Kernel]:
        """Return the kernels of :meth:`move` for some rungs of the ladder, in their order."""
        parts = self.flow, self.potential, temperatures
        kernels: list[Kernel] = []
        if n_steps := self.n_independent:
            kernels.append(FlowIndependence(*parts, n_steps=n_steps))
        if n_steps := self.n_crank_nicolson:
            kernels.append(FlowCrankNicolson(*parts, self.beta, n_steps=n_steps))
        return kernels

    def make_swaps(self, temperatures: tuple[float, ...]) -> list[Kernel]:
        """Return a swap of the even pairs of some rungs and one of the odd pairs, where any."""
        n = len(temperatures)
        sweeps = ([(i, i + 1) for i in range(first, n - 1, 2)] for first in (0, 1))
        parts = self.flow, self.potential, temperatures
        return [SteeredSwap(*parts, scheme=pairs) for pairs in sweeps if pairs and self.n_steered]

    def place(self, positions: NDArray[np.float64]) -> Tensor:
        """Return a host's positions [n, N, 3] in nm on the flow's device.

        And on their constraints, without what the tolerance of the host's dynamics leaves.
        """
        x = torch.from_numpy(positions)
        if self.constrained is not None:
            x = self.constrained.project(x, "simulation")
        return x.to(self.device)

    def draw_velocities(
        self, x: Tensor, temperatures: Sequence[float], generator: Generator
    ) -> Tensor | None:
        """Return velocities [n, N, 3] for moved replicas, in K [n]; None to keep theirs.

        They are drawn where constraints make the velocities that are possible depend on x.
        """
        if self.constrained is None:
            return None
        return self.constrained.draw_velocities(x.cpu(), temperatures, generator)

    def energies(self, x: Tensor) -> Tensor:
        """Return the potential energies [n] of x [n, N, 3]; +inf where they are not finite."""
        self.totals["n_evaluations"] += len(x)
        with torch.no_grad():
            energy = evaluate.energy(self.potential, x).to(torch.float64)
        return torch.where(torch.isfinite(energy), energy, torch.inf)

    def move(
        self, x: Tensor, energy: Tensor, rung: Sequence[int], iteration: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return x [n, N, 3] in nm and energies [n] after the moves of replicas at rungs [n]."""
        usable = self._usable(x, energy)
        self.totals["replicas_outside"] += len(usable) - sum(usable)
        x, energy = x.clone(), energy.clone()
        for rungs, rows in _ladders(rung, usable, generator):
            state = _walkers(x, energy, rows, iteration)
            for kernel in self._kernels_of(rungs)[0]:
                state = self._apply(kernel, rungs, state, generator)
            x[state.replica], energy[state.replica] = state.x, state.energy
        if self._checked is not None:  # no move leaves the domain, and none leads into it
            self._checked = x, self._checked[1]
        return x, energy

    def exchange(
        self, x: Tensor, energy: Tensor, rung: Sequence[int], iteration: int, generator: Generator
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Return x [n, N, 3], energies [n] and rungs [n] of the replicas after steered swaps."""
        usable = self._usable(x, energy)
        x, energy, rung = x.clone(), energy.clone(), list(rung)
        for sweep in range(iteration * self.n_steered, (iteration + 1) * self.n_steered):
            for rungs, rows in _ladders(rung, usable, generator):
                if not (swaps := self._kernels_of(rungs)[1]):
                    continue
                state = _walkers(x, energy, rows, iteration)
                state = self._apply(swaps[sweep % len(swaps)], rungs, state, generator)
                x[state.replica], energy[state.replica] = state.x, state.energy
                for walker in state.replica.tolist():
                    for replica, new in zip(walker, rungs, strict=True):
                        rung[replica] = new
        return x, energy, rung

    def _apply(
        self, kernel: Kernel, rungs: tuple[int, ...], state: WalkerState, generator: Generator
    ) -> WalkerState:
        """Return the walkers after a kernel, whose counts are added."""
        state, info = kernel(state, generator)
        self._add(kernel.name, rungs, info)
        return state

    @torch.no_grad()
    def _usable(self, x: Tensor, energy: Tensor) -> list[bool]:
        """Return which replicas have a finite energy and are in the flow's domain."""
        if self._checked is None or not torch.equal(self._checked[0], x):
            ends = x.to(self.flow.dtype)
            inside = self.flow.is_in_domain(ends) & ~self.flow.is_mirror_image(ends)
            self._checked = x, inside
        usable: list[bool] = (self._checked[1] & torch.isfinite(energy)).tolist()
        return usable

    def _kernels_of(self, rungs: tuple[int, ...]) -> tuple[list[Kernel], list[Kernel]]:
        """Return moves and swaps for some rungs, made once."""
        if rungs not in self._kernels:
            kelvin = tuple(self.temperatures[rung] for rung in rungs)
            self._kernels[rungs] = self.make_moves(kelvin), self.make_swaps(kelvin)
        return self._kernels[rungs]

    def _add(self, name: str, rungs: tuple[int, ...], info: KernelInfo) -> None:
        """Add counts for some rungs to those of the whole ladder."""
        (info,) = counts_to_host({name: info})[0].values()
        n, is_of_pairs = len(self.temperatures), info.accepted.ndim == 2
        shape = (n, n) if is_of_pairs else (n,)
        zero = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        where = np.ix_(rungs, rungs) if is_of_pairs else list(rungs)
        for total, part in zip(
            self.counts.setdefault(name, zero), (info.accepted, info.proposed), strict=True
        ):
            total[where] += part.numpy()
        for total_name in _TOTALS:
            self.totals[total_name] += int(getattr(info, total_name))


def states_after(states: Sequence[int], rung: list[int], new_rung: list[int]) -> list[int]:
    """Return the states of all replicas: those whose rung changed take one that was left."""
    after, left = list(states), dict[int, list[int]]()
    changed = [i for i in range(len(rung)) if rung[i] != new_rung[i]]
    for index in changed:
        left.setdefault(rung[index], []).append(after[index])
    for index in changed:
        after[index] = left[new_rung[index]].pop(0)
    return after


def _walkers(x: Tensor, energy: Tensor, rows: list[list[int]], iteration: int) -> WalkerState:
    """Return the replicas in `rows` [W, R] as walkers."""
    index = torch.tensor(rows, dtype=torch.int64, device=x.device)
    return WalkerState(x[index], None, energy[index], index, iteration)


def _ladders(
    rung: Sequence[int], usable: Sequence[bool], generator: Generator
) -> list[tuple[tuple[int, ...], list[list[int]]]]:
    """Return replicas as walkers [W, R] on rungs [R], one entry for every set of rungs.

    With every rung occupied equally often there is one entry, one batch for all replicas. Which
    replicas of rungs with several are together in a walker is drawn: an order by their numbers
    would change when they swap, and the swap would have no reverse.
    """
    at_rung: dict[int, list[int]] = {number: [] for number in sorted(set(rung))}
    for replica, number in enumerate(rung):
        if usable[replica]:
            at_rung[number].append(replica)
    for number, replicas in at_rung.items():
        if len(replicas) > 1:
            order = torch.randperm(
                len(replicas), generator=generator, device=generator.device, dtype=torch.int64
            )
            at_rung[number] = [replicas[place] for place in order.tolist()]
    walkers: dict[tuple[int, ...], list[list[int]]] = {}
    for column in zip_longest(*at_rung.values()):
        walker = {n: r for n, r in zip(at_rung, column, strict=True) if r is not None}
        walkers.setdefault(tuple(walker), []).append(list(walker.values()))
    return list(walkers.items())
