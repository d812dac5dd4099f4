"""Distances between samples of one temperature and one half of a reference, beside their floor.

Every distance is between as many samples of the run as of one half of the reference, its floor
between as many of both halves, drawn at random without replacement; values are means over several
divisions into halves. The halves are independent of each other as walkers are: each has one half of
the walkers. Fewer than eight walkers are cut into blocks in time, of which each half has one half.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.compare_samples import Ensemble
from openmm_tsf.analysis.ramachandran import BINS, decorrelated_frames, slowest_frames
from openmm_tsf.analysis.statistics import (
    Array,
    group_labels,
    kl_divergence,
    torus_histogram,
    total_variation,
)
from openmm_tsf.analysis.tica import Projection, fit_tica, frame_features, torsion_features
from openmm_tsf.analysis.transport import (
    energy_wasserstein,
    euclidean_wasserstein,
    torus_wasserstein,
)
from openmm_tsf.units import KB
from openmm_tsf.utils.topology import is_backbone, residue_of

#: From this number of walkers on, halves are of whole walkers.
MIN_WALKERS = 8

Index = npt.NDArray[np.int64]
#: The distance of two sets of samples, by their indices among all of run and reference.
Measure = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Distance:
    """A distance of a run from its reference, and of the reference's halves from each other."""

    value: float  # mean over divisions into halves
    floor: float
    floor_low: float  # smallest and largest over divisions
    floor_high: float
    n_samples: int  # of each set

    @property
    def ratio(self) -> float:
        """The distance over its floor."""
        return self.value / self.floor if self.floor > 0 else np.nan

    def scaled(self, factor: float) -> "Distance":
        """Return the distance in another unit."""
        return Distance(
            factor * self.value,
            factor * self.floor,
            factor * self.floor_low,
            factor * self.floor_high,
            self.n_samples,
        )


def split_halves(
    shape: tuple[int, ...], n_splits: int, rng: np.random.Generator
) -> list[tuple[Index, Index]]:
    """Return divisions of samples [n, W] into halves: flat indices of each half.

    The first division is that into even and odd walkers (or blocks), the others are random.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.compare_distances import split_halves
    >>> (halves,) = split_halves((2, 8), 1, np.random.default_rng(1))
    >>> halves[0].tolist(), halves[1].tolist()
    ([0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15])
    """
    labels = group_labels(shape[0], shape[1], MIN_WALKERS).ravel()
    n_groups = int(labels.max()) + 1
    if n_groups < 2:
        raise ValueError(f"reference: expected at least 2 samples, for two halves, got {n_groups}")
    halves = []
    for number in range(n_splits):
        order = np.arange(n_groups) if number == 0 else rng.permutation(n_groups)
        halves.append(
            (
                np.flatnonzero(np.isin(labels, order[::2])),
                np.flatnonzero(np.isin(labels, order[1::2])),
            )
        )
    return halves


class DistanceMeter:
    """Distances of an ensemble from a reference, over divisions of the reference into halves.

    Parameters
    ----------
    run, reference
        Numbers of samples [n, W] of both.
    n_splits
        Divisions into halves.
    rng
        Of the divisions, and of the samples that are drawn.
    """

    def __init__(
        self,
        run: tuple[int, ...],
        reference: tuple[int, ...],
        n_splits: int,
        rng: np.random.Generator,
    ) -> None:
        self.n_run, self.rng = run[0] * run[1], rng
        self.halves = split_halves(reference, n_splits, rng)
        self.most = min(self.n_run, *(len(half) for pair in self.halves for half in pair))

    def measure(self, n: float, of_run: Measure, of_reference: Measure) -> Distance:
        """Return a distance of `n` samples, or of as many as there are.

        Parameters
        ----------
        n
            Samples of each set.
        of_run, of_reference
            The distance of samples of the run, and of samples of the reference, from samples of the
            reference, given by their indices.
        """
        size = max(1, min(round(n), self.most))
        values, floors = [], []
        for first, second in self.halves:
            target = self._draw(first, size)
            values.append(of_run(self._draw(self.n_run, size), target))
            floors.append(of_reference(self._draw(second, size), target))
        value, floor = float(np.mean(values)), float(np.mean(floors))
        return Distance(value, floor, float(min(floors)), float(max(floors)), size)

    def _draw(self, population: Any, size: int) -> Any:
        return self.rng.choice(population, size, replace=False)

    def points(
        self, n: float, run: Array, reference: Array, function: Callable[[Any, Any], float]
    ) -> Distance:
        """Return a distance of samples [n W, ...] by a function of two sets of them."""
        return self.measure(
            n,
            lambda k, target: function(run[k], reference[target]),
            lambda k, target: function(reference[k], reference[target]),
        )


