"""An OpenMM Topology as JSON.

A PDB file would cut long names, merge chains and lose elements and bonds.
"""

from pathlib import Path
from typing import Any

import openmm.app as app

from openmm_tsf.io.files import PathLike, read_json, write_json


def write_topology(topology: app.Topology, path: PathLike) -> None:
    """Write the chains, residues, atoms and bonds in their order."""

    def described(residue: app.topology.Residue) -> dict[str, Any]:
        atoms = [
            {"name": atom.name, "element": atom.element and atom.element.symbol}
            for atom in residue.atoms()
        ]
        return {"name": residue.name, "id": residue.id, "atoms": atoms}

    chains = [
        {"id": chain.id, "residues": [described(residue) for residue in chain.residues()]}
        for chain in topology.chains()
    ]
    bonds = [[bond[0].index, bond[1].index] for bond in topology.bonds()]
    write_json(path, {"chains": chains, "bonds": bonds})


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
            if min(first, second) < 0:
                raise ValueError(f"expected atoms from 0, got {first} and {second}")
            topology.addBond(atoms[first], atoms[second])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{Path(path)}: not a readable topology ({reason})") from error
    return topology


def _check_name(value: Any) -> Any:
    if not isinstance(value, str):
        raise TypeError(f"expected a name, got {str(value)[:40]!r}")
    return value
