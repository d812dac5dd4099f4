"""Runs that are interrupted, killed or fail, and continue bit by bit."""

import math
import shutil
import signal

import pytest
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.io.dcd import DCDWriter
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.sampling import recorder as recording
from openmm_tsf.sampling.kernels import Scheduled
from tests.sampling.conftest import assert_same_run, run_numbers
from tests.support.exact_cases import Changed


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def resumed(make, path):
    return lambda: make(seed=99).resume(path)  # the checkpoint decides everything


@pytest.fixture
def tuned(make):
    sampler = make()
    sampler.tune(4)
    return sampler


@pytest.fixture
def reference(make, tmp_path):
    """A run directory: tuned, then seven iterations in one call."""
    sampler = make()
    sampler.tune(4)
    sampler.run(7, output=tmp_path / "whole", checkpoint_interval=3, progress=False)
    return tmp_path / "whole"


def test_resume_is_the_same_bit_by_bit(tuned, reference, path, resumed):
    tuned.run(4, output=path, checkpoint_interval=3, progress=False)
    again = resumed()
    assert again.seed == 3
    assert again.state.iteration == 8
    again.run(3, output=path, checkpoint_interval=2, progress=False)
    assert_same_run(reference, path)


def test_a_killed_run_continues_from_its_checkpoint(tuned, tmp_path, reference, path, resumed):
    tuned.run(2, output=path, progress=False)
    shutil.copy(path / "checkpoint.pt", tmp_path / "saved.pt")
    tuned.run(2, output=path, progress=False)
    # As if the process had died between the second segment and its checkpoint, in mid-frame.
    shutil.copy(tmp_path / "saved.pt", path / "checkpoint.pt")
    (path / "segments" / "segment_000002.npz").write_bytes(b"half")
    with open(path / "T420.00K.dcd", "ab") as file:
        file.write(b"half a frame")
    resumed().run(5, output=path, progress=False)
    assert_same_run(reference, path)


def test_a_run_that_recorded_fewer_torsions_goes_on_with_these(tuned, path, resumed, monkeypatch):
    tuned.run(2, output=path, progress=False)
    torsions = load_run(path).dihedral_atoms
    more = torsions | {"other": (0, 1, 2, 3)}
    monkeypatch.setattr("openmm_tsf.sampling.run_writer.slow_torsions", lambda topology: more)
    resumed().run(3, output=path, progress=False)
    run = load_run(path)
    assert run.dihedral_atoms == torsions
    assert run.segments.dihedrals.shape == (5, run.n_walkers, run.n_rungs, len(torsions))


def test_a_run_killed_before_its_first_segment_can_resume(tuned, reference, path, resumed):
    tuned.run(0, output=path, progress=False)
    resumed().run(7, output=path, progress=False)
    assert_same_run(reference, path)


def test_checkpoints_by_the_clock_change_nothing(tuned, reference, monkeypatch, path, resumed):
    monkeypatch.setattr(recording, "CHECKPOINT_SHARE", math.inf)
    tuned.run(4, output=path, checkpoint_seconds=0.0, progress=False)
    assert len(list((path / "segments").iterdir())) == 4
    resumed().run(3, output=path, progress=False)
    assert_same_run(reference, path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_everything_and_are_raised(tuned, reference, number, path, resumed):
    def interrupt(owner, state):
        signal.raise_signal(number)

    interrupt.interval = 7
    tuned.reporters.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tuned.run(50, output=path, progress=False)
    assert tuned.state.iteration == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert len(run_numbers(path)["iteration"]) == 3
    resumed().run(4, output=path, progress=False)
    assert_same_run(reference, path)


def test_an_error_in_a_kernel_costs_only_its_iteration(tuned, reference, path):
    place = [entry.kernel.name for entry in tuned.schedule].index("swap_plain")
    swap = tuned.schedule[place].kernel
    calls = []

    class Failing(Changed):
        def __call__(self, state, generator):
            calls.append(1)
            new = swap(state, generator)
            if len(calls) == 4:
                raise MemoryError("out of memory")
            return new

    tuned.schedule[place] = Scheduled(Failing(swap))
    with pytest.raises(MemoryError):
        tuned.run(7, output=path, progress=False)
    assert tuned.state.iteration == 7
    tuned.schedule[place] = Scheduled(swap)
    tuned.run(4, output=path, progress=False)  # the same object continues, too
    assert_same_run(reference, path)


def test_resume_refuses_another_sampler(make, tree, reference):
    for settings, message in (
        ({"n_walkers": 5}, "expected the run's n_walkers, 4, got 5"),
        ({"ladder": (300.0, 600.0)}, "expected the run's temperatures"),
        ({"n_flow_walk": 3}, "expected the kernels that the run was started with"),
        ({"flow": tree.flow("tsf", "volume", 0.2)}, "expected the flow that the run was started"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**settings).resume(reference)
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        make().resume(reference / "nowhere")
    with pytest.raises(ValueError, match="save_interval: this run was started with 1, got 2"):
        make().resume(reference).run(1, output=reference, save_interval=2, progress=False)


def test_resume_warns_of_another_platform(make, tree, reference):
    with OpenMMPotential(tree.system(), platform="Reference", n_contexts=2) as potential:
        sampler = make(potential=potential)
        with pytest.warns(UserWarning, match="not the same bit by bit"):
            sampler.resume(reference)
        sampler.close()


def test_a_changed_sampler_does_not_append(make, tree, path, tmp_path):
    sampler = make()
    sampler.run(2, output=path, progress=False)
    sampler.run(1, output=path, progress=False)  # unchanged
    sampler.tune(0)
    sampler.run(1, output=path, progress=False)
    sigma = sampler.kernels["flow_walk"].sigma.clone()
    sampler.tune(3)
    with pytest.raises(ValueError, match=r"output: the sigma changed since .* write to a new one"):
        sampler.run(1, output=path, progress=False)
    sampler.kernels["flow_walk"].sigma = sigma
    sampler.run(1, output=path, progress=False)
    again = make().resume(path)
    again.tune(3)
    with pytest.raises(ValueError, match="output: the sigma changed"):
        again.run(1, output=path, progress=False)

    trained = tree.flow("tsf", "volume", 0.3)
    sampler = make(flow=trained)
    sampler.run(1, output=tmp_path / "trained", progress=False)
    with torch.no_grad():
        next(trained.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="output: the flow changed"):
        sampler.run(1, output=tmp_path / "trained", progress=False)
    sampler.run(1, output=tmp_path / "new", progress=False)


def test_a_damaged_run_is_refused(make, reference):
    (reference / "segments" / "segment_000001.npz").unlink()
    with pytest.raises(ValueError, match="segment 1 is missing"):
        make().resume(reference)
    with pytest.raises(ValueError, match="expected 1000 frames, the file is shorter"):
        DCDWriter(reference / "T300.00K.dcd", 7).cut_back(1000)
