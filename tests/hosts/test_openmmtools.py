"""Moves through a flow in openmmtools: what they change, refuse, count, store and resume."""

import copy
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import openmm
import openmm.unit as unit
import pytest
import torch
from openmmtools import alchemy, mcmc, multistate, testsystems, utils
from openmmtools.states import CompoundThermodynamicState, ThermodynamicState

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.hosts.openmmtools import TSFIndependenceMove, TSFMove
from openmm_tsf.systems.molecule import MolecularSystem
from tests.support import exact_tree
from tests.support.exact_cases import the_tree
from tests.support.openmmtools_cases import (
    LADDER,
    apply_to_all,
    create_sampler,
    exact_states,
    positions_of,
    reference_cache,
    resume_sampler,
    sampler_state,
    save_flow,
    state_at,
    tree_molecule,
)

KELVIN = 400.0


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return save_flow(tmp_path_factory.mktemp("flow") / "flow.pt")


def independence(flow, **options):
    return TSFIndependenceMove(flow, tree_molecule(), **{"n_steps": 4, "seed": 1, **options})


def one_of_each(flow):
    walk = TSFMove(flow, tree_molecule(), sigma=0.3, seed=1)
    steps = TSFMove(flow, tree_molecule(), beta=0.5, n_steps=2, seed=1)
    return walk, steps, independence(flow)


def applied(move, state, kelvin=KELVIN, times=1):
    """Return the positions after a move was applied to a copy of a state."""
    state = copy.deepcopy(state)
    apply_to_all(move, [state], kelvin, times)
    return positions_of([state])[0]


def test_positions_change_and_velocities_stay(flow):
    velocities = np.random.default_rng(1).normal(size=(7, 3))
    for move in one_of_each(flow):
        (start,) = exact_states(1, KELVIN, seed=5)
        state = sampler_state(positions_of([start])[0], velocities)
        move.apply(state_at(KELVIN), state, reference_cache())
        while not move.n_accepted:
            np.testing.assert_array_equal(positions_of([state]), positions_of([start]))
            move.apply(state_at(KELVIN), state, reference_cache())
        assert not torch.equal(positions_of([state]), positions_of([start]))
        given = state.velocities.value_in_unit(unit.nanometer / unit.picosecond)
        np.testing.assert_array_equal(given, velocities)
        assert state.potential_energy is None  # openmmtools computes that of the new positions
        assert move.n_proposed % move.n_steps == 0


def test_energies_of_torch_are_the_same(flow):
    (start,) = exact_states(1, KELVIN, seed=6)
    context, torch_ = (independence(flow, potential=kind) for kind in ("context", "torch"))
    pairs = [applied(move, start, times=5) for move in (context, torch_)]
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-9)
    assert context.statistics == torch_.statistics
    assert context.n_accepted > 0


def test_random_numbers_repeat_with_the_seed_alone(flow):
    def walk(sigma=0.05, seed=3):
        return TSFMove(flow, tree_molecule(), sigma=sigma, seed=seed)

    (start,) = exact_states(1, KELVIN, seed=7)
    first = applied(walk(), start)
    assert torch.equal(first, applied(walk(), start))
    used, original = walk(), walk()
    applied(used, start)
    copies = copy.deepcopy(original), copy.deepcopy(original), copy.deepcopy(original)
    others = [
        applied(used, start),
        applied(walk(seed=4), start),
        applied(walk(sigma=0.05 + 1e-12), start),
        applied(walk(), start, kelvin=KELVIN + 1e-9),
        applied(copies[0], start),
        applied(copies[1], start),
        applied(copy.deepcopy(copies[2]), start),
    ]
    for one, other in itertools.combinations([first, *others], 2):
        assert not torch.equal(one, other)
    assert torch.equal(first, applied(original, start))
    again = copy.deepcopy(walk())
    assert torch.equal(others[4], applied(again, start))


def test_copies_at_one_temperature_do_not_move_together(flow, tmp_path):
    """Openmmtools copies one move for all states, also within a sequence."""
    (start,) = exact_states(1, KELVIN, seed=14)
    states, reporter = [state_at(KELVIN)] * 3, multistate.MultiStateReporter(tmp_path / "run.nc")
    moves = mcmc.SequenceMove([TSFMove(flow, tree_molecule(), sigma=0.05, seed=1)])
    sampler = multistate.MultiStateSampler(mcmc_moves=moves, number_of_iterations=2)
    sampler.create(states, [start] * 3, reporter)
    sampler.run()
    reporter.close()
    for one, other in itertools.combinations(positions_of(sampler.sampler_states), 2):
        assert not torch.allclose(one, other, rtol=0, atol=1e-4)


