"""Frames with weights: the ensemble at one temperature from frames that were sampled at others."""

from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.statistics import Array
from openmm_tsf.utils.validation import check_int, check_seed


class WeightedTrajectory(mdtraj.Trajectory):
    """An `mdtraj.Trajectory` whose frames have weights, as `Run.at` returns it.

    All functions of mdtraj take it, as frames without weights: means and histograms of what they
    return are weighted, ``np.average(values, weights=frames.weights)``. Slices have the weights of
    their frames, normalised again, and so have subsets of the atoms. Joined, stacked or saved
    frames have none: `resample` first.

    Parameters
    ----------
    frames
        F frames.
    weights
        [F], up to a constant, not negative.
    temperature
        That of the ensemble, in K.

    Attributes
    ----------
    weights, temperature
        [F], normalised; K.
    n_eff
        Kish's effective sample size 1/Σw²: how many frames of equal weight have as large a
        sampling error, if frames are independent. Errors of correlated frames are those of
        `Run.curve`.

    Examples
    --------
    >>> import mdtraj, numpy as np
    >>> from openmm_tsf.analysis import WeightedTrajectory
    >>> x = np.linspace(-4.0, 4.0, 81)[:, None, None] * [1.0, 0.0, 0.0]  # one atom along x
    >>> frames = WeightedTrajectory(mdtraj.Trajectory(x, None), np.exp(-(x[:, 0, 0] ** 2) / 2), 1.0)
    >>> round(float(np.average(frames.xyz[:, 0, 0] ** 2, weights=frames.weights)), 2)
    1.0
    >>> frames[40:].n_frames, round(float(frames[40:].weights.sum()), 6)
    (41, 1.0)
    """

    def __init__(
        self, frames: mdtraj.Trajectory, weights: npt.ArrayLike, temperature: float
    ) -> None:
        values = np.atleast_1d(np.asarray(weights, dtype=np.float64))
        if values.shape != (frames.n_frames,):
            raise ValueError(f"weights: expected {frames.n_frames}, got shape {values.shape}")
        total = values.sum()
        if not (np.isfinite(total) and total > 0 and (values >= 0).all()):
            raise ValueError("weights: expected finite numbers from 0 on, and one above 0")
        super().__init__(
            frames.xyz,
            frames.topology,
            frames.time,
            frames.unitcell_lengths,
            frames.unitcell_angles,
        )
        self.weights: Array = values / total
        self.temperature = float(temperature)

    @property
    def n_eff(self) -> float:
        """Kish's effective sample size 1/Σw² of the weights."""
        return float(1.0 / np.sum(self.weights**2))

    def unweighted(self) -> mdtraj.Trajectory:
        """Return the same frames, all of them once, without their weights."""
        return mdtraj.Trajectory(
            self.xyz, self.topology, self.time, self.unitcell_lengths, self.unitcell_angles
        )

    def draw_indices(self, n_frames: int, seed: int) -> npt.NDArray[np.int64]:
        """Return the indices of frames drawn by their weights, with replacement."""
        generator, n_frames = (
            np.random.default_rng(check_seed(seed)),
            check_int(n_frames, "n_frames"),
        )
        return np.asarray(generator.choice(self.n_frames, n_frames, p=self.weights), np.int64)

    def resample(self, n_frames: int, seed: int) -> mdtraj.Trajectory:
        """Return frames drawn by their weights, with replacement: an ensemble without weights."""
        return self.unweighted().slice(self.draw_indices(n_frames, seed))

    def slice(self, key: Any, copy: bool = True) -> "WeightedTrajectory":
        """Return some of the frames, with their weights."""
        frames = self.unweighted().slice(key, copy)
        return WeightedTrajectory(frames, self.weights[key], self.temperature)

    def atom_slice(self, atom_indices: Any, inplace: bool = False) -> Any:
        """Return all frames of some of the atoms, with their weights."""
        if inplace:
            return super().atom_slice(atom_indices, inplace=True)
        frames = self.unweighted().atom_slice(atom_indices)
        return WeightedTrajectory(frames, self.weights, self.temperature)

    def join(self, other: Any, *args: Any, **options: Any) -> mdtraj.Trajectory:
        """Return the frames of several trajectories, without weights."""
        return self.unweighted().join(other, *args, **options)

    def stack(self, other: Any, *args: Any, **options: Any) -> mdtraj.Trajectory:
        """Return the atoms of two trajectories, without weights."""
        return self.unweighted().stack(other, *args, **options)
