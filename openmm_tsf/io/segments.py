"""The numeric segments of a run directory: headers are read on opening, arrays on first use."""

import logging
import re
import zipfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from openmm_tsf.io.files import check_regular_file
from openmm_tsf.io.npz import UNREADABLE, read_array, read_array_header, read_array_names

logger = logging.getLogger(__name__)

_COUNTERS = (
    "rejected_non_finite", "outside_domain", "mirror_images", "n_evaluations", "wall_seconds",
)  # fmt: skip
_KERNEL_COUNTERS = ("accepted_", "proposed_")
_FRAMES = "frame_iteration"
_MAX_COUNT = 2**53


class _Segment(NamedTuple):
    """A file with its saved iterations, those with frames, and the names of its arrays."""

    path: Path
    iteration: npt.NDArray[np.int64]
    frame_iteration: npt.NDArray[np.int64]
    names: frozenset[str]


class Segments:
    """The arrays that production had written when this object was made, joined over segments.

    Opening reads the numbers of the iterations and the headers of the arrays. An array is read and
    checked on first use, then kept. If the last segment cannot be read, it is left out with a
    warning; if another one is missing or cannot be read, this is an error. The expected shapes are
    [n, W, R] and, of dihedrals, [n, W, R, D].
    """

    def __init__(self, directory: Path, n_walkers: int, n_rungs: int, n_dihedrals: int) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {
            "energy": (n_walkers, n_rungs),
            "replica": (n_walkers, n_rungs),
            "dihedrals": (n_walkers, n_rungs, n_dihedrals),
        }
        self._segments: list[_Segment] = []
        self._last = -1  # the last saved iteration of the segments opened so far
        paths = segment_paths(directory)
        for path in paths:
            check_regular_file(path, "segment of a run")
            try:
                with zipfile.ZipFile(path) as file:
                    segment = self._open(path, file)
            except _WrongContent:
                raise
            except UNREADABLE as error:
                if path == paths[-1]:
                    logger.warning("%s: cannot be read, left out: %s", path, error)
                    break
                raise ValueError(f"{path}: cannot be read: {error}") from error
            self._segments.append(segment)

    def _open(self, path: Path, file: zipfile.ZipFile) -> _Segment:
        names = read_array_names(file)
        for name in (*self._shapes, "iteration", *_COUNTERS):
            if name not in names:
                raise _WrongContent(f"{path}: has no array {name!r}")
        iteration = read_array(file, "iteration")
        if iteration.ndim != 1 or iteration.dtype.kind != "i":
            raise _WrongContent(f"{path}: iteration: expected integers [n], got {iteration.shape}")
        if (np.diff(iteration, prepend=self._last) <= 0).any():
            raise _WrongContent(f"{path}: iteration: expected ascending numbers above {self._last}")
        for name, per_iteration in self._shapes.items():
            shape, expected = read_array_header(file, name)[0], (len(iteration), *per_iteration)
            if shape != expected:
                raise _WrongContent(f"{path}: {name}: expected shape {expected}, got {shape}")
        if len(iteration):
            self._last = int(iteration[-1])
        iteration = framed = iteration.astype(np.int64)
        if _FRAMES in names:  # frames are of fewer iterations than numbers
            framed = read_array(file, _FRAMES)
            known = framed.ndim == 1 and framed.dtype.kind == "i" and (np.diff(framed) > 0).all()
            if not (known and np.isin(framed, iteration).all()):
                raise _WrongContent(f"{path}: {_FRAMES}: expected some of its iterations, in order")
        return _Segment(path, iteration, framed.astype(np.int64), names)

    @cached_property
    def iteration(self) -> npt.NDArray[np.int64]:
        """The iterations [n] as the sampler counts them."""
        return _joined(segment.iteration for segment in self._segments)

    @cached_property
    def frame_iteration(self) -> npt.NDArray[np.int64]:
        """The iterations [m] whose frames were saved: all, or some of `iteration`."""
        return _joined(segment.frame_iteration for segment in self._segments)

    @cached_property
    def energy(self) -> npt.NDArray[np.float64]:
        """The energies [n, W, R] in kJ/mol."""
        return self._series("energy", np.dtype(np.float64))

    @cached_property
    def replica(self) -> npt.NDArray[np.int64]:
        """The replica [n, W, R] at each rung."""
        replica = self._series("replica", np.dtype(np.int64))
        if replica.size and not 0 <= replica.min() <= replica.max() < replica.shape[2]:
            folder = self._segments[0].path.parent
            raise ValueError(f"{folder}: replica: expected numbers below {replica.shape[2]}")
        return replica

    @cached_property
    def dihedrals(self) -> npt.NDArray[np.float32]:
        """The dihedrals [n, W, R, D] in rad, in the precision in which they were written."""
        return self._series("dihedrals", np.dtype(np.float32))

    def _series(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        series = np.empty((len(self.iteration), *self._shapes[name]), dtype)
        start = 0
        for segment in self._segments:
            stop = start + len(segment.iteration)
            values = _read(segment, [name])[name]
            if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
                raise ValueError(f"{segment.path}: {name}: expected finite values")
            if dtype.kind == "i" and values.dtype.kind != "i":
                raise ValueError(f"{segment.path}: {name}: expected integers, got {values.dtype}")
            series[start:stop] = values
            start = stop
        return series

    @cached_property
    def _totals(self) -> dict[str, npt.NDArray[Any]]:
        """The sums of all counters over the segments."""
        totals: dict[str, npt.NDArray[Any]] = {}
        for segment in self._segments:
            counts = _read(segment, sorted(filter(_is_counter, segment.names)))
            self._check_counts(segment.path, counts)
            for name, value in counts.items():
                totals[name] = totals.get(name, 0) + value
        return totals

    def _check_counts(self, path: Path, counts: dict[str, npt.NDArray[Any]]) -> None:
        """Refuse counters of a wrong type, shape or size, or without their counterpart."""
        n_rungs = self._shapes["energy"][1]
        per_kernel = {(n_rungs,), (n_rungs - 1,), (n_rungs, n_rungs)}
        for name, value in counts.items():
            shapes = per_kernel if name.startswith(_KERNEL_COUNTERS) else {()}
            kinds = "iuf" if name == "wall_seconds" else "iu"
            if value.dtype.kind not in kinds or value.shape not in shapes:
                raise ValueError(
                    f"{path}: {name}: expected counts, got {value.dtype} of shape {value.shape}"
                )
            if not ((value >= 0) & (value <= _MAX_COUNT)).all():  # NaN fails both
                raise ValueError(f"{path}: {name}: expected counts, got {value.tolist()}")
            if name.startswith("accepted_"):
                proposed = counts.get(f"proposed_{name.removeprefix('accepted_')}")
                if proposed is None or proposed.shape != value.shape or (value > proposed).any():
                    raise ValueError(f"{path}: {name}: expected at most as many as were proposed")
            elif name.startswith("proposed_"):
                accepted = f"accepted_{name.removeprefix('proposed_')}"
                if accepted not in counts:
                    raise ValueError(f"{path}: {name}: expected {accepted} too, got none")

    def _kernels(self, prefix: str) -> dict[str, npt.NDArray[np.int64]]:
        return {
            name.removeprefix(prefix): value
            for name, value in self._totals.items()
            if name.startswith(prefix)
        }

    @property
    def accepted(self) -> dict[str, npt.NDArray[np.int64]]:
        """Accepted proposals of each kernel: [R], [R-1] (neighbouring pairs) or [R, R] (pairs)."""
        return self._kernels("accepted_")

    @property
    def proposed(self) -> dict[str, npt.NDArray[np.int64]]:
        """Proposals of each kernel, in the shapes of `accepted`."""
        return self._kernels("proposed_")

    @property
    def rejected_non_finite(self) -> int:
        """Proposals rejected because the energy is not finite or x is outside the flow's domain."""
        return int(self._totals.get("rejected_non_finite", 0))

    @property
    def mirror_images(self) -> int:
        """Proposals rejected because a chiral centre has the wrong handedness."""
        return int(self._totals.get("mirror_images", 0))

    @property
    def n_evaluations(self) -> int:
        """Energy evaluations of production."""
        return int(self._totals.get("n_evaluations", 0))

    @property
    def wall_seconds(self) -> float:
        """The duration of production in s."""
        return float(self._totals.get("wall_seconds", 0.0))

    @property
    def outside_domain(self) -> int:
        """The number of proposals in `rejected_non_finite` that left the flow's domain."""
        return int(self._totals.get("outside_domain", 0))


class _WrongContent(ValueError):
    """A segment that can be read but has missing or wrong arrays."""


def _joined(parts: Iterable[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _is_counter(name: str) -> bool:
    return name in _COUNTERS or name.startswith(_KERNEL_COUNTERS)


def _read(segment: _Segment, names: list[str]) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(segment.path) as file:
            return {name: read_array(file, name) for name in names}
    except UNREADABLE as error:
        raise ValueError(f"{segment.path}: cannot be read: {error}") from error


def segment_paths(directory: Path) -> list[Path]:
    """Return the segments in order, without the writer's temporary files."""
    by_number: dict[int, Path] = {}
    for path in directory.glob("segment_*.npz"):
        if match := re.fullmatch(r"segment_(\d{6,})\.npz", path.name):
            by_number[int(match[1])] = path
    for number in range(len(by_number)):
        if number not in by_number:
            name = directory / f"segment_{number:06d}.npz"
            raise FileNotFoundError(f"{name} is missing, but later segments exist")
    return [by_number[number] for number in sorted(by_number)]
