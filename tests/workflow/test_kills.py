"""Kills at any file operation, a full disk, a Ctrl-C within a write: nothing is lost.

``tests/robustness/walk.py`` kills; ``kills.py`` beside it does so at random moments.
"""

import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_tsf.flows.load import load_flow
from openmm_tsf.io import files
from openmm_tsf.io.dcd import DCDWriter
from openmm_tsf.io.topology import POSITIONS
from openmm_tsf.sampling.recorder import Recorder
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import holds_molecule, write_molecule
from openmm_tsf.training import FitSettings
from openmm_tsf.workflow.settings import FlowSettings
from openmm_tsf.workflow.train import train
from tests.workflow.tiny import QUIET

ROOT = Path(__file__).parents[2]
FIT = FitSettings(
    n_steps=4, batch_size=8, kl_batch_size=4, validate_interval=2, n_validation_draws=4
)


def walk(*arguments):
    """Run the walk in another process, which forks: it must have no threads."""
    command = [sys.executable, "-m", "tests.robustness.walk", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 wrong" in done.stdout


@pytest.mark.parametrize(
    ("stage", "faults"),
    [
        ("md", "die full interrupt"),
        pytest.param("train", "die", marks=pytest.mark.slow),  # as in test_resume_run
        ("sample", "die"),
    ],
)
def test_a_stage_that_dies_in_a_file_operation_continues(stage, faults):
    walk("--stages", stage, "--points", "1", "--faults", *faults.split())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die", "full", "interrupt"])
@pytest.mark.parametrize("stage", ["md", "train", "sample"])
def test_every_file_operation(stage, fault):
    walk("--stages", stage, "--faults", fault)


@pytest.mark.slow
def test_every_seventh_file_operation_of_a_whole_run():
    walk("--stages", "run", "--every", "7")


def test_positions_are_there_before_the_molecule_is_complete(molecule, tmp_path, monkeypatch):
    """Else it would be read with the rounded positions of the PDB file."""
    write = files.write_bytes

    def watched(path, content):
        write(path, content)
        assert not holds_molecule(tmp_path) or (tmp_path / POSITIONS).is_file()

    monkeypatch.setattr(files, "write_bytes", watched)
    write_molecule(molecule, tmp_path)
    assert holds_molecule(tmp_path)


@pytest.fixture
def dcd(tmp_path):
    writer = DCDWriter(tmp_path / "x.dcd", 3)
    writer.create("frames")
    writer.append(np.zeros((5, 3, 3)), 0)
    return writer


def test_the_header_of_a_trajectory_never_counts_too_many(dcd, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(struct, "pack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dcd.cut_back(2)
    assert dcd.n_frames == 5  # not cut before the header says so
    dcd.cut_back(2)
    assert dcd.n_frames == int(np.frombuffer(dcd.path.read_bytes()[8:12], "<i4")[0]) == 2


def test_a_full_disk_names_the_trajectory(dcd, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device .*--resume.*x\.dcd"):
        dcd.append(np.zeros((5, 3, 3)), 5)


def test_temporaries_of_a_predecessor_with_the_same_process_number_are_removed(tmp_path):
    ending = f"{files.host_name()}.{os.getpid()}.01234567.tmp"
    (tmp_path / f".x.json.{ending}").touch()
    (tmp_path / f".new.{ending}").mkdir()
    files.remove_stale_temporaries(tmp_path)
    assert not list(tmp_path.iterdir())


def test_results_replace_earlier_ones_together(tmp_path):
    (tmp_path / "a.json").write_text("old")

    def fill(folder):
        with files.replace_together(folder) as new:
            (new / "a.json").write_text("new")
            raise OSError(28, "full", str(new / "b.json"))

    with pytest.raises(OSError, match="full") as caught:
        fill(tmp_path)
    assert caught.value.filename == str(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == "old"
    with files.replace_together(tmp_path) as new:
        (new / "a.json").write_text("new")
        assert (tmp_path / "a.json").read_text() == "old"
    assert (tmp_path / "a.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_nothing_is_written_twice_after_a_second_ctrl_c():
    """It comes when the checkpoint is written and the recorder has not noted it yet."""
    written = []

    class Writer:
        def write(self, numbers, positions, checkpoint):
            written.append(len(positions))
            if len(written) == 1:
                raise KeyboardInterrupt

    energy, replica = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    state = WalkerState(torch.zeros(1, 1, 2), None, energy, replica, 1)
    zero = {"walk": KernelInfo.zero((1,))}
    recorder = Recorder(Writer(), lambda: dict(zero), dict, None, 30.0)
    recorder.add({}, 0.1, state, True)
    with pytest.raises(KeyboardInterrupt):
        recorder.write(state)
    recorder.write(state)  # as the sampler does when it ends
    assert written == [1]


def test_ctrl_c_before_a_training_continues_keeps_its_flow(molecule, tmp_path, monkeypatch):
    dataset = MDDataset.shipped(molecule, stride=400)
    given = (dataset, tmp_path / "flow", FlowSettings(n_blocks=2, hidden=(4,)), FIT)
    options = replace(QUIET, seed=3)
    train(*given, options=options)
    before = load_flow(tmp_path / "flow" / "flow.pt", molecule).network.state_dict()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("openmm_tsf.training.trainer.DirectObjective", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(*given, options=replace(options, resume=True))
    after = load_flow(tmp_path / "flow" / "flow.pt", molecule).network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(KeyboardInterrupt):
        train(dataset, tmp_path / "new", *given[2:], options=options)
    assert not (tmp_path / "new" / "flow.pt").exists()
