"""Time-lagged independent components (TICA) of a reference, by deeptime.

deeptime is no requirement of the package: ``pip install 'openmm-tsf[tica]'``.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.statistics import Array, statistical_inefficiency

#: A walker has at least as many lags.
_MIN_LAGS = 10
N_COMPONENTS = 2
NEEDS = (
    "TICA needs deeptime, which is not installed: pip install 'openmm-tsf[tica]', or leave TICA out"
)

Projection = Callable[[npt.NDArray[Any]], Array]


def has_tica() -> bool:
    """Return whether deeptime is installed."""
    return find_spec("deeptime") is not None


def frame_features(topology: mdtraj.Topology, positions: npt.NDArray[Any]) -> Array:
    """Return the features [F, K] of positions [F, N, 3] in nm.

    They are those of published evaluations of Boltzmann generators of peptides (Klein and Noé,
    arXiv:2406.14426): distances in nm between all atoms of C, N and S, and sine and cosine of φ, ψ
    and ω.
    """
    atoms = [a.index for a in topology.atoms if a.element and a.element.symbol in ("C", "N", "S")]
    first, second = np.triu_indices(len(atoms), k=1)
    x = positions[:, atoms].astype(np.float64)
    parts = [np.linalg.norm(x[:, first] - x[:, second], axis=-1)]
    frames = mdtraj.Trajectory(positions, topology)
    for compute in (mdtraj.compute_phi, mdtraj.compute_psi, mdtraj.compute_omega):
        angles = compute(frames)[1]
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, axis=-1).astype(np.float64)


def torsion_features(angles: Sequence[npt.ArrayLike]) -> Array:
    """Return sine and cosine [..., 2 D] of D torsions [...] in rad."""
    return np.stack([f(np.asarray(each)) for each in angles for f in (np.sin, np.cos)], axis=-1)


def fit_tica(series: Array) -> tuple[Projection, int]:
    """Return the projection onto the two slowest components of features [n, W, K], and its lag.

    The lag is the correlation time of the slowest feature, (g - 1)/2 frames, less where walkers
    have not ten of it. Frames in equilibrium are expected: they are not reweighted. In replica
    exchange the series of a rung is meant, in which replicas come and go; the components are those
    of its slowest features, and any projection serves to compare two ensembles.

    Raises
    ------
    ImportError
        If deeptime is not installed; the error names the extra.
    ValueError
        If there are fewer than two frames of each walker, or all frames are the same.
    """
    if not has_tica():
        raise ImportError(NEEDS)
    from deeptime.decomposition import TICA
    from deeptime.util.data import TrajectoriesDataset

    n, n_walkers = series.shape[:2]
    if n < 2:
        raise ValueError(
            f"reference: expected at least 2 frames of each walker for TICA, got {n}; without TICA "
            "(tica=False, --no-tica) it can be compared"
        )
    if not np.ptp(series, axis=(0, 1)).any():
        raise ValueError("reference: expected different frames for TICA, got one conformation")
    known = [statistical_inefficiency(series[..., k]) for k in range(series.shape[-1])]
    slowest = np.nanmax(known) if np.isfinite(known).any() else 1.0
    lag = max(1, min(round((slowest - 1.0) / 2.0), n // _MIN_LAGS))
    walkers = [np.ascontiguousarray(series[:, k]) for k in range(n_walkers)]
    dataset = TrajectoriesDataset.from_numpy(lag, walkers)
    model = TICA(lagtime=lag, dim=N_COMPONENTS).fit(dataset).fetch_model()
    return model.transform, lag
