"""Constrained bonds in OpenMM's and openmmtools' samplers, against exact distributions."""

import copy

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest
import torch
from openmmtools import utils

import openmm_tsf as tsf
from openmm_tsf.hosts.openmm_app import FlowReplicaExchangeSampler
from openmm_tsf.hosts.openmmtools import TSFIndependenceMove, TSFMove
from openmm_tsf.hosts.replica_moves import ReplicaMoves
from tests.support import constrained_hosts, exact_cases, exact_tree, openmm_host
from tests.support.exact_cases import assert_exact, assert_noticed
from tests.support.openmmtools_cases import positions_of, reference_cache, sampler_state, state_at

MANY = {"independentMoves": 10, "crankNicolsonMoves": 4, "steeredSweeps": 2}
TANGENT = 1e-9


@pytest.fixture(scope="module")
def case():
    return constrained_hosts.tree_case()


def simulation_of(case, system=None):
    return openmm_host.make_simulation(system or case.tree.system(), case.tree.topology)


def app_scores(case, n, n_rounds=2, seed=31, n_plain=100, **options):
    """Return z values, the largest velocity along constraints, and the sampler, after moves."""
    ladder = np.repeat(case.ladder, n)
    simulation = simulation_of(case)
    options = {**MANY, **options}
    sampler = openmm_host.make_sampler(ladder, case.flow, simulation=simulation, **options)
    sampler.exchangesPerIteration = n_plain
    collected = {kelvin: ([], []) for kelvin in case.ladder}
    for number in range(n_rounds):
        x, v = constrained_hosts.start(case, n, seed + number)
        openmm_host.set_replicas(sampler, *(part.transpose(0, 1).flatten(0, 1) for part in (x, v)))
        sampler.simulate(2)
        for index in range(len(ladder)):  # velocities are rescaled when dynamics begin
            sampler.simulateReplica(index, 0)
        arrays, kelvins = openmm_host.arrays_of(sampler), ladder[sampler.replicaStateIndex]
        for kelvin, parts in collected.items():
            for part, values in zip(parts, arrays, strict=True):
                part.append(values[kelvins == kelvin])
    scores, normal = {}, 0.0
    for kelvin, parts in collected.items():
        x, v = (torch.from_numpy(np.concatenate(part)) for part in parts)
        assert float(case.tree.constraints.deviations(x).abs().max()) < 1e-12
        of_rung, largest = constrained_hosts.scores(case, x, v, kelvin)
        scores, normal = scores | of_rung, max(normal, largest)
    both = [scores[f"{kelvin:g} K metric"] for kelvin in case.ladder]
    return scores | {"metric": sum(both) / len(both) ** 0.5}, normal, sampler


def test_openmm_keeps_positions_and_velocities_exact(case):
    scores, normal, sampler = app_scores(case, 60)
    assert_exact(scores)
    assert normal < TANGENT
    statistics = sampler.flowStatistics
    for name in ("flow_independent", "flow_crank_nicolson", "swap_steered", "exchange"):
        accepted, proposed = (statistics[name][key].sum() for key in ("accepted", "proposed"))
        assert 0 < accepted < proposed, name


@pytest.mark.slow
def test_openmm_keeps_many_exact(case):
    scores, normal, _ = app_scores(case, 300, n_rounds=10, seed=41)
    assert_exact(scores)
    assert normal < TANGENT


class ForgetsMetric(FlowReplicaExchangeSampler):
    """Flow moves without |Z|."""

    def makeFlowMoves(self, flow, potential):
        return super().makeFlowMoves(constrained_hosts.tree_case().forgetful().flow, potential)


class KeepsVelocities(FlowReplicaExchangeSampler):
    """Replicas that flow moves displace keep their velocities."""

    def makeFlowMoves(self, flow, potential):
        moves = super().makeFlowMoves(flow, potential)
        moves.constrained = None
        return moves


class SwapsVelocitiesWrongly(FlowReplicaExchangeSampler):
    """Velocities have the temperature after a steered swap before they are rescaled to it."""

    def makeFlowMoves(self, flow, potential):
        moves = super().makeFlowMoves(flow, potential)
        moves.__class__ = MovesOfThis
        return moves


class MovesOfThis(ReplicaMoves):
    """Draws velocities at the temperature after a swap."""

    def exchange(self, *parts):
        self.rung = super().exchange(*parts)
        return self.rung

    def draw_velocities(self, x, temperatures, generator):
        if getattr(self, "rung", None) is not None:
            temperatures = [self.temperatures[rung] for rung in self.rung[2]]
        self.rung = None
        return super().draw_velocities(x, temperatures, generator)


