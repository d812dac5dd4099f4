"""Frames of a run and its reference as ``.npy`` files, for evaluation by other programs.

In ``FOLDER/300.00K/``, of the frames of a temperature, or up to 20 000 of them, walkers inside
iterations::

    pred_samples.npy                   [F, 3 N] of the run, float32, nm, flattened atom by atom
    pred_samples_target_log_prob.npy   [F] -U/kT, float64
    pred_samples_energies.npy          [F] U in kJ/mol, float64
    true_samples.npy, ...              the same of the reference
    ../topology.pdb                    the molecule

The names are those of the arguments of boltzkit's ``tools/evaluate_offline.py``
(``--pred_samples``, ``--true_samples_target_log_prob``, ``--topology``, ...); the references of
transferable-samplers are arrays of positions in nm, too. A temperature without positions has no
files, energies are left out where there is no molecule to evaluate them. There are no importance
weights: frames of a run have equal ones.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.compare_samples import Ensemble
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.io.directory import list_contents
from openmm_tsf.units import KB


def check_export_folder(path: str | PathLike[str]) -> Path:
    """Return the folder of an export; refuse a file, and a folder that is not empty."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"export: {folder} is a file, expected a new or empty folder")
    if folder.is_dir() and (names := list_contents(folder)):
        raise FileExistsError(f"export: expected a new or empty folder, {folder} holds {names[0]}")
    return folder


def export_samples(
    folder: Path, run: Ensemble, reference: Ensemble, topology: mdtraj.Topology | None
) -> list[Path]:
    """Write the frames of both sides at one temperature, and return the files."""
    place = folder / f"{run.temperature:.2f}K"
    written: list[Path] = []

    def save(name: str, values: npt.NDArray[Any]) -> None:
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{name}.npy", values, allow_pickle=False)
        written.append(place / f"{name}.npy")

    for prefix, side in (("pred", run), ("true", reference)):
        if side.positions is None:
            continue
        x = side.positions.reshape(-1, 3 * side.positions.shape[-2])
        save(f"{prefix}_samples", x.astype(np.float32))
        if side.frame_energy is not None:
            energy: Array = side.frame_energy.ravel().astype(np.float64)
            save(f"{prefix}_samples_energies", energy)
            save(f"{prefix}_samples_target_log_prob", -energy / (KB * run.temperature))
        if topology is not None and not (folder / "topology.pdb").exists():
            first = x[:1].reshape(1, -1, 3)
            mdtraj.Trajectory(first, topology).save_pdb(str(folder / "topology.pdb"))
    return written
