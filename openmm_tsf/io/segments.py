"""The numeric segments of a run directory: opened at once, read when they are asked for."""

import logging
import re
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from openmm_tsf.io.files import regular_file
from openmm_tsf.io.npz import UNREADABLE, array_header, array_names, array_of

logger = logging.getLogger(__name__)

_COUNTERS = ("rejected_non_finite", "mirror_images", "n_evaluations", "wall_seconds")
_LARGEST_COUNT = 2**53


class _Part(NamedTuple):
    """One file: where it is, its saved iterations, and the arrays in it."""

    path: Path
    iteration: npt.NDArray[np.int64]
    names: frozenset[str]


class Segments:
    """All production numbers that were written when it was made.

    Opening reads the numbers of the iterations and the headers of the arrays; an array is read,
    and checked, when it is first asked for, and kept.

    Parameters
    ----------
    directory
        Folder with ``segment_000000.npz``, ``segment_000001.npz``, ... A last file that is cut
        short is left out.
    n_walkers, n_rungs, n_dihedrals
        W, R and D that the arrays should have.

    Raises
    ------
    FileNotFoundError
        If a segment is missing in between.
    ValueError
        If one before the last cannot be read, or has the wrong shape; later, where an array cannot
        be read or is not finite.
    """

    def __init__(self, directory: Path, n_walkers: int, n_rungs: int, n_dihedrals: int) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {
            "energy": (n_walkers, n_rungs),
            "replica": (n_walkers, n_rungs),
            "dihedrals": (n_walkers, n_rungs, n_dihedrals),
        }
        self._parts: list[_Part] = []
        self._last = -1  # saved iteration of those opened so far
        paths = _numbered(directory)
        for path in paths:
            regular_file(path, "segment of a run")
            try:
                with zipfile.ZipFile(path) as file:
                    part = self._open(path, file)
            except _Misfit:
                raise
            except UNREADABLE as error:
                if path == paths[-1]:
                    # A run of an earlier version may still be writing it.
                    logger.warning("%s: cannot be read, left out: %s", path, error)
                    break
                raise ValueError(f"{path}: cannot be read: {error}") from error
            self._parts.append(part)

    def _open(self, path: Path, file: zipfile.ZipFile) -> _Part:
        names = array_names(file)
        for name in (*self._shapes, "iteration", *_COUNTERS):
            if name not in names:
                raise _Misfit(f"{path}: has no array {name!r}")
        iteration = array_of(file, "iteration")
        if iteration.ndim != 1 or iteration.dtype.kind != "i":
            raise _Misfit(f"{path}: iteration: expected integers [n], got {iteration.shape}")
        if (np.diff(iteration, prepend=self._last) <= 0).any():
            raise _Misfit(f"{path}: iteration: expected ascending numbers above {self._last}")
        for name, shape in self._shapes.items():
            found, expected = array_header(file, name)[0], (len(iteration), *shape)
            if found != expected:
                raise _Misfit(f"{path}: {name}: expected shape {expected}, got {found}")
        if len(iteration):
            self._last = int(iteration[-1])
        return _Part(path, iteration.astype(np.int64), names)

    @cached_property
    def iteration(self) -> npt.NDArray[np.int64]:
        """[n], the sampler's own count."""
        empty = np.empty(0, dtype=np.int64)
        return np.concatenate([empty, *(part.iteration for part in self._parts)])

    @cached_property
    def energy(self) -> npt.NDArray[np.float64]:
        """[n, W, R] in kJ/mol."""
        return self._series("energy", np.dtype(np.float64))

    @cached_property
    def replica(self) -> npt.NDArray[np.int64]:
        """[n, W, R], the replica that sits at each rung."""
        replica = self._series("replica", np.dtype(np.int64))
        if replica.size and not 0 <= replica.min() <= replica.max() < replica.shape[2]:
            raise ValueError(
                f"{self._parts[0].path.parent}: replica: expected numbers below {replica.shape[2]}"
            )
        return replica

    @cached_property
    def dihedrals(self) -> npt.NDArray[np.float32]:
        """[n, W, R, D] in rad, in the precision in which they were written."""
        return self._series("dihedrals", np.dtype(np.float32))

    def _series(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        series = np.empty((len(self.iteration), *self._shapes[name]), dtype)
        start = 0
        for part in self._parts:
            stop = start + len(part.iteration)
            values = self._read(part, name)
            if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
                raise ValueError(f"{part.path}: {name}: expected finite values")
            if dtype.kind == "i" and values.dtype.kind != "i":
                raise ValueError(f"{part.path}: {name}: expected integers, got {values.dtype}")
            series[start:stop] = values
            start = stop
        return series

    @staticmethod
    def _read(part: _Part, name: str) -> npt.NDArray[Any]:
        try:
            with zipfile.ZipFile(part.path) as file:
                return array_of(file, name)
        except UNREADABLE as error:
            raise ValueError(f"{part.path}: {name} cannot be read: {error}") from error

    # ---------------------------------------------------------------- totals

    @cached_property
    def _totals(self) -> dict[str, npt.NDArray[Any]]:
        """Sums over the segments of everything that is counted."""
        totals: dict[str, npt.NDArray[Any]] = {}
        for part in self._parts:
            wanted = sorted(
                name for name in part.names
                if name in (*_COUNTERS, "outside_domain")
                or name.startswith(("accepted_", "proposed_"))
            )  # fmt: skip
            try:
                with zipfile.ZipFile(part.path) as file:
                    found = {name: array_of(file, name) for name in wanted}
            except UNREADABLE as error:
                raise ValueError(f"{part.path}: cannot be read: {error}") from error
            self._check_counts(part.path, found)
            for name, value in found.items():
                totals[name] = totals.get(name, 0) + value
        return totals

    def _check_counts(self, path: Path, found: dict[str, npt.NDArray[Any]]) -> None:
        """Refuse what cannot have been counted, once or many times over."""
        n_rungs = self._shapes["energy"][1]
        per_kernel = {(n_rungs,), (n_rungs - 1,), (n_rungs, n_rungs)}
        for name, value in found.items():
            of_kernel = name.startswith(("accepted_", "proposed_"))
            kinds = "iuf" if name == "wall_seconds" else "iu"
            if value.dtype.kind not in kinds or value.shape not in (
                per_kernel if of_kernel else {()}
            ):
                raise ValueError(
                    f"{path}: {name}: expected counts, got {value.dtype} of shape {value.shape}"
                )
            if not ((value >= 0) & (value <= _LARGEST_COUNT)).all():  # NaN is neither
                raise ValueError(f"{path}: {name}: expected counts, got {value.tolist()}")
            if name.startswith("accepted_"):
                proposed = found.get(f"proposed_{name.removeprefix('accepted_')}")
                if proposed is None or proposed.shape != value.shape or (value > proposed).any():
                    raise ValueError(f"{path}: {name}: expected at most as many as were proposed")
            elif of_kernel and f"accepted_{name.removeprefix('proposed_')}" not in found:
                raise ValueError(f"{path}: {name}: expected how many were accepted, got none")

    def _kernels(self, prefix: str) -> dict[str, npt.NDArray[np.int64]]:
        return {
            name.removeprefix(prefix): value
            for name, value in self._totals.items()
            if name.startswith(prefix)
        }

    @property
    def accepted(self) -> dict[str, npt.NDArray[np.int64]]:
        """Per kernel, totals [R], [R-1] (neighbouring pairs) or [R, R] (any pairs)."""
        return self._kernels("accepted_")

    @property
    def proposed(self) -> dict[str, npt.NDArray[np.int64]]:
        """As `accepted`."""
        return self._kernels("proposed_")

    def _count(self, name: str) -> int:
        return int(self._totals.get(name, 0))

    @property
    def rejected_non_finite(self) -> int:
        """Proposals rejected for an energy that is not finite, or outside the flow's domain."""
        return self._count("rejected_non_finite")

    @property
    def mirror_images(self) -> int:
        """Proposals rejected for their handedness."""
        return self._count("mirror_images")

    @property
    def n_evaluations(self) -> int:
        """Energies of production."""
        return self._count("n_evaluations")

    @property
    def wall_seconds(self) -> float:
        """Of production."""
        return float(self._totals.get("wall_seconds", 0.0))

    @property
    def outside_domain(self) -> int | None:
        """Those of `rejected_non_finite` that left the flow's domain.

        None in runs of earlier versions, which did not tell them apart.
        """
        told = all("outside_domain" in part.names for part in self._parts)
        return self._count("outside_domain") if told else None


class _Misfit(ValueError):
    """A file that can be read and is not what it should be."""


def _numbered(directory: Path) -> list[Path]:
    found: dict[int, Path] = {}
    for path in directory.glob("segment_*.npz"):
        match = re.fullmatch(r"segment_(\d{6,})\.npz", path.name)
        if match:  # others are the writer's temporary files
            found[int(match[1])] = path
    paths = []
    for number in range(len(found)):
        if number not in found:
            name = directory / f"segment_{number:06d}.npz"
            raise FileNotFoundError(f"{name} is missing, but later segments are there")
        paths.append(found[number])
    return paths
