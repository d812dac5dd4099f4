"""Frames with their energies, of a run directory or of trajectories of any origin."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.trajectories import load_frames
from openmm_tsf.units import NANOMETER, as_array, as_temperature
from openmm_tsf.utils.validation import check_int

logger = logging.getLogger(__name__)

Frames = npt.NDArray[np.float32]

#: Conformations in one call of the potential.
_BATCH_SIZE = 4096


@dataclass(frozen=True)
class Samples:
    """Frames of one temperature: n of each of W walkers (independent trajectories)."""

    temperature: float  # K
    positions: Frames  # [n, W, N, 3] in nm
    energy: Array  # [n, W] in kJ/mol; +inf where it is not finite
    source: tuple[str, ...]
    n_left_out: int = 0  # frames of walkers that are longer than the shortest

    @property
    def n_frames(self) -> int:
        """n times W."""
        return int(self.energy.size)

    @property
    def n_walkers(self) -> int:
        """The number W of walkers."""
        return int(self.energy.shape[1])

    @property
    def by_walker(self) -> torch.Tensor:
        """All frames [W n, N, 3] in float64, walker by walker, each in order."""
        ordered = self.positions.swapaxes(0, 1).reshape(-1, *self.positions.shape[2:])
        return torch.from_numpy(ordered.astype(np.float64))


def read_run(run: RunEstimates) -> list[Samples]:
    """Return the frames of every rung of a run with the energies that it recorded.

    From the start of equilibrated sampling on, which the run tells.
    """
    run.require_samples()
    samples = []
    for kelvin in map(float, run.temperatures):
        frames = run.trajectory(kelvin)
        energy = run.energies(kelvin)[run.frame_index(kelvin)]
        n = min(len(energy), frames.n_frames // run.n_walkers)
        if n == 0:
            raise ValueError(f"{run.path}: no frames of {kelvin:.2f} K yet")
        shape = n, run.n_walkers, frames.n_atoms, 3
        positions = frames.xyz[: n * run.n_walkers].reshape(shape)
        samples.append(Samples(kelvin, positions, energy[:n], (str(run.path),)))
    return samples


def read_trajectories(
    trajectories: Mapping[Any, Any],
    molecule: MolecularSystem,
    potential: Potential,
    walkers: int = 1,
) -> list[Samples]:
    """Return the frames of trajectories with energies from a potential, ascending in temperature.

    Parameters
    ----------
    trajectories
        From a temperature (K) to its walkers: one or several files, each of one walker, or arrays
        [n, N, 3] or [n, W, N, 3] in nm.
    walkers
        The number of walkers that each file holds, frame by frame (those of this package: walker 0
        to W - 1 of the first iteration, then of the second).
    """
    if not isinstance(trajectories, Mapping) or not trajectories:
        got = type(trajectories).__name__ if not isinstance(trajectories, Mapping) else "none"
        raise TypeError(f"samples: expected temperatures with their trajectories, got {got}")
    walkers = check_int(walkers, "walkers")
    by_kelvin = {as_temperature(t, "samples"): item for t, item in trajectories.items()}
    samples = []
    for kelvin in sorted(by_kelvin):
        parts, names = _read_walkers(by_kelvin[kelvin], molecule, walkers, kelvin)
        n = min(len(part) for part in parts)
        positions = np.concatenate([part[:n] for part in parts], axis=1)
        left_out = sum((len(part) - n) * part.shape[1] for part in parts)
        energy = evaluate(potential, positions)
        logger.info("%.2f K: %d frames of each of %d walkers", kelvin, n, positions.shape[1])
        samples.append(Samples(kelvin, positions, energy, names, left_out))
    return samples


def _read_walkers(
    item: Any, molecule: MolecularSystem, walkers: int, kelvin: float
) -> tuple[list[Frames], tuple[str, ...]]:
    """Return arrays [n, W, N, 3] of each file or array, and the names of where they are from."""
    if isinstance(item, str | PathLike):
        item = [item]
    if isinstance(item, Sequence) and all(isinstance(path, str | PathLike) for path in item):
        parts = [_of_file(path, molecule, walkers) for path in item]
        names = tuple(fspath(path) for path in item)
        if not parts:
            raise ValueError(f"samples: expected trajectories of {kelvin:g} K, got none")
        return parts, names
    positions = as_array(item, NANOMETER, "samples")
    if positions.ndim == 3:
        positions = positions[:, None]
    expected = (molecule.n_atoms, 3)
    if positions.ndim != 4 or positions.shape[2:] != expected or positions.size == 0:
        raise ValueError(
            f"samples: expected positions [n, {molecule.n_atoms}, 3] or "
            f"[n, W, {molecule.n_atoms}, 3] of {kelvin:g} K, got shape {positions.shape}"
        )
    return [positions.astype(np.float32)], ("an array",)


def _of_file(path: str | PathLike[str], molecule: MolecularSystem, walkers: int) -> Frames:
    frames = load_frames(path, molecule)[0].astype(np.float32)
    if len(frames) % walkers:
        raise ValueError(
            f"walkers: expected a divisor of the {len(frames)} frames in {path}, got {walkers}"
        )
    return frames.reshape(-1, walkers, molecule.n_atoms, 3)


def evaluate(potential: Potential, positions: Frames) -> Array:
    """Return the energies [n, W] in kJ/mol of positions [n, W, N, 3] in nm."""
    flat = positions.reshape(-1, *positions.shape[2:])
    parts = [
        potential.energy(torch.from_numpy(flat[start : start + _BATCH_SIZE].astype(np.float64)))
        for start in range(0, len(flat), _BATCH_SIZE)
    ]
    energy = torch.cat([part.detach() for part in parts]).cpu().numpy()
    return np.asarray(energy.reshape(positions.shape[:2]), dtype=np.float64)
