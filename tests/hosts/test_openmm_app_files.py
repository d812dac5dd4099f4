"""OpenMM's own replica exchange with flow moves: reporter, resuming, refusals, and its own tests.

The first tests have the content of OpenMM's ``TestReplicaExchangeSampler.py``.
"""

import os
import signal

import mdtraj
import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest

import openmm_tsf as tsf
from openmm_tsf.hosts.openmm_app import FlowReplicaExchangeSampler
from openmm_tsf.utils.random import seeded_generator
from tests.robustness.sandbox import isolated
from tests.support import exact_tree, openmm_host
from tests.support.exact_cases import Changed, the_tree, tree_flow

KELVINS = (300.0, 400.0, 520.0)
GAS_CONSTANT = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)


def particle(expression, **parameters):
    """A Simulation of one particle in an external potential, at the origin."""
    system, force = openmm.System(), openmm.CustomExternalForce(expression)
    system.addParticle(1.0)
    for name, value in parameters.items():
        force.addGlobalParameter(name, value)
    force.addParticle(0)
    system.addForce(force)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.01)  # exact for harmonic terms
    integrator.setRandomNumberSeed(1)
    simulation = openmm_host.make_simulation(system, app.Topology(), np.zeros((1, 3)), integrator)
    return simulation


@pytest.mark.parametrize("reinitialize", [False, True])
def test_states_of_different_temperature_without_a_flow(reinitialize):
    """OpenMM's testTemperature: <U> = 3 kT / 2."""
    simulation, ladder = particle("50*(x*x+y*y+z*z)"), np.geomspace(300.0, 600.0, 5)
    states = [{"temperature": t * unit.kelvin} for t in ladder]
    sampler = FlowReplicaExchangeSampler(states, simulation, 40, reinitialize, flow=None, seed=1)
    energies, exchanged = [], set()

    def record(sampler):
        exchanged.add(tuple(sampler.replicaStateIndex))
        order = np.argsort(sampler.replicaStateIndex)
        energies.append([sampler.replicaStateEnergy[i][0]._value for i in order])

    sampler.reporters.append(record)
    for index in range(5):
        sampler.simulateReplica(index, 100)
    sampler.simulate(300)
    assert len(exchanged) > 1
    for rung, kelvin in enumerate(ladder):
        series = np.array(energies)[:, rung]
        assert abs(series.mean() - 1.5 * GAS_CONSTANT * kelvin) < 4 * openmm_host.batch_error(
            series
        )
    assert all(c.getStepCount() == 300 * 40 + 100 for c in sampler.replicaConformation)


@pytest.mark.parametrize("reinitialize", [False, True])
def test_states_of_different_parameters_without_a_flow(reinitialize, tmp_path):
    """OpenMM's testParameter: <x^2> = kT / k."""
    simulation, constants = particle("0.5*k*x*x", k=1.0), np.geomspace(50.0, 500.0, 5)
    states = [{"k": k} for k in constants]
    sampler = FlowReplicaExchangeSampler(states, simulation, 40, reinitialize, flow=None, seed=1)
    squares, exchanged = [], set()

    def record(sampler):
        exchanged.add(tuple(sampler.replicaStateIndex))
        x = openmm_host.arrays_of(sampler)[0][:, 0, 0]
        squares.append(x[np.argsort(sampler.replicaStateIndex)] ** 2)

    sampler.reporters.append(record)
    sampler.reporters.append(app.ReplicaExchangeReporter(str(tmp_path), 1, sampler, energy=True))
    for index in range(5):
        sampler.simulateReplica(index, 100)
    sampler.simulate(300)
    assert len(exchanged) > 1
    for state, k in enumerate(constants):
        series = 0.5 * k * np.array(squares)[:, state]
        error = openmm_host.batch_error(series)
        assert abs(series.mean() - 0.5 * GAS_CONSTANT * 300.0) < 4 * error
    reduced = np.loadtxt(tmp_path / "energy.csv", delimiter=",").reshape(-1, 5, 5)
    # The energy of every replica in every state is proportional to k.
    np.testing.assert_allclose(reduced / constants, np.repeat(reduced[:, :, :1] / 50.0, 5, 2))


def verlet():
    """An integrator without noise."""
    return openmm.VerletIntegrator(0.0005)


def reported_sampler(directory, resume=False, flow="tsf-volume", integrator=None, **options):
    """The exactly solvable molecule with OpenMM's reporter, every third iteration."""
    simulation = openmm_host.make_simulation(integrator=integrator)
    sampler = openmm_host.make_sampler(KELVINS, flow, 5, simulation=simulation, **options)
    if not resume:
        openmm_host.start_exactly(sampler, seeded_generator(8))
    files = {"trajectoryPerState": True, "trajectoryPerReplica": True, "trajectoryFormat": "dcd"}
    numbers = {"energy": True, "volume": True, "checkpoints": True, "resume": resume}
    reporter = app.ReplicaExchangeReporter(str(directory), 3, sampler, **files, **numbers)
    sampler.reporters.append(reporter)
    return sampler


