"""A pilot of a minute: what swaps of temperatures, energies and slow torsions do in dynamics.

Replicas are heated to above the ladder, where torsions pass their barriers some ten times as often;
then they exchange temperatures on a provisional ladder. Dynamics is Langevin's with steps of 2 fs,
hydrogens of 4 amu, friction 1/ps, a swap every 0.1 ps: plain replica exchange as one would run it.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from openmm_tsf.analysis.exchange_model import Passages, PassageSamples, simulate_swaps
from openmm_tsf.analysis.ladder import Rejection, energy_rejection
from openmm_tsf.analysis.mbar import Mbar
from openmm_tsf.analysis.mixing import round_trips
from openmm_tsf.analysis.observables import DIHEDRAL, Observable
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.initial import maxwell_boltzmann, minimised
from openmm_tsf.sampling.kernels.dynamics import LangevinKernel
from openmm_tsf.sampling.kernels.langevin_openmm import DynamicsPotential, OpenMMLangevin
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles
from openmm_tsf.utils.wells import Wells, count_angles, find_wells

N_STEPS, TIMESTEP_PS, FRICTION_PER_PS = 50, 0.002, 1.0
#: Temperatures above the ladder, in proportion to its highest.
_ABOVE = (1.25, 1.6)
#: Replicas that one batch of compiled energies, or the Contexts of OpenMM, serve.
_COMPILED_REPLICAS, _REPLICAS = 128, 32
#: Parts of the pilot: all of its time, the first of it in which replicas are heated, and up to
#: which they stay hot.
_HEATED, _HOT = 0.1, 0.6
_LEAST_ITERATIONS = 20
#: The first part of the exchange in which replicas are still sorted by energy.
_SORTED = 0.3
#: Passages shorter than this are recrossings of a barrier.
_SHORTEST_PS = 1.0
#: Of swaps, to compare round trips with.
_SIMULATIONS = 8


@dataclass(frozen=True)
class Pilot:
    """What a pilot has seen.

    Attributes
    ----------
    temperatures, energy, angles, replica
        The provisional ladder [R] in K; of each iteration the energies [n, W, R] in kJ/mol, the
        slow torsions in rad by name and the replica at each rung.
    rejections
        Of swaps of neighbours [R-1].
    hot_temperatures, hot_angles
        Above the ladder, without swaps: temperatures [H] in K, torsions [h, V, H].
    others
        Observables that are not dihedrals [n, W, R], by name; dihedrals are among the torsions.
    bends
        The names of those that are angles in rad.
    frames
        Positions [F, N, 3] at the upper half of the rungs.
    n_evaluations, seconds
        The costs of it all.
    """

    temperatures: tuple[float, ...]
    boltzmann_constant: float
    energy: Array
    angles: Mapping[str, Array]
    replica: npt.NDArray[np.int64]
    rejections: Array
    hot_temperatures: tuple[float, ...]
    hot_angles: Mapping[str, Array]
    frames: Tensor
    n_evaluations: int
    seconds: float
    others: Mapping[str, Array] = field(default_factory=dict)
    bends: tuple[str, ...] = ()

    @property
    def seconds_per_evaluation(self) -> float:
        """The time of a step of dynamics of one replica."""
        return self.seconds / self.n_evaluations

    def rejection(self) -> Rejection:
        """Return the rejection of plain swaps between any two temperatures of the ladder."""
        mbar = Mbar(self.energy, self.betas(self.temperatures))
        return energy_rejection(mbar, self.boltzmann_constant)

    def betas(self, temperatures: npt.ArrayLike) -> Array:
        """Return 1/kT in mol/kJ of temperatures in K."""
        return 1.0 / (self.boltzmann_constant * np.asarray(temperatures, dtype=np.float64))

    def wells(self, torsion: str) -> Wells:
        """Return the wells of a torsion over all temperatures."""
        counts = count_angles(self.angles[torsion]) + count_angles(self.hot_angles[torsion])
        return find_wells(torsion, counts)

    def passages(
        self, torsion: str, inside: Callable[[Array], npt.NDArray[np.bool_]]
    ) -> PassageSamples:
        """Return the passages in and out of a well at all temperatures."""
        shortest = max(1, round(_SHORTEST_PS / (N_STEPS * TIMESTEP_PS)))
        hot = inside(self.hot_angles[torsion])
        still = np.broadcast_to(np.arange(hot.shape[2]), hot.shape)
        cold, betas = inside(self.angles[torsion]), self.betas(self.temperatures)
        return PassageSamples(
            Passages.by_walker(cold, self.replica, betas, shortest),
            Passages.by_walker(hot, still, self.betas(self.hot_temperatures), shortest),
        )

    def mixing(self) -> float:
        """Return the round trips in proportion to those of swaps that are independent.

        They are fewer where energies are correlated from swap to swap.
        """
        n, n_walkers, _ = self.replica.shape
        independent = [
            round_trips(simulate_swaps(self.rejections, n, n_walkers, seed)).sum()
            for seed in range(1, 1 + _SIMULATIONS)
        ]
        expected = float(np.mean(independent))
        trips = max(float(round_trips(self.replica).sum()), 0.5)
        return min(1.0, trips / expected) if expected > 0 else 1.0


def provisional_ladder(n_degrees: int, low: float, high: float) -> tuple[float, ...]:
    """Return a geometric ladder in K where about half of the swaps of harmonic modes are rejected.

    Their barrier is sqrt(C/(π k)) ln(high/low) with the heat capacity C = n k/2 of n modes.
    """
    barrier = math.sqrt(n_degrees / (2 * math.pi)) * math.log(high / low)
    n_rungs = max(2, math.ceil(2.0 * barrier) + 1)
    return tuple(np.geomspace(low, high, n_rungs).tolist())


def run_pilot(
    molecule: MolecularSystem,
    potential: Potential,
    low: float,
    high: float,
    *,
    seconds: float | None = None,
    n_iterations: int | None = None,
    seed: int = 1,
    observables: Mapping[str, Observable] | None = None,
) -> Pilot:
    """Run a pilot between two temperatures in K, for some seconds or a number of iterations.

    With a number of iterations (of 0.1 ps for each replica) the result depends on the seed and the
    machine alone. Exactly one of the two is given.
    """
    if (seconds is None) == (n_iterations is None):
        raise ValueError("seconds, n_iterations: expected one of the two")
    ladder = provisional_ladder(molecule.n_degrees_of_freedom, low, high)
    hot = tuple(factor * high for factor in _ABOVE)
    engine = _Engine(molecule, potential, ladder, seed, observables or {})
    engine.start(hot)
    engine.compile()
    start, budget = time.monotonic(), _Budget(seconds, n_iterations)
    budget.spend(_HEATED, engine.advance)
    above = engine.record(lambda each: budget.spend(_HOT, each))
    frames: list[Tensor] = []
    engine.start(ladder)
    swap = PlainSwap(ladder, potential.boltzmann_constant)
    record = engine.record(lambda each: budget.spend(1.0, each), swap, frames)
    engine.close()
    n = len(record.energy)
    kept = slice(round(_SORTED * n), None)
    accepted, proposed = record.accepted[kept].sum(axis=0), record.proposed[kept].sum(axis=0)
    return Pilot(
        temperatures=ladder,
        boltzmann_constant=potential.boltzmann_constant,
        energy=record.energy[kept],
        angles={name: values[kept] for name, values in record.angles.items()},
        replica=record.replica[kept],
        rejections=1.0 - accepted / np.maximum(proposed, 1),
        hot_temperatures=hot,
        hot_angles=above.angles,
        frames=torch.cat(frames[kept]),
        n_evaluations=engine.n_evaluations,
        seconds=time.monotonic() - start,
        others={name: values[kept] for name, values in record.others.items()},
        bends=tuple(name for name in record.others if (observables or {})[name].is_angle),
    )


def redistribute(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return values [V, H, ...] of replicas as [W, R, ...], those of each of the H at every rung.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.workflow.pilot import redistribute
    >>> redistribute(torch.tensor([[1, 2]]).repeat(4, 1), (2, 4)).tolist()
    [[1, 1, 1, 1], [2, 2, 2, 2]]
    """
    return values.transpose(0, 1).flatten(0, 1).unflatten(0, shape)


