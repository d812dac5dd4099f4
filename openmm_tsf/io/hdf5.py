"""HDF5 trajectories of mdtraj, read as plain arrays.

mdtraj's own reader, PyTables, runs pickled code that a file may contain. Here the NetCDF library
reads the array of coordinates and the text of the topology, and nothing else.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

#: Bytes of frames for one byte of a file: more than zlib can compress is no trajectory.
_MOST_COMPRESSED = 1100


#: Element, name, and label with the residue of an atom.
Label = tuple[str, str, str]


def read_hdf5_frames(path: Path) -> tuple[npt.NDArray[np.float32], list[Label]]:
    """Return positions [F, N, 3] in nm, and the labels of the atoms, if the file has them.

    The layout is that of ``mdtraj.Trajectory.save_hdf5``; anything else is a ValueError.
    """
    from netCDF4 import Dataset

    try:
        with Dataset(path) as file:
            if "coordinates" not in file.variables:
                raise ValueError(f"{path}: expected mdtraj's HDF5, got one without coordinates")
            coordinates = file.variables["coordinates"]
            coordinates.set_auto_mask(False)
            shape, kind = coordinates.shape, np.dtype(coordinates.dtype)
            if len(shape) != 3 or shape[2] != 3 or kind.kind != "f":
                raise ValueError(f"{path}: expected coordinates [F, N, 3], got {shape} of {kind}")
            if np.prod(shape, dtype=float) * kind.itemsize > _MOST_COMPRESSED * _size(path):
                raise ValueError(f"{path}: damaged, it is too small for coordinates {shape}")
            units = getattr(coordinates, "units", "nanometers")
            if units != "nanometers":
                raise ValueError(f"{path}: expected coordinates in nanometers, got {units!r}")
            positions = np.asarray(coordinates[:], dtype=np.float32)
            text = file.variables["topology"][:] if "topology" in file.variables else []
            atoms = _atoms(str(text[0])) if len(text) else []
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: not a readable HDF5 file: {error}") from error
    return positions, atoms


def _size(path: Path) -> int:
    return path.stat().st_size


def _atoms(text: str) -> list[Label]:
    """Return the labels of the atoms of mdtraj's JSON, by index."""
    try:
        atoms = [
            (int(atom["index"]), atom["element"], atom["name"], residue)
            for chain in json.loads(text)["chains"]
            for residue in chain["residues"]
            for atom in residue["atoms"]
        ]
        ordered = sorted(atoms, key=lambda atom: atom[0])
        return [
            (str(element), str(name), f"{residue['name']}{residue['resSeq']}-{name}")
            for _, element, name, residue in ordered
        ]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"topology: not that of mdtraj: {type(error).__name__} {error}") from error
