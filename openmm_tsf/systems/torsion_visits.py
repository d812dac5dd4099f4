"""How often frames in order of time came to each well of the slow torsions.

A torsion that went n times into a well and out again tells the well's free energy to about
sqrt(2/n) kT: the time in the well and the time outside are sums of n times each, exponentially
distributed. One that never left its well tells nothing of others.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.slow_torsions import is_in_ring, slow_torsions, torsion_angles
from openmm_tsf.utils.topology import neighbours_of
from openmm_tsf.utils.wells import N_BINS, Wells, angle_bins, count_angles, find_wells

#: Fewer visits than this leave an error of more than 0.45 kT.
ENOUGH_VISITS = 10
#: Wells with a smaller fraction of the frames are passed over.
MIN_POPULATION = 1e-3
#: The core of a well: where the density is at least this fraction of its highest.
_CORE = 0.5
#: Empty bins (30 degrees) on both sides of frames that are apart from all others.
_APART = 10
#: A torsion that leaves this part of the circle empty, and has one well, may have others.
_EMPTY = 0.5


class Visits(NamedTuple):
    """The visits to one well of a torsion, or to the only one."""

    torsion: str
    well: str  #: its name; that of the torsion where it has only one
    fraction: float  #: of the frames
    n_visits: int  #: into its core, from the core of another well


def count_torsion_visits(angles: Mapping[str, npt.ArrayLike]) -> list[Visits]:
    """Return the visits to all wells of torsions, from their angles [F] in rad in order of time.

    A visit begins in the core of a well (at least half of its highest density) once the torsion was
    in the core of another one; that of the first frame counts, too. ValueError without angles, and
    for NaN and infinity.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles
    >>> from openmm_tsf.systems.torsion_visits import count_torsion_visits
    >>> molecule = tsf.systems.alanine_dipeptide()
    >>> frames = tsf.MDDataset.shipped(molecule, stride=4).positions.numpy()
    >>> angles = torsion_angles(frames, slow_torsions(molecule.topology))
    >>> for visits in count_torsion_visits(angles):
    ...     print(f"{visits.well}: {visits.fraction:.2f} of the frames, {visits.n_visits} visits")
    phi > 0: 0.06 of the frames, 19 visits
    phi < 0: 0.94 of the frames, 19 visits
    psi alpha: 0.47 of the frames, 533 visits
    psi beta: 0.53 of the frames, 532 visits
    """
    found = []
    for name, values in angles.items():
        radians = np.asarray(values, dtype=np.float64)
        if radians.ndim != 1 or not len(radians) or not np.isfinite(radians).all():
            raise ValueError(f"angles: expected finite angles [F] of {name}, got {radians}")
        wells = find_wells(name, count_angles(radians))
        labels, n_visits = wells.labels(radians), _count_visits(radians, wells)
        for index, well in enumerate(wells.names or (name,)):
            fraction = float((labels == index).mean()) if wells.names else 1.0
            found.append(Visits(name, well, fraction, n_visits[index]))
    return found


def describe_rare_visits(dataset: MDDataset) -> list[str]:
    """Return, in words, the wells that frames in order of time visit fewer than ten times.

    One of each slow torsion, with the error that it leaves; what to do is said once, at the end.
    """
    angles, n_frames = _angles(dataset), len(dataset)
    by_torsion: dict[str, list[Visits]] = {}
    for each in count_torsion_visits(angles):
        by_torsion.setdefault(each.torsion, []).append(each)
    rare = {}
    for torsion, wells in by_torsion.items():
        few = [w for w in wells if w.n_visits < ENOUGH_VISITS and w.fraction >= MIN_POPULATION]
        if len(wells) > 1 and few:
            rare[torsion] = _describe(min(few, key=lambda w: (w.n_visits, w.fraction)), n_frames)
        elif len(wells) == 1:
            apart = list(_groups_apart(count_angles(angles[torsion])))
            if len(apart) > 1 and (n := min(apart)) >= MIN_POPULATION * n_frames:
                rare[torsion] = (
                    f"{torsion} was in another well in only {n} of {n_frames:,} frames, too few to "
                    "tell its population"
                )
    if len(rare) > 1:
        return [*rare.values(), f"for {', '.join(rare)}: {_REMEDY}"]
    return [f"{message}: {_REMEDY}" for message in rare.values()]


def describe_single_wells(dataset: MDDataset) -> list[str]:
    """Return, in words, the slow torsions that never left one well, if there are any.

    Left out are bonds in rings (the phi of proline).
    """
    angles = _angles(dataset)
    assert dataset.molecule is not None or not angles
    stuck = []
    for each in count_torsion_visits(angles):
        counts = count_angles(angles[each.torsion])
        is_alone = each.fraction == 1.0 and len(list(_groups_apart(counts))) == 1
        if is_alone and (counts == 0).mean() >= _EMPTY:
            stuck.append(each.torsion)
    if dataset.molecule is not None:
        torsions = slow_torsions(dataset.molecule.topology)
        neighbours = neighbours_of(dataset.molecule.topology)
        stuck = [name for name in stuck if not is_in_ring(*torsions[name][1:3], neighbours)]
    if not stuck:
        return []
    return [
        f"{', '.join(stuck)} never left one well in {len(dataset):,} frames, which cannot tell "
        f"whether there are others: {_REMEDY}, if there may be any"
    ]


_REMEDY = "run longer MD (--frames) or MD at a higher temperature, or give other frames"


def _describe(rarest: Visits, n_frames: int) -> str:
    n = max(rarest.n_visits, 1)
    error, longer = (2 / n) ** 0.5, ENOUGH_VISITS / n
    times = f"{n} time{'s' if n > 1 else ''}"
    return (
        f"{rarest.well} was visited {times} only, in {rarest.fraction:.2g} of {n_frames:,} frames, "
        f"which leaves an error of about {error:.1f} kT of its free energy; at this rate "
        f"{ENOUGH_VISITS} visits (0.4 kT) need {longer:.2g} times as many steps of MD"
    )


def _angles(dataset: MDDataset) -> dict[str, npt.NDArray[np.float64]]:
    """The slow torsions [F] by name; none of potentials on R^d, and of chains without an order."""
    if dataset.molecule is None or dataset.chains is not None:
        return {}
    positions = dataset.positions.detach().cpu().numpy()
    return torsion_angles(positions, slow_torsions(dataset.molecule.topology))


def _count_visits(values: npt.NDArray[np.float64], wells: Wells) -> list[int]:
    """Return the visits to each well of a torsion [F], in order of time; 1 for the only well."""
    if not wells.names:
        return [1]
    counts = np.asarray(wells.counts, dtype=np.float64)
    smooth = np.sum([np.roll(counts, shift) for shift in range(-2, 3)], axis=0)
    centres = 2 * np.pi * (np.arange(N_BINS) + 0.5) / N_BINS - np.pi
    of_bin = wells.labels(centres)
    highest = np.array([smooth[of_bin == k].max() for k in range(len(wells.names))])
    core_of_bin = np.where(smooth >= _CORE * highest[of_bin], of_bin, -1)
    core = core_of_bin[angle_bins(values, N_BINS)]
    core = core[core >= 0]
    entered = core[np.concatenate([[True], core[1:] != core[:-1]])] if len(core) else core
    return [int(n) for n in np.bincount(entered, minlength=len(wells.names))]


def _groups_apart(counts: npt.NDArray[np.int64]) -> Iterator[int]:
    """Yield the numbers of frames in each part of the circle between empty arcs of 30 degrees."""
    occupied = np.flatnonzero(counts)
    gaps = np.diff(np.append(occupied, occupied[0] + N_BINS))
    ends = np.flatnonzero(gaps > _APART)
    if len(ends) < 2:
        yield int(counts.sum())
        return
    after = np.cumsum(counts[occupied])[ends]
    yield from (int(n) for n in np.diff(np.append(after, after[0] + counts.sum())))