def test_a_restored_move_continues(flow):
    """With the statistics, and other random numbers."""
    (start,) = exact_states(1, KELVIN, seed=8)
    for move in one_of_each(flow):
        apply_to_all(move, [start], KELVIN, 2)
        restored = utils.deserialize(utils.serialize(move))
        assert restored.statistics == move.statistics
        assert (restored.seed, restored.n_steps) == (move.seed, move.n_steps)
        apply_to_all(restored, [start], KELVIN)
        assert restored.n_proposed == 3 * move.n_steps
        assert move.n_proposed == 2 * move.n_steps


def test_statistics_of_another_process_are_taken_up(flow):
    """Under MPI a state's replica may be moved by another process each time."""
    (start,) = exact_states(1, KELVIN, seed=9)
    here, there, alone = (independence(flow) for _ in range(3))
    state = copy.deepcopy(start)
    for turn in range(4):
        mover, other = (here, there) if turn % 2 else (there, here)
        apply_to_all(mover, [state], KELVIN)
        other.statistics = mover.statistics
    assert torch.equal(positions_of([state])[0], applied(alone, start, times=4))
    assert here.statistics == there.statistics == alone.statistics


def test_in_sequences_and_mixtures(flow):
    walk, steps, draw = one_of_each(flow)
    md = mcmc.LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=2)
    weighted = mcmc.WeightedMove([(walk, 0.5), (steps, 0.5)])
    moves = mcmc.SequenceMove([md, weighted, draw])
    (start,) = exact_states(1, KELVIN, seed=10)
    sampler = mcmc.MCMCSampler(state_at(KELVIN), start, moves)
    sampler.run(6, context_cache=reference_cache())
    assert walk.n_proposed + steps.n_proposed // 2 == 6
    assert draw.n_proposed == 24
    assert not torch.equal(positions_of([sampler.sampler_state]), positions_of([start]))
    again = utils.deserialize(utils.serialize(moves))
    assert again.statistics == moves.statistics
    assert again.statistics[2] == draw.statistics


KINDS = ("ReplicaExchangeSampler", "ParallelTemperingSampler")


@pytest.mark.parametrize("kind", KINDS)
def test_multistate_samplers_store_and_resume(flow, tmp_path, kind):
    md = mcmc.LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=2)
    moves = mcmc.SequenceMove([md, independence(flow)])
    sampler, reporter = create_sampler(kind, moves, tmp_path / "run.nc", n_iterations=6)
    sampler.run(4)
    before = [move.statistics[1] for move in sampler.mcmc_moves]
    assert [counts["n_proposed"] for counts in before] == [16] * len(LADDER)
    assert moves.statistics[1]["n_proposed"] == 0  # the sampler's are copies
    reporter.close()

    resumed, reporter = resume_sampler(kind, tmp_path / "run.nc")
    assert resumed.iteration == 4
    assert [move.statistics[1] for move in resumed.mcmc_moves] == before
    resumed.run()
    assert [m.statistics[1]["n_proposed"] for m in resumed.mcmc_moves] == [24] * len(LADDER)
    reporter.close()
    reporter = multistate.MultiStateReporter(tmp_path / "run.nc", open_mode="r")
    assert reporter.read_last_iteration() == 6
    stored = [move.statistics[1]["n_proposed"] for move in reporter.read_mcmc_moves()]
    assert stored == [24] * len(LADDER)
    frames = [positions_of(reporter.read_sampler_states(iteration=i)) for i in range(7)]
    reporter.close()
    for one, other in itertools.pairwise(frames):
        assert not torch.equal(one, other)


SCRIPT = """
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from openmm_tsf.hosts.openmmtools import TSFIndependenceMove
from tests.support.openmmtools_cases import create_sampler, tree_molecule

flow, path = map(Path, sys.argv[1:])
move = TSFIndependenceMove(flow, tree_molecule(), n_steps=4, seed=1)
kind, options = "ReplicaExchangeSampler", {"replica_mixing_scheme": %r}
sampler, reporter = create_sampler(kind, move, path, 100_000, **options)
sampler.run(3)
"""


def start_process(flow, path, rest="", prefix=(), mixing="swap-all"):
    """Start a process that runs three iterations, and then `rest`."""
    command = [*prefix, sys.executable, "-W", "ignore", "-c", SCRIPT % mixing + rest]
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [*command, str(flow), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths},
    )


