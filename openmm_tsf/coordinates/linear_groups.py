"""Atoms whose two bonds lie in line: nitriles, alkynes, azides, allenes, and the like.

No dihedral angle is defined about a bond in line with the next one. Which atoms are linear is
decided by bonds and elements, so that it does not depend on the conformation at hand: angles only
tell carbon that lacks hydrogens.
"""

from collections.abc import Sequence

import numpy as np

#: Largest ring in which carbon with two neighbours is bent: eight members, cyclooctyne.
MAX_BENT_RING = 8
#: Two-coordinate carbon at a smaller reference angle (degrees) is no sp-hybridised carbon: its
#: hydrogens are missing. Bending a linear group so far takes more than 10 kT at 600 K.
MIN_LINEAR_ANGLE = 130.0

_METALS = frozenset({"Be", "Zn", "Cd", "Hg", "Cu", "Ag", "Au"})

Neighbours = Sequence[Sequence[int]]
Elements = Sequence[str | None]


def find_linear_atoms(
    neighbours: Neighbours, elements: Elements, positions: np.ndarray
) -> frozenset[int]:
    """Return the atoms with two neighbours that lie in line with them.

    `neighbours` are the atoms bonded to each atom, `positions` [N, 3] a reference conformation.
    Two-coordinate carbon is sp-hybridised, except in small rings, and where hydrogens are missing.
    """
    pairs = [atom for atom, bonded in enumerate(neighbours) if len(bonded) == 2]
    if _lacks_hydrogens(neighbours, elements):
        return frozenset()
    linear = {
        atom
        for atom in pairs
        if elements[atom] in _METALS
        or (
            elements[atom] == "C"
            and not _is_in_small_ring(atom, neighbours)
            and _angle(positions[[atom, *neighbours[atom]]]) >= MIN_LINEAR_ANGLE
        )
    }
    nitrogens = [atom for atom in pairs if elements[atom] == "N"]
    more = {atom for atom in nitrogens if _is_linear_nitrogen(atom, linear, neighbours, elements)}
    return frozenset(linear | more)


def _angle(points: np.ndarray) -> float:
    """The angle in degrees at the first of three points [3, 3] between the others."""
    one, other = points[1:] - points[0]
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(one, other)), one @ other)))


def _lacks_hydrogens(neighbours: Neighbours, elements: Elements) -> bool:
    """Whether carbon has a single neighbour, and that is no nitrogen (an isocyanide)."""
    return any(
        element == "C" and len(bonded) == 1 and elements[bonded[0]] != "N"
        for element, bonded in zip(elements, neighbours, strict=True)
    )


def _is_linear_nitrogen(
    nitrogen: int, linear: set[int], neighbours: Neighbours, elements: Elements
) -> bool:
    """Whether two-coordinate nitrogen is linear: imines, pyridines and azo groups are not."""
    for one, other in (neighbours[nitrogen], neighbours[nitrogen][::-1]):
        is_terminal = len(neighbours[one]) == 1
        if is_terminal and elements[one] in ("C", "N"):
            return True  # an isocyanide, azide or diazo group
        if one in linear and elements[one] == "C":
            beyond = next(atom for atom in neighbours[one] if atom != nitrogen)
            if len(neighbours[other]) == 1 and elements[other] == "O":
                return True  # a nitrile oxide
            if len(neighbours[beyond]) == 4:
                return True  # a nitrilium ion
            is_cumulated = len(neighbours[beyond]) == 1 and elements[beyond] in ("O", "S", "Se")
            if is_cumulated and len(neighbours[other]) > 1:
                return True  # an isocyanate or isothiocyanate: bent, but little energy from linear
    return False


def _is_in_small_ring(atom: int, neighbours: Neighbours) -> bool:
    """Whether a two-coordinate atom is in a ring of at most `MAX_BENT_RING` members."""
    start, end = neighbours[atom]
    reached, shell = {atom, start}, [start]
    for _ in range(MAX_BENT_RING - 2):  # bonds from one neighbour to the other
        shell = [other for inner in shell for other in neighbours[inner] if other not in reached]
        reached.update(shell)
        if end in reached:
            return True
    return False
