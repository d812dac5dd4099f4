"""DCD trajectories: written in batches, truncated to complete frames, read without trust."""

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from openmm_tsf.io.files import error_with_path

HEADER_BYTES = 276  # three records of 84, 164 and 4 bytes, with their lengths
_CONTROL_BYTES = 84  # the first record
_MAX_TITLE_BYTES = 2**20
_AKMA_PICOSECONDS = 0.04888821  # CHARMM's unit of time


class DCDWriter:
    """A DCD file in CHARMM's layout without a unit cell.

    The bytes are those of ``openmm.app.DCDFile``, which takes about 0.2 ms of Python for a frame
    and counts a frame before it is written.
    """

    def __init__(self, path: Path, n_atoms: int) -> None:
        self.path, self.n_atoms = path, n_atoms
        self._frame = _frame_dtype(n_atoms)

    def create(
        self, title: str, first_step: int = 0, interval: int = 1, timestep: float | None = None
    ) -> None:
        """Write a new file without frames; `title` has up to 80 characters.

        `first_step` is the step of the first frame, `interval` the steps between frames, `timestep`
        a step in ps; without it, a step is one unit of time.
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
        """The number of complete frames, from the file's size; 0 if there is no file."""
        if not self.path.is_file():
            return 0
        return max(0, self.path.stat().st_size - HEADER_BYTES) // self._frame.itemsize

    def append(self, x: np.ndarray, n_before: int) -> None:
        """Add frames x [n, N, 3] in nm after the first `n_before`; later ones are removed.

        The header never counts an incomplete frame.
        """
        self.append_batches([x], n_before)

    def append_batches(self, batches: Iterable[np.ndarray], n_before: int) -> None:
        """Add frames as `append` does, of arrays [n, N, 3] that are in memory one at a time."""
        n_frames = n_before
        with self._opened("r+b") as file:
            self._truncate(file, n_before)
            file.seek(0, os.SEEK_END)
            for x in batches:
                file.write(self._encode(x))
                n_frames += len(x)
            file.flush()
            self._write_count(file, n_frames)
            file.flush()
            os.fsync(file.fileno())

    def _encode(self, x: np.ndarray) -> memoryview:
        """Return the bytes of frames x [n, N, 3] in nm."""
        frames = np.empty(len(x), dtype=self._frame)
        angstrom = np.empty(x.shape, dtype=np.float32)
        np.multiply(x, 10.0, out=angstrom, casting="same_kind")  # in x's precision, then rounded
        for k, axis in enumerate("xyz"):
            frames[f"{axis}_head"] = frames[f"{axis}_tail"] = 4 * self.n_atoms
            frames[axis] = angstrom[:, :, k]
        return frames.view(np.uint8).data

    def cut_back(self, n_frames: int) -> None:
        """Keep only the first `n_frames` frames; fewer in the file are a ValueError."""
        with self._opened("r+b") as file:
            self._truncate(file, n_frames)
            self._write_count(file, n_frames)

    @contextmanager
    def _opened(self, mode: str) -> Iterator[IO[bytes]]:
        """Open the file; errors name it."""
        try:
            with open(self.path, mode) as file:
                yield file
        except OSError as error:
            raise error_with_path(error, self.path) from error

    def _truncate(self, file: IO[bytes], n_frames: int) -> None:
        n_bytes = HEADER_BYTES + n_frames * self._frame.itemsize
        size = file.seek(0, os.SEEK_END)
        if size < n_bytes:
            raise ValueError(f"{self.path}: expected {n_frames} frames, the file is shorter")
        if size > n_bytes:
            self._write_count(file, n_frames)  # before, for programs that read at the same time
            file.flush()
            file.truncate(n_bytes)

    @staticmethod
    def _write_count(file: IO[bytes], n_frames: int) -> None:
        for offset in (8, 20):
            file.seek(offset)
            file.write(struct.pack("<i", n_frames))


def _frame_dtype(
    n_atoms: int, marker: str = "<i4", cell_bytes: int = 0, axes: str = "xyz"
) -> np.dtype[np.void]:
    """Return the layout of a frame: every record is enclosed by its length in bytes."""
    fields: list[Any] = [("cell", f"V{cell_bytes}")] if cell_bytes else []
    for axis in axes:
        fields += [
            (f"{axis}_head", marker),
            (axis, marker[0] + "f4", (n_atoms,)),
            (f"{axis}_tail", marker),
        ]
    return np.dtype(fields)


class DCDLayout(NamedTuple):
    """The position of the frames in a DCD file."""

    offset: int  #: byte of the first frame
    dtype: np.dtype[np.void]  #: of a frame, with fields x, y, z in Å
    n_frames: int  #: complete frames, from the file's size


