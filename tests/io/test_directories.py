"""Output directories have one owner at a time; files are complete or absent."""

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.io import files
from openmm_tsf.io.directory import (
    LOCK,
    DirectoryInUse,
    DirectoryLock,
    is_owned,
    list_contents,
    open_output_directory,
    read_stage,
)
from openmm_tsf.io.npz import read_arrays
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.potentials.toy import DoubleWell
from openmm_tsf.sampling import ParallelTempering, RunWriter
from tests.robustness.sandbox import isolated

HOLD = """
import sys, time
from openmm_tsf.io.directory import DirectoryLock
with DirectoryLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def open_and_close(path, **options):
    with open_output_directory(path, **options) as lock:
        assert lock.directory.is_dir()


def test_new_empty_and_used(tmp_path):
    for _ in range(2):  # the lock file that is left does not matter
        open_and_close(tmp_path / "a" / "b")
    used = tmp_path / "used"
    used.mkdir()
    (used / "something").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        open_and_close(used)
    assert [path.name for path in used.iterdir()] == ["something"]  # not even a lock
    with pytest.raises(ValueError, match="holds nothing to resume"):
        open_and_close(used, resume=True)
    assert list_contents(used) == ["something"]
    with pytest.raises(NotADirectoryError, match="is a file"):
        open_and_close(used / "something")
    with pytest.raises(OSError, match="output: cannot make this directory"):
        open_and_close(used / "something" / "new")


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", denied)
    with pytest.raises(PermissionError, match="output: cannot write to it: Permission denied"):
        DirectoryLock(tmp_path).__enter__()


def test_a_second_owner_is_refused_until_the_first_has_ended(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout.readline() == "held\n"
            for resume in (False, True):
                with pytest.raises(DirectoryInUse, match=f"in use by process {owner.pid} on"):
                    open_and_close(tmp_path, resume=resume)
        finally:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
    with open_output_directory(tmp_path):
        note = json.loads((tmp_path / ".lock-owner.json").read_text())
        assert note["pid"] == os.getpid()


def test_a_lock_is_reentrant_and_exclusive(tmp_path):
    lock = DirectoryLock(tmp_path)
    with lock, lock, pytest.raises(DirectoryInUse), DirectoryLock(tmp_path):
        pass
    with DirectoryLock(tmp_path):
        pass


def note_of(path):
    return json.loads((path / ".lock-owner.json").read_text())


def change_note(path, **changes):
    (path / ".lock-owner.json").write_text(json.dumps(note_of(path) | changes))


def test_the_note_of_an_owner_says_which_attempt_it_is_and_that_it_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with DirectoryLock(tmp_path) as lock:
        first = note_of(tmp_path)
        assert (first["job"], first["attempt"]) == ("4711", 1)
        assert is_owned(first)
        lock.check_held()
    assert note_of(tmp_path).keys() - first.keys() == {"ended"}
    assert is_owned(note_of(tmp_path)) is False
    with DirectoryLock(tmp_path):
        second = note_of(tmp_path)
    assert second["attempt"] == 2
    assert second["token"] != first["token"]
    assert is_owned(first | {"pid": 2**22 + 1}) is False  # killed
    assert is_owned(first | {"host": "elsewhere"}) is None


def test_a_stale_lock_of_another_host_is_taken_over_and_told(tmp_path, caplog):
    with DirectoryLock(tmp_path):
        pass
    with caplog.at_level(logging.WARNING), DirectoryLock(tmp_path):
        assert not caplog.text  # it had ended
    before = {k: v for k, v in note_of(tmp_path).items() if k != "ended"}
    (tmp_path / ".lock-owner.json").write_text(json.dumps(before | {"host": "node7", "job": "12"}))
    with caplog.at_level(logging.WARNING), DirectoryLock(tmp_path) as lock:
        lock.check_held()
    assert "of job 12, attempt 2, on node7 since" in caplog.text
    assert "taken over as attempt 3. If it still runs, it stops at its next" in caplog.text


def test_the_first_of_two_owners_stops_and_the_second_one_is_not_disturbed(tmp_path):
    """On a file system whose locks are known to one node only, both have the lock."""
    path, first = tmp_path / "run", toy_sampler()
    first.run(3, path, progress=False)

    class Other:
        interval = 2

        def __call__(self, sampler, state):
            change_note(path, token="of another node", host="node7", attempt=9)

    first.reporters.append(Other())
    files = ("checkpoint.pt", "segments/segment_000000.npz")
    before = [(path / name).read_bytes() for name in files]
    with pytest.raises(DirectoryInUse, match=r"taken over by process .*, attempt 9, on node7"):
        first.run(4, path, checkpoint_interval=3, progress=False)
    assert [(path / name).read_bytes() for name in files] == before
    assert not (path / "segments" / "segment_000001.npz").exists()
    assert "ended" not in note_of(path)
    with pytest.raises(RuntimeError, match="the last iterations could not be written"):
        first.run(1, path, progress=False)
    second = toy_sampler().resume(path)
    second.run(4, path, progress=False)
    assert second.n_written == 7


def test_an_owner_that_was_replaced_while_it_wrote_stops_before_the_next_file(tmp_path):
    """Its segment would replace that of the second owner."""
    writer, calls = RunWriter(tmp_path / "run", None, (1.0, 2.0), n_walkers=2), []
    writer.create(seed=1, boltzmann_constant=1.0, choices={})

    def check_held():
        calls.append(1)
        if len(calls) == 2:
            raise DirectoryInUse("taken over")

    writer.check_held = check_held
    with pytest.raises(DirectoryInUse, match="taken over"):
        writer.write({"energy": np.zeros((1, 2, 2))}, np.zeros((1, 2, 2, 1)), checkpoint={})
    assert not list((tmp_path / "run" / "segments").iterdir())


def toy_sampler():
    flow, potential = TemperatureSteerableFlow(1, 2, 1, (4,)), DoubleWell(0.1, -1.0, 0.3)
    sampler = ParallelTempering(None, flow, [1.0, 2.0], 2, potential=potential, seed=1)
    sampler.set_positions(torch.zeros(2, 2, 1))
    return sampler


def test_samplers_hold_the_lock_while_they_run(tmp_path):
    path, other = tmp_path / "run", toy_sampler()

    class Intruder:
        interval = 2

        def __call__(self, owner, state):
            with pytest.raises(DirectoryInUse, match="is in use by process"):
                other.resume(path)
            with pytest.raises(FileExistsError, match=r"continue a run with resume\(\)"):
                other.run(1, path, progress=False)

    first = toy_sampler()
    first.run(1, path, progress=False)
    first.reporters.append(Intruder())
    first.run(2, path, progress=False)
    other.resume(path).run(1, path, progress=False)  # the first is not running now
    with pytest.raises(RuntimeError, match="was continued by another sampler"):
        first.run(1, path, progress=False)
    first.reporters.clear()
    first.resume(path).run(1, path, progress=False)
    assert first.state.iteration == 5


def test_the_stage_is_read_from_the_first_file(tmp_path):
    assert read_stage(tmp_path) is None
    for text, stage in (("[", None), ('{"stage": "md"}', "md")):
        (tmp_path / "config.json").write_text(text)
        assert read_stage(tmp_path) == stage


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(files, "open", lambda *a, **b: full(), raising=False)
        else:
            patch.setattr(os, moment, full)
        with pytest.raises(OSError, match=r"No space left .*free some space.*a\.json"):
            files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_error_of_a_full_disk_names_the_file(tmp_path):
    """A real limit: the child may write 64 KiB a file and no more."""
    path = tmp_path / "checkpoint.pt"
    write_tensors(path, {"x": torch.ones(3)})

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        write_tensors(path, {"x": torch.zeros(100_000)})

    outcome = isolated(write)
    assert outcome.error == "OSError"
    assert "File too large (free some space" in outcome.message
    assert "checkpoint.pt" in outcome.message
    assert torch.equal(read_tensors(path, "checkpoint")["x"], torch.ones(3))


def test_temporary_files_of_ended_processes_are_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    host = files.host_name()
    for pid in (process.pid, os.getpid()):  # in containers, processes often have the same number
        (tmp_path / f".a.json.{host}.{pid}.0123abcd.tmp").touch()
    recent, old = (tmp_path / f".{name}.elsewhere.1.0123abcd.tmp" for name in ("recent", "old"))
    foreign = tmp_path / ".notes.tmp"
    for path in (recent, old, foreign):
        path.touch()
    os.utime(old, (time.time() - 1e6,) * 2)
    with DirectoryLock(tmp_path):
        assert {p.name for p in tmp_path.glob(".*.tmp")} == {recent.name, foreign.name}
    assert list_contents(tmp_path) == []


def test_the_temporary_file_that_is_being_written_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: files.remove_stale_temporaries(tmp_path))
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_links_are_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("precious")
    inside = tmp_path / "run"
    inside.mkdir()
    (inside / "summary.json").symlink_to(outside)
    files.write_json(inside / "summary.json", {})
    assert outside.read_text() == "precious"
    assert not (inside / "summary.json").is_symlink()
    (inside / LOCK).symlink_to(outside)
    with pytest.raises(ValueError, match=r"\.lock is a link"), DirectoryLock(inside):
        pass
    assert outside.read_text() == "precious"


def test_arrays_must_be_finite_and_of_the_expected_shape(tmp_path):
    path = tmp_path / "a.npz"
    files.write_arrays(path, {"a": np.arange(3.0), "n": np.array(2)})
    shapes = {"a": (3,), "n": ()}
    assert read_arrays(path, "thing", shapes)["a"].tolist() == [0.0, 1.0, 2.0]
    for wrong in ({"a": (4,)}, {"b": (3,)}):
        with pytest.raises(ValueError, match=r"a\.npz: not a readable thing"):
            read_arrays(path, "thing", wrong)
    np.savez(path, a=np.array([{}], dtype=object), n=np.array(np.nan))
    for wrong in ({"a": (1,)}, {"n": ()}):
        with pytest.raises(ValueError, match=r"a\.npz: not a readable thing"):
            read_arrays(path, "thing", wrong)
    path.write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match="not a readable thing"):
        read_arrays(path, "thing", shapes)
    with pytest.raises(FileNotFoundError, match="no such thing"):
        read_arrays(Path("none.npz"), "thing", shapes)