def test_mutants_of_openmm_are_noticed(case):
    scores, normal, _ = app_scores(case, 150, 4, kind=ForgetsMetric)
    assert_noticed(scores)
    assert normal < TANGENT
    assert app_scores(case, 20, 1, kind=KeepsVelocities)[1] > 1e5 * TANGENT
    swaps = {"independentMoves": 0, "crankNicolsonMoves": 0, "steeredSweeps": 1, "n_plain": 0}
    assert_exact(app_scores(case, 100, 2, **swaps)[0])
    assert_noticed(app_scores(case, 100, 2, kind=SwapsVelocitiesWrongly, **swaps)[0])


def test_openmm_runs_that_are_resumed_continue_exactly(case, tmp_path):
    """Velocities are drawn again as before; dynamics without noise are the same then."""

    def run(folder, *parts):
        ends = []
        for number, n in enumerate(parts):
            integrator = openmm.VerletIntegrator(0.0005)
            system, topology = case.tree.system(), case.tree.topology
            simulation = openmm_host.make_simulation(system, topology, integrator=integrator)
            options = {"steps": 5, "simulation": simulation}
            sampler = openmm_host.make_sampler((300.0, 400.0, 500.0), case.flow, **options)
            files = {"checkpoints": True, "energy": True, "resume": number > 0}
            sampler.reporters.append(
                app.ReplicaExchangeReporter(str(tmp_path / folder), 1, sampler, **files)
            )
            sampler.simulate(n)
            ends = openmm_host.arrays_of(sampler)
        return ends

    for one, other in zip(run("whole", 6), run("parts", 2, 4), strict=True):
        np.testing.assert_array_equal(one, other)


def test_flows_of_other_constraints_masses_or_measures_are_refused_by_name(case):
    light = case.tree.system()
    light.setParticleMass(4, 3.0)
    for flow, system, message in (
        (case.forgetful().flow, None, "flow: expected the measure 'rigid', .* got 'stiff'"),
        (case.flow, light, "flow: expected the constraints .* other masses"),
        (case.flow, exact_cases.the_tree().system(), "0 constraints .* got one for 5"),
        (exact_cases.tree_flow("tsf-volume"), None, "the 5 constraints of .* got one for 0"),
    ):
        simulation = simulation_of(case, system)
        with pytest.raises(ValueError, match=message):
            openmm_host.make_sampler((300.0, 400.0), flow, simulation=simulation)
    sampler = openmm_host.make_sampler((300.0, 400.0), case.flow, simulation=simulation_of(case))
    x = torch.tensor(exact_tree.POSITIONS).repeat(2, 1, 1)
    x[:, 0] *= 1.001
    openmm_host.set_replicas(sampler, x, torch.zeros_like(x))
    with pytest.raises(ValueError, match=r"simulation: .*constrained distances.* off by 0.001"):
        sampler.simulate(1)
    with pytest.raises(ValueError, match="molecule: expected the measure 'rigid'"):
        TSFMove("flow.pt", constrained_hosts.molecule_of(case, "stiff"))


@pytest.fixture(scope="module")
def path(case, tmp_path_factory):
    """The file of a flow whose System is the molecule's."""
    flow, path = copy.deepcopy(case.flow), tmp_path_factory.mktemp("flow") / "flow.pt"
    flow.fingerprint = constrained_hosts.molecule_of(case).fingerprint
    flow.save(path)
    return path


def moves_of(case, path):
    molecule = constrained_hosts.molecule_of(case)
    return [
        TSFIndependenceMove(path, molecule, n_steps=10, seed=1),
        TSFMove(path, molecule, beta=0.5, n_steps=4, seed=2, potential="torch"),
    ]


def openmmtools_scores(case, moves, n, seed=51):
    """Return z values, and the largest velocity along constraints, after moves at each rung."""
    x, v = constrained_hosts.start(case, n, seed)
    cache, scores, normal = reference_cache(), {}, 0.0
    for rung, kelvin in enumerate(case.ladder):
        state, states = state_at(kelvin, case.tree.system()), []
        for positions, velocities in zip(x[:, rung], v[:, rung].numpy(), strict=True):
            states.append(sampler_state(positions, velocities))
            for move in moves:
                move.apply(state, states[-1], cache)
        end = torch.tensor(np.array([s.velocities._value for s in states]))
        parts = positions_of(states), end, kelvin
        assert float(case.tree.constraints.deviations(parts[0]).abs().max()) < 1e-12
        of_rung, largest = constrained_hosts.scores(case, *parts)
        scores, normal = scores | of_rung, max(normal, largest)
    both = [scores[f"{kelvin:g} K metric"] for kelvin in case.ladder]
    return scores | {"metric": sum(both) / len(both) ** 0.5}, normal


