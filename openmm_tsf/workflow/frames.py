"""Frames that a flow is trained on: read from files, and told apart by their hash."""

import hashlib
from pathlib import Path

from openmm_tsf.io.files import PathLike
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.workflow.md_simulation import read_md_config


def load_trajectory(
    trajectory: PathLike,
    molecule: MolecularSystem,
    temperature: float | None = None,
    stride: int = 1,
) -> MDDataset:
    """Frames of a trajectory file, or of a directory that the ``md`` stage wrote.

    Parameters
    ----------
    trajectory
        A file that mdtraj reads, or a directory of the ``md`` stage, which knows its temperature
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
        If there is no such file or directory.
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
    if not (path / "md.dcd").is_file() or not (path / "config.json").is_file():
        raise ValueError(f"trajectory: {path} is no directory of the md stage (no md.dcd in it)")
    config = read_md_config(path)
    known = float(config["settings"]["temperature"])
    if temperature is not None and abs(temperature - known) > 1e-6:
        raise ValueError(f"temperature: {path} was run at {known} K, got {temperature} K")
    return MDDataset.load(
        path / "md.dcd",
        molecule,
        known,
        stride=stride,
        n_evaluations=int(config["progress"]["n_evaluations"]),
    )


def hash_of_frames(dataset: MDDataset) -> str:
    """SHA-256 of a dataset's positions."""
    return hashlib.sha256(
        dataset.positions.detach().cpu().contiguous().numpy().tobytes()
    ).hexdigest()
