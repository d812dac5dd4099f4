"""Frames that a flow is trained on: where they come from, and their hash."""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

from openmm_tsf.io.files import PathLike
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_choice, check_fields, check_int
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

    Raises
    ------
    TypeError, ValueError
        If a value is not valid, or they contradict each other.

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
            object.__setattr__(self, "trajectory", os.path.abspath(self.trajectory))
        if self.temperature is not None:
            check_fields(self, temperature=as_temperature)
        is_bool = partial(check_choice, allowed=(False, True))
        check_fields(self, simulate=is_bool, stride=check_int)
        if self.trajectory is not None and self.simulate:
            raise ValueError("trajectory: expected none where MD is to be run, got both")
        if self.trajectory is None and self.temperature is not None:
            raise ValueError("temperature: expected none without a trajectory, got one")

    def completed_from(self, recorded: "FrameSource") -> Self:
        """Return this source, completed by the one that an earlier start recorded."""
        temperature = self.temperature
        if temperature is None:
            temperature = recorded.temperature
        return replace(
            self,
            trajectory=self.trajectory or recorded.trajectory,
            temperature=temperature,
            simulate=self.simulate or recorded.simulate,
        )

    def load(self, molecule: MolecularSystem) -> MDDataset:
        """Return the frames of the trajectory, or the shipped ones.

        Raises
        ------
        FileNotFoundError, ValueError
            As `load_trajectory`.
        """
        if self.trajectory is None:
            return MDDataset.shipped(molecule, stride=self.stride)
        return load_trajectory(self.trajectory, molecule, self.temperature, self.stride)


def load_trajectory(
    trajectory: PathLike,
    molecule: MolecularSystem,
    temperature: float | None = None,
    stride: int = 1,
) -> MDDataset:
    """Return the frames of a trajectory file, or of a directory that the ``md`` stage wrote.

    Parameters
    ----------
    trajectory
        A file that mdtraj reads, or a directory of the ``md`` stage, which records its temperature
        and its cost.
    molecule
        The molecule.
    temperature
        Temperature of a trajectory file in K.
    stride
        Keep every `stride`-th frame.

    Raises
    ------
    FileNotFoundError
        If the file or directory does not exist.
    ValueError
        If the temperature is missing or contradicts the directory's, or the frames do not fit.
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
    return MDDataset.load(
        path / TRAJECTORY,
        molecule,
        recorded,
        stride=stride,
        n_evaluations=int(config["progress"]["n_evaluations"]),
    )


def hash_of_frames(dataset: MDDataset) -> str:
    """Return the SHA-256 of a dataset's positions."""
    return hashlib.sha256(
        dataset.positions.detach().cpu().contiguous().numpy().tobytes()
    ).hexdigest()