@pytest.mark.parametrize("flow", ["tsf-volume", None])
def test_files_of_the_reporter(flow, tmp_path):
    """OpenMM's testReporter: files before and after resuming are those of the sampler."""
    kept = {"states": [], "energies": [], "positions": []}

    def record(sampler):
        if sampler.currentIteration % 3 == 0:
            kept["states"].append(list(sampler.replicaStateIndex))
            rows = [[u._value for u in row] for row in sampler.replicaStateEnergy]
            kept["energies"].append(rows)
            kept["positions"].append(openmm_host.arrays_of(sampler)[0])

    directory = tmp_path / "run"
    sampler = reported_sampler(directory, flow=flow)
    sampler.reporters.append(record)
    sampler.simulate(15)
    del sampler
    sampler = reported_sampler(directory, resume=True, flow=flow)
    for index, conformation in enumerate(sampler.replicaConformation):
        xml = (directory / f"checkpoint_{index}.xml").read_text()
        assert openmm.XmlSerializer.serialize(conformation) == xml
    sampler.reporters.append(record)
    sampler.simulate(15)
    states, energies, positions = (np.array(kept[name]) for name in kept)
    log = np.loadtxt(directory / "log.csv", delimiter=",", skiprows=1, dtype=int)
    np.testing.assert_array_equal(log[:, 0], 3 * np.arange(1, 11))
    np.testing.assert_array_equal(log[:, 1], 15 * np.arange(1, 11))
    np.testing.assert_array_equal(log[:, 2:], states)
    assert len(np.unique(states, axis=0)) > 1
    reduced = np.loadtxt(directory / "energy.csv", delimiter=",").reshape(-1, 3, 3)
    np.testing.assert_allclose(reduced * GAS_CONSTANT * np.array(KELVINS), energies, rtol=1e-12)
    assert np.loadtxt(directory / "volume.csv", delimiter=",").shape == (10, 3)
    topology = mdtraj.Topology.from_openmm(the_tree().topology)
    for number in range(3):
        frames = mdtraj.load_dcd(str(directory / f"replica_{number}.dcd"), top=topology).xyz
        np.testing.assert_allclose(frames, positions[:, number], atol=1e-6)
        frames = mdtraj.load_dcd(str(directory / f"state_{number}.dcd"), top=topology).xyz
        of_state = positions[np.arange(10), np.argsort(states, axis=1)[:, number]]
        np.testing.assert_allclose(frames, of_state, atol=1e-6)
    # The energies that were written are those of the conformations that were written.
    context = sampler.simulation.context
    for row, x in zip(energies.reshape(-1, 3), positions.reshape(-1, 7, 3), strict=True):
        context.setPositions(x)
        energy = context.getState(energy=True).getPotentialEnergy()._value
        np.testing.assert_allclose(row, energy, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="not empty"):
        app.ReplicaExchangeReporter(str(directory), 3, sampler)


