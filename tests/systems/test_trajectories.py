"""Trajectory files: endings, several files, odd standard streams, threads."""

import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mdtraj
import netCDF4
import numpy as np
import openmm.unit as unit
import pytest
import torch

from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.trajectories import load_frames
from tests.robustness.sandbox import isolated
from tests.support.refusals import cases, from_shell, refused

#: Twelve of the shipped frames (stride 2000), written by mdtraj 1.11 with PyTables 3.11.
HDF5 = Path(__file__).parents[1] / "support" / "ala2_mdtraj.h5"
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


@pytest.mark.parametrize("kind", ["closed", "no file"])
def test_odd_standard_streams(molecule, folder, kind):
    def read():
        if kind == "closed":
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            os.close(1)
            os.close(2)
        else:
            sys.stdout = object()
        return [len(MDDataset.load(folder / f"a.{e}", molecule, 600)) for e in ENDINGS]

    assert isolated(read, seconds=300.0).status == [20] * len(ENDINGS)


def test_threads_leave_the_standard_output_alone(molecule, folder):
    before = os.fstat(1)
    paths = [folder / f"a.{ending}" for ending in ("dcd", "nc", "trr")] * 8
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda path: len(load_frames(path, molecule)[0]), paths)) == {20}
    after = os.fstat(1)
    assert (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino)


def test_hdf5_of_mdtraj_is_read_without_pickles(molecule, frames):
    dataset = MDDataset.load(HDF5, molecule, 600)
    assert torch.equal(dataset.positions, frames[:12].float().double())
    assert "tables" not in sys.modules


@cases(
    ("change", "message"),
    [
        ("units", lambda f: f["coordinates"].setncattr("units", "angstroms"), "in nanometers"),
        ("names", lambda f: f["coordinates"].renameAttribute("units", "unit"), None),
        ("other", lambda f: f.renameVariable("coordinates", "positions"), "without coordinates"),
    ],
)
def test_other_hdf5_is_refused(molecule, tmp_path, change, message):
    path = tmp_path / "a.h5"
    write_hdf5(path, MDDataset.shipped(molecule, stride=4000).positions.numpy())
    with netCDF4.Dataset(path, "a") as file:
        change(file)
    if message is None:
        assert len(MDDataset.load(path, molecule, 600)) == 10
        return
    with refused(ValueError, f"path: cannot read .*a.h5 as a trajectory of 22 atoms: .*{message}"):
        MDDataset.load(path, molecule, 600)


def write_hdf5(path, positions, n_frames=None):
    """Write mdtraj's layout; `n_frames` claims more frames than there are."""
    with netCDF4.Dataset(path, "w", format="NETCDF4") as file:
        shape = (n_frames or len(positions), *positions.shape[1:])
        for name, size in zip("fnx", shape, strict=True):
            file.createDimension(name, size)
        values = file.createVariable("coordinates", "f4", tuple("fnx"), zlib=True)
        values.units = "nanometers"
        values[: len(positions)] = positions


def test_damaged_hdf5_is_refused(molecule, tmp_path):
    content = HDF5.read_bytes()
    (tmp_path / "short.h5").write_bytes(content[:9000])
    write_hdf5(tmp_path / "few.h5", np.zeros((3, 21, 3)))
    write_hdf5(tmp_path / "bomb.h5", np.zeros((3, 22, 3)), n_frames=500_000)
    for name, message in (
        ("short", "cannot read .*short.h5"),
        ("few", "expected the molecule's 22 atoms, got 21"),
        ("bomb", "too small for coordinates"),
    ):
        with refused(ValueError, f"path: .*{message}"):
            MDDataset.load(tmp_path / f"{name}.h5", molecule, 600)


def write_xtc(path, frames, molecule, precision):
    """XTC holds integers and their precision: those of ten times the positions, and 10000."""
    path.unlink(missing_ok=True)
    part, factor = path.with_name("part.xtc"), precision / 1000
    with open(path, "ab") as file:
        for x in frames.numpy():
            frame = mdtraj.Trajectory(factor * (x - x[0]), molecule.mdtraj_topology)
            frame.save_xtc(str(part))
            content = part.read_bytes()
            assert struct.unpack(">f", content[56:60]) == (1000.0,)
            file.write(content[:56] + struct.pack(">f", precision) + content[60:])


def test_xtc_is_judged_by_its_precision(molecule, frames, tmp_path, capsys):
    path, relative = tmp_path / "a.xtc", frames - frames[:, :1]
    write_xtc(path, frames, molecule, 10_000.0)
    error = float((MDDataset.load(path, molecule, 600).positions - relative).abs().max())
    assert 3e-5 < error < 6e-5
    write_xtc(path, frames, molecule, 2000.0)
    with refused(ValueError, "is XTC, which rounds positions to 0.0005 nm here.*10000 or more"):
        MDDataset.load(path, molecule, 600)
    arguments = ["train", "--output", tmp_path / "out", "--trajectory", path, "--temperature", 600]
    assert "is XTC, which rounds positions to 0.0005 nm here" in from_shell(arguments, capsys)


@pytest.mark.parametrize("ending", ["dcd", "nc", "xtc", "trr", "h5", "pdb"])
def test_files_that_are_not_what_their_ending_says_are_named(molecule, folder, tmp_path, ending):
    kinds = {
        folder / "a.dcd": "a DCD trajectory",
        folder / "a.nc": "a NetCDF file",
        folder / "a.trr": "a TRR trajectory",
        HDF5: "an HDF5 file",
    }
    for source, words in kinds.items():
        path = tmp_path / f"a.{ending}"
        path.write_bytes(source.read_bytes())
        if source.suffix != path.suffix and (source, ending) != (HDF5, "nc"):  # as NetCDF-4
            with refused(ValueError, f"path: expected .*, got {words}: .*a.{ending}"):
                MDDataset.load(path, molecule, 600)


def test_trajectories_of_mdtraj(molecule, frames, folder):
    trajectory = mdtraj.load_netcdf(str(folder / "a.nc"), top=molecule.mdtraj_topology)
    dataset = MDDataset.load(trajectory, molecule, 600 * unit.kelvin, stride=2, skip=1)
    assert len(dataset) == 10
    assert dataset.name == "the trajectory"
    assert (dataset.positions - frames[1::2]).abs().max() < 1e-5
    exchanged = trajectory[:]
    exchanged.topology = trajectory.topology.copy()
    first, second = exchanged.topology.atom(0), exchanged.topology.atom(1)
    first.element, second.element = second.element, first.element
    with refused(ValueError, "path: expected the molecule's atoms in its order, got another in"):
        MDDataset.load(exchanged, molecule, 600)
    with refused(ValueError, "path: expected the molecule's 22 atoms, got 10 in the trajectory"):
        MDDataset.load(trajectory.atom_slice(range(10)), molecule, 600)
    with refused(ValueError, "temperature: expected the temperature of .* in K, got none"):
        MDDataset.load(folder / "a.nc", molecule)
