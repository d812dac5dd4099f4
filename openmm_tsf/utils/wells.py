"""The wells of one torsion: where its density has maxima that real barriers separate."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

#: Bins of the full circle (3 degrees), and the width of the kernel that smooths them in bins.
N_BINS, _KERNEL = 120, 2.5
#: Depth in kT that the density between two wells has to fall below the lower of them.
MIN_BARRIER = 1.0
#: A well has at least this many samples.
MIN_SAMPLES = 10
#: Square roots of the samples in the kernel's width at a well and at its border differ by this
#: much or more: some 3 standard errors of independent samples (the root of a count has 1/2).
_MIN_ROOTS = 2.0

_STAGGERED = {"g+": 60, "t": 180, "g-": -60}


@dataclass(frozen=True)
class Wells:
    """The wells of a torsion.

    `borders` [K] are in whole degrees, ascending in [-180, 180); well k lies between border k and
    the next one, the last across 180 degrees. Both are empty for a torsion with a single well.
    `counts` are the samples that they were found from, in 120 bins over [-180, 180).
    """

    borders: tuple[int, ...]
    names: tuple[str, ...]
    counts: tuple[int, ...]

    def labels(self, angles: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the index of the well of each angle (rad); 0 for a single well."""
        degrees = np.remainder(np.degrees(np.asarray(angles, dtype=np.float64)) + 180, 360) - 180
        after = np.searchsorted(np.asarray(self.borders), degrees, side="right")
        return (after - 1) % max(1, len(self.borders))


def angle_bins(angles: npt.ArrayLike, n_bins: int) -> npt.NDArray[np.int64]:
    """Return the index of the bin of each angle (rad, wrapped) among equal bins over [-π, π)."""
    wrapped = np.mod(np.asarray(angles, dtype=np.float64) + np.pi, 2 * np.pi)
    # np.mod may round up to 2π itself, which belongs to the first bin.
    return (wrapped / (2 * np.pi) * n_bins).astype(np.int64) % n_bins


def count_angles(angles: npt.ArrayLike) -> Counts:
    """Return the numbers [120] of angles (rad) in each bin."""
    return np.bincount(angle_bins(np.ravel(np.asarray(angles)), N_BINS), minlength=N_BINS)


def find_wells(name: str, counts: npt.ArrayLike) -> Wells:
    """Return the wells of a named torsion from its samples per bin [120].

    A well is a maximum of the smoothed density with at least 10 samples and, on both sides, a
    barrier of 1 kT or more at the samples' temperature that chance does not make; its borders are
    the minima.
    """
    samples = np.asarray(counts, dtype=np.int64)
    borders, peaks = _separate(samples)
    if len(borders) < 2:
        borders, peaks = [], []
    degrees = [_degrees(border) for border in borders]
    names = _name_wells(name, degrees, [_degrees(peak) for peak in peaks])
    return Wells(tuple(degrees), names, tuple(samples.tolist()))


def lacks_a_well(wells: Wells, counts: npt.ArrayLike) -> bool:
    """Return whether other samples per bin [120] have a well where those of `wells` are not."""
    others = find_wells("", counts)
    label = others.labels(np.radians([_degrees(k) + 1 for k in range(N_BINS)]))
    inside = np.bincount(label, weights=wells.counts, minlength=len(others.borders))
    return bool(others.borders) and bool((inside < MIN_SAMPLES).any())


def _degrees(position: int) -> int:
    """The lower edge of a bin."""
    return round(position * 360 / N_BINS) - 180


def _smooth(counts: Counts) -> npt.NDArray[np.float64]:
    """Return the expected number of samples within the kernel's width around each bin's edge."""
    bins = np.arange(N_BINS)
    distance = np.abs(bins[:, None] - (bins + 0.5))
    distance = np.minimum(distance, N_BINS - distance)
    weights = np.exp(-0.5 * (distance / _KERNEL) ** 2)
    return np.asarray(weights @ counts, dtype=np.float64)


def _separate(counts: Counts) -> tuple[list[int], list[int]]:
    """Return the bins of borders, ascending, and of the peak of the well after each of them."""
    density = _smooth(counts)
    is_peak = (density > np.roll(density, 1)) & (density >= np.roll(density, -1))
    peaks = np.flatnonzero(is_peak).tolist()
    if len(peaks) < 2:
        return [], []

    def lowest(first: int, last: int) -> int:
        between = np.arange(first, last + 1 if last > first else last + N_BINS + 1) % N_BINS
        return int(between[density[between].argmin()])

    # Border k lies between well k - 1 and well k.
    borders = [lowest(peaks[k - 1], peaks[k]) for k in range(len(peaks))]
    while len(peaks) > 1:
        k = _least_border(density, counts, borders, peaks)
        if k is None:
            break
        peaks[k - 1] = max(peaks[k - 1], peaks[k], key=lambda peak: density[peak])
        del borders[k], peaks[k]
    start = int(np.argmin(borders))
    return borders[start:] + borders[:start], peaks[start:] + peaks[:start]


def _least_border(
    density: npt.NDArray[np.float64], counts: Counts, borders: list[int], peaks: list[int]
) -> int | None:
    """Return the border that separates least; None if all of them separate two wells."""
    n = len(peaks)
    depth = []
    for k in range(n):
        low, peak = density[borders[k]], min(density[peaks[k - 1]], density[peaks[k]])
        barrier = np.log(peak) - np.log(max(low, np.finfo(float).tiny))
        depth.append(min(barrier / MIN_BARRIER, (np.sqrt(peak) - np.sqrt(low)) / _MIN_ROOTS))
    if min(depth) < 1:
        return int(np.argmin(depth))
    sizes = []
    for k in range(n):
        length = (borders[(k + 1) % n] - borders[k]) % N_BINS
        sizes.append(int(np.roll(counts, -borders[k])[:length].sum()))
    smallest = int(np.argmin(sizes))
    if sizes[smallest] >= MIN_SAMPLES:
        return None
    return min((smallest, (smallest + 1) % n), key=lambda k: depth[k])


def _name_wells(name: str, borders: Sequence[int], peaks: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the wells, those of phi, psi and chi as usual, others by their peak."""
    if not borders:
        return ()
    usual: list[str] = []
    if re.fullmatch(r"phi\d*", name) and len(peaks) == 2:
        usual = [f"{name} > 0" if peak > 0 else f"{name} < 0" for peak in peaks]
    elif re.fullmatch(r"psi\d*", name) and len(peaks) == 2:
        usual = [f"{name} {'alpha' if -120 <= peak < 75 else 'beta'}" for peak in peaks]
    elif re.match(r"chi\d", name) and (len(peaks) == 3 or all(map(_is_staggered, peaks))):
        usual = [f"{name} {_staggered(peak)}" for peak in peaks]
    if len(set(usual)) == len(peaks):
        return tuple(usual)
    rounded = [30 * round(peak / 30) for peak in peaks]
    chosen = rounded if len({r % 360 for r in rounded}) == len(peaks) else peaks
    return tuple(f"{name} {180 if degrees == -180 else degrees}" for degrees in chosen)


def _is_staggered(peak: int) -> bool:
    return abs(peak % 120 - 60) < 25


def _staggered(peak: int) -> str:
    return min(_STAGGERED, key=lambda k: abs((peak - _STAGGERED[k] + 180) % 360 - 180))
