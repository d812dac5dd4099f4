"""Molecules from a user's files, and in the directories of runs."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import openmm

from openmm_tsf.io.files import PathLike, write_text
from openmm_tsf.io.openmm_xml import read_openmm_xml
from openmm_tsf.io.run_config import read_config
from openmm_tsf.io.topology import PDB, read_structure, write_structure
from openmm_tsf.systems.bonds import add_bonds_of_system, unbonded_residue
from openmm_tsf.systems.consistency import check_no_solvent
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.parameter_files import (
    IMPLICIT_SOLVENTS,
    Parameters,
    check_constraints,
    check_implicit_solvent,
    has_implicit_solvent,
    read_force_field,
    read_prmtop,
    read_psf,
    read_top,
)
from openmm_tsf.systems.structures import Structure, read_structure_of
from openmm_tsf.utils.validation import require_entry

logger = logging.getLogger(__name__)

#: The coordinates that usually come with each file of parameters, and those that may.
_COORDINATES = {
    "system": "pdb", "force_field": "pdb", "prmtop": "inpcrd", "top": "gro", "psf": "crd",
}  # fmt: skip


def load_molecule(
    pdb: Any = None,
    system: Any = None,
    force_field: Any = None,
    *,
    prmtop: Any = None,
    inpcrd: Any = None,
    top: Any = None,
    gro: Any = None,
    include_dir: PathLike | None = None,
    psf: Any = None,
    crd: Any = None,
    parameters: Any = None,
    implicit_solvent: Any = None,
    constraints: Any = None,
) -> MolecularSystem:
    """Load a molecule from the files of OpenMM, Amber, GROMACS or CHARMM.

    Every argument takes a path, or the object that ``openmm.app`` loaded from it. One of `system`,
    `force_field`, `prmtop`, `top` and `psf` is needed, with coordinates from `pdb`, `inpcrd`, `gro`
    or `crd`; without any file, the shipped alanine dipeptide is returned. The files have all atoms
    of the molecule and no explicit solvent; a periodic box is left out.

    Parameters
    ----------
    pdb
        PDB or mmCIF file (also compressed by gzip), ``PDBFile``, ``PDBxFile`` or ``Modeller``.
    system
        A serialized System (XML) or a System, with `pdb`; its bonds are added where the PDB file
        has none (ligands without CONECT records).
    force_field
        Names of OpenMM's force field files, e.g. ``["amber14-all.xml", "implicit/obc2.xml"]``, or a
        ``ForceField``, with `pdb`.
    prmtop, inpcrd
        Amber topology (``AmberPrmtopFile``), and coordinates in text or NetCDF
        (``AmberInpcrdFile``).
    top, gro, include_dir
        GROMACS topology (``GromacsTopFile``), coordinates (``GromacsGroFile``), and the folder of
        files that the topology includes.
    psf, crd, parameters
        CHARMM PSF (``CharmmPsfFile``), coordinates (``CharmmCrdFile``), and the parameter files
        (prm, rtf, str) or a ``CharmmParameterSet``.
    implicit_solvent
        ``"HCT"``, ``"OBC1"``, ``"OBC2"``, ``"GBn"`` or ``"GBn2"`` (or OpenMM's object) for all but
        `system`, with the radii and surface term of OpenMM's createSystem (GROMACS: those of its
        ``implicit/*.xml``); ``"none"`` is vacuum, or what `force_field` has. Files with a periodic
        box need it, because they were made for explicit solvent.
    constraints
        ``"none"`` (default), ``"hbonds"`` or ``"allbonds"``, for all but `system`.

    Raises
    ------
    ValueError
        If a file is of another kind, cannot be read, or has water or ions; if the arguments do not
        go together or the molecule is not supported (see :class:`MolecularSystem`).

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> from openmmtools.testsystems import get_data_filename
    >>> folder = "data/alanine-dipeptide-gbsa/alanine-dipeptide"
    >>> prmtop, inpcrd = (get_data_filename(f"{folder}.{end}") for end in ("prmtop", "crd"))
    >>> molecule = tsf.systems.load_molecule(
    ...     prmtop=prmtop, inpcrd=inpcrd, implicit_solvent="OBC2"
    ... )
    >>> molecule.dihedrals
    {'phi': (4, 6, 8, 14), 'psi': (6, 8, 14, 16)}
    """
    coordinates = {"pdb": pdb, "inpcrd": inpcrd, "gro": gro, "crd": crd}
    sources = {
        "system": system, "force_field": force_field, "prmtop": prmtop, "top": top, "psf": psf,
    }  # fmt: skip
    source, place = _chosen(sources, coordinates)
    for argument, value, needed in (
        ("include_dir", include_dir, "top"), ("parameters", parameters, "psf"),
    ):  # fmt: skip
        if value is not None and source != needed:
            raise ValueError(f"{argument}: it belongs to {needed}, which is not given")
    solvent, bonds = check_implicit_solvent(implicit_solvent), check_constraints(constraints)
    if source is None:
        if solvent is not None or bonds is not None:
            argument = "constraints" if solvent is None else "implicit_solvent"
            raise ValueError(f"{argument}: expected files of a molecule beside it, got none")
        return alanine_dipeptide()
    if source == "psf" and parameters is None:
        raise ValueError("parameters: expected CHARMM parameter files beside the PSF, got none")
    structure = read_structure_of(place, coordinates[place])
    if source == "system":
        if solvent is not None or bonds is not None:
            argument = "constraints" if solvent is None else "implicit_solvent"
            raise ValueError(f"{argument}: expected none, it is part of the System, got {argument}")
        return _with_system(structure, system)
    if source == "force_field":
        assert structure.topology is not None
        check_no_solvent(structure.topology, f"pdb: {structure.name}")
        given = read_force_field(force_field, structure.topology)
    elif source == "prmtop":
        given = read_prmtop(prmtop)
    elif source == "top":
        given = read_top(top, include_dir)
    else:
        given = read_psf(psf, parameters)
    return _with_parameters(structure, given, implicit_solvent, solvent, bonds)


def _chosen(sources: dict[str, Any], coordinates: dict[str, Any]) -> tuple[str | None, str]:
    """Return the names of the source of the System and of the coordinates that are given."""

    def given(values: dict[str, Any]) -> list[str]:
        return [
            k for k, v in values.items() if v is not None and not (k == "force_field" and not v)
        ]

    names, places = given(sources), given(coordinates)
    if not names and not places:
        return None, ""
    if "pdb" in places and (not names or names == ["system", "force_field"]):
        got = "both" if names else "none"
        raise ValueError(
            f"system, force_field: expected exactly one of the two with a PDB file, got {got} "
            "(or a prmtop, top or psf)"
        )
    if len(names) != 1:
        needed = next((k for k, v in _COORDINATES.items() if v == places[0]), "") if places else ""
        expected = f"one beside {places[0]}" if places and not names else "one of them"
        got = " and ".join(names) or "none"
        raise ValueError(f"{', '.join(names) or needed}: expected {expected}, got {got}")
    (name,) = names
    needed = _COORDINATES[name]
    if needed == "pdb" and places != ["pdb"]:
        got = " and ".join(places) or "none"
        raise ValueError(f"pdb: expected a PDB file beside the System or force field, got {got}")
    if len(places) != 1:
        got = " and ".join(places) or "none"
        raise ValueError(f"{needed}: expected one file of coordinates beside {name}, got {got}")
    return name, places[0]


def _with_system(structure: Structure, system: Any) -> MolecularSystem:
    """The molecule of a PDB file and a System."""
    topology, positions = structure.topology, structure.positions
    assert topology is not None
    if not isinstance(system, openmm.System):
        if not isinstance(system, (str, os.PathLike)):
            raise TypeError(f"system: expected a path or an openmm.System, got {system!r}")
        system = read_openmm_xml(system, openmm.System, "system")
    if system.getNumParticles() == topology.getNumAtoms() == len(positions):
        add_bonds_of_system(topology, system, positions)
    check_no_solvent(topology, f"pdb: {structure.name}")
    return MolecularSystem(system, topology, positions)


def _with_parameters(
    structure: Structure, given: Parameters, asked: Any, solvent: str | None, constraints: Any
) -> MolecularSystem:
    """The molecule of coordinates and parameters."""
    topology, positions, argument = given.topology, structure.positions, structure.argument
    check_no_solvent(topology, f"{given.argument}: {given.name}")
    if len(positions) != topology.getNumAtoms():
        expected, got = f"the {topology.getNumAtoms()} atoms of {given.name}", len(positions)
        raise ValueError(f"{argument}: expected {expected}, got {got} in {structure.name}")
    names = [atom.name for atom in topology.atoms()]
    others = list(structure.atom_names or names)
    if others != names and sorted(others) == sorted(names):
        first = next(i for i, name in enumerate(names) if name != others[i])
        raise ValueError(
            f"{argument}: expected the atoms in the order of {given.name}, got another in "
            f"{structure.name}: atom {first} is {others[first]}, expected {names[first]}"
        )
    has_box = structure.has_box or given.has_box
    if has_box and asked is None and given.argument != "force_field":
        boxed = given.name if given.has_box else structure.name
        raise ValueError(
            f"implicit_solvent: expected one of {', '.join(IMPLICIT_SOLVENTS)}, or 'none' for "
            f"vacuum, because {boxed} has a periodic box, as for explicit solvent, got none"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            system = given.create(solvent, constraints)
        except Exception as error:
            raise ValueError(_cannot_build(structure, given, error)) from error
    for warning in caught:  # such as radii for another model of implicit solvent
        logger.warning("%s: OpenMM says: %s", given.argument, warning.message)
    if has_box and not has_implicit_solvent(system):
        logger.warning(
            "%s has a periodic box, which is left out: the molecule is in vacuum, without any "
            "solvent (implicit_solvent, --implicit-solvent)",
            structure.name,
        )
    return MolecularSystem(system, topology, positions)


def _cannot_build(structure: Structure, given: Parameters, error: Exception) -> str:
    if given.argument != "force_field":
        return f"{given.argument}: OpenMM cannot build a System for {given.name}: {error}"
    message = (
        f"force_field: OpenMM cannot build a System for {structure.name} with {given.name}: {error}"
    )
    if residue := unbonded_residue(given.topology):
        message += (
            f" (the file has no bonds for atoms of {residue}: add its CONECT records, or give a "
            "System, whose bond terms are then used)"
        )
    return message


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
