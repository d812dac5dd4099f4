"""The distance between two (φ, ψ) samples, and the distance that chance alone would give."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.statistics import (
    group_labels,
    kl_divergence,
    statistical_inefficiency,
    torus_bins,
    torus_histogram,
    total_variation,
)

BINS = 64
_FLOOR_PAIRS = 20
_FLOOR_SEED = 2024


@dataclass(frozen=True)
class RamachandranDistance:
    """The distance of a sample from the reference on 64×64 bins, beside its floor.

    ``total_variation`` is ½Σ|p - q|, ``kl`` is KL(reference ‖ sample) with ε = 1e-10. The floors
    are the same between two blocks drawn from the reference, each of as many decorrelated frames as
    the sample has (or the reference, whichever is fewer). ``expected_total_variation`` is that of
    an exact sampler of this size from a reference of this size. See `chance_distance`,
    `decorrelated_frames` and, for ``n_slowest`` of the sample, `slowest_frames`.
    """

    total_variation: float
    floor_total_variation: float
    expected_total_variation: float
    kl: float
    floor_kl: float
    n_decorrelated: float
    n_decorrelated_reference: float
    n_slowest: float


def backbone_names(recorded: Sequence[str], residue: int | None) -> tuple[str, str]:
    """Return the names of a residue's φ and ψ among the recorded dihedrals; see `Run.backbone`."""
    if residue is None and {"phi", "psi"} <= set(recorded):
        return "phi", "psi"
    numbers = sorted(
        int(name[3:])
        for name in recorded
        if re.fullmatch(r"phi\d+", name) and f"psi{name[3:]}" in recorded
    )
    if residue is None and numbers:
        residue = numbers[0]
    if residue is None:
        raise ValueError(f"expected a run that recorded phi and psi, this one recorded {recorded}")
    if not numbers and {"phi", "psi"} <= set(recorded):
        raise ValueError(f"residue: this run has a single pair, phi and psi, got {residue!r}")
    if residue not in numbers:
        raise ValueError(
            f"residue: expected one of {numbers}, whose phi and psi are both among the "
            f"recorded {recorded}, got {residue!r}"
        )
    return f"phi{residue}", f"psi{residue}"


def decorrelated_frames(phi: npt.ArrayLike, psi: npt.ArrayLike, bins: int = BINS) -> float:
    """Return the number of independent frames whose histogram would be as noisy as this one.

    N_eff = p(1-p)/SE², summed over the bins: (1 - Σp²) / Σ SE², at most n W; NaN for fewer than two
    groups. The errors of the bins come from the spread between walkers (between blocks, where
    walkers are few), so that slow exchange of basins and fast motion within them enter as they
    enter the histogram. Dividing the frames by the g of the slowest observable instead would give
    far fewer, hence a floor so high that any sample passes.
    """
    index = torus_bins(phi, psi, bins)
    labels = group_labels(*index.shape)
    n_groups = int(labels.max()) + 1
    if n_groups < 2:
        return np.nan
    kept = labels >= 0
    flat = labels[kept] * bins**2 + index[kept]
    counts = np.bincount(flat, minlength=n_groups * bins**2).reshape(n_groups, bins**2)
    histograms = counts / counts.sum(axis=1, keepdims=True)
    variance = float(histograms.var(axis=0, ddof=1).sum() / n_groups)
    p = histograms.mean(axis=0)
    if variance == 0.0:
        return np.nan
    return float(min((1.0 - np.sum(p**2) + variance) / variance, index.size))


def slowest_frames(phi: npt.ArrayLike, psi: npt.ArrayLike) -> float:
    """Return the frames over the largest g among cos φ, sin φ, cos ψ, sin ψ and 1[φ > 0]."""
    first, second = np.asarray(phi), np.asarray(psi)
    observables = [np.cos(first), np.sin(first), np.cos(second), np.sin(second), first > 0]
    known = [g for g in map(statistical_inefficiency, observables) if np.isfinite(g)]
    return float(first.size / max(known)) if known else np.nan


def ramachandran_distance(
    phi: npt.ArrayLike,
    psi: npt.ArrayLike,
    reference_phi: npt.ArrayLike,
    reference_psi: npt.ArrayLike,
    bins: int = BINS,
) -> RamachandranDistance:
    """Return the distance of a sample [n, W] from a reference [F, W'], angles in rad."""
    sample = torus_histogram(phi, psi, bins)
    target = torus_histogram(reference_phi, reference_psi, bins)
    n_sample = decorrelated_frames(phi, psi, bins)
    n_target = decorrelated_frames(reference_phi, reference_psi, bins)
    floor_tv = floor_kl = expected = np.nan
    if np.isfinite(n_sample) and np.isfinite(n_target):
        counts = np.rint(target.ravel() * np.asarray(reference_phi).size).astype(np.int64)
        floor_tv, floor_kl = chance_distance(counts, min(n_sample, n_target))
        # Two blocks of unequal sizes are as noisy as two of the harmonic mean of the sizes.
        expected, _ = chance_distance(counts, 2.0 / (1.0 / n_sample + 1.0 / n_target))
    return RamachandranDistance(
        total_variation=total_variation(target, sample),
        floor_total_variation=floor_tv,
        expected_total_variation=expected,
        kl=kl_divergence(target, sample),
        floor_kl=floor_kl,
        n_decorrelated=n_sample,
        n_decorrelated_reference=n_target,
        n_slowest=slowest_frames(phi, psi),
    )


def chance_distance(counts: npt.NDArray[np.int64], n: float) -> tuple[float, float]:
    """Return total variation and KL between two disjoint blocks of `n` of the reference's frames.

    Means over 20 pairs of blocks, drawn from the `counts` per bin at random without replacement (a
    bootstrap would lack the bins that the reference has missed, and give too small a distance).
    Where the reference has fewer than 2n frames, its two halves are compared, and the distances
    scaled to n as n^(-1/2) and n^(-1). Sparse bins shrink more slowly than that, so the floor is
    then too low if anything.
    """
    half = int(counts.sum()) // 2
    size = min(max(1, round(n)), half)
    rng = np.random.default_rng(_FLOOR_SEED)
    distances = []
    for _ in range(_FLOOR_PAIRS):
        first = rng.multivariate_hypergeometric(counts, size)
        second = rng.multivariate_hypergeometric(counts - first, size)
        p, q = first / size, second / size
        distances.append((total_variation(p, q), kl_divergence(p, q)))
    tv, kl = np.mean(distances, axis=0)
    shrink = min(1.0, half / n)
    return float(tv * np.sqrt(shrink)), float(kl * shrink)
