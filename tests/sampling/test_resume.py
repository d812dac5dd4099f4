"""Runs that are interrupted, killed or fail, and continue bit by bit."""

import math
import shutil
import signal

import numpy as np
import pytest
import torch

from openmm_tsf.io.dcd import DCDWriter
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.sampling import recorder as recording
from openmm_tsf.sampling.kernels import Scheduled, SequenceSettings, default_kernels
from openmm_tsf.sampling.tempering import ParallelTempering
from tests.sampling.conftest import LADDER


def everything(path):
    """Return all numbers of a run, joined over its segments, and the bytes of its DCD files."""
    parts = [dict(np.load(file)) for file in sorted((path / "segments").iterdir())]
    joined = {
        name: np.concatenate([part[name] for part in parts])
        for name in ("energy", "replica", "iteration", "dihedrals")
    }
    for name in parts[0]:
        if name.startswith(("accepted_", "proposed_")) or name in (
            "rejected_non_finite",
            "mirror_images",
            "n_evaluations",
        ):
            joined[name] = sum(part[name] for part in parts)
    for dcd in sorted(path.glob("*.dcd")):
        joined[dcd.name] = np.frombuffer(dcd.read_bytes(), dtype=np.uint8)
    return joined


def assert_same_run(first, second):
    one, two = everything(first), everything(second)
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)


def resumed(make, path):
    return make(seed=99).resume(path)  # the checkpoint decides everything


@pytest.fixture
def reference(make, tmp_path):
    """A run directory: tuned, then seven iterations in one call."""
    sampler = make()
    sampler.tune(4)
    sampler.run(7, output=tmp_path / "whole", checkpoint_interval=3, progress=False)
    return tmp_path / "whole"


def test_resume_is_the_same_bit_by_bit(make, tmp_path, reference):
    path = tmp_path / "cut"
    sampler = make()
    sampler.tune(4)
    sampler.run(4, output=path, checkpoint_interval=3, progress=False)
    again = resumed(make, path)
    assert again.seed == 3
    assert again.state.iteration == 8
    again.run(3, output=path, checkpoint_interval=2, progress=False)
    assert_same_run(reference, path)


def test_a_killed_run_continues_from_its_checkpoint(make, tmp_path, reference):
    path = tmp_path / "killed"
    sampler = make()
    sampler.tune(4)
    sampler.run(2, output=path, progress=False)
    shutil.copy(path / "checkpoint.pt", tmp_path / "saved.pt")
    sampler.run(2, output=path, progress=False)
    # As if the process had died between the second segment and its checkpoint, in mid-frame.
    shutil.copy(tmp_path / "saved.pt", path / "checkpoint.pt")
    (path / "segments" / "segment_000002.npz").write_bytes(b"half")
    with open(path / "T420.00K.dcd", "ab") as file:
        file.write(b"half a frame")
    resumed(make, path).run(5, output=path, progress=False)
    assert_same_run(reference, path)


def test_a_run_killed_before_its_first_segment_can_resume(make, tmp_path, reference):
    path = tmp_path / "early"
    sampler = make()
    sampler.tune(4)
    sampler.run(0, output=path, progress=False)
    resumed(make, path).run(7, output=path, progress=False)
    assert_same_run(reference, path)


def test_checkpoints_by_the_clock_change_nothing(make, tmp_path, reference, monkeypatch):
    path = tmp_path / "slow"
    monkeypatch.setattr(recording, "CHECKPOINT_SHARE", math.inf)
    sampler = make()
    sampler.tune(4)
    sampler.run(4, output=path, checkpoint_seconds=0.0, progress=False)
    assert len(list((path / "segments").iterdir())) == 4
    resumed(make, path).run(3, output=path, progress=False)
    assert_same_run(reference, path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_everything_and_are_raised(make, tmp_path, reference, number):
    path = tmp_path / "interrupted"
    sampler = make()
    sampler.tune(4)

    class PressCtrlC:
        interval = 7

        def __call__(self, owner, state):
            signal.raise_signal(number)

    sampler.reporters.append(PressCtrlC())
    with pytest.raises(KeyboardInterrupt):
        sampler.run(50, output=path, progress=False)
    assert sampler.state.iteration == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert len(everything(path)["iteration"]) == 3
    resumed(make, path).run(4, output=path, progress=False)
    assert_same_run(reference, path)


def test_an_error_in_a_kernel_costs_only_its_iteration(make, tmp_path, reference):
    path = tmp_path / "failed"
    sampler = make()
    sampler.tune(4)
    place = [entry.kernel.name for entry in sampler.schedule].index("swap_plain")
    swap = sampler.schedule[place].kernel
    calls = []

    class Failing:
        def __getattr__(self, name):
            return getattr(swap, name)

        def __call__(self, state, generator):
            calls.append(1)
            new = swap(state, generator)
            if len(calls) == 4:
                raise MemoryError("out of memory")
            return new

    sampler.schedule[place] = Scheduled(Failing())
    with pytest.raises(MemoryError):
        sampler.run(7, output=path, progress=False)
    assert sampler.state.iteration == 7
    sampler.schedule[place] = Scheduled(swap)
    sampler.run(4, output=path, progress=False)  # the same object continues, too
    assert_same_run(reference, path)


def test_resume_refuses_another_sampler(make, tree_molecule, potential, flow, tree, reference):
    with pytest.raises(ValueError, match="expected the run's n_walkers, 4, got 5"):
        make(n_walkers=5).resume(reference)
    with pytest.raises(ValueError, match="expected the run's temperatures"):
        make(temperatures=(300.0, 600.0)).resume(reference)
    with pytest.raises(ValueError, match="expected the kernels that the run was started with"):
        make(n_flow_walk=3).resume(reference)
    other, settings = tree.flow("tsf", "volume", 0.2), SequenceSettings(local_interval=2)
    kernels = default_kernels(potential, other, LADDER, tree_molecule.masses, settings)
    with pytest.raises(ValueError, match="expected the flow that the run was started with"):
        ParallelTempering(tree_molecule, other, LADDER, 4, kernels, potential).resume(reference)
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        make().resume(reference / "nowhere")
    with pytest.raises(ValueError, match="save_interval: this run was started with 1, got 2"):
        make().resume(reference).run(1, output=reference, save_interval=2, progress=False)


def test_resume_warns_of_another_platform(make, tree_molecule, flow, tree, reference):
    with OpenMMPotential(tree.system(), platform="Reference", n_contexts=2) as potential:
        settings = SequenceSettings(local_interval=2)
        kernels = default_kernels(potential, flow, LADDER, tree_molecule.masses, settings)
        sampler = ParallelTempering(tree_molecule, flow, LADDER, 4, kernels, potential)
        with pytest.warns(UserWarning, match="not the same bit by bit"):
            sampler.resume(reference)
        kernels[2].kernel.close()


def test_a_changed_sampler_does_not_append(make, tree_molecule, potential, tree, tmp_path):
    path = tmp_path / "changed"
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
    kernels = default_kernels(potential, trained, LADDER)
    sampler = ParallelTempering(tree_molecule, trained, LADDER, 2, kernels, potential, seed=1)
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