def test_openmmtools_keeps_positions_and_velocities_exact(case, path):
    moves = moves_of(case, path)
    scores, normal = openmmtools_scores(case, moves, 25)
    assert_exact(scores)
    assert normal < TANGENT
    assert min(move.n_accepted for move in moves) > 20


class ForgetsMetricMove(TSFIndependenceMove):
    """Draws without |Z|."""

    def _make_kernel(self, flow, potential, kelvin):
        return super()._make_kernel(
            constrained_hosts.tree_case().forgetful().flow, potential, kelvin
        )


@pytest.mark.slow
def test_mutant_of_openmmtools_is_noticed(case, path):
    move = ForgetsMetricMove(path, constrained_hosts.molecule_of(case), n_steps=40, seed=1)
    assert_noticed(openmmtools_scores(case, [move], 600)[0])


def test_openmmtools_velocities_masses_and_restored_moves(case, path):
    """None stays None; a move that is restored draws tangent velocities; masses must agree."""
    move, kelvin = moves_of(case, path)[0], 300.0
    x, v = constrained_hosts.start(case, 1, 7)
    cache, system = reference_cache(), case.tree.system()
    without = sampler_state(x[0, 0])
    move.apply(state_at(kelvin, system), without, cache)
    assert without.velocities is None
    restored = utils.deserialize(utils.serialize(move))
    state = sampler_state(x[0, 0], v[0, 0].numpy())
    while not restored.n_accepted > move.n_accepted:
        restored.apply(state_at(kelvin, system), state, cache)
    drawn = torch.tensor(state.velocities.value_in_unit(unit.nanometer / unit.picosecond))[None]
    assert float((drawn - v[0, 0]).abs().min()) > 0
    assert constrained_hosts.tangent_and_normal(case, positions_of([state]), drawn)[1] < TANGENT
    system.setParticleMass(4, 3.0)
    with pytest.raises(ValueError, match=r"thermodynamic_state: .*another set of masses"):
        move.apply(state_at(kelvin, system), state, cache)
    state.positions = 1.01 * state.positions
    with pytest.raises(ValueError, match="sampler_state: expected constrained distances"):
        restored.apply(state_at(kelvin, case.tree.system()), state, cache)


def test_the_way_of_a_script_with_constrained_bonds_to_hydrogen():
    """Frames of a Simulation, a flow of them, replica exchange with it on the CPU platform."""
    shipped = tsf.systems.alanine_dipeptide()
    field = app.ForceField("amber14-all.xml")
    system = field.createSystem(shipped.topology, constraints=app.HBonds)
    integrator = openmm.LangevinMiddleIntegrator(600.0, 10.0, 0.002)
    integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatform("CPU"), {"Threads": "1"}
    simulation = app.Simulation(shipped.topology, system, integrator, *platform)
    simulation.context.setPositions(shipped.positions)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(600.0, 1)
    simulation.step(1000)
    reporter = tsf.TSFDatasetReporter(15)
    simulation.reporters.append(reporter)
    simulation.step(3000)
    simulation.reporters.clear()
    dataset = reporter.dataset()
    constraints = dataset.molecule.constraints
    assert constraints.n_constraints == 12
    assert dataset.molecule.measure == "rigid"
    assert float(constraints.deviations(dataset.positions).abs().max()) < 1e-12
    stiff = tsf.MolecularSystem(system, shipped.topology, shipped.positions, "stiff")
    with pytest.raises(ValueError, match="molecule: expected the measure 'rigid'"):
        reporter.dataset(stiff)
    flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,))
    options = {"simulation": simulation, "steps": 5, "crankNicolsonMoves": 4, "beta": 0.02}
    sampler = openmm_host.make_sampler((400.0, 490.0, 600.0), flow, **options)
    sampler.simulate(10)
    x = torch.from_numpy(openmm_host.arrays_of(sampler)[0])
    assert float((constraints.deviations(x).abs() / constraints.lengths).max()) < 2e-5
    statistics = sampler.flowStatistics
    assert statistics["flow_crank_nicolson"]["accepted"].sum() > 0
    assert statistics["replicasOutside"] == 0
