"""Molecules from a user's files, and in the directories of runs."""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import openmm
import openmm.app as app

from openmm_tsf.io.files import PathLike, read_text, write_text
from openmm_tsf.io.openmm_xml import read_openmm_xml
from openmm_tsf.io.run_config import read_config
from openmm_tsf.io.topology import PDB, read_structure, write_structure
from openmm_tsf.systems.bonds import add_bonds_of_system, unbonded_residue
from openmm_tsf.systems.consistency import check_no_solvent
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import as_positions
from openmm_tsf.utils.validation import require_entry

#: What is in files of other formats, for messages.
_OTHER_FORMATS = {
    "@<TRIPOS>": "a Mol2 file",
    "%VERSION": "an Amber topology (prmtop)",
    "V2000": "an SDF or MOL file",
    "V3000": "an SDF or MOL file",
    "<?xml": "an XML file",
    "PSF": "a CHARMM PSF",
}


def load_molecule(
    pdb: PathLike | None = None,
    system: PathLike | None = None,
    force_field: Sequence[str] | None = None,
) -> MolecularSystem:
    """Load a molecule from files; without any, return the shipped alanine dipeptide.

    `pdb` names a PDB or mmCIF file (also compressed by gzip) with all atoms of the molecule and no
    solvent: Topology and reference conformation. With it comes either `system`, a serialized System
    (XML) without constraints or a periodic box, whose bonds are added where the file has none
    (ligands without CONECT records), or `force_field`, the names of OpenMM force field files, e.g.
    ``["amber14-all.xml", "implicit/obc2.xml"]``.
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
    structure = _read_structure(Path(pdb))
    if system is not None:
        loaded = read_openmm_xml(system, openmm.System, "system")
        if loaded.getNumParticles() == structure.topology.getNumAtoms():
            positions = as_positions(structure.positions, loaded.getNumParticles())
            add_bonds_of_system(structure.topology, loaded, positions)
        check_no_solvent(structure.topology, f"pdb: {pdb}")
        return MolecularSystem(loaded, structure.topology, structure.positions)
    assert force_field is not None
    check_no_solvent(structure.topology, f"pdb: {pdb}")
    try:
        options = {"constraints": None, "rigidWater": False, "removeCMMotion": False}
        built = app.ForceField(*force_field).createSystem(
            structure.topology, nonbondedMethod=app.NoCutoff, **options
        )
    except Exception as error:
        given = f"{pdb} with {', '.join(force_field)}"
        message = f"force_field: OpenMM cannot build a System for {given}: {error}"
        if residue := unbonded_residue(structure.topology):
            message += (
                f" (the file has no bonds for atoms of {residue}: add its CONECT records, or give "
                "a System, whose bond terms are then used)"
            )
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
    """Read the molecule that a stage wrote into its directory, its measure in ``config.json``."""
    folder = Path(directory)
    topology, positions = read_structure(folder)
    system = read_openmm_xml(folder / "system.xml", openmm.System, "system")
    try:
        if system.getNumConstraints():
            choices = read_config(folder).get("choices", {})
            measure = require_entry(choices, "measure", str)
            return MolecularSystem(system, topology, positions, measure)
        return MolecularSystem(system, topology, positions)
    except ValueError as error:
        raise ValueError(f"{folder}: its files do not make a molecule: {error}") from error


def _read_structure(path: Path) -> app.PDBFile | app.PDBxFile:
    """Read a PDB or mmCIF file, whatever its name."""
    if not path.is_file():
        raise FileNotFoundError(f"pdb: no such file {path}")
    try:
        text = read_text(path, "PDB or mmCIF file")
        return _reader_of(text)(StringIO(text))
    except Exception as error:  # OpenMM's readers raise errors of many types
        raise ValueError(f"pdb: OpenMM cannot read {path}: {error}") from error


def _reader_of(text: str) -> type[app.PDBFile] | type[app.PDBxFile]:
    """Return OpenMM's reader of a text; refuse one without atoms, naming its format."""
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    if lines and lines[0].lower().startswith("data_"):
        if "_atom_site." not in text:
            raise ValueError("expected mmCIF with the category _atom_site, got a CIF file without")
        return app.PDBxFile
    if any(line.startswith(("ATOM", "HETATM")) for line in lines):
        return app.PDBFile
    for mark, name in _OTHER_FORMATS.items():
        if any(line.startswith(mark) or line.rstrip().endswith(mark) for line in lines[:10]):
            raise ValueError(f"expected PDB or mmCIF, got {name}")
    raise ValueError("there are no atoms in it, expected ATOM or HETATM records of PDB, or mmCIF")
