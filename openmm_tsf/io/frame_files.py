"""The trajectories of a run: in its directory, or in those of its shards."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from openmm_tsf.io.dcd import read_dcd, read_dcd_layout
from openmm_tsf.io.files import check_regular_file
from openmm_tsf.io.run_config import trajectory_name

logger = logging.getLogger(__name__)


class FrameFiles:
    """The DCD files of every rung, side by side where the walkers are in several directories.

    Parameters
    ----------
    directories, n_walkers
        The directories, and the number of walkers in each.
    temperatures
        The ladder in K.
    """

    def __init__(
        self, directories: Sequence[Path], temperatures: Sequence[float], n_walkers: int
    ) -> None:
        self.directories, self.n_walkers = list(directories), n_walkers
        self.temperatures = list(temperatures)
        self.names = [trajectory_name(kelvin) for kelvin in temperatures]

    def split(self) -> Iterator[Self]:
        """Yield the files of each directory alone."""
        for directory in self.directories:
            yield type(self)([directory], self.temperatures, self.n_walkers)

    def has(self, rung: int) -> bool:
        """Return whether the trajectory of a rung is there, in all directories."""
        return all((directory / self.names[rung]).exists() for directory in self.directories)

    def paths(self, rung: int) -> list[Path]:
        """Return the files of a rung; FileNotFoundError if one is missing."""
        paths = [directory / self.names[rung] for directory in self.directories]
        for path in paths:
            if not os.path.lexists(path):
                raise FileNotFoundError(f"{path} is missing")
            check_regular_file(path, "DCD file")
        return paths

    def count(self, rung: int, n_atoms: int, most: int) -> int:
        """Return the number of iterations with frames of all walkers, up to `most`.

        A shard that has fewer is named in a warning.
        """
        fewest = most
        for path in self.paths(rung):
            n = read_dcd_layout(path, n_atoms).n_frames // self.n_walkers
            if n < fewest and len(self.directories) > 1:
                logger.warning("%s: has frames of only %d iterations, of %d", path, n, most)
            fewest = min(fewest, n)
        return fewest

    def read(
        self, rung: int, n_atoms: int, iterations: slice, walker: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Return positions [n, w, N, 3] in nm of the iterations of a slice that has a stop.

        Of all walkers w, those of the first directory first, or of one.
        """
        paths, shape = self.paths(rung), (iterations.stop, self.n_walkers)
        if walker is not None:
            part, local = divmod(walker, self.n_walkers)
            one = slice(local, local + 1)
            return read_dcd(paths[part], n_atoms, shape, iterations, one)[:, np.newaxis]
        n = len(range(*iterations.indices(iterations.stop)))
        if len(paths) == 1:
            xyz = read_dcd(paths[0], n_atoms, shape, iterations)
            return xyz.reshape(n, self.n_walkers, n_atoms, 3)
        joined = np.empty((n, len(paths) * self.n_walkers, n_atoms, 3), dtype=np.float32)
        for part, path in enumerate(paths):
            xyz = read_dcd(path, n_atoms, shape, iterations)
            columns = slice(part * self.n_walkers, (part + 1) * self.n_walkers)
            joined[:, columns] = xyz.reshape(n, self.n_walkers, n_atoms, 3)
        return joined
