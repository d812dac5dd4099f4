"""Moves through a flow in OpenMM's own replica exchange (openmm.app, OpenMM 8.6 and later)."""

import logging
from typing import Any

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import torch
from torch import Generator, Tensor

from openmm_tsf.hosts.matching import (
    check_all_forces_integrated,
    check_checkpoints,
    compare_energies,
    match_flow,
    positions_of,
    temperatures_of,
)
from openmm_tsf.hosts.replica_moves import ReplicaMoves, states_after
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB, KJ_PER_MOLE
from openmm_tsf.utils.random import make_generator
from openmm_tsf.utils.validation import check_int, check_seed

if not hasattr(app, "ReplicaExchangeSampler"):
    raise ImportError(
        "openmm_tsf.hosts.openmm_app: expected OpenMM 8.6 or later, which has "
        f"openmm.app.ReplicaExchangeSampler, got {openmm.__version__}"
    )

logger = logging.getLogger(__name__)

#: What random numbers are for: every purpose has its own in each iteration.
_MOVES, _EXCHANGES, _VELOCITIES = range(3)
#: In kT: differences between the energies of the host's platform and of the flow moves to report.
_REPORTED = 1e-3


class FlowReplicaExchangeSampler(app.ReplicaExchangeSampler):
    """OpenMM's replica exchange with moves through a flow beside the dynamics.

    An iteration is the dynamics of every replica, as in the base class; independence and
    Crank-Nicolson moves of all replicas in one batch; the reporters; then steered swaps between
    neighbouring temperatures and the base class's exchanges of random pairs. All but the dynamics
    are exact. ``ReplicaExchangeReporter`` works as with the base class: conformations, states and
    energies that reporters see belong to each other.

    Flow moves keep a replica's velocities, position and orientation; velocities are rescaled, or
    drawn anew, when the temperature changes, as in the base class. Where bonds are constrained
    (HBonds) replicas that a flow move displaced have velocities drawn anew, tangent to the
    constraints; the flow is one for the System's masses and the measure "rigid". A replica that the
    dynamics have brought outside the flow's domain (a mirror image) is left to dynamics and
    exchanges. Proposals and exchanges with energies that are not finite are rejected and counted.

    Random numbers come from `seed` and the number of the iteration. A run that is resumed by
    ``ReplicaExchangeReporter(..., resume=True)`` with the same seed therefore continues as if it
    had not stopped, including the exchanges that follow its last report; bit by bit as far as the
    dynamics do, whose noise OpenMM draws and does not save.

    Parameters
    ----------
    states, simulation, stepsPerIteration, reinitializeVelocities
        As in ``openmm.app.ReplicaExchangeSampler``. With a flow, states have a temperature and
        nothing else; several may have the same.
    flow
        The flow or the name of its file; None for the base class's moves alone, with exchanges that
        are seeded and cannot overflow.
    potential
        The energy of the flow moves; ``MolecularSystem(...).potential()`` of the Simulation's
        System by default. It must agree with the Simulation's Context; on a platform of single
        precision the difference is logged.
    independentMoves, crankNicolsonMoves, beta
        Proposals for every replica in an iteration: independent ones, and Crank-Nicolson steps,
        with a share `beta` of noise (:class:`openmm_tsf.sampling.kernels.FlowCrankNicolson`).
    steeredSweeps
        Sweeps of steered swaps in an iteration, alternately over the even and the odd pairs.
    seed
        The seed, from 0 to 2^64 - 1; drawn if None (see the attribute `seed`).

    Attributes
    ----------
    seed : int
        The seed in use.
    molecule, potential
        What the flow moves are made for; None without a flow, or before the Simulation or a
        reporter that resumes has set positions.

    Raises
    ------
    ValueError
        If the flow belongs to another System or Topology than the Simulation's, other constraints
        or the measure "stiff", or the System has constrained angles, a barostat, a periodic box,
        ... (named); if states have other properties than the temperature; if energies differ from
        the Context's, or dynamics leave out force groups or constraints.

    Examples
    --------
    >>> import openmm
    >>> import openmm.app as app
    >>> import openmm.unit as unit
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.hosts.openmm_app import FlowReplicaExchangeSampler
    >>> molecule = tsf.systems.alanine_dipeptide()
    >>> dataset = tsf.MDDataset.shipped(molecule, stride=40)
    >>> flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,))
    >>> integrator = openmm.LangevinMiddleIntegrator(300, 1.0, 0.001)
    >>> simulation = app.Simulation(molecule.topology, molecule.system, integrator)
    >>> simulation.context.setPositions(molecule.positions)
    >>> states = [{"temperature": t * unit.kelvin} for t in (300, 424, 600)]
    >>> sampler = FlowReplicaExchangeSampler(states, simulation, 10, flow=flow, seed=1)
    >>> sampler.simulate(5)
    >>> sampler.flowStatistics["flow_independent"]["proposed"]
    array([5, 5, 5])
    """

    replicaConformation: list[openmm.State]
    replicaStateIndex: list[int]
    replicaStateEnergy: Any  # a Quantity [n, n], None while an iteration is not complete
    molecule: MolecularSystem | None
    potential: Potential | None
    _moves: ReplicaMoves | None

    def __init__(
        self,
        states: list[dict[str, Any]],
        simulation: app.Simulation,
        stepsPerIteration: int,
        reinitializeVelocities: bool = False,
        *,
        flow: Any,
        potential: Potential | None = None,
        independentMoves: int = 1,
        crankNicolsonMoves: int = 1,
        beta: float = 0.5,
        steeredSweeps: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(states, simulation, stepsPerIteration, reinitializeVelocities)
        drawn = int(np.random.SeedSequence().generate_state(1)[0])
        self.seed = drawn if seed is None else check_seed(seed)
        self.molecule, self.potential = None, potential
        self._flow, self._moves = flow, None
        self._options: dict[str, Any] = {
            "n_independent": check_int(independentMoves, "independentMoves", least=0),
            "n_crank_nicolson": check_int(crankNicolsonMoves, "crankNicolsonMoves", least=0),
            "beta": beta,
            "n_steered": check_int(steeredSweeps, "steeredSweeps", least=0),
        }
        n = len(states)
        self._exchanges = np.zeros((2, n, n), dtype=np.int64)  # accepted and proposed, by state
        self._rejected_non_finite = 0
        self._exchanged = 0  # the last iteration whose exchanges are done
        self._calls: dict[int, tuple[int, int]] = {}  # by purpose: iteration, calls in it
        if flow is None:
            return
        self._temperatures = temperatures_of(states)
        self._ladder = tuple(sorted(set(self._temperatures)))
        self._rung_of_state = [self._ladder.index(t) for t in self._temperatures]
        if positions_of(self.replicaConformation[0]).any():  # OpenMM's are 0 before they are set
            self._prepare()

    @property
    def flowStatistics(self) -> dict[str, Any]:
        """Counts since the sampler was made, as a dict of dicts.

        For every kind of move arrays "accepted" and "proposed": by rung [R] (distinct temperatures,
        ascending: "temperatures"), steered swaps by pair of rungs [R, R] (upper triangle), and the
        base class's exchanges, "exchange", by pair of states. Then how many proposals were
        rejected as "rejectedNonFinite" (of these "outsideDomain" left the flow's domain) or
        "mirrorImages", how often replicas were outside the domain ("replicasOutside"), and the
        "energyEvaluations" of the flow moves.
        """
        moves = self._moves
        accepted, proposed = self._exchanges.copy()
        statistics: dict[str, Any] = {"exchange": {"accepted": accepted, "proposed": proposed}}
        totals: dict[str, int] = {} if moves is None else moves.totals
        if moves is not None:
            statistics["temperatures"] = moves.temperatures
            for name, (taken, tried) in moves.counts.items():
                statistics[name] = {"accepted": taken.copy(), "proposed": tried.copy()}
        return statistics | {
            "rejectedNonFinite": totals.get("rejected_non_finite", 0) + self._rejected_non_finite,
            "outsideDomain": totals.get("outside_domain", 0),
            "mirrorImages": totals.get("mirror_images", 0),
            "replicasOutside": totals.get("replicas_outside", 0),
            "energyEvaluations": totals.get("n_evaluations", 0),
        }

    def makeFlowMoves(self, flow: Any, potential: Potential) -> ReplicaMoves:
        """Return the moves through the flow; override it for others."""
        return ReplicaMoves(flow, potential, self._ladder, **self._options)

    def simulate(self, iterations: int) -> None:
        """Run iterations of dynamics, flow moves, reporters and exchanges."""
        if self.currentIteration != self._exchanged:  # resumed: what follows the last report
            check_checkpoints(
                self.replicaConformation, self.currentIteration * self.stepsPerIteration
            )
            self._compute_energies()
            self.exchangeReplicas()
        if self._flow is None:
            super().simulate(iterations)
            return
        for _ in range(iterations):
            self.replicaStateEnergy = None
            for index in range(len(self.states)):
                self.simulateReplica(index)
            self._apply_flow_moves()
            self.currentIteration += 1
            for reporter in self.reporters:
                reporter(self)
            self.exchangeReplicas()

    def simulateReplica(self, index: int, steps: int | None = None) -> None:
        """Run the dynamics of one replica; see the base class."""
        state = self.replicaStateIndex[index]
        if self.reinitializeVelocities and self._previousReplicaStateIndex[index] != state:
            # As the base class does, but with a seed: it then finds the state unchanged.
            kelvin = self.states[state].get("temperature")
            if kelvin is None:
                kelvin = self.simulation.integrator.getTemperature()
            seed = self._sequence(_VELOCITIES, index).generate_state(1)[0] >> 1
            context = self.simulation.context
            context.setState(self.replicaConformation[index])
            context.setVelocitiesToTemperature(kelvin, int(seed))
            self.replicaConformation[index] = _get_state(context)
            self._previousReplicaStateIndex[index] = state
        super().simulateReplica(index, steps)

    def exchangeReplicas(self) -> None:
        """Exchange states through the flow, then of random pairs as the base class does."""
        if self.replicaStateEnergy is None:
            self._compute_energies()
        generator = self._generator(_EXCHANGES)
        if self._moves is not None:
            x, energy = self._positions(), self._own_energies()
            rung = [self._rung_of_state[state] for state in self.replicaStateIndex]
            parts = x, energy, rung, self.currentIteration, generator
            new_x, new_energy, new_rung = self._moves.exchange(*parts)
            states = states_after(self.replicaStateIndex, rung, new_rung)
            self._store(x, new_x, new_energy, generator, states)
        self._exchange_plain(generator)
        self._exchanged = self.currentIteration

    def _prepare(self) -> ReplicaMoves:
        """Check flow and energy against the Simulation, and make the moves."""
        if self._moves is not None:
            return self._moves
        simulation, positions = self.simulation, positions_of(self.replicaConformation[0])
        flow, molecule = match_flow(self._flow, simulation.system, simulation.topology, positions)
        check_all_forces_integrated(simulation.integrator, simulation.system)
        potential = molecule.potential() if self.potential is None else self.potential
        context = simulation.context
        context.setState(self.replicaConformation[0])
        energy = context.getState(energy=True).getPotentialEnergy().value_in_unit(KJ_PER_MOLE)
        coldest, platform = self._ladder[0], context.getPlatform().getName()
        source = f"simulation: its Context ({platform})"
        difference = compare_energies(potential, positions[None], [energy], coldest, source)
        if difference > _REPORTED * KB * coldest:
            logger.warning(
                "the %s platform of the Simulation computes energies that differ by %.2g kJ/mol "
                "from those of the flow moves: dynamics and exchanges have its precision",
                platform,
                difference,
            )
        self.molecule, self.potential = molecule, potential
        self._moves = self.makeFlowMoves(flow, potential)
        return self._moves

    def _apply_flow_moves(self) -> None:
        moves = self._prepare()
        x = self._positions()
        rung = [self._rung_of_state[state] for state in self.replicaStateIndex]
        energy, generator = moves.energies(x), self._generator(_MOVES)
        new_x, energy = moves.move(x, energy, rung, self.currentIteration, generator)
        self._store(x, new_x, energy, generator)

    def _positions(self) -> Tensor:
        """Return the positions of all replicas [n, N, 3] in nm, for the flow moves."""
        rows = np.stack([positions_of(state) for state in self.replicaConformation])
        return self._prepare().place(rows)

    def _own_energies(self) -> Tensor:
        """Return the energies [n] of the replicas, the same in all states of a flow."""
        rows = self.replicaStateEnergy.value_in_unit(KJ_PER_MOLE)
        return torch.from_numpy(rows[:, 0].copy()).to(self._prepare().device)

    def _store(
        self,
        old: Tensor,
        new: Tensor,
        energy: Tensor,
        generator: Generator | None = None,
        states: list[int] | None = None,
    ) -> None:
        """Put positions [n, N, 3] that changed into the replicas' States, and all energies [n].

        With constraints their velocities are drawn anew. And the replicas' states if given; all at
        the end, in case this is interrupted.
        """
        moves, context = self._prepare(), self.simulation.context
        kept, rounded = list(self.replicaConformation), []
        # At the temperatures of the dynamics before, from which the base class rescales them.
        kelvins = [self._temperatures[state] for state in self._previousReplicaStateIndex]
        v = None if generator is None else moves.draw_velocities(new, kelvins, generator)
        for index in (new != old).flatten(1).any(dim=1).nonzero().flatten().tolist():
            x = new[index].cpu().numpy()
            context.setState(kept[index])
            context.setPositions(x)
            if v is not None:
                context.setVelocities(v[index].numpy())
            kept[index] = _get_state(context)
            if not np.array_equal(stored := positions_of(kept[index]), x):
                rounded.append((index, stored))  # on a platform of single precision
        if rounded:
            rows, positions = zip(*rounded, strict=True)
            energy = energy.clone()
            energy[list(rows)] = moves.energies(moves.place(np.stack(positions)))
        table = np.repeat(energy.cpu().numpy()[:, None], len(self.states), axis=1)
        self.replicaConformation, self.replicaStateIndex, self.replicaStateEnergy = (
            kept,
            self.replicaStateIndex if states is None else states,
            unit.Quantity(table, KJ_PER_MOLE),
        )

    def _compute_energies(self) -> None:
        """Set the energies of all replicas in all states."""
        if self._flow is not None:
            x = self._positions()
            self._store(x, x, self._prepare().energies(x))
            return
        rows = [] * KJ_PER_MOLE
        for index, conformation in enumerate(self.replicaConformation):
            self.simulation.context.setState(conformation)
            self._sampler.applyState(self.replicaStateIndex[index])
            rows.append(self._sampler.computeAllEnergies())
        self.replicaStateEnergy = rows

    def _exchange_plain(self, generator: Generator) -> None:
        """Attempt exchanges of random pairs, as the base class does, in logarithms."""
        n, n_attempts = len(self.states), self.exchangesPerIteration
        if n < 2 or n_attempts < 1:
            return
        device = generator.device
        # Of the n (n - 1) ordered pairs one for each attempt, and a uniform number.
        uniform = torch.rand(2, n_attempts, generator=generator, dtype=torch.float64, device=device)
        pairs = (uniform[0] * (n * (n - 1))).long()
        first, second = pairs // (n - 1), pairs % (n - 1)
        second = second + (second >= first)
        log_uniform = uniform[1].log()
        reduced, index = self._reduced_energies(), self.replicaStateIndex
        accepted, proposed = self._exchanges
        for i, j, limit in zip(first.tolist(), second.tolist(), log_uniform.tolist(), strict=True):
            si, sj = index[i], index[j]
            pair = min(si, sj), max(si, sj)
            proposed[pair] += 1
            exponent = reduced[i][si] + reduced[j][sj] - reduced[j][si] - reduced[i][sj]
            if not np.isfinite(exponent):
                self._rejected_non_finite += 1
            elif limit < exponent:
                accepted[pair] += 1
                index[i], index[j] = sj, si

    def _reduced_energies(self) -> list[list[float]]:
        """Return U/kT of every replica in every state [n, n]."""
        energies = np.array(self.replicaStateEnergy.value_in_unit(KJ_PER_MOLE), dtype=np.float64)
        if self._kT is None:
            kelvin = self.simulation.integrator.getTemperature().value_in_unit(unit.kelvin)
            kt = np.full(len(self.states), KB * kelvin)
        else:
            kt = np.array(self._kT.value_in_unit(KJ_PER_MOLE), dtype=np.float64)
        reduced: list[list[float]] = (energies / kt).tolist()
        return reduced

    def _generator(self, purpose: int) -> Generator:
        """Return the generator of a purpose in this iteration; another one in every call."""
        iteration, calls = self._calls.get(purpose, (-1, 0))
        calls = calls + 1 if iteration == self.currentIteration else 0
        self._calls[purpose] = self.currentIteration, calls
        device = torch.device("cpu") if self._moves is None else self._moves.device
        seed = int(self._sequence(purpose, calls).generate_state(1, np.uint64)[0])
        return make_generator(seed, device)

    def _sequence(self, purpose: int, number: int) -> np.random.SeedSequence:
        """Return the seeds of a purpose in this iteration."""
        return np.random.SeedSequence(self.seed, spawn_key=(self.currentIteration, purpose, number))


def _get_state(context: openmm.Context) -> openmm.State:
    """Return what the base class keeps of a replica."""
    return context.getState(
        positions=True, velocities=True, parameters=True, integratorParameters=True
    )
