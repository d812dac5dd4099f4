"""Problems in recorded frames: opposite handedness, cis peptide bonds, dihedrals at branch cuts.

Topology and frames are enough for the first two. Branch cuts are read from the flow's file as plain
numbers; no model is built.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.statistics import Array, group_means
from openmm_tsf.utils.topology import neighbours_of

if TYPE_CHECKING:
    from openmm_tsf.coordinates.chirality import Chirality

Indices = npt.NDArray[np.int64]

#: Windows of the full circle: 5 degrees each.
_BINS = 72


@dataclass(frozen=True)
class Centres:
    """Tetrahedral atoms, and their handedness."""

    names: tuple[str, ...]  # as mdtraj writes them: ``ALA2-CA``
    chirality: "Chirality"


def tetrahedral_centres(topology: mdtraj.Topology, positions: npt.ArrayLike) -> Centres:
    """Return the tetrahedral atoms that are not flat, with their handedness in positions [N, 3]."""
    from openmm_tsf.coordinates.chirality import Chirality, find_centres, is_flat

    reference = np.asarray(positions, dtype=np.float64)
    elements = [atom.element.symbol if atom.element else None for atom in topology.atoms]
    centres = find_centres(neighbours_of(topology), elements)
    centres = centres[~is_flat(reference, centres)]
    names = [str(atom) for atom in topology.atoms]
    chirality = Chirality.from_reference(centres, reference, names)
    return Centres(tuple(names[centre] for centre in centres[:, 0]), chirality)


def is_mirrored(x: npt.ArrayLike, centres: Centres) -> npt.NDArray[np.bool_]:
    """Return whether each centre has the opposite handedness in each frame, [F, C].

    The rule is that of the flow's domain: see :mod:`openmm_tsf.coordinates.chirality`.
    """
    import torch

    frames = torch.from_numpy(np.asarray(x, dtype=np.float64))
    return np.asarray((centres.chirality.similarity(frames) <= 0).T.numpy())


def peptide_bonds(topology: mdtraj.Topology) -> tuple[tuple[str, ...], Indices]:
    """Return names and atoms [P, 4] of every omega: carbon, amide carbon, amide nitrogen, carbon.

    By bonds and elements, so that caps, whose atoms have other names, are included. The names are
    those of the two residues, followed by the amide's atoms where several have the same residues.
    """
    neighbours = neighbours_of(topology)
    symbol = [atom.element.symbol if atom.element else "" for atom in topology.atoms]
    names, quartets = [], []
    for carbon, bonded in enumerate(neighbours):
        oxygens = [a for a in bonded if symbol[a] == "O" and len(neighbours[a]) == 1]
        if symbol[carbon] != "C" or len(bonded) != 3 or len(oxygens) != 1:
            continue
        for nitrogen in (a for a in bonded if symbol[a] == "N"):
            before = [a for a in bonded if symbol[a] == "C"]
            after = [a for a in neighbours[nitrogen] if symbol[a] == "C" and a != carbon]
            if not before or not after:
                continue  # a primary amide: cis and trans are the same
            # The nitrogen of proline has two carbons: omega is defined by the alpha carbon.
            after.sort(key=lambda a: (topology.atom(a).name != "CA", a))
            pair = topology.atom(carbon).residue, topology.atom(nitrogen).residue
            names.append(f"{pair[0]}-{pair[1]}")
            quartets.append([before[0], carbon, nitrogen, after[0]])
    repeated = {name for name, count in Counter(names).items() if count > 1}
    labels = (
        f"{name} (atoms {quartet[1]} {quartet[2]})" if name in repeated else name
        for name, quartet in zip(names, quartets, strict=True)
    )
    return tuple(labels), np.array(quartets, dtype=np.int64).reshape(-1, 4)


def is_tertiary(topology: mdtraj.Topology, nitrogen: int) -> bool:
    """Return whether an amide's nitrogen has no hydrogen, as that of proline."""
    symbols = [atom.element.symbol if atom.element else "" for atom in topology.atoms]
    return not any(symbols[a] in ("H", "D") for a in neighbours_of(topology)[nitrogen])


def is_cis(frames: mdtraj.Trajectory, quartets: Indices) -> npt.NDArray[np.bool_]:
    """Return whether each omega of each frame is within 90 degrees of 0, [F, P]."""
    if not len(quartets):
        return np.zeros((frames.n_frames, 0), dtype=bool)
    omega = mdtraj.compute_dihedrals(frames, quartets, periodic=False)
    return np.asarray(np.abs(omega) < np.pi / 2)


@dataclass(frozen=True)
class Branches:
    """The dihedrals of a flow's coordinates and their branch cuts."""

    names: tuple[str, ...]  # names of the four atoms of each
    atoms: Indices  # [T, 4]
    cuts: Array  # [T] in rad


def read_branches(path: Path) -> Branches | None:
    """Read the branch cuts from a flow file; None if the flow has no internal coordinates.

    Groups of equivalent hydrogens are left out: they rotate freely, and their cuts separate
    equivalent thirds of the circle.
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
    equivalent = {atom for group in entries["equivalent"] for atom in group}
    kept = np.array(
        [bool(s) or int(row[0]) not in equivalent for row, s in zip(rows, siblings, strict=True)],
        dtype=bool,
    )
    names = tuple(" ".join(zmatrix.atom_names[int(atom)] for atom in row) for row in rows[kept])
    cuts = entries["branch_cuts"].numpy()[kept]
    return Branches(names, rows[kept].astype(np.int64), cuts)


@dataclass(frozen=True)
class Leak:
    """The density of samples next to the branch cut of one dihedral, in windows of 5 degrees."""

    density: float  # in the fuller window next to the cut, relative to the fullest of all
    emptiest: float  # the angle (rad) whose two adjacent windows hold fewest samples
    emptiest_density: float  # the mean of those two
    n_at_cut: int  # frames in both windows next to the cut
    below: int
    above: int
    z: float  # of the difference between the sides, by the spread of walkers; NaN if not known


def measure_leak(angles: npt.ArrayLike, cut: float) -> Leak:
    """Measure the density of a dihedral [n, W] (rad) next to its branch cut.

    The Boltzmann density is continuous at the cut: if its two sides differ beyond their errors,
    walkers accumulate at a cut that they do not cross.
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
    densities = max(above, below) / peak, emptiest, pairs[lowest] / 2 / peak
    return Leak(*densities, above + below, below, above, z)
