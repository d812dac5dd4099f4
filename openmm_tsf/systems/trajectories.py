"""Frames of trajectory files: DCD and HDF5 by this package's readers, other formats by mdtraj's."""

import os
import struct
import threading
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np

from openmm_tsf.io.dcd import read_dcd_frames
from openmm_tsf.io.file_kinds import DCD, GRO, HDF5, NETCDF, NPZ, PDB, TRR, XTC, describe_file
from openmm_tsf.io.hdf5 import Label, read_hdf5_frames
from openmm_tsf.systems.molecule import MolecularSystem

#: The content that belongs to an ending.
_KINDS = {
    ".dcd": DCD, ".nc": NETCDF, ".ncdf": NETCDF, ".netcdf": NETCDF, ".h5": HDF5, ".hdf5": HDF5,
    ".xtc": XTC, ".trr": TRR, ".pdb": PDB, ".gro": GRO,
}  # fmt: skip
_OF_REPORTER = (
    "; frames of a TSFDatasetReporter are read in Python, by "
    "TSFDatasetReporter(reportInterval, file, append=True).dataset(molecule)"
)
#: mdtraj's reader of HDF5 (PyTables) runs pickled code in a file.
_HDF5 = (".h5", ".hdf5")
_RUN_PICKLES = (".lh5",)
#: The NetCDF library is not safe for threads that read at the same time.
_READING = threading.Lock()
#: Formats that name their atoms; the others need the molecule's topology.
_NAME_ATOMS = (".gro", ".cif", ".mmcif", ".mol2", ".pdb", ".pdbx")
#: XTC has a multiple of 1 / precision nm for each coordinate; PDB files have 10000.
_LEAST_PRECISION = 10_000.0
#: In an XTC file, the precision follows magic number, atoms, step, time, box and atoms; for more
#: than nine atoms, with fewer there are plain numbers instead.
_XTC_PRECISION, _XTC_PLAIN = 56, 9


def check_trajectory_paths(path: Any) -> list[str]:
    """Return the names of one or several trajectory files, checked before the first is read."""
    try:
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        names = [os.fsdecode(item) for item in paths]
    except TypeError as error:
        raise TypeError(f"path: expected a trajectory file or several, got {path!r}") from error
    if not names:
        raise ValueError("path: expected at least one trajectory file, got none")
    readable = (mdtraj.FormatRegistry.loaders.keys() | set(_HDF5)) - set(_RUN_PICKLES)
    for name in names:
        if Path(name).is_dir():
            raise IsADirectoryError(f"path: expected a trajectory file, got the directory {name}")
        if not Path(name).is_file():
            raise FileNotFoundError(f"path: no such trajectory {name}")
        ending, kind = _ending(name), describe_file(name)
        got = name if kind is None else f"{kind}: {name}"
        if ending not in readable:
            formats = ", ".join(sorted(readable))
            hint = _OF_REPORTER if kind == NPZ else ""
            raise ValueError(f"path: expected a trajectory file ({formats}), got {got}{hint}")
        if Path(name).stat().st_size == 0:
            raise ValueError(f"path: expected frames, got the empty file {name}")
        expected = _KINDS.get(ending, kind)
        is_netcdf4 = (kind, expected) == (HDF5, NETCDF)  # in a container of HDF5
        if kind not in (None, expected, "a binary file") and not is_netcdf4:
            raise ValueError(f"path: expected {expected}, as the ending {ending} says, got {got}")
        if ending == ".xtc":
            _check_precision(name)
    return names


def _check_precision(name: str) -> None:
    """Refuse an XTC file that rounds positions so that energies are wrong."""
    with open(name, "rb") as file:
        start = file.read(_XTC_PRECISION + 4)
    if len(start) < _XTC_PRECISION + 4 or struct.unpack(">i", start[4:8])[0] <= _XTC_PLAIN:
        return
    (precision,) = struct.unpack(">f", start[_XTC_PRECISION:])
    if not precision >= _LEAST_PRECISION:
        raise ValueError(
            f"path: {name} is XTC, which rounds positions to {1 / precision:.3g} nm here, too "
            "coarse for energies; use DCD, NetCDF or TRR, or XTC of a precision (GROMACS's "
            f"compressed-x-precision) of {_LEAST_PRECISION:g} or more"
        )


