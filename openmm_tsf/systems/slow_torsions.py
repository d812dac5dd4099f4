"""The torsions of a molecule about which it changes slowly: backbone, side chains, single bonds.

They are chosen by bonds and elements alone. A torsion that turns out to have a single well does no
harm; one that is left out hides basins.
"""

import re
from collections.abc import Mapping, Sequence

import mdtraj
import numpy as np
import numpy.typing as npt
import openmm.app as app

from openmm_tsf.utils.topology import Quartet, backbone_dihedrals, neighbours_of

#: Bonds in rings of at most this many atoms are not torsions of their own: the ring closes them.
_MAX_RING = 7
_CHI = (
    mdtraj.geometry.dihedral.indices_chi1,
    mdtraj.geometry.dihedral.indices_chi2,
    mdtraj.geometry.dihedral.indices_chi3,
    mdtraj.geometry.dihedral.indices_chi4,
)
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9.+-]")


def slow_torsions(topology: app.Topology) -> dict[str, Quartet]:
    """Return the slow torsions of a molecule by name: four bonded atoms each.

    They are phi and psi of :func:`~openmm_tsf.utils.topology.backbone_dihedrals`; chi1 to chi4 of
    amino acids, by the names of their atoms; and the other bonds between heavy atoms that can
    rotate, named by their two atoms (``"C3-C4"``), that of a carboxylic acid to its OH included.
    Left out are other bonds to OH, SH and NH, bonds in rings of up to 7 atoms, amides, bonds at
    linear atoms, and ends whose substituents are all equivalent (methyl, CF3, tert-butyl,
    carboxylate, phenyl), which have one conformation only.

    Names of torsions in several residues end with the residue's number in the Topology, counted
    from 1: ``phi2``, ``chi1_2``, ``C3-C4_2``.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.systems.slow_torsions import slow_torsions
    >>> slow_torsions(tsf.systems.alanine_dipeptide().topology)
    {'phi': (4, 6, 8, 14), 'psi': (6, 8, 14, 16)}
    """
    if not isinstance(topology, app.Topology):
        raise TypeError(f"topology: expected an openmm.app.Topology, got {type(topology).__name__}")
    atoms = list(topology.atoms())
    torsions = backbone_dihedrals(topology)
    covered = {frozenset(quartet[1:3]) for quartet in torsions.values()}
    chi = _side_chain_quartets(topology)
    found: list[tuple[str, Quartet]] = []
    for bond, quartet in _rotatable_bonds(topology).items():
        if bond in covered:
            continue
        if bond in chi:
            found.append(chi[bond])
        else:
            first, second = (_NOT_IN_NAMES.sub("", atoms[k].name)[:12] for k in quartet[1:3])
            found.append((f"{first}-{second}", quartet))
    residue = {quartet: atoms[quartet[1]].residue.index + 1 for _, quartet in found}
    single = _residue_without_number(torsions, atoms, set(residue.values()))
    for name, quartet in sorted(found, key=lambda item: (residue[item[1]], not _is_chi(item[0]))):
        number = residue[quartet]
        label = name if number == single else f"{name}_{number}"
        if label in torsions:  # atoms of the same names
            label = label.replace(name, f"{name}.{quartet[1]}.{quartet[2]}", 1)
        torsions[label] = quartet
    return torsions


def dihedral_angles(x: npt.ArrayLike, quartets: npt.ArrayLike) -> np.ndarray:
    """Return dihedral angles [..., D] in rad (IUPAC) of x [..., N, 3] for quartets [D, 4]."""
    points, indices = np.asarray(x), np.asarray(quartets, dtype=int).reshape(-1, 4)
    # Components first, [3, ..., D]: twice as fast as arithmetic on vectors, with the same bits.
    a, b, c, d = (
        np.ascontiguousarray(np.moveaxis(points[..., indices[:, k], :], -1, 0)) for k in range(4)
    )
    first, axis, last = b - a, c - b, d - c
    normal_1, normal_2 = _cross(first, axis), _cross(axis, last)
    sine = _dot(first, normal_2) * np.sqrt(_dot(axis, axis))
    return np.asarray(np.arctan2(sine, _dot(normal_1, normal_2)))


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the cross products of vectors [3, ...]."""
    product = np.empty_like(u)
    for k, i, j in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        np.multiply(u[i], v[j], out=product[k, ...])
        product[k, ...] -= u[j] * v[i]
    return product


def _dot(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the scalar products [...] of vectors [3, ...]."""
    products = u * v
    return np.asarray(products[0] + products[1] + products[2])


