"""Frames of trajectory files: DCD by this package's reader, other formats by mdtraj's."""

import os
import threading
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np

from openmm_tsf.io.dcd import read_dcd_frames
from openmm_tsf.systems.molecule import MolecularSystem

#: Formats whose reader (PyTables) runs pickled code in a file.
_RUN_PICKLES = (".h5", ".hdf5", ".lh5")
#: The NetCDF library is not safe for threads that read at the same time.
_READING = threading.Lock()
#: Formats that name their atoms; the others need the molecule's topology.
_NAME_ATOMS = (".gro", ".cif", ".mmcif", ".mol2", ".pdb", ".pdbx")
#: Rounds to 0.001 nm.
_ROUNDED = ".xtc"


def check_trajectory_paths(path: Any) -> list[str]:
    """Return the names of one or several trajectory files, checked before the first is read."""
    try:
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        names = [os.fsdecode(item) for item in paths]
    except TypeError as error:
        raise TypeError(f"path: expected a trajectory file or several, got {path!r}") from error
    if not names:
        raise ValueError("path: expected at least one trajectory file, got none")
    readable = mdtraj.FormatRegistry.loaders.keys() - {_ROUNDED, *_RUN_PICKLES}
    for name in names:
        if Path(name).is_dir():
            raise IsADirectoryError(f"path: expected a trajectory file, got the directory {name}")
        if not Path(name).is_file():
            raise FileNotFoundError(f"path: no such trajectory {name}")
        ending = _ending(name)
        if ending == _ROUNDED:
            raise ValueError(
                f"path: {name} is XTC, which rounds positions to 0.001 nm, too coarse for "
                "energies; use DCD or NetCDF"
            )
        if ending in _RUN_PICKLES:
            raise ValueError(
                f"path: {name} is HDF5, whose reader (PyTables) runs pickled code in a file; use "
                "DCD or NetCDF, or load a file that you trust with mdtraj and pass its positions"
            )
        if ending not in readable:
            formats = ", ".join(sorted(readable))
            raise ValueError(f"path: expected a trajectory file ({formats}), got {name}")
        if Path(name).stat().st_size == 0:
            raise ValueError(f"path: expected frames, got the empty file {name}")
    return names


def _ending(name: str) -> str:
    """Return the ending of a file's name in lower case, with that of what is compressed."""
    path = Path(name.lower())
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def load_frames(
    path: Any, molecule: MolecularSystem, stride: int = 1, skip: int = 0
) -> tuple[np.ndarray, str]:
    """Return frames [F, N, 3] in nm of one or several trajectory files, and the files' names.

    Every `stride`-th frame is kept, after leaving out `skip` frames at the start.
    """
    names = check_trajectory_paths(path)
    positions = np.concatenate([_load_file(name, molecule) for name in names])[skip::stride]
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
            frames = mdtraj.FormatRegistry.loaders[ending](name, **topology)
    except Exception as error:
        what = f"a trajectory of {n_atoms} atoms"
        raise ValueError(f"path: cannot read {name} as {what}: {error}") from error
    if frames.n_atoms != molecule.n_atoms:
        expected, got = f"the molecule's {molecule.n_atoms} atoms", f"{frames.n_atoms} in {name}"
        raise ValueError(f"path: expected {expected}, got {got}")
    _check_order(name, list(frames.topology.atoms), list(molecule.mdtraj_topology.atoms))
    return np.asarray(frames.xyz, dtype=np.float64)


def _check_order(path: str, atoms: list[Any], expected: list[Any]) -> None:
    """Refuse the same elements, or the same names, in another order.

    Programs name atoms, and guess elements, in different ways: that alone is no other molecule.
    """
    for label_of in (lambda atom: atom.element.symbol, lambda atom: atom.name):
        labels, reference = ([label_of(atom) for atom in each] for each in (atoms, expected))
        if labels != reference and sorted(labels) == sorted(reference):
            first = next(i for i, label in enumerate(labels) if label != reference[i])
            raise ValueError(
                f"path: expected the molecule's atoms in its order, got another in {path}: atom "
                f"{first} is {atoms[first]}, expected {expected[first]}"
            )
