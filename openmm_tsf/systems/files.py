"""Molecules from a user's files, and in the directories of runs."""

from collections.abc import Sequence
from pathlib import Path

import openmm
import openmm.app as app

from openmm_tsf.io.files import PathLike, write_text
from openmm_tsf.io.openmm_xml import read_openmm_xml
from openmm_tsf.io.topology import PDB, read_structure, write_structure
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem


def load_molecule(
    pdb: PathLike | None = None,
    system: PathLike | None = None,
    force_field: Sequence[str] | None = None,
) -> MolecularSystem:
    """Load a molecule from files; without any, return the shipped alanine dipeptide.

    `pdb` names a PDB file with all atoms: Topology and reference conformation. With it comes either
    `system`, a serialized System (XML) without constraints or a periodic box, or `force_field`, the
    names of OpenMM force field files, e.g. ``["amber14-all.xml", "implicit/obc2.xml"]``.
    """
    if pdb is None:
        if system is not None or force_field:
            raise ValueError("pdb: expected a PDB file beside the System or force field, got none")
        return alanine_dipeptide()
    if (system is None) == (not force_field):
        got = "none" if system is None else "both"
        raise ValueError(
            f"system, force_field: expected exactly one of the two with a PDB file, got {got}"
        )
    structure = _read_pdb(Path(pdb))
    if system is not None:
        loaded = read_openmm_xml(system, openmm.System, "system")
        return MolecularSystem(loaded, structure.topology, structure.positions)
    assert force_field is not None
    try:
        options = {"constraints": None, "rigidWater": False, "removeCMMotion": False}
        built = app.ForceField(*force_field).createSystem(
            structure.topology, nonbondedMethod=app.NoCutoff, **options
        )
    except Exception as error:
        given = f"{pdb} with {', '.join(force_field)}"
        message = f"force_field: OpenMM cannot build a System for {given}: {error}"
        raise ValueError(message) from error
    return MolecularSystem(built, structure.topology, structure.positions)


def write_molecule(molecule: MolecularSystem, directory: PathLike) -> None:
    """Write the files that `read_molecule` reads, and ``topology.pdb`` for other programs."""
    write_structure(molecule.topology, molecule.positions, directory)
    write_text(Path(directory) / "system.xml", openmm.XmlSerializer.serialize(molecule.system))


def holds_molecule(directory: PathLike) -> bool:
    """Whether the directory has the files of a molecule."""
    return all((Path(directory) / name).is_file() for name in ("system.xml", PDB))


def read_molecule(directory: PathLike) -> MolecularSystem:
    """Read the molecule that a stage wrote into its directory."""
    folder = Path(directory)
    topology, positions = read_structure(folder)
    system = read_openmm_xml(folder / "system.xml", openmm.System, "system")
    try:
        return MolecularSystem(system, topology, positions)
    except ValueError as error:
        raise ValueError(f"{folder}: its files do not make a molecule: {error}") from error


def _read_pdb(path: Path) -> app.PDBFile:
    if not path.is_file():
        raise FileNotFoundError(f"pdb: no such file {path}")
    try:
        with open(path) as file:
            if not any(line.startswith(("ATOM", "HETATM")) for line in file):
                raise ValueError("there are no atoms in it")
            file.seek(0)
            return app.PDBFile(file)
    except Exception as error:  # OpenMM's reader raises errors of many types
        raise ValueError(f"pdb: OpenMM cannot read {path}: {error}") from error
