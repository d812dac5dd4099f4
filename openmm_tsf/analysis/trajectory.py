"""DCD files that may still be growing.

mdtraj reads DCD too, but prints a warning of its C library for every file whose header lags behind
its length, which is the normal state of a file that is being written.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

_HEADER_BYTES = 84
_LONGEST_TITLES = 2**20


@dataclass(frozen=True)
class DCDLayout:
    """Where the frames of a DCD file lie.

    Attributes
    ----------
    offset
        Byte of the first frame.
    dtype
        One frame as a structured type, with fields x, y, z in Å.
    n_frames
        Complete frames, from the file's size.
    """

    offset: int
    dtype: np.dtype[np.void]
    n_frames: int


def dcd_layout(path: Path, n_atoms: int) -> DCDLayout:
    """Read the header of a DCD file (CHARMM format, as OpenMM and mdtraj write it).

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no DCD file of `n_atoms` atoms.
    """
    empty = DCDLayout(0, np.dtype([]), 0)  # the writer has only just opened it
    with open(path, "rb") as file:
        head = file.read(8 + _HEADER_BYTES)
        if len(head) < 8 + _HEADER_BYTES:
            return empty
        order = "<" if head[:4] == struct.pack("<i", _HEADER_BYTES) else ">"
        if head[:8] != struct.pack(order + "i", _HEADER_BYTES) + b"CORD":
            raise ValueError(f"{path}: not a DCD file")
        control = struct.unpack(order + "20i", head[8:88])
        if control[8] != 0:
            raise ValueError(f"{path}: DCD files with fixed atoms are not supported")
        titles = file.read(4)
        if len(titles) < 4:
            return empty
        length = struct.unpack(order + "i", titles)[0]
        if not 4 <= length <= _LONGEST_TITLES:
            raise ValueError(f"{path}: corrupt: titles of {length} bytes")
        file.seek(length + 4, os.SEEK_CUR)
        atoms = file.read(12)
        if len(atoms) < 12:
            return empty
        offset = file.tell()
    found = struct.unpack(order + "3i", atoms)[1]
    if found != n_atoms:
        raise ValueError(f"{path}: expected {n_atoms} atoms as in the topology, got {found}")
    # Every record is enclosed by its length in bytes.
    fields: list[tuple[str, str] | tuple[str, str, tuple[int, ...]]] = []
    if control[10] != 0:
        fields.append(("cell", "V56"))
    for axis in "xyz":
        fields += [
            (f"{axis}_head", order + "i4"),
            (axis, order + "f4", (n_atoms,)),
            (f"{axis}_tail", order + "i4"),
        ]
    dtype = np.dtype(fields)
    return DCDLayout(offset, dtype, max(0, os.path.getsize(path) - offset) // dtype.itemsize)


def read_dcd(
    path: Path,
    n_atoms: int,
    shape: tuple[int, int],
    stride: int = 1,
    walkers: slice = slice(None),
) -> npt.NDArray[np.float32]:
    """Positions [F, n_atoms, 3] in nm of the first frames, iterations with walkers inside.

    Parameters
    ----------
    path
        The file.
    n_atoms
        Its atoms.
    shape
        Iterations and walkers of them that there should be.
    stride
        Every so many-th iteration.
    walkers
        Which walkers.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no DCD file of `n_atoms` atoms, is corrupt, or has fewer frames.
    """
    layout = dcd_layout(path, n_atoms)
    if layout.n_frames < shape[0] * shape[1]:
        raise ValueError(f"{path}: expected {shape[0] * shape[1]} frames, found {layout.n_frames}")
    if shape[0] == 0:
        return np.empty((0, n_atoms, 3), dtype=np.float32)
    mapped = np.memmap(path, layout.dtype, mode="r", offset=layout.offset, shape=shape)
    frames = mapped[::stride, walkers].reshape(-1)
    xyz = np.empty((len(frames), n_atoms, 3), dtype=np.float32)
    for column, axis in enumerate("xyz"):
        for end in ("head", "tail"):
            if not np.all(frames[f"{axis}_{end}"] == 4 * n_atoms):
                raise ValueError(f"{path}: corrupt: a frame does not begin or end where it should")
        xyz[:, :, column] = frames[axis]
    if not np.isfinite(xyz).all():
        raise ValueError(f"{path}: corrupt: positions are not finite")
    xyz /= np.float32(10.0)  # Å to nm
    return xyz