@pytest.mark.parametrize("reinitialize", [False, True])
def test_a_resumed_run_is_the_same_bit_by_bit(tmp_path, reinitialize):
    options = {"integrator": verlet(), "reinitializeVelocities": reinitialize}
    whole = reported_sampler(tmp_path / "whole", **options)
    whole.simulate(12)
    first = reported_sampler(tmp_path / "parts", **options | {"integrator": verlet()})
    first.simulate(6)
    del first
    second = reported_sampler(tmp_path / "parts", resume=True, **options | {"integrator": verlet()})
    second.simulate(6)
    assert second.replicaStateIndex == whole.replicaStateIndex
    for ours, others in zip(*map(openmm_host.arrays_of, (second, whole)), strict=True):
        np.testing.assert_array_equal(ours, others)
    for name in ("log.csv", "energy.csv", "checkpoint_0.xml"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_simulation_without_positions_resumes(tmp_path):
    """As in OpenMM's own test: positions come from the checkpoints alone."""
    reported_sampler(tmp_path / "run").simulate(3)
    tree, platform = the_tree(), openmm.Platform.getPlatform("Reference")
    simulation = app.Simulation(tree.topology, tree.system(), verlet(), platform)
    sampler = openmm_host.make_sampler(KELVINS, steps=5, simulation=simulation)
    assert sampler.molecule is None
    options = {"resume": True, "checkpoints": True}
    app.ReplicaExchangeReporter(str(tmp_path / "run"), 3, sampler, **options)
    sampler.simulate(1)
    assert sampler.molecule.n_atoms == 7


class SinglePrecision(Changed):
    """A Context that keeps positions in single precision, as those of GPUs may."""

    def setPositions(self, positions):
        self.unchanged.setPositions(np.asarray(positions, np.float32).astype(np.float64))


def test_energies_are_those_of_positions_in_single_precision():
    simulation = openmm_host.make_simulation()
    simulation.context = SinglePrecision(simulation.context)
    sampler = openmm_host.make_sampler(KELVINS, simulation=simulation, independentMoves=10)
    openmm_host.start_exactly(sampler, seeded_generator(4))
    sampler.simulate(5)
    x = openmm_host.arrays_of(sampler)[0]
    np.testing.assert_array_equal(x, x.astype(np.float32))
    context = openmm_host.make_simulation().context
    for row, positions in zip(sampler.replicaStateEnergy, x, strict=True):
        context.setPositions(positions)
        energy = context.getState(energy=True).getPotentialEnergy()._value
        np.testing.assert_allclose(row._value, energy, rtol=1e-11)


class Offset(Changed):
    """Energies 0.02 kJ/mol too high."""

    def energy(self, x):
        return self.unchanged.energy(x) + 0.02


def test_a_reduced_precision_of_the_platform_is_stated(caplog):
    molecule = tsf.MolecularSystem(the_tree().system(), the_tree().topology, exact_tree.POSITIONS)
    openmm_host.make_sampler(KELVINS, potential=molecule.potential())
    assert not caplog.text
    openmm_host.make_sampler(KELVINS, potential=Offset(molecule.potential()))
    assert "the Reference platform of the Simulation computes energies that differ by 0.02" in (
        caplog.text
    )


def test_a_killed_run_resumes(tmp_path):
    """Killed after the seventh iteration, it goes on from the sixth, and ends as without."""

    def kill(sampler):
        if sampler.currentIteration == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(name, reporters=()):
        """In a child process."""

        def simulate():
            directory = tmp_path / name
            sampler = reported_sampler(directory, resume=directory.exists(), integrator=verlet())
            sampler.reporters += reporters
            sampler.simulate(12 - sampler.currentIteration)
            return "done"

        outcome = isolated(simulate, seconds=300.0)
        return outcome.killed or outcome.status or outcome.trace

    assert run("whole") == "done"
    assert run("parts", [kill]) == "SIGKILL"
    assert (tmp_path / "parts" / "log.csv").read_text().splitlines()[-1].startswith("6,")
    assert run("parts") == "done"
    for name in ("log.csv", "energy.csv", *(f"checkpoint_{i}.xml" for i in range(3))):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for path in (tmp_path / "whole").glob("*.dcd"):
        assert path.stat().st_size == (tmp_path / "parts" / path.name).stat().st_size


def test_checkpoints_of_different_iterations_are_warned_of(tmp_path, caplog):
    sampler = reported_sampler(tmp_path / "run")
    sampler.simulate(3)
    old = (tmp_path / "run" / "checkpoint_2.xml").read_text()
    sampler.simulate(3)
    (tmp_path / "run" / "checkpoint_2.xml").write_text(old)
    reported_sampler(tmp_path / "run", resume=True).simulate(1)
    assert "checkpoints are of steps [30, 30, 15]" in caplog.text


def test_checkpoints_older_than_the_log_are_warned_of(tmp_path, caplog):
    """All of one iteration: killed after the line of the log, and before the first of them."""
    sampler, folder = reported_sampler(tmp_path / "run"), tmp_path / "run"
    sampler.simulate(3)
    old = {path: path.read_text() for path in folder.glob("checkpoint_*.xml")}
    sampler.simulate(3)
    reported_sampler(folder, resume=True).simulate(1)
    assert not caplog.text
    for path, text in old.items():
        path.write_text(text)
    reported_sampler(folder, resume=True).simulate(1)
    assert "checkpoints are of steps [15, 15, 15]" in caplog.text


def changed(change):
    """The exactly solvable molecule's System with a change."""
    system = the_tree().system()
    change(system)
    return system


def add_barostat(system):
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    make_periodic(system)  # OpenMM refuses a barostat without


def make_periodic(system):
    force = openmm.CustomBondForce("0*r")
    force.setUsesPeriodicBoundaryConditions(True)
    system.addForce(force)


def tie_to_the_origin(system):
    force = openmm.CustomExternalForce("x*x")
    force.addParticle(0)
    system.addForce(force)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_barostat, "barostats are not supported, got MonteCarloBarostat"),
        (make_periodic, "expected no periodic box, but CustomBondForce uses one"),
        (lambda system: system.addConstraint(0, 2, 0.25), "constrained angles are not supported"),
        (lambda system: system.addConstraint(0, 1, 0.15), "flow: expected one for the 1 constr"),
        (tie_to_the_origin, "does not depend on position and orientation.*CustomExternalForce"),
    ],
)
def test_systems_that_flows_do_not_describe_are_refused_by_name(change, message):
    simulation = openmm_host.make_simulation(changed(change))
    with pytest.raises(ValueError, match=message):
        openmm_host.make_sampler(KELVINS, simulation=simulation)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([{"temperature": 300.0, "groups": {0}}], "temperature alone, got 'groups' in state 0"),
        ([{"groups": {0}}], "temperature alone, got 'groups'"),
        ([{"temperature": 300.0, "scale": 1.0}], "temperature alone, got 'scale' in state 0"),
    ],
)
def test_states_with_other_properties_are_refused_by_name(states, message):
    system = the_tree().system()
    force = openmm.CustomBondForce("0*scale*r")
    force.addGlobalParameter("scale", 1.0)
    system.addForce(force)
    simulation = openmm_host.make_simulation(system)
    with pytest.raises(ValueError, match=message):
        FlowReplicaExchangeSampler(states, simulation, 1, flow=tree_flow("tsf-volume"))


