"""A Topology as JSON: all that a PDB file cuts, merges or reorders (names, elements, bonds)."""

from pathlib import Path
from typing import Any

import openmm.app as app

from openmm_tsf.io.files import PathLike, read_json, write_json


def write_topology(topology: app.Topology, path: PathLike) -> None:
    """Write chains, residues, atoms and bonds, in order."""
    chains = [
        {
            "id": chain.id,
            "residues": [
                {
                    "name": residue.name,
                    "id": residue.id,
                    "atoms": [
                        {"name": atom.name, "element": atom.element and atom.element.symbol}
                        for atom in residue.atoms()
                    ],
                }
                for residue in chain.residues()
            ],
        }
        for chain in topology.chains()
    ]
    bonds = [[bond[0].index, bond[1].index] for bond in topology.bonds()]
    write_json(path, {"chains": chains, "bonds": bonds})


def read_topology(path: PathLike) -> app.Topology:
    """What `write_topology` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged.
    """
    content = read_json(path)
    topology = app.Topology()
    try:
        for chain in content["chains"]:
            new_chain = topology.addChain(_word(chain["id"]))
            for residue in chain["residues"]:
                new_residue = topology.addResidue(
                    _word(residue["name"]), new_chain, _word(residue["id"])
                )
                for atom in residue["atoms"]:
                    symbol = atom["element"]
                    element = None if symbol is None else app.element.get_by_symbol(_word(symbol))
                    topology.addAtom(_word(atom["name"]), element, new_residue)
        atoms = list(topology.atoms())
        for first, second in content["bonds"]:
            if min(first, second) < 0:
                raise ValueError(f"expected atoms from 0, got {first} and {second}")
            topology.addBond(atoms[first], atoms[second])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise ValueError(f"{Path(path)}: not a readable topology ({kind}: {error})") from error
    return topology


def _word(value: Any) -> Any:
    if not isinstance(value, str):
        raise TypeError(f"expected a name, got {str(value)[:40]!r}")
    return value
