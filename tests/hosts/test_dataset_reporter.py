"""The reporter that makes a dataset of a user's own simulation."""

import gc
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import openmm
import openmm.app as app
import pytest

import openmm_tsf as tsf
from tests.robustness.sandbox import isolated
from tests.support.chain import ZIGZAG, chain_of

KELVIN = 600.0


@pytest.fixture(scope="module")
def chain():
    return chain_of()


def simulate(chain, n_steps=0, kelvin=KELVIN, system=None, seed=1, integrator=None):
    """A Simulation of the chain on the Reference platform after some steps."""
    if integrator is None:
        integrator = openmm.LangevinMiddleIntegrator(kelvin, 10.0, 0.001)
        integrator.setRandomNumberSeed(seed)
    platform = openmm.Platform.getPlatform("Reference")
    system = chain.system if system is None else system
    simulation = app.Simulation(chain.topology, system, integrator, platform)
    simulation.context.setPositions(ZIGZAG)
    simulation.context.setVelocitiesToTemperature(KELVIN, seed)
    simulation.step(n_steps)
    return simulation


def test_frames_and_energies_are_those_of_the_simulation(chain):
    """In double precision, at the interval, beside another reporter; energies are the System's."""
    simulation, seen = simulate(chain, 1005), []

    class Watcher:
        def describeNextReport(self, simulation):
            return {"steps": 20 - simulation.currentStep % 20, "include": ["positions", "energy"]}

        def report(self, simulation, state):
            energy = state.getPotentialEnergy()._value
            seen.append((state.getPositions(asNumpy=True)._value.copy(), energy))

    reporter = tsf.TSFDatasetReporter(20)
    simulation.reporters += [reporter, Watcher()]
    simulation.step(8000)
    dataset = reporter.dataset(chain)
    assert len(dataset) == len(reporter) == len(seen) == 400
    np.testing.assert_array_equal(dataset.positions.numpy(), [x for x, _ in seen])
    np.testing.assert_array_equal(dataset.energies.numpy(), [u for _, u in seen])
    assert dataset.temperature == KELVIN
    assert dataset.n_evaluations == 8000
    assert dataset.molecule is chain
    # Its own System and Topology make the same molecule, and a flow.
    own = reporter.dataset()
    assert own.molecule.n_atoms == 5
    tsf.TemperatureSteerableFlow.from_dataset(own, n_blocks=1, hidden=(4,))


def test_energies_of_single_precision_are_accepted(chain):
    """On the CPU platform: energies differ from those of the System, by less than is refused."""
    integrator = openmm.LangevinMiddleIntegrator(KELVIN, 10.0, 0.001)
    integrator.setRandomNumberSeed(2)
    platform = openmm.Platform.getPlatform("CPU")
    simulation = app.Simulation(chain.topology, chain.system, integrator, platform)
    simulation.context.setPositions(ZIGZAG)
    simulation.step(1000)
    reporter = tsf.TSFDatasetReporter(20)
    simulation.reporters.append(reporter)
    simulation.step(2000)
    assert len(reporter.dataset(chain)) == 100


def test_a_file_continues_and_is_read_alone(chain, tmp_path):
    path = tmp_path / "md.npz"
    parts = []
    for number in range(2):
        simulation = simulate(chain, 1000, seed=number + 1)
        reporter = tsf.TSFDatasetReporter(50, path, append=True)
        assert len(reporter) == 40 * number
        simulation.reporters.append(reporter)
        simulation.step(2000)
        parts.append(reporter.dataset(chain).positions.numpy()[40 * number :])
        reporter.save()
    dataset = tsf.TSFDatasetReporter(50, path, append=True).dataset(chain)
    np.testing.assert_array_equal(dataset.positions.numpy(), np.concatenate(parts))
    assert dataset.n_evaluations == 4000
    with pytest.raises(ValueError, match=r"got arrays of NumPy .*append=True\)\.dataset\(molecule"):
        tsf.MDDataset.load(path, chain, 300.0)  # the way to read it is named
    with pytest.raises(FileExistsError, match=r"md.npz exists; append=True continues it"):
        tsf.TSFDatasetReporter(50, path)


def test_frames_that_a_checkpoint_repeats_are_kept_once(chain, tmp_path):
    """A deterministic Simulation that goes on from an earlier checkpoint makes the same frames."""
    simulation = simulate(chain, integrator=openmm.VerletIntegrator(0.001))
    reporter = tsf.TSFDatasetReporter(50, temperature=KELVIN)
    simulation.reporters.append(reporter)
    simulation.step(500)
    checkpoint = simulation.context.createCheckpoint()
    simulation.step(500)
    before = len(reporter)
    simulation.context.loadCheckpoint(checkpoint)
    simulation.step(600)
    assert (before, len(reporter)) == (20, 22)


def test_the_file_is_written_when_the_reporter_goes(chain, tmp_path):
    simulation = simulate(chain)
    reporter = tsf.TSFDatasetReporter(10, tmp_path / "md.npz")
    simulation.reporters.append(reporter)
    simulation.step(100)
    assert not (tmp_path / "md.npz").exists()
    del simulation, reporter
    gc.collect()
    assert len(tsf.TSFDatasetReporter(10, tmp_path / "md.npz", append=True)) == 10


