"""The bonds of a molecule as a graph, and the spanning tree on which its Z-matrix is built."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Self

import numpy as np
import openmm.app as app

from openmm_tsf.coordinates.chirality import find_centres, is_tetrahedral
from openmm_tsf.coordinates.linear_groups import find_linear_atoms
from openmm_tsf.units import as_positions
from openmm_tsf.utils.topology import atom_label, neighbours_of

#: Angles closer than this to 0 or pi (radians) leave a dihedral angle about their bonds undefined,
#: at atoms with more than two neighbours: these keep such an angle.
LINEAR_TOLERANCE = np.deg2rad(5.0)
#: The same at atoms with two neighbours, which are bent in other conformations.
LINEAR_TOLERANCE_OF_PAIRS = np.deg2rad(0.1)

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class BondGraph:
    """The bonded atoms of one molecule and what is needed to rank atoms and bonds.

    An atom without an element has None and 0 in `elements` and `atomic_numbers`. `backbone` are
    peptide backbone bonds, `bridges` other bonds between residues, both in both directions;
    `alpha_triples` are N, CA and C of the residues that have them; `positions` [N, 3] in nm;
    `constrained` are bonds of fixed length, in both directions.
    """

    names: tuple[str, ...]
    elements: tuple[str | None, ...]
    atomic_numbers: tuple[int, ...]
    neighbours: tuple[tuple[int, ...], ...]
    backbone: frozenset[tuple[int, int]]
    bridges: frozenset[tuple[int, int]]
    alpha_triples: tuple[Triple, ...]
    positions: np.ndarray
    constrained: frozenset[tuple[int, int]] = frozenset()

    @classmethod
    def from_topology(
        cls, topology: app.Topology, positions: Any, constrained: Iterable[Sequence[int]] = ()
    ) -> Self:
        """Return the graph of a Topology; the errors are those of `ZMatrix.from_topology`.

        `constrained` are pairs of bonded atoms at a fixed distance.
        """
        if not isinstance(topology, app.Topology):
            got = type(topology).__name__
            raise TypeError(f"topology: expected an openmm.app.Topology, got {got}")
        atoms = list(topology.atoms())
        n_atoms = len(atoms)
        if n_atoms < 4:
            raise ValueError(f"topology: expected at least 4 atoms, got {n_atoms}")
        xyz = as_positions(positions, n_atoms)
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
            hint = (
                "Topology.createStandardBonds() adds those of standard residues, addBond others; a "
                "PDB file has them in CONECT records"
            )
            raise ValueError(f"topology: expected bonds, got none; {hint}")
        names = tuple(atom_label(atom) for atom in atoms)
        _check_connected(neighbours, names)
        residues: dict[int, dict[str, int]] = {}
        for atom in atoms:
            residues.setdefault(atom.residue.index, {})[atom.name] = atom.index
        alpha_triples = tuple(
            (residue["N"], residue["CA"], residue["C"])
            for residue in residues.values()
            if {"N", "CA", "C"} <= residue.keys()
            and {residue["N"], residue["C"]} <= neighbours[residue["CA"]]
        )
        elements = tuple(None if atom.element is None else atom.element.symbol for atom in atoms)
        numbers = tuple(0 if atom.element is None else atom.element.atomic_number for atom in atoms)
        bonded_to = tuple(tuple(sorted(bonded)) for bonded in neighbours)
        bonds = frozenset(backbone), frozenset(bridges)
        fixed = frozenset((i, j) for a, b in constrained for i, j in ((a, b), (b, a)))
        return cls(names, elements, numbers, bonded_to, *bonds, alpha_triples, xyz, fixed)

    def is_heavy(self, atom: int) -> bool:
        """Whether the atom is not a hydrogen."""
        return self.elements[atom] not in ("H", "D")

    def is_tetrahedral(self, atom: int) -> bool:
        """Whether the atom has four neighbours and an element that is then tetrahedral."""
        return is_tetrahedral(len(self.neighbours[atom]), self.elements[atom])

    @cached_property
    def centres(self) -> np.ndarray:
        """The tetrahedral atoms with their neighbours, int [C, 5]."""
        return find_centres(self.neighbours, self.elements)

    @cached_property
    def linear_atoms(self) -> frozenset[int]:
        """The atoms that lie in line with their two neighbours."""
        return find_linear_atoms(self.neighbours, self.elements, self.positions)

    def check_bond(self, first: int, second: int) -> None:
        """Refuse bonded atoms that coincide in the reference."""
        if np.linalg.norm(self.positions[first] - self.positions[second]) < 1e-3:
            pair = f"{self.names[first]} and {self.names[second]}"
            raise ValueError(f"positions: atoms {pair} coincide")

    def check_angle(self, first: int, vertex: int, last: int) -> None:
        """Refuse a reference angle that leaves dihedral angles undefined, naming its atoms."""
        for atom in (first, last):
            self.check_bond(atom, vertex)
        if not self._is_bent(first, vertex, last):
            names = f"{self.names[first]} {self.names[vertex]} {self.names[last]}"
            degrees = np.rad2deg(self._angle(first, vertex, last))
            what = f"{names} is at {degrees:.2f} degrees, without dihedral angles about it"
            hint = "give a conformation in which it is bent, such as a frame of dynamics"
            raise ValueError(f"positions: expected no linear angle, but {what}; {hint}")

    def _angle(self, first: int, vertex: int, last: int) -> float:
        one = self.positions[first] - self.positions[vertex]
        two = self.positions[last] - self.positions[vertex]
        return float(np.arctan2(np.linalg.norm(np.cross(one, two)), one @ two))

    def _is_bent(self, first: int, vertex: int, last: int) -> bool:
        angle = self._angle(first, vertex, last)
        is_pair = len(self.neighbours[vertex]) == 2
        tolerance = LINEAR_TOLERANCE_OF_PAIRS if is_pair else LINEAR_TOLERANCE
        return min(angle, np.pi - angle) >= tolerance

    def _eccentricity(self, atom: int) -> int:
        """Number of bonds to the farthest atom."""
        depth, queue = {atom: 0}, [atom]
        for current in queue:  # grows while it is read
            for other in self.neighbours[current]:
                if other not in depth:
                    depth[other] = depth[current] + 1
                    queue.append(other)
        return max(depth.values())

    def root_triple(self) -> Triple:
        """Return three bonded atoms (a0, a1, a2) for the root of the tree.

        N, CA, C of the most central residue, or else heavy atoms at the centre: rounding errors and
        the number of levels grow with the depth of the tree. They are not in line.
        """
        candidates: Sequence[Triple] = self.alpha_triples or [
            (first, vertex, last)
            for vertex, bonded in enumerate(self.neighbours)
            if vertex not in self.linear_atoms
            for first, last in combinations(bonded, 2)  # ascending
        ]
        if not candidates:
            linear = ", ".join(self.names[atom] for atom in sorted(self.linear_atoms))
            way_out = "molecular dynamics (openmm-tsf md) samples it without a flow"
            raise ValueError(
                "topology: expected no linear angle at one atom at least, but all atoms with two "
                f"neighbours ({linear}) are in line, without dihedral angles; {way_out}"
            )
        bent = [triple for triple in candidates if self._is_bent(*triple)]
        if not bent:
            self.check_angle(*candidates[0])  # raises, and names the atoms
        n_heavy = {triple: sum(map(self.is_heavy, triple)) for triple in bent}
        most = max(n_heavy.values())
        heaviest = [triple for triple in bent if n_heavy[triple] == most]
        eccentricity = {vertex: self._eccentricity(vertex) for vertex in {t[1] for t in heaviest}}

        def rank(triple: Triple) -> tuple[int, int, Triple]:
            n_bonds = sum(len(self.neighbours[atom]) for atom in triple)
            return eccentricity[triple[1]], -n_bonds, triple

        return min(heaviest, key=rank)

    def spanning_tree(self, root: Triple) -> dict[int, int]:
        """Return the parent of each atom (Prim's algorithm): rings open far from the root.

        Backbone bonds come first and bridges between residues (disulfides) last, so that a ring
        through a bridge is never opened in the backbone. Bonds of fixed length come before all
        others: they are never those that are left out.
        """
        parents = {root[0]: root[1], root[2]: root[1]}
        reached = set(root)
        heap: list[tuple[int, int, int, int, int]] = []

        def add_bonds(atom: int, depth: int) -> None:
            for other in self.neighbours[atom]:
                bond = (atom, other)
                order = 0 if bond in self.backbone else 2 if bond in self.bridges else 1
                if bond in self.constrained:
                    order = -1
                heapq.heappush(heap, (order, depth, not self.is_heavy(other), other, atom))

        for atom in root:
            add_bonds(atom, 1)
        while heap:
            _, depth, _, atom, parent = heapq.heappop(heap)
            if atom not in reached:
                reached.add(atom)
                parents[atom] = parent
                add_bonds(atom, depth + 1)
        return parents


def centres_of(topology: app.Topology) -> np.ndarray:
    """Return the tetrahedral atoms of a Topology with their neighbours in order, int [C, 5]."""
    elements = [atom.element and atom.element.symbol for atom in topology.atoms()]
    return find_centres(neighbours_of(topology), elements)


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
        shown = ", ".join([names[atom] for atom in fragments[:4]] + ["..."] * (len(fragments) > 4))
        got = f"{len(fragments)} fragments (starting at {shown})"
        hint = "other molecules must be left out, missing bonds added (CONECT records of PDB files)"
        raise ValueError(f"topology: expected one molecule connected by bonds, got {got}; {hint}")
