"""The numeric segments of a run directory, put together."""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_SERIES = ("energy", "replica", "iteration", "dihedrals")
_COUNTERS = ("rejected_non_finite", "mirror_images", "n_evaluations")


@dataclass(frozen=True)
class Segments:
    """All production numbers written so far.

    Attributes
    ----------
    energy
        [n, W, R] in kJ/mol.
    replica
        [n, W, R], the replica that sits at each rung.
    iteration
        [n], the sampler's own count.
    dihedrals
        [n, W, R, D] in rad.
    accepted, proposed
        Per kernel, totals [R], [R-1] (neighbouring pairs) or [R, R] (any pairs).
    rejected_non_finite, mirror_images, n_evaluations
        Totals.
    wall_seconds
        Total.
    outside_domain
        Those of `rejected_non_finite` that left the flow's domain; None in runs of earlier
        versions, which did not tell them apart.
    """

    energy: npt.NDArray[np.float64]
    replica: npt.NDArray[np.int64]
    iteration: npt.NDArray[np.int64]
    dihedrals: npt.NDArray[np.float64]
    accepted: dict[str, npt.NDArray[np.int64]]
    proposed: dict[str, npt.NDArray[np.int64]]
    rejected_non_finite: int
    mirror_images: int
    n_evaluations: int
    wall_seconds: float
    outside_domain: int | None = None


def read_segments(directory: Path, n_walkers: int, n_rungs: int, n_dihedrals: int) -> Segments:
    """Read ``segment_000000.npz``, ``segment_000001.npz``, ... of a directory.

    A last file that is cut short is left out: the run may still be writing it.

    Raises
    ------
    FileNotFoundError
        If a segment is missing in between.
    ValueError
        If one before the last cannot be read, or has the wrong shape or non-finite energies.
    """
    paths = _numbered(directory)
    parts: list[dict[str, Any]] = []
    for position, path in enumerate(paths):
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
                part = {name: data[name] for name in data.files}
        except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
            if position == len(paths) - 1:
                break
            raise ValueError(f"{path}: cannot be read: {error}") from error
        _check(path, part, (n_walkers, n_rungs), n_dihedrals)
        parts.append(part)
    empty = {
        "energy": np.empty((0, n_walkers, n_rungs)),
        "replica": np.empty((0, n_walkers, n_rungs), dtype=np.int64),
        "iteration": np.empty(0, dtype=np.int64),
        "dihedrals": np.empty((0, n_walkers, n_rungs, n_dihedrals)),
    }
    series = {
        name: np.concatenate([empty[name], *(part[name] for part in parts)]) for name in _SERIES
    }
    return Segments(
        energy=series["energy"].astype(np.float64),
        replica=series["replica"].astype(np.int64),
        iteration=series["iteration"].astype(np.int64),
        dihedrals=series["dihedrals"].astype(np.float64),
        accepted=_totals(parts, "accepted_"),
        proposed=_totals(parts, "proposed_"),
        rejected_non_finite=sum(int(part["rejected_non_finite"]) for part in parts),
        mirror_images=sum(int(part["mirror_images"]) for part in parts),
        n_evaluations=sum(int(part["n_evaluations"]) for part in parts),
        wall_seconds=sum(float(part["wall_seconds"]) for part in parts),
        outside_domain=sum(int(part["outside_domain"]) for part in parts)
        if all("outside_domain" in part for part in parts)
        else None,
    )


def _numbered(directory: Path) -> list[Path]:
    found: dict[int, Path] = {}
    for path in directory.glob("segment_*.npz"):
        match = re.fullmatch(r"segment_(\d{6})\.npz", path.name)
        if match:  # others are the writer's temporary files
            found[int(match[1])] = path
    paths = []
    for number in range(max(found, default=-1) + 1):
        if number not in found:
            name = directory / f"segment_{number:06d}.npz"
            raise FileNotFoundError(f"{name} is missing, but later segments are there")
        paths.append(found[number])
    return paths


def _check(path: Path, part: dict[str, Any], layout: tuple[int, int], n_dihedrals: int) -> None:
    for name in (*_SERIES, *_COUNTERS, "wall_seconds"):
        if name not in part:
            raise ValueError(f"{path}: has no array {name!r}")
    n = len(part["iteration"])
    expected = {
        "energy": (n, *layout),
        "replica": (n, *layout),
        "iteration": (n,),
        "dihedrals": (n, *layout, n_dihedrals),
    }
    for name, shape in expected.items():
        if part[name].shape != shape:
            raise ValueError(f"{path}: {name}: expected shape {shape}, got {part[name].shape}")
    for name in ("energy", "dihedrals"):
        if not np.isfinite(part[name]).all():
            raise ValueError(f"{path}: {name}: expected finite values")


def _totals(parts: list[dict[str, Any]], prefix: str) -> dict[str, npt.NDArray[np.int64]]:
    totals: dict[str, npt.NDArray[np.int64]] = {}
    for part in parts:
        for key, value in part.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                totals[name] = totals.get(name, np.zeros((), dtype=np.int64)) + value
    return totals
