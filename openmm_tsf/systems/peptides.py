"""Peptides of any sequence, built from their internal coordinates."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np
import numpy.typing as npt
import openmm
import openmm.app as app
import openmm.unit as unit
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]

from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.parameter_files import check_constraints, read_force_field
from openmm_tsf.utils.validation import check_bool, check_choice

#: Force fields by name: OpenMM's files.
FORCE_FIELDS = {
    "amber99sbildn-amber99_obc": ("amber99sbildn.xml", "amber99_obc.xml"),
    "amber14-obc2": ("amber14-all.xml", "implicit/obc2.xml"),
}
#: Peptides of published benchmarks: sequence, and whether it is capped.
PUBLISHED = {
    "ala4": ("AAA", True),
    "ala6": ("AAAAA", True),
    "ELIL": ("ELIL", False),
    "chignolin": ("GYDPETGTWG", False),
}
RESIDUES = {
    "A": "ALA", "C": "CYS", "D": "ASP", "E": "GLU", "F": "PHE", "G": "GLY", "H": "HIS", "I": "ILE",
    "K": "LYS", "L": "LEU", "M": "MET", "N": "ASN", "P": "PRO", "Q": "GLN", "R": "ARG", "S": "SER",
    "T": "THR", "V": "VAL", "W": "TRP", "Y": "TYR",
}  # fmt: skip
#: Lengths in nm and angles in degrees: Engh and Huber, Acta Cryst. A 47, 392 (1991).
_N_CA, _CA_C, _C_N, _C_O = 0.1458, 0.1525, 0.1329, 0.1231
_N_CA_C, _CA_C_N, _C_N_CA, _CA_C_O = 111.2, 116.2, 121.7, 120.8
#: An extended strand; the ring of proline fixes its phi.
_PHI, _PSI, _OMEGA, _PHI_OF_PROLINE = -120.0, 135.0, 180.0, -65.0
_SEED = 1
_MINIMISATION_STEPS = 100
_TOLERANCE = 1e-8  # of constraints, relative

Point = npt.NDArray[np.float64]
Residue = tuple[str, dict[str, Point]]  # name, positions in nm of the heavy atoms by name


def capped_peptide(
    sequence: str,
    force_field: Any = "amber99sbildn-amber99_obc",
    constraints: Any = "none",
    *,
    capped: bool = True,
) -> MolecularSystem:
    """Return a peptide of L amino acids, ACE-sequence-NME, in implicit solvent.

    An extended strand (φ -120°, of proline -65°; ψ 135°; ω 180°) is built from internal
    coordinates; side chains are those of PDBFixer's templates, put onto N, CA and C. Hydrogens are
    OpenMM's for pH 7: Asp, Glu, Lys and Arg are charged, His is neutral. Then 100
    steps of minimisation follow, on one thread. The same arguments give the same molecule. The
    conformation is a start, not one of equilibrium.

    Parameters
    ----------
    sequence
        One-letter codes of the 20 amino acids.
    force_field
        ``"amber99sbildn-amber99_obc"``: ``amber99sbildn.xml`` with ``amber99_obc.xml``, the System
        of bgmol's ``MiniPeptide`` and of the published benchmarks on ala4 and ala6.
        ``"amber14-obc2"``: ``amber14-all.xml`` with ``implicit/obc2.xml``. Or names of OpenMM's
        files, or a ``ForceField``.
    constraints
        ``"none"``, ``"hbonds"`` or ``"allbonds"``.
    capped
        False leaves ACE and NME out: the ends are charged, NH3+ and COO-.

    Raises
    ------
    ValueError
        If the sequence has other letters, or the force field is unknown or lacks a residue.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> molecule = tsf.systems.capped_peptide("GA")
    >>> molecule.n_atoms, sorted(molecule.dihedrals)
    (29, ['phi2', 'phi3', 'psi2', 'psi3'])
    """
    codes = _check_sequence(sequence)
    bonds, with_caps = check_constraints(constraints), check_bool(capped, "capped")
    field = force_field
    if isinstance(field, str) and not field.endswith(".xml"):
        field = FORCE_FIELDS[check_choice(field, "force_field", tuple(FORCE_FIELDS))]
    topology, positions = _with_hydrogens(_build(codes, with_caps))
    parameters = read_force_field(field, topology)
    try:
        system = parameters.create(None, bonds)
    except Exception as error:  # of many types
        raise ValueError(
            f"force_field: {parameters.name} cannot describe {sequence}: {error}"
        ) from error
    return MolecularSystem(system, topology, _minimise(system, positions))


def published_peptide(
    name: str, force_field: Any = "amber99sbildn-amber99_obc", constraints: Any = "none"
) -> MolecularSystem:
    """Return a peptide by its name in published benchmarks; see `capped_peptide`.

    ``"ala4"`` is ACE-AAA-NME, ``"ala6"`` ACE-AAAAA-NME; ``"ELIL"`` and ``"chignolin"``
    (GYDPETGTWG) have charged ends.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> tsf.systems.published_peptide("ala4").n_atoms
    42
    """
    sequence, capped = PUBLISHED[check_choice(name, "name", tuple(PUBLISHED))]
    return capped_peptide(sequence, force_field, constraints, capped=capped)


def _check_sequence(sequence: Any) -> str:
    if not isinstance(sequence, str):
        raise TypeError(f"sequence: expected one-letter codes, got {type(sequence).__name__}")
    unknown = [letter for letter in sequence if letter not in RESIDUES]
    if unknown or not sequence:
        expected = f"one-letter codes of amino acids ({''.join(RESIDUES)})"
        raise ValueError(f"sequence: expected {expected}, got {sequence!r}")
    return sequence


def _build(sequence: str, capped: bool) -> list[Residue]:
    """Return the heavy atoms of a chain."""
    n_inner = len(sequence)
    residues: list[Residue] = []
    # The first three atoms of the chain fix its pose: CH3, C and N of the cap, or N, CA and C.
    if capped:
        start, carbon = np.zeros(3), np.array([_CA_C, 0.0, 0.0])
        turn = np.radians(180.0 - _CA_C_N)
        nitrogen = carbon + _C_N * np.array([np.cos(turn), np.sin(turn), 0.0])
        oxygen = _place(nitrogen, start, carbon, _C_O, _CA_C_O, 180.0)
        # O is opposite to N about CH3-C: place it by the improper torsion N-CH3-C-O.
        residues.append(("ACE", {"CH3": start, "C": carbon, "O": oxygen}))
        alpha = _place(start, carbon, nitrogen, _N_CA, _C_N_CA, _OMEGA)
        before = carbon
    else:
        nitrogen, alpha = np.zeros(3), np.array([_N_CA, 0.0, 0.0])
        before = np.array([0.0, _C_N, 0.0])  # an imagined carbon: only the pose depends on it
    for number, code in enumerate(sequence):
        name = RESIDUES[code]
        phi = _PHI_OF_PROLINE if code == "P" else _PHI
        carbon = _place(before, nitrogen, alpha, _CA_C, _N_CA_C, phi)
        following = _place(nitrogen, alpha, carbon, _C_N, _CA_C_N, _PSI)
        oxygen = _place(following, alpha, carbon, _C_O, _CA_C_O, 180.0)
        atoms = {"N": nitrogen, "CA": alpha, "C": carbon, "O": oxygen}
        atoms |= _side_chain(name, atoms)
        if number == n_inner - 1 and not capped:
            atoms["OXT"] = _place(oxygen, alpha, carbon, _C_O, _CA_C_O, 180.0)
        residues.append((name, atoms))
        alpha_before, before, nitrogen = alpha, carbon, following
        alpha = _place(alpha_before, before, nitrogen, _N_CA, _C_N_CA, _OMEGA)
    if capped:
        residues.append(("NME", {"N": nitrogen, "C": alpha}))
    return residues


def _place(a: Point, b: Point, c: Point, length: float, angle: float, torsion: float) -> Point:
    """Return an atom bonded to c, with an angle to b and a torsion about b-c, both in degrees."""
    theta, phi = np.radians(angle), np.radians(torsion)
    axis = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, axis)
    normal /= np.linalg.norm(normal)
    in_frame = np.array([-np.cos(theta), np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi)])
    frame = np.stack([axis, np.cross(normal, axis), normal], axis=-1)
    return np.asarray(c + length * (frame @ in_frame))


@cache
def _template(name: str) -> dict[str, Point]:
    """Return the heavy atoms of an amino acid in nm, by name."""
    with as_file(files("pdbfixer") / "templates" / f"{name}.pdb") as path:
        pdb = app.PDBFile(str(path))
    x = np.array(pdb.positions.value_in_unit(unit.nanometer))
    return {atom.name: x[atom.index] for atom in pdb.topology.atoms()}


def _side_chain(name: str, backbone: dict[str, Point]) -> dict[str, Point]:
    """Return the other heavy atoms of a residue, on its N, CA and C."""
    template = _template(name)
    around = [template[key] - template["CA"] for key in ("N", "C")]
    onto = [backbone[key] - backbone["CA"] for key in ("N", "C")]
    rotation, _ = Rotation.align_vectors(np.array(onto), np.array(around))
    return {
        key: rotation.apply(x - template["CA"]) + backbone["CA"]
        for key, x in template.items()
        if key not in (*backbone, "OXT")
    }


def _with_hydrogens(residues: list[Residue]) -> tuple[app.Topology, Any]:
    """Return Topology and positions of all atoms, with bonds."""
    topology, positions = app.Topology(), []
    chain = topology.addChain("A")
    for number, (name, atoms) in enumerate(residues, start=1):
        residue = topology.addResidue(name, chain, id=str(number))
        for label, x in atoms.items():
            topology.addAtom(label, app.Element.getBySymbol(label[0]), residue)
            positions.append(openmm.Vec3(*x))
    topology.createStandardBonds()
    modeller = app.Modeller(topology, positions * unit.nanometer)
    with _python_seed(_SEED):  # hydrogens start at random, and are minimised
        modeller.addHydrogens(pH=7.0, platform=openmm.Platform.getPlatformByName("Reference"))
    return _with_standard_bonds(modeller.topology), modeller.positions


def _with_standard_bonds(topology: app.Topology) -> app.Topology:
    """Return a Topology with its bonds in the order of a PDB file that was read.

    The order of the terms of the System follows, and so its fingerprint.
    """
    result = app.Topology()
    chain = result.addChain("A")
    for residue in topology.residues():
        copy = result.addResidue(residue.name, chain, id=residue.id)
        for atom in residue.atoms():
            result.addAtom(atom.name, atom.element, copy)
    result.createStandardBonds()
    if result.getNumBonds() != topology.getNumBonds():
        raise RuntimeError(f"{result.getNumBonds()} bonds of {topology.getNumBonds()} are standard")
    return result


@contextmanager
def _python_seed(seed: int) -> Iterator[None]:
    """Seed Python's own generator for a block, and leave it as it was."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _minimise(system: openmm.System, positions: Any) -> npt.NDArray[np.float64]:
    """Return positions [N, 3] in nm of lower energy, which fulfil the constraints."""
    context = _open(system, "CPU", {"Threads": "1", "DeterministicForces": "true"})
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, _MINIMISATION_STEPS)
    x = context.getState(positions=True).getPositions(asNumpy=True)
    if system.getNumConstraints():
        exact = _open(system, "Reference", {})  # the other platform has single precision
        exact.setPositions(x)
        exact.applyConstraints(_TOLERANCE)
        x = exact.getState(positions=True).getPositions(asNumpy=True)
    return np.array(x.value_in_unit(unit.nanometer))


def _open(system: openmm.System, name: str, properties: dict[str, str]) -> openmm.Context:
    integrator = openmm.VerletIntegrator(0.001)
    integrator.setConstraintTolerance(_TOLERANCE)
    return openmm.Context(system, integrator, openmm.Platform.getPlatformByName(name), properties)