def test_energies_of_another_system_are_refused():
    system = the_tree().system()
    force = openmm.CustomBondForce("scale*r")
    force.addGlobalParameter("scale", 0.0)
    force.addBond(0, 3, [])
    system.addForce(force)
    simulation = openmm_host.make_simulation(system)
    openmm_host.make_sampler(KELVINS, simulation=simulation)
    simulation.context.setParameter("scale", 100.0)
    with pytest.raises(ValueError, match=r"Context.*a parameter of the Context that was changed"):
        openmm_host.make_sampler(KELVINS, simulation=simulation)


def test_dynamics_without_some_forces_are_refused():
    integrator = verlet()
    integrator.setIntegrationForceGroups({0})
    system = the_tree().system()
    system.getForce(2).setForceGroup(1)
    simulation = openmm_host.make_simulation(system, integrator=integrator)
    with pytest.raises(ValueError, match=r"leave out CustomTorsionForce \(group 1\)"):
        openmm_host.make_sampler(KELVINS, simulation=simulation)


def test_wrong_arguments_are_refused():
    for options, message in (
        ({"independentMoves": -1}, "independentMoves: expected an integer of at least 0, got -1"),
        ({"steeredSweeps": 0.5}, "steeredSweeps: expected an integer"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"beta": 1.0}, "beta: expected numbers below 1"),
        ({"flow": tsf.TemperatureSteerableFlow(2, 2, 1, (4,))}, "flow: expected configurations"),
    ):
        with pytest.raises(ValueError, match=message):
            openmm_host.make_sampler(KELVINS, **options)
    with pytest.raises(TypeError, match="flow: expected a flow, got dict"):
        openmm_host.make_sampler(KELVINS, flow={})


@pytest.fixture(scope="module")
def dipeptide(molecule, tmp_path_factory):
    """A file with an untrained flow of alanine dipeptide."""
    dataset = tsf.MDDataset.shipped(molecule, stride=100)
    flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(4,))
    path = tmp_path_factory.mktemp("flow") / "flow.pt"
    flow.save(path)
    return path


def dipeptide_sampler(molecule, flow, system=None, positions=None):
    system = molecule.system if system is None else system
    positions = molecule.positions if positions is None else positions
    simulation = openmm_host.make_simulation(system, molecule.topology, positions)
    return openmm_host.make_sampler((300.0, 450.0), flow, 1, simulation=simulation)


def test_masses_and_the_motion_of_the_centre_of_mass_may_differ(molecule, dipeptide):
    system = openmm.XmlSerializer.clone(molecule.system)
    system.addForce(openmm.CMMotionRemover())
    for index, mass in enumerate(molecule.heavy_hydrogen_masses):
        system.setParticleMass(index, mass)
    sampler = dipeptide_sampler(molecule, dipeptide, system)
    assert sampler.molecule.fingerprint == molecule.fingerprint
    sampler.simulate(1)


def test_a_flow_of_another_system_is_refused(molecule, dipeptide):
    system = openmm.XmlSerializer.clone(molecule.system)
    nonbonded = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    nonbonded.setParticleParameters(0, 0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="flow: it was made for another System or Topology"):
        dipeptide_sampler(molecule, dipeptide, system)
    with pytest.raises(ValueError, match="flow: it was made for another stereoisomer"):
        dipeptide_sampler(molecule, dipeptide, positions=-molecule.positions)