def wait_for_three(process):
    """Wait until a process has printed that it ran three iterations."""
    for line in process.stdout:
        if line.strip() == b"three":
            return
    raise RuntimeError(f"the process ended with {process.wait()}")


def check_resumes(path):
    """Assert that a killed sampler resumes with what it had counted."""
    resumed, reporter = resume_sampler("ReplicaExchangeSampler", path)
    n = resumed.iteration
    assert n >= 3
    counts = [move.n_proposed for move in resumed.mcmc_moves]
    # The moves may be one iteration ahead of the last that is complete.
    assert set(counts) <= {4 * n, 4 * (n + 1)}
    resumed.run(2)
    assert [move.n_proposed - c for move, c in zip(resumed.mcmc_moves, counts, strict=True)] == [
        8
    ] * len(LADDER)
    reporter.close()


def test_the_files_of_a_running_sampler_resume(flow, tmp_path):
    """What a kill would leave."""
    path, left = tmp_path / "run.nc", tmp_path / "left"
    left.mkdir()
    sampler, reporter = create_sampler("ReplicaExchangeSampler", independence(flow), path, 100)
    sampler.run(3)
    for file in tmp_path.glob("run*.nc"):
        shutil.copy(file, left)
    reporter.close()
    check_resumes(left / "run.nc")