class _Budget:
    """Iterations until a part of the time, or of their number, is spent."""

    def __init__(self, seconds: float | None, n_iterations: int | None) -> None:
        self._seconds, self._n = seconds, n_iterations
        self._start, self._done = time.monotonic(), 0

    def spend(self, until: float, iterate: Callable[[], None]) -> None:
        """Iterate until a fraction of everything is spent."""
        first = self._done
        if self._seconds is None:
            assert self._n is not None
            total: int | None = max(_LEAST_ITERATIONS, round(until * self._n) - first)
        else:
            total = None
        while self._is_left(until, first, total):
            iterate()
            self._done += 1

    def _is_left(self, until: float, first: int, total: int | None) -> bool:
        done = self._done - first
        if total is not None:
            return done < total
        assert self._seconds is not None
        spent = time.monotonic() - self._start
        return done < _LEAST_ITERATIONS or spent < until * self._seconds


@dataclass
class _Record:
    """Series of iterations [n, W, R]."""

    energy: Array
    angles: Mapping[str, Array]
    replica: npt.NDArray[np.int64]
    accepted: Array
    proposed: Array
    others: Mapping[str, Array]


class _Engine:
    """Replicas under dynamics, at one set of temperatures after the other."""

    def __init__(
        self,
        molecule: MolecularSystem,
        potential: Potential,
        ladder: tuple[float, ...],
        seed: int,
        observables: Mapping[str, Observable],
    ) -> None:
        self._molecule, self._potential = molecule, potential
        dihedrals = {n: each for n, each in observables.items() if each.kind == DIHEDRAL}
        self._torsions: dict[str, tuple[int, ...]] = {
            **slow_torsions(molecule.topology),
            **{name: each.atoms for name, each in dihedrals.items()},
        }
        self._others = {n: each for n, each in observables.items() if n not in dihedrals}
        self._masses = torch.tensor(molecule.dynamics_masses, dtype=torch.float64, device="cpu")
        self._generator = Generator().manual_seed(seed)
        compiled = bool(getattr(potential, "compile_requested", False))
        n = _COMPILED_REPLICAS if compiled else _REPLICAS
        # A multiple of every number of temperatures, at least two walkers at each rung.
        each = math.lcm(len(ladder), len(_ABOVE))
        self._n_replicas = each * max(1, round(n / each))
        if self._n_replicas < 2 * len(ladder):
            self._n_replicas *= 2
        self._kernel: LangevinKernel | None = None
        self._state: WalkerState | None = None
        self.n_evaluations = 0

    def start(self, temperatures: tuple[float, ...]) -> None:
        """Go on at other temperatures, with new velocities."""
        n_rungs = len(temperatures)
        shape = self._n_replicas // n_rungs, n_rungs
        if self._state is None:
            x = torch.tensor(
                minimised(self._potential, self._molecule), dtype=torch.float64, device="cpu"
            ).expand(*shape, -1, -1)
            energy = self._potential.energy(x[:1, 0].contiguous()).double().expand(shape)
        else:
            x, energy = (redistribute(each, shape) for each in (self._state.x, self._state.energy))
        constant = self._potential.boltzmann_constant
        kt = constant * torch.tensor(temperatures, dtype=torch.float64, device="cpu")
        velocities = maxwell_boltzmann(tuple(x.shape), kt, self._masses, self._generator)
        replica = torch.arange(n_rungs, dtype=torch.int64, device="cpu").repeat(shape[0], 1)
        self._state = WalkerState(x.contiguous(), velocities, energy.contiguous(), replica)
        self.close()
        numbers = (N_STEPS, TIMESTEP_PS, FRICTION_PER_PS, False)
        potential: Any = self._potential
        kind: Any = OpenMMLangevin if isinstance(potential, DynamicsPotential) else TorchLangevin
        # The other measure hardly changes how temperatures exchange, and needs a Metropolis test.
        constraints = {"constraints": self._molecule.constraints, "measure": "rigid"}
        self._kernel = kind(potential, temperatures, self._masses, None, *numbers, **constraints)

    def compile(self) -> None:
        """Compile what is compiled on first use."""
        assert self._state is not None
        self._potential.energy_and_forces(self._state.x.flatten(0, 1))

    def advance(self) -> None:
        """Take a piece of dynamics."""
        assert self._kernel is not None
        assert self._state is not None
        self._state, info = self._kernel(self._state, self._generator)
        self.n_evaluations += info.n_evaluations

    def record(
        self,
        repeat: Callable[[Callable[[], None]], None],
        swap: PlainSwap | None = None,
        frames: list[Tensor] | None = None,
    ) -> _Record:
        """Repeat dynamics and swaps, and return what was seen after each."""
        energy, angles, replica, accepted, proposed = [], [], [], [], []
        others: dict[str, list[Array]] = {name: [] for name in self._others}

        def iterate() -> None:
            self.advance()
            assert self._state is not None
            if swap is not None:
                self._state, info = swap(self._state, self._generator)
                accepted.append(info.accepted.numpy())
                proposed.append(info.proposed.numpy())
            x = self._state.x
            energy.append(self._state.energy.numpy())
            angles.append(torsion_angles(x.numpy(), self._torsions))
            replica.append(self._state.replica.numpy())
            if self._others:
                flat = x.flatten(0, 1).numpy().astype(np.float32)
                trajectory = mdtraj.Trajectory(flat, self._molecule.mdtraj_topology)
                for name, each in self._others.items():
                    others[name].append(each.evaluate(trajectory).reshape(x.shape[:2]))
            if frames is not None:
                frames.append(x[:, x.shape[1] // 2 :].flatten(0, 1))

        repeat(iterate)
        return _Record(
            np.array(energy),
            {name: np.array([each[name] for each in angles]) for name in self._torsions},
            np.array(replica),
            np.array(accepted, dtype=float),
            np.array(proposed, dtype=float),
            {name: np.array(values) for name, values in others.items()},
        )

    def close(self) -> None:
        """Free the Contexts of the kernel."""
        close = getattr(self._kernel, "close", None)
        if close is not None:
            close()
