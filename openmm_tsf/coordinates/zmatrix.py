"""A Z-matrix for any molecule, from the bonds of its Topology.

The bonds that close rings are left out, the rest is a tree. Each row places one atom by a bond, an
angle and a dihedral angle. Every tree bond with substituents at both ends has exactly one primary
torsion; the other substituents at that end are placed relative to the primary one (an improper
dihedral), so that a rotation about the bond moves them together and their coordinate is stiff.
About a linear group (a nitrile, an alkyne) no dihedral is defined that starts from an atom of it:
there the torsion partner is the next atom that is not in line.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import openmm.app as app

from openmm_tsf.coordinates.bond_graph import BondGraph
from openmm_tsf.utils.validation import require_array, require_entry

#: Kinds of internal coordinates.
BOND, ANGLE, TORSION, OFFSET = range(4)
_KIND_NAMES = ("bond", "angle", "torsion", "offset")


@dataclass(frozen=True)
class ZMatrix:
    """Rows of a Z-matrix in the order of placement.

    Attributes
    ----------
    rows : ndarray of int [N, 4]
        Atom, bond partner, angle partner, torsion partner; -1 where the first three rows have
        none. The torsion partner of a sibling is the primary substituent, bonded to the same atom.
    siblings, tetrahedral : ndarray of bool [N]
        Whether the row's dihedral is a sibling offset (improper) and not a primary torsion, and
        whether that is at a tetrahedral centre, which has a handedness.
    linear : ndarray of bool [N]
        Whether the row's angle is at an atom that lies in line with its two neighbours.
    levels : ndarray of int [N]
        Bonds from the root triple (0 for its three atoms): rows of one level are independent.
    atom_names : tuple of str
        A label per atom, e.g. ``ALA2-CA``.

    Examples
    --------
    >>> from openmm_tsf.coordinates import ZMatrix
    >>> from openmm_tsf.systems import alanine_dipeptide
    >>> molecule = alanine_dipeptide()
    >>> zmatrix = ZMatrix.from_topology(molecule.topology, molecule.positions)
    >>> zmatrix.rows.shape
    (22, 4)
    >>> zmatrix.coordinate_names[0], zmatrix.coordinate_names[-1]
    ('bond ALA2-CA ALA2-N', 'offset NME3-H3 NME3-C NME3-N NME3-H1')
    """

    rows: np.ndarray
    siblings: np.ndarray
    tetrahedral: np.ndarray
    linear: np.ndarray
    levels: np.ndarray
    atom_names: tuple[str, ...]

    @property
    def n_atoms(self) -> int:
        """The number of atoms N."""
        return len(self.rows)

    @property
    def coordinate_kinds(self) -> np.ndarray:
        """The kind of each coordinate [3N-6]: 0 bond, 1 angle, 2 primary torsion, 3 offset."""
        bonds, angles = np.full(self.n_atoms - 1, BOND), np.full(self.n_atoms - 2, ANGLE)
        return np.concatenate((bonds, angles, np.where(self.siblings[3:], OFFSET, TORSION)))

    @property
    def coordinate_names(self) -> list[str]:
        """The kind and the atoms of each coordinate, e.g. ``bond ALA2-CA ALA2-N``."""
        atoms = [*self.rows[1:, :2], *self.rows[2:, :3], *self.rows[3:]]
        return [
            " ".join((_KIND_NAMES[kind], *(self.atom_names[i] for i in partners)))
            for kind, partners in zip(self.coordinate_kinds, atoms, strict=True)
        ]

    @classmethod
    def from_topology(cls, topology: app.Topology, positions: Any) -> Self:
        """Build the Z-matrix of a single molecule.

        `topology` is an OpenMM Topology with its bonds, `positions` a reference conformation
        [N, 3] in nm, or a Quantity.

        Raises
        ------
        ValueError
            If there are fewer than four atoms, no bonds, several fragments, positions of another
            shape, all atoms in line by their bonds, or a dihedral angle that is undefined in the
            reference (atoms are named).
        """
        return cls.from_graph(BondGraph.from_topology(topology, positions))

    @classmethod
    def from_graph(cls, graph: BondGraph) -> Self:
        """Build the Z-matrix of the bonds of a molecule, as :meth:`from_topology` does."""
        return cls(*_Tree(graph).zmatrix_rows(), graph.names)

    def describe(self, row: int) -> str:
        """Return the row's atoms as text, e.g. ``ALA2-CA ALA2-N ACE1-C``."""
        return " ".join(self.atom_names[atom] for atom in self.rows[row] if atom >= 0)

    def to_config(self) -> dict[str, Any]:
        """Return lists from which :meth:`from_config` rebuilds the Z-matrix."""
        arrays = ("rows", "siblings", "tetrahedral", "linear", "levels")
        content = {name: getattr(self, name).tolist() for name in arrays}
        return {**content, "atom_names": list(self.atom_names)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Rebuild a Z-matrix from what :meth:`to_config` returned; ValueError for anything else."""
        rows = require_array(config, "rows", "i", -1, 4)
        n_atoms = len(rows)
        names = tuple(require_entry(config, "atom_names", list))
        if len(names) != n_atoms or not all(isinstance(name, str) for name in names):
            raise ValueError(f"atom_names: expected {n_atoms} names, got {names}")
        levels = require_array(config, "levels", "i", n_atoms)
        siblings = require_array(config, "siblings", "b", n_atoms)
        _check_rows(rows, levels, siblings)
        return cls(
            rows.astype(np.int64),
            siblings,
            require_array(config, "tetrahedral", "b", n_atoms),
            require_array(config, "linear", "b", n_atoms),
            levels.astype(np.int64),
            names,
        )


def _check_rows(rows: np.ndarray, levels: np.ndarray, siblings: np.ndarray) -> None:
    """Refuse rows [N, 4] that do not place every atom once, relative to atoms placed before."""
    n_atoms = len(rows)
    if n_atoms < 4 or not np.array_equal(np.sort(rows[:, 0]), np.arange(n_atoms)):
        raise ValueError(f"rows: expected each of 4 or more atoms once, got {rows[:, 0].tolist()}")
    row_of = np.empty(n_atoms, dtype=np.int64)
    row_of[rows[:, 0]] = np.arange(n_atoms)
    for index, (row, level) in enumerate(zip(rows.tolist(), levels.tolist(), strict=True)):
        partners = row[1 : min(index, 3) + 1]
        unused = row[len(partners) + 1 :]
        are_placed = all(0 <= atom < n_atoms for atom in partners) and all(
            row_of[atom] < index or levels[row_of[atom]] <= level for atom in partners
        )
        if index >= 3 and not siblings[index]:  # the frame of a torsion is that of a level before
            are_placed = are_placed and levels[row_of[row[3]]] < level
        are_distinct = len({row[0], *partners}) == len(partners) + 1
        if not are_placed or not are_distinct or any(atom != -1 for atom in unused):
            raise ValueError(f"rows: expected partners that are placed before, got {row}")
        if level != (0 if index < 3 else levels[row_of[row[1]]] + 1):
            raise ValueError(f"levels: expected one more than the bond partner's, got {level}")
    if (np.diff(levels) < 0).any():
        raise ValueError(f"levels: expected ascending levels, got {levels.tolist()}")


class _Tree:
    """The spanning tree of a molecule, breadth first from the root triple."""

    def __init__(self, graph: BondGraph) -> None:
        self.graph = graph
        self.root = graph.root_triple()
        parents = graph.spanning_tree(self.root)
        self.children: dict[int, list[int]] = {atom: [] for atom in range(len(graph.names))}
        for atom, parent in parents.items():
            if atom not in self.root:
                self.children[parent].append(atom)
        self.order = list(self.root)
        self.level = dict.fromkeys(self.root, 0)
        for atom in self.order:  # grows while it is read
            for child in self.children[atom]:
                self.level[child] = self.level[atom] + 1
                self.order.append(child)
        first, vertex, last = self.root
        self.angle_partner = {first: vertex, vertex: first, last: vertex}
        self.angle_partner |= {c: p for c, p in parents.items() if c not in self.root}

    def zmatrix_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return rows, siblings, tetrahedral, linear and levels in the order of placement."""
        first, vertex, last = self.root
        self.graph.check_angle(first, vertex, last)
        root = [(first, -1, -1, -1), (vertex, first, -1, -1), (last, vertex, first, -1)]
        others: list[tuple[tuple[int, int, int, int], bool]] = []
        sizes = self._subtree_sizes()
        for atom in self.order:
            if not self.children[atom]:
                continue
            ranked = sorted(self.children[atom], key=lambda child: self._rank(atom, child, sizes))
            axis = self.angle_partner[atom]
            if atom == vertex:  # `last` is the primary substituent: it defines the plane
                primary, rows = last, []
            else:
                primary = ranked.pop(0)
                anchor = self._anchor(atom)
                if axis not in self.graph.linear_atoms:
                    self.graph.check_angle(anchor, axis, atom)
                rows = [((primary, atom, axis, anchor), False)]
            rows += [((child, atom, axis, primary), True) for child in ranked]
            for row, _ in rows:
                self.graph.check_bond(row[0], atom)
            if len(ranked) > 0:  # siblings are placed relative to the primary substituent
                self.graph.check_angle(primary, atom, axis)
            others += rows
        # Within a level, atoms with children first: only they need a frame.
        others.sort(key=lambda item: (self.level[item[0][0]], not self.children[item[0][0]]))
        placed = [*((row, False) for row in root), *others]
        return (
            np.array([row for row, _ in placed], dtype=np.int64),
            np.array([is_sibling for _, is_sibling in placed], dtype=bool),
            np.array([is_sib and self.graph.is_tetrahedral(row[1]) for row, is_sib in placed]),
            np.array([row[1] in self.graph.linear_atoms for row, _ in placed]),
            np.array([self.level[row[0]] for row, _ in placed]),
        )

    def _subtree_sizes(self) -> dict[int, tuple[int, int]]:
        """Count heavy atoms and all atoms at and below each atom."""
        sizes: dict[int, tuple[int, int]] = {}
        for atom in reversed(self.order):
            below = [sizes[child] for child in self.children[atom]]
            n_heavy = int(self.graph.is_heavy(atom)) + sum(heavy for heavy, _ in below)
            sizes[atom] = n_heavy, 1 + sum(total for _, total in below)
        return sizes

    def _rank(
        self, parent: int, child: int, sizes: Mapping[int, tuple[int, int]]
    ) -> tuple[Any, ...]:
        """Rank candidates for the primary torsion: backbone first, then large substituents."""
        n_heavy, n_atoms = sizes[child]
        is_backbone = (parent, child) in self.graph.backbone
        return not is_backbone, -n_heavy, -n_atoms, -self.graph.atomic_numbers[child], child

    def _anchor(self, atom: int) -> int:
        """Return the torsion partner of the primary torsion about `atom` and its parent."""
        first, vertex, last = self.root
        axis = self.angle_partner[atom]
        if atom == first:
            return last
        default = first if axis == vertex else self.angle_partner[axis]
        if axis in self.graph.linear_atoms:
            return self._beyond_line(axis, default)
        backbone = self.graph.backbone
        if (axis, atom) in backbone and (axis, default) not in backbone:
            # The tree entered the chain through a side chain (a disulfide): phi and psi still need
            # the backbone atom on the other side.
            for other in self.children[axis]:
                if other != atom and (axis, other) in backbone:
                    return other
        return default

    def _beyond_line(self, previous: int, atom: int) -> int:
        """Return the first atom off the line that leads from `previous` to `atom`, rootwards."""
        first, vertex, last = self.root
        while True:
            is_turn = atom == vertex and previous == first
            following = last if is_turn else self.angle_partner[atom]
            if atom not in self.graph.linear_atoms:
                return following
            previous, atom = atom, following
