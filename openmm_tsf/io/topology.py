"""The structure of a molecule, Topology and positions, in the directory of a run.

``topology.json`` and ``positions.npz`` are what the package reads. ``topology.pdb`` is for other
programs: a PDB file rounds positions, cuts long names and loses elements, and its readers add bonds
of their own templates.
"""

from io import StringIO
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm.app as app

from openmm_tsf.io.files import PathLike, read_json, write_arrays, write_json, write_text
from openmm_tsf.io.npz import read_arrays
from openmm_tsf.utils.topology import bonds_of

POSITIONS, TOPOLOGY, PDB = "positions.npz", "topology.json", "topology.pdb"
#: Atoms by which residues of peptides and nucleic acids are bonded to the next.
_TEMPLATE_LINKS = (("C", "N"), ("O3'", "P"))


def write_structure(topology: app.Topology, positions: np.ndarray, directory: PathLike) -> None:
    """Write a Topology and positions [N, 3] in nm; ``topology.pdb`` is the last of the files."""
    folder = Path(directory)
    write_arrays(folder / POSITIONS, {"positions": positions})
    write_topology(topology, folder / TOPOLOGY)
    write_text(folder / PDB, _pdb_text(topology, positions))


def read_structure(directory: PathLike) -> tuple[app.Topology, np.ndarray]:
    """Return the Topology and the positions [N, 3] in nm that `write_structure` wrote."""
    folder = Path(directory)
    topology = read_topology(folder / TOPOLOGY)
    shape = {"positions": (topology.getNumAtoms(), 3)}
    return topology, read_arrays(folder / POSITIONS, "file of positions", shape)["positions"]


def read_pdb(path: Path) -> mdtraj.Trajectory:
    """Read a PDB file, with the bonds that mdtraj infers."""
    try:
        return mdtraj.load_pdb(str(path))
    except Exception as error:  # mdtraj's reader raises errors of many types
        raise ValueError(f"{path}: mdtraj cannot read it: {error!r}") from error


def _pdb_text(topology: app.Topology, positions: np.ndarray) -> str:
    """Return a PDB file with all bonds as CONECT records, whatever a reader's templates know.

    Readers bond consecutive residues of a chain: where that is wrong, the chain ends (TER).
    """
    copy, atoms = app.Topology(), {}
    bonds = {frozenset(pair) for pair in bonds_of(topology).tolist()}
    for chain in topology.chains():
        previous, new_chain = None, copy.addChain(str(chain.id))
        for residue in chain.residues():
            if previous is not None and _is_wrongly_bonded(previous, residue, bonds):
                new_chain = copy.addChain(str(chain.id))
            previous = residue
            code = residue.insertionCode
            new_residue = copy.addResidue(residue.name, new_chain, str(residue.id), code)
            for atom in residue.atoms():
                new_atom = copy.addAtom(atom.name, atom.element, new_residue)
                new_atom.formalCharge = getattr(atom, "formalCharge", None)  # from OpenMM 8.2
                atoms[atom.index] = new_atom
    for first, second in bonds_of(topology):
        copy.addBond(atoms[first], atoms[second])
    text = StringIO()
    # Without OpenMM's header, which has the date: equal runs write equal files.
    app.PDBFile.writeModel(copy, 10.0 * positions, text, keepIds=True)  # in Angstrom
    for residue in copy.residues():
        residue.name = ""  # OpenMM writes no bonds between residues with a template
    app.PDBFile.writeFooter(copy, text)
    return text.getvalue()


def _is_wrongly_bonded(
    first: app.topology.Residue, second: app.topology.Residue, bonds: set[frozenset[int]]
) -> bool:
    """Whether templates have a bond from a residue to the next that is not among the bonds."""
    from_first = {atom.name: atom.index for atom in first.atoms()}
    to_second = {atom.name: atom.index for atom in second.atoms()}
    return any(
        name in from_first
        and other in to_second
        and frozenset((from_first[name], to_second[other])) not in bonds
        for name, other in _TEMPLATE_LINKS
    )


def write_topology(topology: app.Topology, path: PathLike) -> None:
    """Write the chains, residues, atoms and bonds in their order."""

    def described(residue: app.topology.Residue) -> dict[str, Any]:
        atoms = [
            {"name": atom.name, "element": atom.element and atom.element.symbol}
            for atom in residue.atoms()
        ]
        return {"name": residue.name, "id": str(residue.id), "atoms": atoms}

    chains = [
        {"id": str(chain.id), "residues": [described(residue) for residue in chain.residues()]}
        for chain in topology.chains()
    ]
    write_json(path, {"chains": chains, "bonds": bonds_of(topology).tolist()})


def read_topology(path: PathLike) -> app.Topology:
    """Return the Topology that `write_topology` wrote."""
    content = read_json(path)
    topology = app.Topology()
    try:
        for chain in content["chains"]:
            new_chain = topology.addChain(_check_name(chain["id"]))
            for residue in chain["residues"]:
                new_residue = topology.addResidue(
                    _check_name(residue["name"]), new_chain, _check_name(residue["id"])
                )
                for atom in residue["atoms"]:
                    element = atom["element"]
                    if element is not None:
                        element = app.element.get_by_symbol(_check_name(element))
                    topology.addAtom(_check_name(atom["name"]), element, new_residue)
        atoms = list(topology.atoms())
        for first, second in content["bonds"]:
            if min(first, second) < 0 or first == second:
                raise ValueError(f"expected two atoms from 0, got {first} and {second}")
            topology.addBond(atoms[first], atoms[second])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{Path(path)}: not a readable topology ({reason})") from error
    return topology


def _check_name(value: Any) -> Any:
    if not isinstance(value, str):
        raise TypeError(f"expected a name, got {str(value)[:40]!r}")
    return value
