"""A DCD file that takes whole batches of frames, and is cut back to what is known to be whole."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from openmm_tsf.io.files import named_error

HEADER_BYTES = 276  # three records of 84, 164 and 4 bytes, with their lengths
_AKMA_PICOSECONDS = 0.04888821  # CHARMM's unit of time


class DCDWriter:
    """A DCD file in CHARMM's layout without a unit cell.

    ``openmm.app.DCDFile`` writes the same bytes frame by frame, about 0.2 ms each in Python, and
    counts a frame before it is written.

    Parameters
    ----------
    path
        The file.
    n_atoms
        Atoms of a frame.
    """

    def __init__(self, path: Path, n_atoms: int) -> None:
        self.path, self.n_atoms = path, n_atoms
        self._record = np.dtype(
            [(f"{part}_{axis}", kind, shape) for axis in "xyz" for part, kind, shape in
             (("head", "<i4", ()), ("value", "<f4", (n_atoms,)), ("tail", "<i4", ()))]
        )  # fmt: skip
        self._size = 4 * n_atoms

    def create(
        self, title: str, first_step: int = 0, interval: int = 1, timestep: float | None = None
    ) -> None:
        """Write a file without frames.

        Parameters
        ----------
        title
            Up to 80 characters.
        first_step, interval, timestep
            Step of the first frame, steps between frames, and ps of a step (the file then says
            times in CHARMM's unit; without, each frame is one unit of time).

        Raises
        ------
        FileExistsError
            If there is one.
        """
        delta = 1.0 if timestep is None else timestep / _AKMA_PICOSECONDS
        control = struct.pack(
            "<4s9if10i", b"CORD", 0, first_step, interval, 0, 0, 0, 0, 0, 0, delta, *(0,) * 9, 24
        )
        titles = struct.pack("<i80s80s", 2, b"Created by openmm_tsf", title.encode("ascii"))
        with self._opened("xb") as file:
            for record in (control, titles, struct.pack("<i", self.n_atoms)):
                file.write(struct.pack("<i", len(record)) + record + struct.pack("<i", len(record)))

    @property
    def n_frames(self) -> int:
        """Whole frames in the file, whatever its header says; 0 where there is no file."""
        if not self.path.is_file():
            return 0
        return max(0, self.path.stat().st_size - HEADER_BYTES) // self._record.itemsize

    def append(self, x: np.ndarray, n_before: int) -> None:
        """Add frames x [n, N, 3] in nm after the first `n_before`; later ones are cut off.

        The header never counts a frame that is not whole in the file.
        """
        frames = np.empty(len(x), dtype=self._record)
        for k, axis in enumerate("xyz"):
            frames[f"head_{axis}"] = frames[f"tail_{axis}"] = self._size
            frames[f"value_{axis}"] = 10.0 * x[:, :, k]
        with self._opened("r+b") as file:
            self._cut(file, n_before)
            file.seek(0, os.SEEK_END)
            file.write(frames.tobytes())
            file.flush()
            self._count(file, n_before + len(x))
            file.flush()
            os.fsync(file.fileno())

    def cut_back(self, n_frames: int) -> None:
        """Keep the first frames only.

        Raises
        ------
        ValueError
            If the file has fewer.
        """
        with self._opened("r+b") as file:
            self._cut(file, n_frames)
            self._count(file, n_frames)

    @contextmanager
    def _opened(self, mode: str) -> Iterator[IO[bytes]]:
        """The file; a full disk is reported with its name."""
        try:
            with open(self.path, mode) as file:
                yield file
        except OSError as error:
            raise named_error(error, self.path) from error

    def _cut(self, file: IO[bytes], n_frames: int) -> None:
        wanted = HEADER_BYTES + n_frames * self._record.itemsize
        size = file.seek(0, os.SEEK_END)
        if size < wanted:
            raise ValueError(f"{self.path}: expected {n_frames} frames, the file is shorter")
        if size > wanted:
            self._count(file, n_frames)  # first: whoever reads meanwhile finds what is counted
            file.flush()
            file.truncate(wanted)

    @staticmethod
    def _count(file: IO[bytes], n_frames: int) -> None:
        file.seek(8)
        file.write(struct.pack("<i", n_frames))
        file.seek(20)
        file.write(struct.pack("<i", n_frames))


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