def test_a_thermostat_among_the_forces_is_no_energy(chain):
    system = openmm.XmlSerializer.clone(chain.system)
    system.addForce(openmm.AndersenThermostat(KELVIN, 20.0))
    simulation = simulate(chain, system=system, integrator=openmm.VerletIntegrator(0.001))
    simulation.context.setVelocitiesToTemperature(KELVIN, 1)
    simulation.step(2000)
    reporter = tsf.TSFDatasetReporter(20, temperature=KELVIN)
    simulation.reporters.append(reporter)
    simulation.step(2000)
    assert len(reporter.dataset()) == 100


def simulate_to_file(path, **options):
    simulation = simulate(chain_of())
    simulation.reporters.append(tsf.TSFDatasetReporter(10, path, **options))
    simulation.step(1000)


def test_a_simulation_that_is_killed_keeps_its_frames(tmp_path):
    def killed():
        simulate_to_file(tmp_path / "md.npz", saveSeconds=0.0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert isolated(killed, seconds=300.0).killed == "SIGKILL"
    assert 1 <= len(tsf.TSFDatasetReporter(10, tmp_path / "md.npz", append=True)) <= 100


SCRIPT = """
import sys
from tests.hosts.test_dataset_reporter import simulate_to_file

simulate_to_file(sys.argv[1], saveSeconds=99)
raise SystemExit(3)
"""


def test_a_script_that_ends_keeps_its_frames(tmp_path):
    (tmp_path / "run.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "md.npz")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, check=False, env=environment, timeout=300).returncode == 3
    assert len(tsf.TSFDatasetReporter(10, tmp_path / "md.npz", append=True)) == 100


def test_what_is_no_ensemble_of_the_system_is_refused(chain):
    stiffer = chain_of(constant=2.2e5)
    simulation = simulate(chain, 500)
    reporter = tsf.TSFDatasetReporter(10)
    simulation.reporters.append(reporter)
    with pytest.raises(ValueError, match="at least one frame, got none"):
        reporter.dataset(chain)
    simulation.step(1000)
    with pytest.raises(ValueError, match="energies: those of the Simulation: expected"):
        reporter.dataset(stiffer)
    simulation.integrator.setTemperature(300.0)
    with pytest.raises(ValueError, match="expected frames of 600 K, got an integrator at 300 K"):
        simulation.step(10)


def test_a_biased_simulation_is_refused(chain):
    system = openmm.XmlSerializer.clone(chain.system)
    bias = openmm.CustomTorsionForce("20*cos(theta)")
    bias.addTorsion(0, 1, 2, 3, [])
    system.addForce(bias)
    simulation = simulate(chain, 500, system=system)
    reporter = tsf.TSFDatasetReporter(10)
    simulation.reporters.append(reporter)
    simulation.step(500)
    with pytest.raises(ValueError, match="or an added bias"):
        reporter.dataset(chain)


def test_wrong_simulations_and_files_are_refused(chain, tmp_path):
    path = tmp_path / "md.npz"
    simulation = simulate(chain)
    reporter = tsf.TSFDatasetReporter(10, path)
    simulation.reporters.append(reporter)
    simulation.step(50)
    reporter.save()

    def continue_with(simulation, message, **options):
        def run():
            reporter = tsf.TSFDatasetReporter(**{"reportInterval": 10, "append": True} | options)
            simulation.reporters.append(reporter)
            simulation.step(10)

        with pytest.raises(ValueError, match=message):
            run()

    own = {"file": path}
    continue_with(simulate(chain, kelvin=300.0), "frames of 600 K, got an integrator at 300", **own)
    continue_with(simulate(chain_of(constant=1e5)), "file: expected frames of this System", **own)
    continue_with(simulate(chain), "reportInterval: expected 10", **own | {"reportInterval": 20})
    continue_with(simulate(chain), "temperature: expected 600 K", **own | {"temperature": 300.0})
    periodic = openmm.XmlSerializer.clone(chain.system)
    periodic.getForce(0).setUsesPeriodicBoundaryConditions(True)
    continue_with(simulate(chain, system=periodic), "no periodic box", file=None)
    constrained = openmm.XmlSerializer.clone(chain.system)
    constrained.addConstraint(0, 2, 0.25)
    continue_with(simulate(chain, system=constrained), "constrained angles are not", file=None)
    verlet = openmm.VerletIntegrator(0.001)
    continue_with(simulate(chain, integrator=verlet), "VerletIntegrator has no", file=None)
    content = path.read_bytes()
    for damaged in (content[:-30], b"", b"text", content.replace(b"energies", b"anergies")):
        path.write_bytes(damaged)
        continue_with(simulate(chain), "not a readable file of frames", **own)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        tsf.TSFDatasetReporter(10, tmp_path / "missing" / "md.npz")
    with pytest.raises(ValueError, match="reportInterval: expected an integer"):
        tsf.TSFDatasetReporter(0)
    path.write_bytes(content)
    alone = tsf.TSFDatasetReporter(10, path, append=True)
    with pytest.raises(ValueError, match="molecule: expected one"):
        alone.dataset()
    with pytest.raises(ValueError, match="file: expected the name"):
        tsf.TSFDatasetReporter(10).save()
