"""Frames of trajectory files, through mdtraj."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np

from openmm_tsf.systems.molecule import MolecularSystem

#: Formats whose reader (PyTables) runs pickled code in a file.
_RUN_PICKLES = (".h5", ".hdf5", ".lh5")
#: Formats that name their atoms; the others need the molecule's topology.
_NAME_ATOMS = (".gro", ".cif", ".mmcif", ".pdb", ".pdbx")


def check_trajectory_paths(path: Any) -> list[str]:
    """Return the names of one or several trajectory files, checked before the first is read."""
    try:
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        names = [os.fsdecode(item) for item in paths]
    except TypeError as error:
        raise TypeError(f"path: expected a trajectory file or several, got {path!r}") from error
    if not names:
        raise ValueError("path: expected at least one trajectory file, got none")
    readable = tuple(ending for ending in mdtraj.FormatRegistry.loaders if ending != ".xtc")
    for name in names:
        if Path(name).is_dir():
            raise IsADirectoryError(f"path: expected a trajectory file, got the directory {name}")
        if not Path(name).is_file():
            raise FileNotFoundError(f"path: no such trajectory {name}")
        if name.lower().endswith(".xtc"):
            raise ValueError(
                f"path: {name} is XTC, which rounds positions to 0.001 nm, too coarse for "
                "energies; use DCD or NetCDF"
            )
        if name.lower().endswith(_RUN_PICKLES):
            raise ValueError(
                f"path: {name} is HDF5, whose reader (PyTables) runs pickled code in a file; use "
                "DCD or NetCDF, or load a file that you trust with mdtraj and pass its positions"
            )
        if not name.endswith(readable):
            formats = ", ".join(sorted(readable))
            raise ValueError(
                f"path: expected a trajectory that mdtraj reads ({formats}), got {name}"
            )
        if Path(name).stat().st_size == 0:
            raise ValueError(f"path: expected frames, got the empty file {name}")
    return names


def load_frames(name: str, molecule: MolecularSystem) -> np.ndarray:
    """Load all frames [F, N, 3] of a trajectory file in nm."""
    names_atoms = name.removesuffix(".gz").endswith(_NAME_ATOMS)
    topology = {} if names_atoms else {"top": molecule.mdtraj_topology}
    try:
        with _silent_stdout():
            frames = mdtraj.load(name, **topology)
    except Exception as error:
        what = f"a trajectory of {molecule.n_atoms} atoms"
        raise ValueError(f"path: mdtraj cannot read {name} as {what}: {error}") from error
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


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Discard what C code prints: mdtraj's DCD plugin writes to the process's stdout."""
    sys.stdout.flush()
    saved, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)
