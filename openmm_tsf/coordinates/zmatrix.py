"""A Z-matrix for any molecule, from the bonds of its Topology.

The bonds that close rings are left out, the rest is a tree. Each row places one atom by a bond, an
angle and a dihedral angle. Every tree bond with substituents at both ends has exactly one primary
torsion; the other substituents at that end are placed relative to the primary one (an improper
dihedral), so that a rotation about the bond moves them together and their own coordinate is stiff.
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import openmm.app as app

from openmm_tsf.coordinates.config import check_rows
from openmm_tsf.units import NANOMETER, in_unit
from openmm_tsf.utils.topology import atom_label
from openmm_tsf.utils.validation import require_array, require_entry

#: Reference angles closer than this to 0 or pi (radians) leave a dihedral angle undefined.
LINEAR_TOLERANCE = np.deg2rad(5.0)

_TETRAHEDRAL_ELEMENTS = frozenset({"B", "C", "N", "Si", "P", "S", None})


@dataclass(frozen=True)
class ZMatrix:
    """Rows of a Z-matrix in the order of placement.

    Attributes
    ----------
    rows : ndarray of int [N, 4]
        Atom, bond partner, angle partner, torsion partner; -1 where the first three rows have
        none. The dihedral angle of a row is that of its four atoms. The torsion partner of a
        sibling is the primary substituent, bonded to the same atom.
    siblings : ndarray of bool [N]
        Whether the row's dihedral is a sibling offset (improper) and not a primary torsion.
    tetrahedral : ndarray of bool [N]
        Whether the row is an offset at a tetrahedral centre, which has a handedness.
    levels : ndarray of int [N]
        Bonds from the root triple (0 for its three atoms): rows of one level are independent.
    atom_names : tuple of str
        A label per atom, e.g. ``ALA2-CA``.
    """

    rows: np.ndarray
    siblings: np.ndarray
    tetrahedral: np.ndarray
    levels: np.ndarray
    atom_names: tuple[str, ...]

    @property
    def n_atoms(self) -> int:
        """Number of atoms N."""
        return len(self.rows)

    @classmethod
    def from_topology(cls, topology: app.Topology, positions: Any) -> Self:
        """Build the Z-matrix of a single molecule.

        Parameters
        ----------
        topology
            An OpenMM Topology with its bonds.
        positions
            Reference conformation [N, 3] in nm, or a Quantity.

        Raises
        ------
        TypeError
            If `topology` is not an OpenMM Topology.
        ValueError
            If there are fewer than four atoms, no bonds, several fragments, positions of another
            shape, or a reference angle is linear (its atoms are named).
        """
        molecule = _Molecule.from_topology(topology, positions)
        root = molecule.root_triple()
        parents = molecule.spanning_tree(root)
        return cls(*_make_rows(molecule, root, parents), molecule.names)

    def describe(self, row: int) -> str:
        """The row's atoms as text, e.g. ``ALA2-CA ALA2-N ACE1-C``."""
        return " ".join(self.atom_names[atom] for atom in self.rows[row] if atom >= 0)

    def to_config(self) -> dict[str, Any]:
        """Plain lists from which :meth:`from_config` rebuilds the Z-matrix."""
        return {
            "rows": self.rows.tolist(),
            "siblings": self.siblings.tolist(),
            "tetrahedral": self.tetrahedral.tolist(),
            "levels": self.levels.tolist(),
            "atom_names": list(self.atom_names),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_config`.

        Raises
        ------
        ValueError
            If an entry is missing or not what :meth:`to_config` could have written.
        """
        rows = require_array(config, "rows", "i", -1, 4)
        n_atoms = len(rows)
        names = tuple(require_entry(config, "atom_names", list))
        if len(names) != n_atoms or not all(isinstance(name, str) for name in names):
            raise ValueError(f"atom_names: expected {n_atoms} names, got {names}")
        levels = require_array(config, "levels", "i", n_atoms)
        check_rows(rows, levels)
        return cls(
            rows.astype(np.int64),
            require_array(config, "siblings", "b", n_atoms),
            require_array(config, "tetrahedral", "b", n_atoms),
            levels.astype(np.int64),
            names,
        )


@dataclass(frozen=True)
class _Molecule:
    """The bond graph, with what is needed to rank atoms and bonds."""

    names: tuple[str, ...]
    elements: tuple[str | None, ...]
    atomic_numbers: tuple[int, ...]
    neighbours: tuple[tuple[int, ...], ...]
    backbone: frozenset[tuple[int, int]]
    bridges: frozenset[tuple[int, int]]
    alpha_triples: tuple[tuple[int, int, int], ...]
    positions: np.ndarray

    @classmethod
    def from_topology(cls, topology: app.Topology, positions: Any) -> "_Molecule":
        if not isinstance(topology, app.Topology):
            raise TypeError(
                f"topology: expected an openmm.app.Topology, got {type(topology).__name__}"
            )
        atoms = list(topology.atoms())
        n_atoms = len(atoms)
        if n_atoms < 4:
            raise ValueError(f"topology: expected at least 4 atoms, got {n_atoms}")
        xyz = np.asarray(in_unit(positions, NANOMETER, "positions"), dtype=np.float64)
        if xyz.shape != (n_atoms, 3):
            raise ValueError(f"positions: expected shape ({n_atoms}, 3) in nm, got {xyz.shape}")
        if not np.isfinite(xyz).all():
            raise ValueError("positions: expected finite numbers, got NaN or infinity")
        neighbours: list[set[int]] = [set() for _ in atoms]
        backbone: set[tuple[int, int]] = set()
        bridges: set[tuple[int, int]] = set()
        for first, second in topology.bonds():
            i, j = first.index, second.index
            neighbours[i].add(j)
            neighbours[j].add(i)
            if _is_backbone(first, second):
                backbone |= {(i, j), (j, i)}
            elif first.residue is not second.residue:
                bridges |= {(i, j), (j, i)}
        if not any(neighbours):
            raise ValueError(
                "topology: expected bonds, got none; Topology.createStandardBonds() adds those of "
                "standard residues, Topology.addBond any other"
            )
        names = tuple(atom_label(atom) for atom in atoms)
        _check_connected(neighbours, names)
        by_name: dict[int, dict[str, int]] = {}
        for atom in atoms:
            by_name.setdefault(atom.residue.index, {})[atom.name] = atom.index
        triples = tuple(
            (residue["N"], residue["CA"], residue["C"])
            for residue in by_name.values()
            if {"N", "CA", "C"} <= residue.keys()
            and {residue["N"], residue["C"]} <= neighbours[residue["CA"]]
        )
        return cls(
            names,
            tuple(None if atom.element is None else atom.element.symbol for atom in atoms),
            tuple(0 if atom.element is None else atom.element.atomic_number for atom in atoms),
            tuple(tuple(sorted(bonded)) for bonded in neighbours),
            frozenset(backbone),
            frozenset(bridges),
            triples,
            xyz,
        )

    def is_heavy(self, atom: int) -> bool:
        return self.elements[atom] not in ("H", "D")

    def angle(self, first: int, vertex: int, last: int) -> float:
        one = self.positions[first] - self.positions[vertex]
        two = self.positions[last] - self.positions[vertex]
        return float(np.arctan2(np.linalg.norm(np.cross(one, two)), one @ two))

    def check_angle(self, first: int, vertex: int, last: int) -> None:
        for atom in (first, last):
            if np.linalg.norm(self.positions[atom] - self.positions[vertex]) < 1e-3:
                raise ValueError(
                    f"positions: atoms {self.names[atom]} and {self.names[vertex]} coincide"
                )
        angle = self.angle(first, vertex, last)
        if min(angle, np.pi - angle) < LINEAR_TOLERANCE:
            raise ValueError(
                "positions: expected no linear angle, but "
                f"{self.names[first]} {self.names[vertex]} {self.names[last]} is at "
                f"{np.rad2deg(angle):.2f} degrees; dihedral angles about it are undefined"
            )

    def is_tetrahedral(self, atom: int) -> bool:
        return len(self.neighbours[atom]) == 4 and self.elements[atom] in _TETRAHEDRAL_ELEMENTS

    def eccentricity(self, atom: int) -> int:
        depth = {atom: 0}
        queue = deque([atom])
        while queue:
            here = queue.popleft()
            for other in self.neighbours[here]:
                if other not in depth:
                    depth[other] = depth[here] + 1
                    queue.append(other)
        return max(depth.values())

    def root_triple(self) -> tuple[int, int, int]:
        """Bonded atoms (a0, a1, a2): N, CA, C of the most central residue, else heavy and central.

        Central, because errors and the number of levels grow with the depth of the tree.
        """
        candidates: Sequence[tuple[int, int, int]] = self.alpha_triples
        if not candidates:
            candidates = [
                (first, vertex, last)
                for vertex, bonded in enumerate(self.neighbours)
                for first in bonded
                for last in bonded
                if first < last
            ]
        bent = [t for t in candidates if self._is_bent(t)]
        if not bent:
            self.check_angle(*candidates[0])  # names the atoms
        heavy = [sum(map(self.is_heavy, triple)) for triple in bent]
        heaviest = [t for t, count in zip(bent, heavy, strict=True) if count == max(heavy)]
        eccentricity = {vertex: self.eccentricity(vertex) for vertex in {t[1] for t in heaviest}}

        def rank(triple: tuple[int, int, int]) -> tuple[int, int, tuple[int, int, int]]:
            bonds = sum(len(self.neighbours[atom]) for atom in triple)
            return eccentricity[triple[1]], -bonds, triple

        return min(heaviest, key=rank)

    def _is_bent(self, triple: tuple[int, int, int]) -> bool:
        angle = self.angle(*triple)
        return min(angle, np.pi - angle) >= LINEAR_TOLERANCE

    def spanning_tree(self, root: tuple[int, int, int]) -> dict[int, int]:
        """Parent of each atom (Prim's algorithm): rings open far from the root.

        Backbone bonds come first and bridges between residues (disulfides) last, so that a ring
        through a bridge is never opened in the backbone.
        """
        parents = {root[0]: root[1], root[2]: root[1]}
        reached = set(root)
        heap: list[tuple[int, int, int, int, int]] = []

        def push(atom: int, depth: int) -> None:
            for other in self.neighbours[atom]:
                bond = (atom, other)
                order = 0 if bond in self.backbone else 2 if bond in self.bridges else 1
                heapq.heappush(heap, (order, depth, not self.is_heavy(other), other, atom))

        for atom in root:
            push(atom, 1)
        while heap:
            _, depth, _, atom, parent = heapq.heappop(heap)
            if atom not in reached:
                reached.add(atom)
                parents[atom] = parent
                push(atom, depth + 1)
        return parents


def _is_backbone(first: app.topology.Atom, second: app.topology.Atom) -> bool:
    pair = {first.name, second.name}
    if first.residue is second.residue:
        return pair in ({"N", "CA"}, {"CA", "C"})
    return pair == {"C", "N"}


def _check_connected(neighbours: Sequence[set[int]], names: Sequence[str]) -> None:
    """Refuse several fragments, naming an atom of each of the first few."""
    unseen = set(range(len(neighbours)))
    fragments = []
    while unseen:
        fragments.append(min(unseen))
        stack = [fragments[-1]]
        while stack:
            atom = stack.pop()
            if atom in unseen:
                unseen.remove(atom)
                stack.extend(neighbours[atom])
    if len(fragments) > 1:
        shown = ", ".join(names[atom] for atom in fragments[:4])
        raise ValueError(
            f"topology: expected one molecule connected by bonds, got {len(fragments)} fragments "
            f"(starting at {shown}{', ...' if len(fragments) > 4 else ''})"
        )


def _subtree_sizes(
    molecule: _Molecule, children: Mapping[int, Sequence[int]], order: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Heavy atoms and all atoms at and below each atom."""
    sizes: dict[int, tuple[int, int]] = {}
    for atom in reversed(order):
        heavy = int(molecule.is_heavy(atom)) + sum(sizes[c][0] for c in children[atom])
        sizes[atom] = heavy, 1 + sum(sizes[c][1] for c in children[atom])
    return sizes


def _make_rows(
    molecule: _Molecule, root: tuple[int, int, int], parents: Mapping[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, siblings, tetrahedral and levels in order of placement."""
    children: dict[int, list[int]] = {atom: [] for atom in range(len(molecule.names))}
    for atom, parent in parents.items():
        if atom not in root:
            children[parent].append(atom)
    order = list(root)
    level = dict.fromkeys(root, 0)
    for atom in order:  # grows while it is read: breadth first
        for child in children[atom]:
            level[child] = level[atom] + 1
            order.append(child)
    sizes = _subtree_sizes(molecule, children, order)

    def well_defined(parent: int, child: int) -> tuple[bool, int, int, int, int]:
        heavy, total = sizes[child]
        on_backbone = (parent, child) in molecule.backbone
        return not on_backbone, -heavy, -total, -molecule.atomic_numbers[child], child

    first, vertex, last = root
    angle_partner = {first: vertex, vertex: first, last: vertex}
    angle_partner |= {c: p for c, p in parents.items() if c not in root}
    molecule.check_angle(first, vertex, last)
    placed: list[tuple[int, tuple[int, int, int, int], bool]] = [
        (0, (first, -1, -1, -1), False),
        (0, (vertex, first, -1, -1), False),
        (0, (last, vertex, first, -1), False),
    ]
    for atom in order:
        if not children[atom]:
            continue
        ranked = sorted(children[atom], key=lambda child: well_defined(atom, child))
        axis = angle_partner[atom]
        if atom == vertex:  # `last` is the primary substituent here: it defines the plane
            primary, rows = last, []
        else:
            primary = ranked.pop(0)
            anchor = _anchor(molecule, children, root, angle_partner, atom)
            molecule.check_angle(anchor, axis, atom)
            rows = [((primary, atom, axis, anchor), False)]
        rows += [((child, atom, axis, primary), True) for child in ranked]
        for row, is_sibling in rows:
            molecule.check_angle(row[0], atom, axis)
            placed.append((level[row[0]], row, is_sibling))
    # Within a level, atoms that carry others first: only they need a frame.
    body = sorted(placed[3:], key=lambda item: (item[0], not children[item[1][0]]))
    placed[3:] = body
    rows_array = np.array([row for _, row, _ in placed], dtype=np.int64)
    siblings = np.array([is_sibling for _, _, is_sibling in placed], dtype=bool)
    tetrahedral = np.array(
        [sib and molecule.is_tetrahedral(row[1]) for _, row, sib in placed], dtype=bool
    )
    return (
        rows_array,
        siblings,
        tetrahedral,
        np.array([item[0] for item in placed]),
    )


def _anchor(
    molecule: _Molecule,
    children: Mapping[int, Sequence[int]],
    root: tuple[int, int, int],
    angle_partner: Mapping[int, int],
    atom: int,
) -> int:
    """Torsion partner of the primary torsion about the bond of `atom` to its axis atom."""
    first, vertex, last = root
    axis = angle_partner[atom]
    if atom == first:
        return last
    usual = first if axis == vertex else angle_partner[axis]
    if (axis, atom) in molecule.backbone and (axis, usual) not in molecule.backbone:
        # The chain was entered through a side chain (a disulfide): phi and psi still want the
        # backbone atom on the other side.
        for other in children[axis]:
            if other != atom and (axis, other) in molecule.backbone:
                return other
    return usual
