"""The basins of the slow torsions of frames and of a flow's draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.basins import Basins
from openmm_tsf.analysis.certify_coverage import WeightedPoints
from openmm_tsf.analysis.certify_flow import FlowWeights
from openmm_tsf.analysis.certify_samples import Samples
from openmm_tsf.analysis.convergence import count_pieces
from openmm_tsf.analysis.statistics import Array, reverse_ess
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles

Labels = npt.NDArray[np.int64]
Angles = dict[str, np.ndarray]

_SEED = 1


@dataclass(frozen=True)
class LabelledSamples:
    """Samples of one temperature with the basins of their frames, and of the flow's draws."""

    samples: Samples
    names: tuple[str, ...]  # of the basins, the same at every temperature
    labels: Labels  # [n, W, G], for each group of torsions an index in `names`
    n_pieces: float  # independent pieces of the samples, by the slowest torsion or U
    draws: WeightedPoints | None = None
    frames: WeightedPoints | None = None  # every `stride`-th iteration
    n_draws: int = 0


def label_samples(
    molecule: MolecularSystem,
    samples: Sequence[Samples],
    weights: Sequence[FlowWeights] | None = None,
    basins: Basins | None = None,
) -> list[LabelledSamples]:
    """Find the basins that frames or the flow's draws visit, and label both.

    Given `basins` are completed by those that they lack.
    """
    torsions = slow_torsions(molecule.topology)
    angles = [torsion_angles(each.positions, torsions) for each in samples]
    of_draws = [torsion_angles(each.x[each.inside], torsions) for each in weights or ()]
    basins = Basins.find(_joined(angles)) if basins is None else basins.completed(_joined(angles))
    if weights is not None:
        resampled = [
            {name: value[_resample(each.draws[each.inside])] for name, value in table.items()}
            for each, table in zip(weights, of_draws, strict=True)
        ]
        basins = basins.completed(_joined(resampled))
    labelled = []
    for k, (each, table) in enumerate(zip(samples, angles, strict=True)):
        labels = basins.labels(table)[: len(each.energy)]
        draws = frames = None
        n_draws = 0
        if weights is not None:
            weight = weights[k]
            draws = WeightedPoints(weight.draws[weight.inside], basins.labels(of_draws[k]))
            frames = WeightedPoints(weight.frames, labels[:: weight.stride])
            n_draws = len(weight.draws)
        finite = [each.energy] if np.isfinite(each.energy).all() else []
        known = bool(finite or table)
        pieces = count_pieces(*finite, angles=table.values()) if known else float(each.n_walkers)
        labelled.append(LabelledSamples(each, basins.names, labels, pieces, draws, frames, n_draws))
    return labelled


def _joined(angles: Sequence[Angles]) -> Angles:
    """Return the angles of all temperatures, flattened."""
    return {name: np.concatenate([table[name].ravel() for table in angles]) for name in angles[0]}


def _resample(log_weights: Array) -> npt.NDArray[np.int64]:
    """Return the indices of draws that are chosen by weight, as many as there are effective ones.

    The density of what the flow draws is not that of the molecule: it need not have its wells.
    """
    if not np.isfinite(log_weights).any():
        return np.zeros(0, dtype=np.int64)
    n = int(reverse_ess(log_weights).fraction * len(log_weights))
    p = np.exp(log_weights - log_weights.max())
    chosen = np.random.default_rng(_SEED).choice(len(p), size=n, p=p / p.sum())
    return np.asarray(chosen, dtype=np.int64)
