"""Labels and bonds of the atoms of a Topology."""

import numpy as np
import openmm.app as app


def atom_label(atom: app.topology.Atom) -> str:
    """Return the label of an atom for messages, e.g. ``ALA2-CA``."""
    return f"{atom.residue.name}{atom.residue.id}-{atom.name}"


def bonds_of(topology: app.Topology) -> np.ndarray:
    """Return the indices [n, 2] of bonded atoms."""
    pairs = [(first.index, second.index) for first, second in topology.bonds()]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