def _ending(name: str) -> str:
    """Return the ending of a file's name in lower case, with that of what is compressed."""
    path = Path(name.lower())
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def load_frames(
    path: Any, molecule: MolecularSystem, stride: int = 1, skip: int = 0
) -> tuple[np.ndarray, str]:
    """Return frames [F, N, 3] in nm of trajectory files, or of an mdtraj.Trajectory, and a name.

    Every `stride`-th frame is kept, after leaving out `skip` frames at the start.
    """
    if isinstance(path, mdtraj.Trajectory):
        names, frames = ["the trajectory"], [_positions("the trajectory", path, molecule)]
    else:
        names = check_trajectory_paths(path)
        frames = [_load_file(name, molecule) for name in names]
    positions = np.concatenate(frames)[skip::stride]
    if not len(positions):
        raise ValueError(f"path: no frames left in {', '.join(names)}")
    return positions, ", ".join(names)


def _load_file(name: str, molecule: MolecularSystem) -> np.ndarray:
    ending, n_atoms = _ending(name), molecule.n_atoms
    names_atoms = ending.removesuffix(".gz") in _NAME_ATOMS
    topology = {} if names_atoms else {"top": molecule.mdtraj_topology}
    try:
        if ending == ".dcd":
            return np.asarray(read_dcd_frames(Path(name), n_atoms), dtype=np.float64)
        with _READING:
            if ending in _HDF5:
                xyz, atoms = read_hdf5_frames(Path(name))
            else:
                frames = mdtraj.FormatRegistry.loaders[ending](name, **topology)
    except Exception as error:
        what = f"a trajectory of {n_atoms} atoms"
        raise ValueError(f"path: cannot read {name} as {what}: {error}") from error
    if ending not in _HDF5:
        return _positions(name, frames, molecule)
    _check_number(name, xyz.shape[1], molecule)
    if atoms:
        _check_order(name, atoms, molecule)
    return xyz.astype(np.float64)


def _positions(name: str, frames: mdtraj.Trajectory, molecule: MolecularSystem) -> np.ndarray:
    """Return the positions of frames of the molecule's atoms in its order."""
    _check_number(name, frames.n_atoms, molecule)
    _check_order(name, _labels(frames.topology), molecule)
    return np.asarray(frames.xyz, dtype=np.float64)


def _check_number(name: str, n_atoms: int, molecule: MolecularSystem) -> None:
    if n_atoms != molecule.n_atoms:
        expected, got = f"the molecule's {molecule.n_atoms} atoms", f"{n_atoms} in {name}"
        raise ValueError(f"path: expected {expected}, got {got}")


def _labels(topology: mdtraj.Topology) -> list[Label]:
    """Return element, name and label of each atom."""
    return [(atom.element.symbol, atom.name, str(atom)) for atom in topology.atoms]


def _check_order(path: str, atoms: list[Label], molecule: MolecularSystem) -> None:
    """Refuse the same elements, or the same names, in another order.

    Programs name atoms, and guess elements, in different ways: that alone is no other molecule.
    """
    expected = _labels(molecule.mdtraj_topology)
    for column in range(2):
        labels, reference = ([atom[column] for atom in each] for each in (atoms, expected))
        if labels != reference and sorted(labels) == sorted(reference):
            first = next(i for i, label in enumerate(labels) if label != reference[i])
            raise ValueError(
                f"path: expected the molecule's atoms in its order, got another in {path}: atom "
                f"{first} is {atoms[first][2]}, expected {expected[first][2]}"
            )