@pytest.mark.slow
def test_a_killed_sampler_resumes(flow, tmp_path):
    rest = 'print("three", flush=True); sys.stdin.read()'
    process = start_process(flow, tmp_path / "run.nc", rest)
    wait_for_three(process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    check_resumes(tmp_path / "run.nc")


@pytest.mark.slow
def test_a_sampler_terminated_within_an_iteration_resumes(flow, tmp_path):
    """Openmmtools finishes writing an iteration when it is terminated."""
    for trial in range(4):
        path = tmp_path / f"{trial}.nc"
        process = start_process(flow, path, 'print("three", flush=True); sampler.run()')
        wait_for_three(process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2 + 0.13 * trial)
        process.terminate()
        process.communicate()
        check_resumes(path)


@pytest.mark.slow
def test_two_processes_of_mpi_sample_the_same_as_one(flow, tmp_path):
    """Without exchanges, which are random, bit by bit."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if (mpiexec := shutil.which("mpiexec", path=folders)) is None:
        pytest.skip("no mpiexec (pip install mpich, for example)")
    rest = "import mpiplus; print(mpiplus.get_mpicomm().size); reporter.close()"
    results = []
    for name, prefix in (("two", (mpiexec, "-n", "2")), ("one", ())):
        path = tmp_path / f"{name}.nc"
        end = rest if prefix else "reporter.close()"
        process = start_process(flow, path, end, prefix, mixing=None)
        printed, _ = process.communicate()
        assert process.returncode == 0
        assert printed.split().count(b"2") == 2 * bool(prefix)
        sampler, reporter = resume_sampler("ReplicaExchangeSampler", path)
        results.append(
            (positions_of(sampler.sampler_states), [m.statistics for m in sampler.mcmc_moves])
        )
        reporter.close()
    (two, counts_two), (one, counts_one) = results
    assert counts_two == counts_one
    assert torch.equal(two, one)


def test_a_flow_file_that_moved_or_changed_is_refused(flow, tmp_path):
    path = tmp_path / "flow.pt"
    shutil.copy(flow, path)
    move = independence(path)
    fresh = copy.deepcopy(move)  # reads the file when it is first applied
    stored = utils.serialize(move)
    sampler, reporter = create_sampler("ReplicaExchangeSampler", move, tmp_path / "run.nc", 2)
    sampler.run(1)
    reporter.close()

    path.rename(tmp_path / "elsewhere.pt")
    message = f"flow: expected the flow file of this TSFIndependenceMove at {path}, got none"
    for refused in (
        lambda: utils.deserialize(dict(stored)),
        lambda: resume_sampler("ReplicaExchangeSampler", tmp_path / "run.nc"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            refused()
    save_flow(path, metric="polar")
    (start,) = exact_states(1, KELVIN, seed=11)
    message = r"flow: expected the file with which this .* was made \(SHA-256 \w{12}\), got another"
    for refused in (
        lambda: utils.deserialize(dict(stored)),
        lambda: resume_sampler("ReplicaExchangeSampler", tmp_path / "run.nc"),
        lambda: apply_to_all(fresh, [start], KELVIN),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    (tmp_path / "elsewhere.pt").replace(path)
    assert utils.deserialize(dict(stored)).flow_sha256 == move.flow_sha256


def changed_system(change):
    system = copy.deepcopy(tree_molecule().system)
    change(system)
    return system


def test_states_of_another_energy_are_refused_by_name(flow, molecule):
    (start,) = exact_states(1, KELVIN, seed=12)
    bond = openmm.CustomBondForce("(r - 1)^2")
    bond.addBond(0, 3, [])
    bond.setName("restraint")
    region = alchemy.AlchemicalRegion(alchemical_atoms=[0])
    charged = copy.deepcopy(tree_molecule().system)
    nonbonded = openmm.NonbondedForce()
    for _ in range(7):
        nonbonded.addParticle(0.1, 0.3, 0.1)
    charged.addForce(nonbonded)
    alchemical = alchemy.AbsoluteAlchemicalFactory().create_alchemical_system(charged, region)
    compound = CompoundThermodynamicState(
        state_at(KELVIN, alchemical), [alchemy.AlchemicalState.from_system(alchemical)]
    )

    def other_bond(system):
        i, j, length, k = system.getForce(0).getBondParameters(0)
        system.getForce(0).setBondParameters(0, i, j, 1.01 * length, k)

    def in_a_box(system):
        system.getForce(0).setUsesPeriodicBoundaryConditions(True)

    cases = {
        "restraint in addition": state_at(KELVIN, changed_system(lambda s: s.addForce(bond))),
        "another HarmonicBondForce": state_at(KELVIN, changed_system(other_bond)),
        "no HarmonicAngleForce": state_at(KELVIN, changed_system(lambda s: s.removeForce(1))),
        "1 constraints in addition": state_at(
            KELVIN, changed_system(lambda s: s.addConstraint(0, 1, 0.15))
        ),
        "no periodic box": state_at(KELVIN, changed_system(in_a_box)),
        "a CompoundThermodynamicState with .*CustomNonbondedForce": compound,
        "no 7 particles, .*22 particles in addition": state_at(KELVIN, molecule.system),
    }
    for message, state in cases.items():
        move = independence(flow)
        with pytest.raises(ValueError, match=f"thermodynamic_state: expected .*{message}"):
            move.apply(state, copy.deepcopy(start), reference_cache())
        # Also after a state that is right.
        move.apply(state_at(KELVIN), copy.deepcopy(start), reference_cache())
        with pytest.raises(ValueError, match=message):
            move.apply(state, copy.deepcopy(start), reference_cache())


def test_constant_pressure_is_refused(flow):
    """By name; the ensemble is known before the energy is."""
    testsystem = testsystems.LennardJonesFluid(nparticles=64)
    state = ThermodynamicState(
        testsystem.system, temperature=KELVIN * unit.kelvin, pressure=1.0 * unit.bar
    )
    move = independence(flow)
    with pytest.raises(ValueError, match=r"constant volume, got a pressure of 1.0 bar \(NPT\)"):
        move.apply(state, sampler_state(testsystem.positions / unit.nanometer), reference_cache())
    assert move.statistics == dict.fromkeys(move.statistics, 0)


def test_states_of_the_same_energy_are_accepted(flow):
    """With other masses, groups, order of Forces, or parameters that are as in the System."""

    def change(system):
        system.setParticleMass(4, 4.0)
        system.getForce(0).setForceGroup(3)
        force = copy.deepcopy(system.getForce(1))
        system.removeForce(1)
        system.addForce(force)
        system.addForce(openmm.CMMotionRemover())

    (start,) = exact_states(1, KELVIN, seed=13)
    same = applied(independence(flow), start)
    state = copy.deepcopy(start)
    independence(flow).apply(state_at(KELVIN, changed_system(change)), state, reference_cache())
    torch.testing.assert_close(positions_of([state])[0], same, rtol=0, atol=1e-12)


def molecule_with_forbidden_bonds():
    """The molecule with an energy that is not a number where its first bond is short."""
    system, tree = the_tree().system(), the_tree()
    force = openmm.CustomBondForce(f"1e-9*log(r - {float(tree.centre[0])})")
    i, j, *_ = system.getForce(0).getBondParameters(0)
    force.addBond(i, j, [])
    system.addForce(force)
    return MolecularSystem(system, tree.topology, 1.02 * exact_tree.POSITIONS), (i, j)


def test_non_finite_energies_are_counted_rejections(tmp_path):
    molecule, (i, j) = molecule_with_forbidden_bonds()
    flow = the_tree().flow("tsf", "volume", 0.3)
    flow.fingerprint = molecule.fingerprint
    flow.save(tmp_path / "flow.pt")
    move = TSFIndependenceMove(tmp_path / "flow.pt", molecule, n_steps=40, seed=1)
    starts = exact_states(20, KELVIN, seed=15)
    centre = float(the_tree().centre[0])
    long = [(x[i] - x[j]).norm() > centre for x in positions_of(starts)]
    state = starts[long.index(True)]
    for _ in range(5):
        move.apply(state_at(KELVIN, molecule.system), state, reference_cache())
        x = positions_of([state])[0]
        assert (x[i] - x[j]).norm() > centre
    counts = move.statistics
    assert counts["n_proposed"] == 200
    assert counts["n_accepted"] > 0
    # Up to half of the draws have a short bond; those outside the domain are not evaluated.
    assert 40 < counts["rejected_non_finite"] - counts["outside_domain"] < 140
    assert counts["n_evaluations"] == 205 - counts["outside_domain"] - counts["mirror_images"]
    short = sampler_state(0.9 * molecule.positions)
    with pytest.raises(ValueError, match="sampler_state: expected positions of finite energy"):
        move.apply(state_at(KELVIN, molecule.system), short, reference_cache())


@pytest.mark.parametrize("flip", [[1, 1, 1], [1, 1, -1]])
def test_a_mirror_image_stays_and_is_counted(flow, caplog, flip):
    for move in one_of_each(flow):
        is_mirrored = flip[2] < 0
        caplog.clear()
        (start,) = exact_states(1, KELVIN, seed=4)
        apply_to_all(move, [start], KELVIN, times=3)
        changed = sampler_state(positions_of([start])[0] * torch.tensor(flip))
        x = positions_of([changed])
        apply_to_all(move, [changed], KELVIN, times=20)
        assert torch.equal(positions_of([changed]), x) == is_mirrored
        assert move.n_proposed == 23 * move.n_steps
        assert move.starts_mirrored == 20 * is_mirrored
        assert move.n_evaluations <= move.n_proposed + 23
        told = [m for m in caplog.messages if "mirror image" in m]
        assert len(told) == is_mirrored  # once
        restored = pickle.loads(pickle.dumps(move))
        assert restored.starts_mirrored == move.starts_mirrored
        apply_to_all(move, [start], KELVIN, times=3)  # and moves go on elsewhere
        assert move.starts_mirrored == 20 * is_mirrored


def test_statistics_without_the_count_of_mirrored_starts_are_read(flow):
    state = independence(flow).__getstate__()
    del state["starts_mirrored"]
    move = independence(flow)
    move.__setstate__(state)
    assert move.starts_mirrored == 0


def test_positions_that_a_flow_cannot_start_from_are_refused(flow):
    move = independence(flow)
    fewer = sampler_state(tree_molecule().positions[:6])
    with pytest.raises(ValueError, match=r"positions: expected shape \(7, 3\) in nm, got \(6, 3\)"):
        apply_to_all(move, [fewer], KELVIN)


def test_wrong_arguments_are_refused(flow, tmp_path, molecule):
    tree = tree_molecule()
    toy = TemperatureSteerableFlow(1, 1, 1, (4,))
    cases = [
        (TypeError, "flow: expected the path", lambda: TSFMove(toy, tree)),
        (FileNotFoundError, "no such flow file", lambda: TSFMove(tmp_path / "no.pt", tree)),
        (ValueError, "belongs to another molecule", lambda: TSFMove(flow, molecule)),
        (TypeError, "molecule: expected", lambda: TSFMove(flow, tree.system)),
        (ValueError, "sigma: expected either", lambda: TSFMove(flow, tree, sigma=0.1, beta=0.1)),
        (ValueError, "sigma: expected a positive", lambda: TSFMove(flow, tree, sigma=0.0)),
        (ValueError, "beta: expected below 1", lambda: TSFMove(flow, tree, beta=1.0)),
        (ValueError, "n_steps: expected", lambda: TSFIndependenceMove(flow, tree, n_steps=0)),
        (ValueError, "seed: expected", lambda: TSFIndependenceMove(flow, tree, seed=-1)),
        (ValueError, "potential: expected", lambda: TSFMove(flow, tree, potential="gpu")),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    incomplete = utils.serialize(TSFMove(flow, tree))
    del incomplete["n_accepted"]
    with pytest.raises(ValueError, match="n_accepted: expected an entry"):
        utils.deserialize(incomplete)
    assert TSFMove(flow, tree).seed != TSFMove(flow, tree).seed
    assert TSFMove(flow, tree).sigma == 0.1
