"""What recorded frames show of trouble: other handedness, cis peptide bonds, torsions at their cut.

Topology and frames are enough for the first two. Branch cuts are read from the flow's file as plain
numbers; no model is built.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import NoneType

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.statistics import group_means

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

#: A centre flatter than this (volume of any three unit bonds) in the reference is left out.
_FLAT = 0.05
#: Bins of a full turn for the density next to a cut: windows of 5 degrees on either side.
_BINS = 72


@dataclass(frozen=True)
class Centres:
    """Atoms with four neighbours, and their handedness.

    Attributes
    ----------
    names
        Of the atoms, as mdtraj writes them: ``ALA2-CA``.
    atoms
        Centre and three of its neighbours, for each of the four such triples [C, 4, 4].
    signs
        Signs [C, 4] of the volumes that they span in the reference.
    """

    names: tuple[str, ...]
    atoms: Indices
    signs: Array


def tetrahedral_centres(topology: mdtraj.Topology, positions: npt.ArrayLike) -> Centres:
    """The atoms with exactly four bonds, with the handedness of positions [N, 3]."""
    neighbours = _neighbours(topology)
    atoms = np.array(
        [
            [[atom, *triple] for triple in combinations(sorted(bonded), 3)]
            for atom, bonded in neighbours.items()
            if len(bonded) == 4
        ],
        dtype=np.int64,
    ).reshape(-1, 4, 4)
    volume = _volumes_of_triples(np.asarray(positions, dtype=np.float64)[None], atoms)[0]
    known = (np.abs(volume) > _FLAT).all(axis=1)
    names = tuple(str(topology.atom(int(centre))) for centre in atoms[known, 0, 0])
    return Centres(names, atoms[known], np.sign(volume[known]))


def signed_volumes(x: npt.ArrayLike, atoms: Indices) -> Array:
    """Volumes [F, C] that the unit bonds to three neighbours span, for x [F, N, 3]."""
    frames = np.asarray(x, dtype=np.float64)
    bonds = frames[:, atoms[:, 1:]] - frames[:, atoms[:, :1]]
    bonds /= np.linalg.norm(bonds, axis=-1, keepdims=True)
    first, second, third = np.moveaxis(bonds, 2, 0)
    return np.asarray(np.einsum("fci,fci->fc", np.cross(first, second), third))


def mirrored(x: npt.ArrayLike, centres: Centres) -> npt.NDArray[np.bool_]:
    """Whether each centre in each frame has the other handedness, [F, C].

    It has where all four triples of its neighbours span volumes of the other sign. A single triple
    goes flat in hot, bent frames whose handedness no coordinates would doubt.
    """
    turned = _volumes_of_triples(x, centres.atoms) * centres.signs < 0
    return np.asarray(turned.all(axis=-1))


def _volumes_of_triples(x: npt.ArrayLike, atoms: Indices) -> Array:
    """Volumes [F, C, 4] for atoms [C, 4, 4]."""
    volumes = signed_volumes(x, atoms.reshape(-1, 4))
    return volumes.reshape(len(volumes), *atoms.shape[:2])


def peptide_bonds(topology: mdtraj.Topology) -> tuple[tuple[str, ...], Indices]:
    """Names and atoms [P, 4] of every omega: carbon, amide carbon, amide nitrogen, carbon.

    Found by bonds and elements, so that caps, whose atoms have other names, are included.
    """
    neighbours = _neighbours(topology)
    symbol = [atom.element.symbol if atom.element else "" for atom in topology.atoms]
    names, quartets = [], []
    for carbon, bonded in neighbours.items():
        oxygens = [a for a in bonded if symbol[a] == "O" and len(neighbours[a]) == 1]
        if symbol[carbon] != "C" or len(bonded) != 3 or len(oxygens) != 1:
            continue
        for nitrogen in (a for a in bonded if symbol[a] == "N"):
            before = [a for a in bonded if symbol[a] == "C"]
            after = [a for a in neighbours[nitrogen] if symbol[a] == "C" and a != carbon]
            if not before or not after:
                continue  # a primary amide: nothing to be cis to
            # A proline's nitrogen has two: the alpha carbon bears the next carbonyl.
            after.sort(key=lambda a: (topology.atom(a).name != "CA", a))
            pair = topology.atom(carbon).residue, topology.atom(nitrogen).residue
            names.append(f"{pair[0]}-{pair[1]}")
            quartets.append([before[0], carbon, nitrogen, after[0]])
    return tuple(names), np.array(quartets, dtype=np.int64).reshape(-1, 4)


def cis(frames: mdtraj.Trajectory, quartets: Indices) -> npt.NDArray[np.bool_]:
    """Whether each omega of each frame is within 90 degrees of 0, [F, P]."""
    if not len(quartets):
        return np.zeros((frames.n_frames, 0), dtype=bool)
    omega = mdtraj.compute_dihedrals(frames, quartets, periodic=False)
    return np.asarray(np.abs(omega) < np.pi / 2)


def _neighbours(topology: mdtraj.Topology) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {atom.index: [] for atom in topology.atoms}
    for first, second in topology.bonds:
        found[first.index].append(second.index)
        found[second.index].append(first.index)
    return found


# ------------------------------------------------------------------------ branch cuts


@dataclass(frozen=True)
class Branches:
    """The dihedrals of a flow's coordinates and where their circles are cut.

    Attributes
    ----------
    names
        Their four atoms each.
    atoms
        [T, 4].
    cuts
        [T] in rad.
    """

    names: tuple[str, ...]
    atoms: Indices
    cuts: Array


def read_branches(path: Path) -> Branches | None:
    """The branch cuts in a flow file; None if its flow has no coordinates.

    Groups of equivalent hydrogens are left out: they turn freely, and are cut in thirds between
    copies that are the same.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is no flow file.
    """
    from openmm_tsf.coordinates.config import parse_layer_config
    from openmm_tsf.coordinates.zmatrix import ZMatrix
    from openmm_tsf.flows.serialization import read_flow_file
    from openmm_tsf.utils.validation import require_entry

    content = read_flow_file(path)
    try:
        layer = require_entry(content, "coordinates", dict | NoneType)
        if layer is None:
            return None
        zmatrix = ZMatrix.from_config(require_entry(layer, "zmatrix", dict))
        entries = parse_layer_config(layer, zmatrix.n_atoms)
    except ValueError as error:
        raise ValueError(f"{path}: damaged flow file: {error}") from error
    rows, siblings = zmatrix.rows[3:], zmatrix.siblings[3:]
    turning = {atom for group in entries["equivalent"] for atom in group}
    kept = np.array([bool(s) or int(row[0]) not in turning
                     for row, s in zip(rows, siblings, strict=True)], dtype=bool)  # fmt: skip
    names = tuple(" ".join(zmatrix.atom_names[int(atom)] for atom in row) for row in rows[kept])
    cuts = entries["branch_cuts"].numpy()[kept]
    return Branches(names, rows[kept].astype(np.int64), cuts)


@dataclass(frozen=True)
class Leak:
    """How much a sample populates the cut of one dihedral.

    Attributes
    ----------
    density
        Within 5 degrees of the cut, on its fuller side, over the fullest such window's.
    emptiest, emptiest_density
        The angle (rad) around which the two windows together hold least, and its density.
    n_at_cut
        Frames in both windows.
    below, above
        Frames on either side.
    z
        Of the difference between the sides, by the spread of walkers; NaN where it is not known.
    """

    density: float
    emptiest: float
    emptiest_density: float
    n_at_cut: int
    below: int
    above: int
    z: float


def leak(angles: npt.ArrayLike, cut: float) -> Leak:
    """Density of a dihedral [n, W] (rad) next to its cut.

    The true density is continuous there. Where the sides differ beyond their errors, walkers pile
    up at a wall that they do not pass.
    """
    values = np.asarray(angles, dtype=np.float64)
    from_cut = np.remainder(values - cut, 2 * np.pi)
    width = 2 * np.pi / _BINS
    bins = np.minimum((from_cut / width).astype(np.int64), _BINS - 1)
    counts = np.bincount(bins.ravel(), minlength=_BINS)
    pairs = counts + np.roll(counts, 1)  # windows on either side of each bin's lower edge
    lowest = int(pairs.argmin())
    peak = float(counts.max())
    above, below = int(counts[0]), int(counts[-1])
    means = group_means((bins == 0).astype(np.float64) - (bins == _BINS - 1))
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else np.nan
    z = float(means.mean() / error) if error > 0 else np.nan
    emptiest = float(np.remainder(cut + lowest * width + np.pi, 2 * np.pi) - np.pi)
    return Leak(
        max(above, below) / peak, emptiest, pairs[lowest] / 2 / peak, above + below, below, above, z
    )
