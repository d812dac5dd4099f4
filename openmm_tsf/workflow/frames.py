"""Frames that a flow is trained on: where they come from, and their hash."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch

from openmm_tsf.analysis.basins import TrainingBasins
from openmm_tsf.io.files import PathLike
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.frame_ensemble import check_ensemble
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles
from openmm_tsf.systems.trajectories import load_frames
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_bool, check_fields, check_int, optional
from openmm_tsf.workflow.md_simulation import TRAJECTORY, read_md_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameSource:
    """Where the frames come from that a flow is trained on.

    Parameters
    ----------
    trajectory
        A file that mdtraj can read, several in order, or a directory of the md stage. None: the
        frames that are shipped for alanine dipeptide, MD for other molecules.
    temperature
        Temperature of trajectory files in K.
    simulate
        Run MD even where frames are shipped.
    stride
        Keep every `stride`-th frame.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.workflow.frames import FrameSource
    >>> len(FrameSource(stride=400).load(tsf.systems.alanine_dipeptide()))
    100
    """

    trajectory: PathLike | tuple[PathLike, ...] | None = None
    temperature: float | None = None
    simulate: bool = False
    stride: int = 1

    def __post_init__(self) -> None:
        if self.trajectory is not None:
            paths = tuple(os.path.abspath(path) for path in _as_paths(self.trajectory))
            object.__setattr__(self, "trajectory", paths[0] if len(paths) == 1 else paths)
        check_fields(
            self, temperature=optional(as_temperature), simulate=check_bool, stride=check_int
        )
        if self.trajectory is not None and self.simulate:
            raise ValueError("trajectory: expected none where MD is to be run, got both")
        if self.trajectory is None and self.temperature is not None:
            raise ValueError("temperature: expected none without a trajectory, got one")

    @property
    def name(self) -> str:
        """The paths of the trajectory, or ``"shipped"``."""
        if self.trajectory is None:
            return "shipped"
        return ", ".join(str(path) for path in _as_paths(self.trajectory))

    def completed_from(self, recorded: "FrameSource") -> Self:
        """Return this source, completed by the one that an earlier start recorded."""
        return replace(
            self,
            trajectory=self.trajectory or recorded.trajectory,
            temperature=recorded.temperature if self.temperature is None else self.temperature,
            simulate=self.simulate or recorded.simulate,
        )

    def load(self, molecule: MolecularSystem) -> MDDataset:
        """Return the frames of the trajectory, or the shipped ones."""
        if self.trajectory is None:
            return MDDataset.shipped(molecule, stride=self.stride)
        return load_trajectory(self.trajectory, molecule, self.temperature, self.stride)


def load_trajectory(
    trajectory: PathLike | Sequence[PathLike],
    molecule: MolecularSystem,
    temperature: float | None = None,
    stride: int = 1,
) -> MDDataset:
    """Return every `stride`-th frame of one or several files, or of a directory of ``md``.

    Files need their `temperature` in K; a directory records it, and what its MD cost.
    """
    paths = [Path(path) for path in _as_paths(trajectory)]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"trajectory: no such file or directory {path}")
        if path.is_dir() and len(paths) > 1:
            raise ValueError(f"trajectory: expected files where several are given, got {path}")
    if not paths[0].is_dir():
        if temperature is None:
            names = ", ".join(map(str, paths))
            raise ValueError(f"temperature: expected the temperature of {names} in K, got none")
        return MDDataset.load(paths, molecule, temperature, stride=stride)
    return _load_md(paths[0], molecule, temperature, stride)


def _as_paths(trajectory: Any) -> list[PathLike]:
    """Return one or several paths as a list."""
    is_one = isinstance(trajectory, str | os.PathLike)
    if not is_one and not isinstance(trajectory, list | tuple):
        raise TypeError(f"trajectory: expected a path or several, got {trajectory!r}")
    paths = [trajectory] if is_one else list(trajectory)
    if not paths:
        raise ValueError("trajectory: expected a path, got none")
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"trajectory: expected a path, got {path!r}")
        if not os.fspath(path):
            raise ValueError("trajectory: expected a path, got an empty text")
    return paths


def _load_md(
    path: Path, molecule: MolecularSystem, temperature: float | None, stride: int
) -> MDDataset:
    """Frames of a directory of ``md``."""
    if not (path / TRAJECTORY).is_file() or not (path / "config.json").is_file():
        raise ValueError(f"trajectory: {path} is not a directory of the md stage (no md.dcd in it)")
    config = read_md_config(path)
    recorded = float(config["choices"]["settings"]["temperature"])
    if temperature is not None and abs(temperature - recorded) > 1e-6:
        raise ValueError(f"temperature: {path} was run at {recorded} K, got {temperature} K")
    evaluations = int(config["progress"]["n_evaluations"])
    positions, name = load_frames(path / TRAJECTORY, molecule, stride)
    dataset = MDDataset(
        torch.from_numpy(positions), recorded, molecule, n_evaluations=evaluations, name=name
    )
    try:
        check_ensemble(molecule, dataset.positions, recorded)
    except ValueError as error:
        if config["choices"].get("molecule") != molecule.fingerprint:
            raise
        # The System is this one: the dynamics were too short, or their time step too long.
        logger.warning("%s: %s", path, error)
    return dataset


def check_enough_frames(dataset: MDDataset, molecule: MolecularSystem) -> None:
    """Refuse frames that are too few to split, or to fit the fixed layers of a flow on."""
    least, needed = _least_training_frames(molecule), _least_frames(molecule)
    advice = (
        f"{molecule.n_atoms} atoms need {needed} frames or more, of which 8 in 10 are trained on: "
        "more frames, or a smaller stride (--stride)"
    )
    try:
        n_train = len(dataset.split().train)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    if n_train < least:
        expected = f"expected at least {least} frames to train on, got {n_train} of {len(dataset)}"
        raise ValueError(f"dataset: {expected}; {advice}")


def check_enough_md(n_frames: int, stride: int, molecule: MolecularSystem) -> None:
    """Refuse MD of too few frames, before it is run."""
    n, needed = len(range(0, n_frames, stride)), _least_frames(molecule)
    if n >= 2 * needed or _n_training_frames(n) >= _least_training_frames(molecule):
        return
    raise ValueError(
        f"frames: {n_frames} with stride {stride} are too few: {_n_training_frames(n)} of {n} are "
        f"trained on, expected at least {_least_training_frames(molecule)}; run MD of "
        f"{stride * (needed - 1) + 1} frames or more (n_frames, --frames), or use a smaller stride "
        "(--stride)"
    )


def _least_training_frames(molecule: MolecularSystem) -> int:
    return molecule.n_degrees_of_freedom + 1  # a full covariance


def _least_frames(molecule: MolecularSystem) -> int:
    """Return the smallest number of frames with enough to train on."""
    least = _least_training_frames(molecule)
    first = max(least, int(least / 0.8) - 20)  # each of ten blocks rounds its number
    return next(n for n in count(first) if _n_training_frames(n) >= least)


def _n_training_frames(n_frames: int) -> int:
    """Return how many of the frames are trained on; 0 where they are too few to split."""
    try:
        positions = torch.zeros(n_frames, 1, dtype=torch.float64, device="cpu")
        return len(MDDataset(positions, temperature=1.0).split().train)
    except ValueError:
        return 0


def describe_frames(dataset: MDDataset, source: str) -> dict[str, Any]:
    """Return what is recorded of frames, beside their hash."""
    return {"source": source, "n_frames": len(dataset), "temperature_K": dataset.temperature}


def measure_basins(dataset: MDDataset) -> dict[str, Any]:
    """Return what is recorded of the basins of frames; see `analysis.basins.TrainingBasins`."""
    assert dataset.molecule is not None
    positions = dataset.positions.detach().cpu().numpy()
    angles = torsion_angles(positions, slow_torsions(dataset.molecule.topology))
    return TrainingBasins.measure(angles, dataset.temperature).to_config()


def hash_of_frames(dataset: MDDataset) -> str:
    """Return the SHA-256 of a dataset's positions."""
    positions = dataset.positions.detach().cpu().contiguous().numpy()
    return hashlib.sha256(positions.tobytes()).hexdigest()
