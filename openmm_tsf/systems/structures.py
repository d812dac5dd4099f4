"""Conformations, with what their files say of atoms and boxes: PDB, mmCIF, inpcrd, gro, crd."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import openmm.app as app

from openmm_tsf.io.file_kinds import CRD, GRO, GZIP, INPCRD, MMCIF, NETCDF, PDB, check_kind
from openmm_tsf.io.files import read_text
from openmm_tsf.units import NANOMETER, as_array

#: Boxes with a shorter edge (nm) are place holders, such as ``CRYST1 1.000 1.000 1.000``.
_SMALLEST_BOX = 0.15
#: For each argument: what is expected, the kinds of files, and OpenMM's reader.
_READERS: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "pdb": ("a PDB or mmCIF file", (PDB, MMCIF, GZIP), None),
    "inpcrd": ("Amber coordinates (inpcrd or rst7)", (INPCRD, NETCDF), app.AmberInpcrdFile),
    "gro": ("GROMACS coordinates (gro)", (GRO,), app.GromacsGroFile),
    "crd": ("CHARMM coordinates (crd)", (CRD,), app.CharmmCrdFile),
}


@dataclass(frozen=True)
class Structure:
    """One conformation of a file or of an object that OpenMM loaded."""

    argument: str
    name: str  #: of the file, for messages
    positions: np.ndarray  #: [N, 3] in nm
    topology: app.Topology | None = None  #: of a PDB or mmCIF file
    atom_names: Sequence[str] | None = None
    has_box: bool = False


def read_structure_of(argument: str, value: Any) -> Structure:
    """Read the file, or take the object of ``openmm.app`` with positions, of an argument.

    `argument` is ``"pdb"``, ``"inpcrd"``, ``"gro"`` or ``"crd"``.
    """
    loaded, name = value, type(value).__name__
    expected, kinds, reader = _READERS[argument]
    if not hasattr(value, "positions"):
        if argument == "crd" and str(value).lower().endswith(".rst"):
            kinds, reader = (), app.CharmmRstFile
        path = check_kind(value, argument, expected, kinds)
        loaded, name = _load(argument, path, reader), str(value)
    positions = as_array(loaded.positions, NANOMETER, argument)
    if positions.ndim != 2 or positions.shape[1:] != (3,):
        shape = positions.shape
        raise ValueError(f"{argument}: expected positions of shape (N, 3), got {shape}: {name}")
    topology = getattr(loaded, "topology", None)
    if argument == "pdb" and not isinstance(topology, app.Topology):
        raise TypeError(f"pdb: expected {expected}, or an object with a Topology, got {name}")
    atom_names = getattr(loaded, "atomNames", None) or getattr(loaded, "attype", None)
    if topology is not None:
        atom_names = [atom.name for atom in topology.atoms()]
    return Structure(argument, name, positions, topology, atom_names, _has_box(loaded))


def is_box(vectors: Any) -> bool:
    """Return whether periodic box vectors are those of a box that holds a molecule."""
    if vectors is None:
        return False
    edges = np.linalg.norm(as_array(vectors, NANOMETER, "box"), axis=1)
    return bool(edges.min() > _SMALLEST_BOX)


def _load(argument: str, path: Path, reader: Any) -> Any:
    try:
        if reader is None:
            text = read_text(path, "PDB or mmCIF file")
            return _reader_of(text)(StringIO(text))
        return reader(str(path))
    except Exception as error:  # OpenMM's readers raise errors of many types
        raise ValueError(f"{argument}: OpenMM cannot read {path}: {error}") from error


def _reader_of(text: str) -> type[app.PDBFile] | type[app.PDBxFile]:
    """Return OpenMM's reader of a text; refuse one without atoms."""
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    if lines and lines[0].lower().startswith("data_"):
        if "_atom_site." not in text:
            raise ValueError("expected mmCIF with the category _atom_site, got a CIF file without")
        return app.PDBxFile
    if any(line.startswith(("ATOM", "HETATM")) for line in lines):
        return app.PDBFile
    raise ValueError("there are no atoms in it, expected ATOM or HETATM records of PDB, or mmCIF")


def _has_box(loaded: Any) -> bool:
    topology = getattr(loaded, "topology", None)
    if topology is not None:
        return is_box(topology.getPeriodicBoxVectors())
    if isinstance(loaded, app.GromacsGroFile):
        return is_box(loaded.getPeriodicBoxVectors())
    return is_box(getattr(loaded, "boxVectors", None))
