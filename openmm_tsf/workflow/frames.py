"""Frames that a flow is trained on: where they come from, and their hash."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from openmm_tsf.io.files import PathLike
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_bool, check_fields, check_int, optional
from openmm_tsf.workflow.md_simulation import TRAJECTORY, read_md_config


@dataclass(frozen=True)
class FrameSource:
    """Where the frames come from that a flow is trained on.

    Parameters
    ----------
    trajectory
        A file that mdtraj reads, or a directory of the md stage. None: the frames that are shipped
        for alanine dipeptide, MD for other molecules.
    temperature
        Temperature of a trajectory file in K.
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

    trajectory: PathLike | None = None
    temperature: float | None = None
    simulate: bool = False
    stride: int = 1

    def __post_init__(self) -> None:
        if self.trajectory is not None:
            if not isinstance(self.trajectory, str | os.PathLike):
                raise TypeError(f"trajectory: expected a path, got {self.trajectory!r}")
            if not os.fspath(self.trajectory):
                raise ValueError("trajectory: expected a path, got an empty text")
            object.__setattr__(self, "trajectory", os.path.abspath(self.trajectory))
        check_fields(
            self, temperature=optional(as_temperature), simulate=check_bool, stride=check_int
        )
        if self.trajectory is not None and self.simulate:
            raise ValueError("trajectory: expected none where MD is to be run, got both")
        if self.trajectory is None and self.temperature is not None:
            raise ValueError("temperature: expected none without a trajectory, got one")

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
    trajectory: PathLike,
    molecule: MolecularSystem,
    temperature: float | None = None,
    stride: int = 1,
) -> MDDataset:
    """Return every `stride`-th frame of a file that mdtraj reads, or of a directory of ``md``.

    A file needs its `temperature` in K; a directory records it, and what its MD cost.
    """
    path = Path(trajectory)
    if not path.exists():
        raise FileNotFoundError(f"trajectory: no such file or directory {path}")
    if not path.is_dir():
        if temperature is None:
            raise ValueError(f"temperature: expected the temperature of {path} in K, got none")
        return MDDataset.load(path, molecule, temperature, stride=stride)
    if not (path / TRAJECTORY).is_file() or not (path / "config.json").is_file():
        raise ValueError(f"trajectory: {path} is not a directory of the md stage (no md.dcd in it)")
    config = read_md_config(path)
    recorded = float(config["choices"]["settings"]["temperature"])
    if temperature is not None and abs(temperature - recorded) > 1e-6:
        raise ValueError(f"temperature: {path} was run at {recorded} K, got {temperature} K")
    evaluations = int(config["progress"]["n_evaluations"])
    trajectory = path / TRAJECTORY
    return MDDataset.load(trajectory, molecule, recorded, stride=stride, n_evaluations=evaluations)


def check_enough_frames(dataset: MDDataset, molecule: MolecularSystem) -> None:
    """Refuse frames that are too few to split, or to fit the fixed layers of a flow on."""
    n_train, least = len(dataset.split().train), 3 * molecule.n_atoms - 5  # a full covariance
    if n_train < least:
        raise ValueError(
            f"dataset: expected at least {least} frames to train on, got {n_train} "
            f"of {len(dataset)}"
        )


def check_enough_md(n_frames: int, stride: int, molecule: MolecularSystem) -> None:
    """Refuse MD of too few frames, before it is run."""
    n = min(len(range(0, n_frames, stride)), 1000 * molecule.n_atoms)  # more are always enough
    positions = torch.zeros(n, 1, dtype=torch.float32, device="cpu")  # only their number matters
    try:
        check_enough_frames(MDDataset(positions, temperature=1.0), molecule)
    except ValueError as error:
        raise ValueError(f"frames: {n_frames} with stride {stride} are too few: {error}") from None


def describe_frames(dataset: MDDataset, source: str) -> dict[str, Any]:
    """Return what is recorded of frames, beside their hash."""
    return {"source": source, "n_frames": len(dataset), "temperature_K": dataset.temperature}


def hash_of_frames(dataset: MDDataset) -> str:
    """Return the SHA-256 of a dataset's positions."""
    positions = dataset.positions.detach().cpu().contiguous().numpy()
    return hashlib.sha256(positions.tobytes()).hexdigest()