def torsion_angles(
    x: npt.ArrayLike, torsions: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """Return the angles [...] in rad of named torsions of positions [..., N, 3], by name.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles
    >>> molecule = tsf.systems.alanine_dipeptide()
    >>> angles = torsion_angles(molecule.positions, slow_torsions(molecule.topology))
    >>> {name: round(float(angle), 2) for name, angle in angles.items()}
    {'phi': 3.14, 'psi': 3.14}
    """
    angles = dihedral_angles(x, list(torsions.values()))
    return {name: angles[..., k] for k, name in enumerate(torsions)}


def _is_chi(name: str) -> bool:
    return re.match(r"chi\d", name) is not None


def _residue_without_number(
    backbone: Mapping[str, Quartet], atoms: list[app.topology.Atom], others: set[int]
) -> int | None:
    """Return the only residue with torsions, or that of an unnumbered phi and psi."""
    if "phi" in backbone:
        return int(atoms[backbone["phi"][1]].residue.index) + 1
    return next(iter(others)) if not backbone and len(others) == 1 else None


def _side_chain_quartets(topology: app.Topology) -> dict[frozenset[int], tuple[str, Quartet]]:
    """Return name and quartet of chi1, chi2, ... of amino acids by their central bond.

    mdtraj goes by names, which need not tell what is bonded in a row.
    """
    converted, neighbours = mdtraj.Topology.from_openmm(topology), neighbours_of(topology)
    table: dict[frozenset[int], tuple[str, Quartet]] = {}
    for number, indices in enumerate(_CHI, start=1):
        for a, b, c, d in indices(converted).tolist():
            if a not in neighbours[b] or d not in neighbours[c]:
                continue
            table.setdefault(frozenset((b, c)), (f"chi{number}", (a, b, c, d)))
    return table


def _rotatable_bonds(topology: app.Topology) -> dict[frozenset[int], Quartet]:
    """Return a quartet of heavy atoms for each bond that can rotate, by the bond's atoms."""
    neighbours = neighbours_of(topology)
    elements = [atom.element.symbol if atom.element else "" for atom in topology.atoms()]
    classes = _equivalence_classes(neighbours, elements)
    linear = _linear_atoms(neighbours, elements)

    def end(atom: int, other: int) -> int | None:
        """Return a heavy substituent of one end of a bond; None if rotation changes nothing."""
        around = [k for k in neighbours[atom] if k != other]
        heavy = [k for k in around if elements[k] not in ("H", "D")]
        if len(around) == 1 and _is_acid(other, atom, neighbours, elements):
            return around[0]
        if not heavy or (len(around) > 1 and len({classes[k] for k in around}) == 1):
            return None
        # A substituent that no other one equals defines the angle; the lowest index of these.
        kinds = [classes[k] for k in heavy]
        return min(heavy, key=lambda k: (kinds.count(classes[k]), k))

    bonds: dict[frozenset[int], Quartet] = {}
    for first, bonded in enumerate(neighbours):
        for second in (k for k in bonded if k > first):
            if not linear.isdisjoint((first, second)):
                continue
            before, after = end(first, second), end(second, first)
            if before is None or after is None or _is_amide(first, second, neighbours, elements):
                continue
            if not is_in_ring(first, second, neighbours):
                bonds[frozenset((first, second))] = (before, first, second, after)
    return bonds


def _equivalence_classes(neighbours: list[list[int]], elements: list[str]) -> list[int]:
    """Return a number for each atom, the same for atoms with the same surroundings by bonds."""
    classes = [sorted(set(elements)).index(element) for element in elements]
    n_before = 0
    while len(set(classes)) > n_before:
        n_before = len(set(classes))
        keys = [
            (classes[k], tuple(sorted(classes[other] for other in bonded)))
            for k, bonded in enumerate(neighbours)
        ]
        order = {key: number for number, key in enumerate(sorted(set(keys)))}
        classes = [order[key] for key in keys]
    return classes


def _linear_atoms(neighbours: list[list[int]], elements: list[str]) -> set[int]:
    """Return the atoms in line with their two neighbours, by bonds and elements.

    None where carbon lacks its hydrogens; see :mod:`openmm_tsf.coordinates.linear_groups`, whose
    rules need a conformation.
    """
    ends = {k for k, bonded in enumerate(neighbours) if len(bonded) == 1}
    pairs = {k for k, bonded in enumerate(neighbours) if len(bonded) == 2}
    if any(elements[k] == "C" and elements[neighbours[k][0]] != "N" for k in ends):
        return set()
    after_end = {
        k for k in pairs if any(e in ends and elements[e] in ("C", "N") for e in neighbours[k])
    }
    return {k for k in pairs if elements[k] == "C" or (elements[k] == "N" and k in after_end)}


def _is_amide(first: int, second: int, neighbours: list[list[int]], elements: list[str]) -> bool:
    for carbon, nitrogen in ((first, second), (second, first)):
        ends = [k for k in neighbours[carbon] if len(neighbours[k]) == 1]
        if (
            (elements[carbon], elements[nitrogen]) == ("C", "N")
            and len(neighbours[nitrogen]) == 3
            and any(elements[k] in ("O", "S") for k in ends)
        ):
            return True
    return False


def _is_acid(carbon: int, oxygen: int, neighbours: list[list[int]], elements: list[str]) -> bool:
    """Whether atoms are C and O(H) of a carboxylic acid, of which syn and anti mix slowly."""
    ends = [k for k in neighbours[carbon] if len(neighbours[k]) == 1]
    return (
        (elements[carbon], elements[oxygen]) == ("C", "O")
        and len(neighbours[carbon]) == 3
        and any(elements[k] in ("O", "S") for k in ends)
    )


def is_in_ring(first: int, second: int, neighbours: list[list[int]]) -> bool:
    """Return whether a bond is in a ring of at most 7 atoms."""
    reached, shell = {first}, [first]
    for step in range(_MAX_RING - 1):
        new = {
            other
            for atom in shell
            for other in neighbours[atom]
            if not (step == 0 and other == second)
        }
        shell = sorted(new - reached)
        reached |= new
        if second in reached:
            return True
    return False