def read_dcd_layout(path: Path, n_atoms: int) -> DCDLayout:
    """Read the header of a DCD file in the formats of CHARMM (32 or 64 bits) and X-PLOR."""
    empty = DCDLayout(0, np.dtype([]), 0)  # another process is creating the file
    with open(path, "rb") as file:
        start = file.read(12)
        if len(start) < 12:
            return empty
        marker = _marker(start)
        if marker is None:
            raise ValueError(f"{path}: not a DCD file")
        width = int(marker[2])  # bytes of the length that encloses each record
        file.seek(width + 4)
        head = file.read(_CONTROL_BYTES - 4 + width)
        if len(head) < _CONTROL_BYTES - 4 + width:
            return empty
        control = struct.unpack(marker[0] + "20i", head[: _CONTROL_BYTES - 4])
        if control[8] != 0:
            raise ValueError(f"{path}: DCD files with fixed atoms are not supported")
        titles = file.read(width)
        if len(titles) < width:
            return empty
        length = _integer(titles, marker)
        if not 4 <= length <= _MAX_TITLE_BYTES:
            raise ValueError(f"{path}: corrupt: titles of {length} bytes")
        file.seek(length + width, os.SEEK_CUR)
        atoms = file.read(4 + 2 * width)
        if len(atoms) < 4 + 2 * width:
            return empty
        offset = file.tell()
    n_in_file = struct.unpack(marker[0] + "i", atoms[width : width + 4])[0]
    if n_in_file != n_atoms:
        raise ValueError(f"{path}: expected {n_atoms} atoms as in the topology, got {n_in_file}")
    # X-PLOR's format, of version 0, has neither a cell nor a fourth dimension.
    has_cell, has_fourth = (control[19] != 0 and control[flag] != 0 for flag in (10, 11))
    cell_bytes = 48 + 2 * width if has_cell else 0
    dtype = _frame_dtype(n_atoms, marker, cell_bytes, "xyzw" if has_fourth else "xyz")
    return DCDLayout(offset, dtype, max(0, os.path.getsize(path) - offset) // dtype.itemsize)


def _marker(start: bytes) -> str | None:
    """Return the dtype of the lengths around records, from the file's first 12 bytes."""
    for marker in ("<i4", ">i4", "<i8", ">i8"):
        width = int(marker[2])
        if _integer(start[:width], marker) == _CONTROL_BYTES and (
            start[width : width + 4] == b"CORD"
        ):
            return marker
    return None


def _integer(value: bytes, marker: str) -> int:
    return int.from_bytes(value, "little" if marker[0] == "<" else "big", signed=True)


def read_dcd(
    path: Path,
    n_atoms: int,
    shape: tuple[int, int],
    iterations: slice = slice(None),
    walkers: slice = slice(None),
) -> npt.NDArray[np.float32]:
    """Return positions [F, n_atoms, 3] in nm; the walkers of an iteration are consecutive frames.

    `shape` is the numbers of iterations and of walkers, of which those in the slices are read;
    frames beyond them are ignored.
    """
    layout = read_dcd_layout(path, n_atoms)
    if layout.n_frames < shape[0] * shape[1]:
        raise ValueError(f"{path}: expected {shape[0] * shape[1]} frames, got {layout.n_frames}")
    if shape[0] == 0:
        return np.empty((0, n_atoms, 3), dtype=np.float32)
    mapped = np.memmap(path, layout.dtype, mode="r", offset=layout.offset, shape=shape)
    xyz = _angstrom(path, mapped[iterations, walkers].reshape(-1), n_atoms)
    if not np.isfinite(xyz).all():
        raise ValueError(f"{path}: corrupt: positions are not finite")
    xyz /= np.float32(10.0)  # Å to nm
    return xyz


def read_dcd_frames(path: Path, n_atoms: int) -> npt.NDArray[np.float32]:
    """Return the positions [F, n_atoms, 3] in nm of all complete frames, as mdtraj does.

    mdtraj's reader prints to the standard output of the process, from C.
    """
    layout = read_dcd_layout(path, n_atoms)
    if layout.n_frames == 0:
        raise ValueError(f"{path}: no complete frame in the file")
    shape = (layout.n_frames,)
    mapped = np.memmap(path, layout.dtype, mode="r", offset=layout.offset, shape=shape)
    xyz = _angstrom(path, mapped, n_atoms)
    xyz *= np.float32(0.1)  # mdtraj's product: a quotient may differ in the last bit
    return xyz


def _angstrom(path: Path, frames: npt.NDArray[np.void], n_atoms: int) -> npt.NDArray[np.float32]:
    """Return the positions [F, n_atoms, 3] of frames in Å; a damaged record is an error."""
    xyz = np.empty((len(frames), n_atoms, 3), dtype=np.float32)
    for column, axis in enumerate("xyz"):
        for end in ("head", "tail"):
            if not np.all(frames[f"{axis}_{end}"] == 4 * n_atoms):
                raise ValueError(f"{path}: corrupt: a frame does not begin or end where it should")
        xyz[:, :, column] = frames[axis]
    return xyz
