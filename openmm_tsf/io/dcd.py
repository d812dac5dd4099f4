"""A DCD file that takes whole batches of frames, and is cut back to what is known to be whole."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

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
