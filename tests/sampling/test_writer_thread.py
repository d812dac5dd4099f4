"""Writing while the next iterations are sampled: overlap, errors, memory."""

import threading
import tracemalloc
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.sampling import recorder as recording
from openmm_tsf.sampling import writer_thread
from openmm_tsf.sampling.recorder import Recorder
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.sampling.writer_thread import WriterThread
from openmm_tsf.units import KB
from tests.sampling.conftest import assert_same_run

SECONDS = 60.0  # after which a test that hangs fails


class At:
    """A reporter that calls a function at one iteration."""

    interval = 1

    def __init__(self, iteration, function):
        self.iteration, self.function = iteration, function

    def __call__(self, sampler, state):
        if state.iteration == self.iteration:
            self.function()


def test_iterations_are_sampled_while_a_segment_is_written(make, tmp_path, monkeypatch):
    """The first write does not end before iteration 3 is reached."""
    reached, waited, write = threading.Event(), [], RunWriter.write

    def slow(self, *args):
        if not waited:
            waited.append(reached.wait(SECONDS))
        write(self, *args)

    monkeypatch.setattr(RunWriter, "write", slow)
    sampler = make()
    sampler.reporters.append(At(3, reached.set))
    sampler.run(4, output=tmp_path / "run", checkpoint_interval=2, progress=False)
    assert waited == [True]
    assert load_run(tmp_path / "run").n_iterations == 4
    assert not [t for t in threading.enumerate() if t.name.startswith("writer")]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_error_of_the_writer_is_raised_and_costs_one_segment(
    make, tmp_path, monkeypatch, number
):
    """As on a full disk: later segments are left out, and resume continues bit by bit."""
    whole, path = tmp_path / "whole", tmp_path / "run"
    make().run(6, output=whole, progress=False)
    calls, write = [], RunWriter.write

    def failing(self, *args):
        self._writing = True  # as `write` does before it fails
        calls.append(1)
        if len(calls) == number:
            raise OSError(28, "No space left on device", "segment")
        write(self, *args)

    sampler = make()
    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "write", failing)
        with pytest.raises(OSError, match="No space left on device"):
            sampler.run(6, output=path, checkpoint_interval=2, progress=False)
    assert len(calls) == number
    assert load_run(path).n_iterations == 2 * (number - 1)
    with pytest.raises(RuntimeError, match="the last iterations could not be written"):
        sampler.run(1, output=path, progress=False)
    again = make(seed=99).resume(path)
    again.run(6 - 2 * (number - 1), output=path, progress=False)
    assert_same_run(whole, path)


def test_a_second_ctrl_c_while_the_writer_is_waited_for(make, tmp_path, monkeypatch):
    """The write ends before its next file, nothing is written later, and resume continues."""
    whole, path = tmp_path / "whole", tmp_path / "run"
    make().run(6, output=whole, progress=False)
    interrupted, wait = threading.Event(), writer_thread.wait

    def interrupt(jobs):
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        return wait(jobs)

    write = RunWriter.write

    def slow(self, *args):
        check = self._check_stop

        def wait_for_interrupt():
            interrupted.wait(SECONDS)
            while not self._stopped:  # set by the thread that was interrupted
                pass
            check()

        self._check_stop = wait_for_interrupt
        write(self, *args)

    sampler = make()
    with monkeypatch.context() as patch:
        patch.setattr(writer_thread, "wait", interrupt)
        patch.setattr(RunWriter, "write", slow)
        with pytest.raises(KeyboardInterrupt):
            sampler.run(6, output=path, progress=False)
    assert not list((path / "segments").iterdir())
    with pytest.raises(RuntimeError, match="the last iterations could not be written"):
        sampler.run(1, output=path, progress=False)
    make(seed=99).resume(path).run(6, output=path, progress=False)
    assert_same_run(whole, path)


def test_one_job_at_a_time_in_order():
    begun, release, done = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        release.wait(SECONDS)
        done.append("first")

    thread = WriterThread()
    assert thread.submit(first)
    assert begun.wait(SECONDS)
    second: Future[bool] = Future()
    submitting = threading.Thread(
        target=lambda: second.set_result(thread.submit(lambda: done.append("second")))
    )
    submitting.start()
    submitting.join(0.05)
    assert submitting.is_alive()  # it waits: at most one segment is in memory beside the next
    assert not done
    release.set()
    assert second.result(SECONDS)
    thread.wait()
    assert done == ["first", "second"]
    thread.close()


def no_counts():
    return {"walk": KernelInfo.zero((2,))}


def peak_mib(recorder, n_iterations, shape):
    """Return the peak memory of numpy and Python while states are recorded in a thread."""
    rng = np.random.default_rng(1)
    energy, replica = np.zeros(shape[:2]), np.zeros(shape[:2], dtype=np.int64)
    tracemalloc.start()
    with recorder:
        for iteration in range(1, n_iterations + 1):
            x = torch.from_numpy(rng.normal(size=shape))
            state = WalkerState(
                x, None, torch.from_numpy(energy), torch.from_numpy(replica), iteration
            )
            recorder.add({}, 0.0, state, True)
            recorder.write_if_due(state)
        recorder.finish(state)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def test_memory_does_not_grow_with_the_number_of_iterations(molecule, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "SEGMENT_BYTES", 4 * 2**20)
    shape, peaks = (64, 2, molecule.n_atoms, 3), []
    for n in (60, 240):  # 4 and 16 MiB: one segment is full after 60
        writer = RunWriter(tmp_path / str(n), molecule, (300.0, 600.0), 64)
        writer.create(1, KB, {})
        recorder = Recorder(writer, no_counts, dict, None, 1e9)
        peaks.append(peak_mib(recorder, n, shape))
        assert writer.n_saved == n
    assert writer.n_segments >= 3
    assert peaks[1] < 12, peaks  # two segments of 4 MiB, and what is prepared for the files
    assert peaks[1] < peaks[0] + 5  # the second segment, which the first run does not have
