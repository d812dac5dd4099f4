"""Trajectory files: endings, several files, odd standard streams, threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mdtraj
import numpy as np
import pytest
import torch

from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.trajectories import load_frames
from tests.support.refusals import refused

ENDINGS = ("dcd", "nc", "trr", "pdb.gz")


@pytest.fixture(scope="module")
def frames(molecule):
    return MDDataset.shipped(molecule, stride=2000).positions


@pytest.fixture(scope="module")
def folder(molecule, frames, tmp_path_factory):
    path = tmp_path_factory.mktemp("trajectories")
    trajectory = mdtraj.Trajectory(frames.numpy().astype(np.float32), molecule.mdtraj_topology)
    for ending in ENDINGS:
        trajectory.save(str(path / f"a.{ending}"))
        upper = path / f"B.{ending.upper()}"
        upper.write_bytes((path / f"a.{ending}").read_bytes())
    return path


@pytest.mark.parametrize("ending", ENDINGS)
def test_endings_in_capitals(molecule, frames, folder, ending):
    dataset = MDDataset.load(folder / f"B.{ending.upper()}", molecule, 600)
    assert (dataset.positions - frames).abs().max() < 1e-4
    again = MDDataset.load(folder / f"a.{ending}", molecule, 600)
    assert torch.equal(dataset.positions, again.positions)


def test_several_files_of_different_formats(molecule, frames, folder):
    paths = [folder / "a.nc", folder / "B.DCD", folder / "a.trr"]
    dataset = MDDataset.load(paths, molecule, 600, skip=10, stride=5)
    assert len(dataset) == 10
    assert (dataset.positions[2] - frames[0]).abs().max() < 1e-5


def test_unknown_endings_name_what_is_read(molecule, folder):
    for name in ("a.foo", "a.dcd.gz", "noending"):
        (folder / name).write_bytes(b"frames")
        with refused(
            ValueError, r"expected a trajectory file \(.*\.dcd, .*\.nc, .*\), got"
        ) as caught:
            MDDataset.load(folder / name, molecule, 600)
        listed = str(caught.value).split("(")[1].split(")")[0].split(", ")
        assert {".h5", ".xtc"} <= set(listed)
        assert ".lh5" not in listed  # read by PyTables, which runs pickled code


def test_nothing_is_printed(molecule, folder, capfd):
    for ending in ENDINGS:
        load_frames(folder / f"a.{ending}", molecule)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("closed", ["os.close(1); os.close(2)", "sys.stdout = object()"])
def test_odd_standard_streams(folder, closed):
    code = (
        "import os, sys, openmm_tsf as tsf\n"
        "molecule = tsf.systems.alanine_dipeptide()\n"
        f"{closed}\n"
        "n = [len(tsf.MDDataset.load(p, molecule, 600)) for p in sys.argv[1:]]\n"
        "os._exit(7 if n == [20] * len(n) else 8)\n"
    )
    paths = [str(folder / f"a.{ending}") for ending in ENDINGS]
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code, *paths]).returncode == 7


def test_threads_leave_the_standard_output_alone(molecule, folder):
    before = os.fstat(1)
    paths = [folder / f"a.{ending}" for ending in ("dcd", "nc", "trr")] * 8
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda path: len(load_frames(path, molecule)[0]), paths)) == {20}
    after = os.fstat(1)
    assert (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino)