def backbone_pairs(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the names of φ and ψ of each residue that has both, by the residue's label.

    Examples
    --------
    >>> from openmm_tsf.analysis.compare_distances import backbone_pairs
    >>> backbone_pairs(["phi", "psi"]), backbone_pairs(["phi2", "psi2", "psi3", "chi1_2"])
    ({'': ('phi', 'psi')}, {'2': ('phi2', 'psi2')})
    """
    numbers = ["" if residue_of(n) is None else str(residue_of(n)) for n in names if is_backbone(n)]
    pairs = {each: (f"phi{each}", f"psi{each}") for each in dict.fromkeys(numbers)}
    return {each: pair for each, pair in pairs.items() if set(pair) <= set(names)}


def measure_energies(
    meter: DistanceMeter, run: Ensemble, reference: Ensemble, n: float
) -> dict[str, Distance]:
    """Return the W2 distances of the energies, in kJ/mol and in kT."""
    first, second = run.energy.ravel(), reference.energy.ravel()
    distance = meter.points(n, first, second, energy_wasserstein)
    return {
        "energy_w2_kJ_mol": distance,
        "energy_w2_kT": distance.scaled(1.0 / (KB * run.temperature)),
    }


def measure_torus(
    meter: DistanceMeter, run: Ensemble, reference: Ensemble, names: Sequence[str], n: float
) -> Distance:
    """Return the W2 distance on the torus of some torsions."""
    first, second = (
        np.stack([side.angles[name].ravel() for name in names], axis=-1)
        for side in (run, reference)
    )
    return meter.points(n, first, second, torus_wasserstein)


def measure_ramachandran(
    meter: DistanceMeter, run: Ensemble, reference: Ensemble, pair: tuple[str, str]
) -> dict[str, Any]:
    """Return total variation and KL(reference ‖ run) of one residue's (φ, ψ), on 64×64 bins.

    Of as many samples as are decorrelated in the run, and in one half of the reference (see
    `openmm_tsf.analysis.ramachandran.decorrelated_frames`): more would make the run look worse the
    more its frames are correlated. ``n_slowest`` are the frames of each side over the largest g.
    """
    (phi, psi), (phi0, psi0) = ([each.angles[k] for k in pair] for each in (run, reference))
    known = [decorrelated_frames(phi, psi), decorrelated_frames(phi0, psi0) / 2.0]
    n = float(min(known)) if np.isfinite(known).all() else float(meter.most)
    of_run, of_reference = (
        np.stack([a.ravel(), b.ravel()], axis=-1) for a, b in ((phi, psi), (phi0, psi0))
    )

    def histogram(points: Array) -> Array:
        return torus_histogram(points[:, 0], points[:, 1], BINS)

    def variation(sample: Array, target: Array) -> float:
        return total_variation(histogram(target), histogram(sample))

    def divergence(sample: Array, target: Array) -> float:
        return kl_divergence(histogram(target), histogram(sample))

    return {
        "total_variation": meter.points(n, of_run, of_reference, variation),
        "kl": meter.points(n, of_run, of_reference, divergence),
        "n_decorrelated": known[0],
        "n_decorrelated_reference": 2.0 * known[1],
        "n_slowest": {"run": slowest_frames(phi, psi), "reference": slowest_frames(phi0, psi0)},
    }


def measure_tica(
    run: Ensemble,
    reference: Ensemble,
    topology: mdtraj.Topology | None,
    names: Sequence[str],
    n_splits: int,
    n: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return the W2 distance in the plane of the reference's two slowest components.

    Of the features of frames (`openmm_tsf.analysis.tica.frame_features`) where both sides have
    positions, and the reference has them in the order of time; else of sine and cosine of the
    recorded torsions `names`.
    """
    by_frames = run.positions is not None and reference.positions is not None
    if by_frames and reference.in_order and topology is not None:
        first, second = (
            _by_walker(frame_features(topology, x.reshape(-1, *x.shape[2:])), x.shape[:2])
            for x in (run.positions, reference.positions)
            if x is not None
        )
        features = "distances of C, N and S, and sine and cosine of phi, psi and omega"
    else:
        first, second = (
            torsion_features([each.angles[name] for name in names]) for each in (run, reference)
        )
        features = f"sine and cosine of {', '.join(names)}"
    project, lag = fit_tica(second)
    meter = DistanceMeter(first.shape[:2], second.shape[:2], n_splits, rng)
    planes = [_project(project, each) for each in (first, second)]
    distance = meter.points(n, planes[0], planes[1], euclidean_wasserstein)
    return {"distance": distance, "features": features, "lag": lag}


def _by_walker(features: Array, shape: tuple[int, ...]) -> Array:
    return features.reshape(*shape[:2], -1)


def _project(project: Projection, features: Array) -> Array:
    return np.asarray(project(features.reshape(-1, features.shape[-1])), dtype=np.float64)
