"""The molecules of ``twenty.py``: PDB files, and a System where no force field file knows them.

    python examples/benchmarks/molecules/make_molecules.py --output examples/benchmarks/molecules

Capped amino acids are ACE-X-NME, Met-enkephalin ACE-YGGFM-NME. PDBFixer replaces the side chains of
alanine dipeptide, or of a chain of alanines, and completes them; hydrogens are those of pH 7 (Asp,
Glu, Lys and Arg are charged, His is neutral). It does not look at energies: a minimisation, 2 ps
of dynamics at 600 K and as many at 300 K and another minimisation follow, with peptide bonds held
trans, in amber14 with OBC2, on one thread of OpenMM's CPU platform from fixed seeds. Then the
conformation is checked: amino acids are L, and peptide bonds trans.

Toluene is openmmtools' (GAFF, AM1-BCC charges), without constraints. The drug-like molecules come
from ``NAME.prmtop`` and ``NAME.inpcrd`` in this folder, which ``acpype -i SMILES -b NAME -c bcc
-a gaff2`` (version 2023.10.27: GAFF2, AM1-BCC charges) made from these SMILES:

    paracetamol  CC(=O)Nc1ccc(O)cc1
    ibuprofen    CC(C)Cc1ccc(cc1)[C@H](C)C(=O)O

``ace_ala3_nme.pdb`` and ``ace_trp_nme.pdb`` are of an earlier benchmark, and not made here.
"""

import argparse
import math
from importlib.resources import as_file, files
from io import StringIO
from pathlib import Path

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
from openmmtools.testsystems import TolueneImplicitOBC2
from pdbfixer import PDBFixer
from scipy.spatial.transform import Rotation

from openmm_tsf.systems.slow_torsions import dihedral_angles

HERE = Path(__file__).resolve().parent
FORCE_FIELD = ("amber14-all.xml", "implicit/obc2.xml")
AMINO_ACIDS = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL"
#: Residues between the caps, by the name of the file.
PEPTIDES = {f"ace_{name.lower()}_nme": [name] for name in AMINO_ACIDS.split() if name != "TRP"}
PEPTIDES["met_enkephalin"] = ["TYR", "GLY", "GLY", "PHE", "MET"]
DRUGS = ("paracetamol", "ibuprofen")
N_STEPS = 2000  # of 1 fs, at each of the temperatures
TEMPERATURES_K = (600.0, 300.0)
SEED = 1


def chain_of_alanines(n):
    """ACE-ALA-NME, or with three alanines and more, as a PDB file that was read."""
    with as_file(files("openmm_tsf.data") / "ala2.pdb") as path:
        if n > 1:
            path = HERE / "ace_ala3_nme.pdb"
        pdb = app.PDBFile(str(path))
    x = np.array(pdb.positions.value_in_unit(unit.nanometer))
    parts = [
        [(atom.name, x[atom.index]) for atom in residue.atoms()]
        for residue in pdb.topology.residues()
    ]
    while n > 1 and len(parts) < n + 2:  # the last residue and cap once more, behind themselves
        *_, third, last, cap = map(dict, parts)
        first = [third["CA"], third["C"], third["O"], last["N"]]
        second = [last["CA"], last["C"], last["O"], cap["N"]]
        moved = [
            [(name, superpose(point, first, second)) for name, point in part] for part in parts[-2:]
        ]
        parts[-1:] = moved
    names = ["ACE", *["ALA"] * n, "NME"]
    lines = []
    for number, (name, part) in enumerate(zip(names, parts, strict=True), start=1):
        for atom, point in part:
            place = "".join(f"{10 * c:8.3f}" for c in point)
            label = f"{atom:^4s}" if len(atom) < 4 else atom
            lines.append(
                f"ATOM  {len(lines) + 1:5d} {label} {name} A{number:4d}    {place}  1.00  0.00"
            )
    return app.PDBFile(StringIO("\n".join([*lines, "END"])))


def superpose(point, first, second):
    """A point moved with the rigid motion that brings four points best onto four others."""
    a, b = np.mean(first, axis=0), np.mean(second, axis=0)
    rotation, _ = Rotation.align_vectors(np.array(second) - b, np.array(first) - a)
    return rotation.apply(point - a) + b


def turn_phi(topology, x, angle):
    """Positions of ACE-X-NME with phi at an angle in rad."""
    number = {(atom.residue.index, atom.name): atom.index for atom in topology.atoms()}
    c, n, ca, c2 = (number[k] for k in ((0, "C"), (1, "N"), (1, "CA"), (1, "C")))
    axis = x[ca] - x[n]
    turn = dihedral_angles(x, (c, n, ca, c2))[0] - angle
    cap = [a.index for a in topology.atoms() if a.residue.index == 0 or a.name == "H"]
    cap = [k for k in cap if k != number[2, "H"]]
    moved = x.copy()
    rotation = Rotation.from_rotvec(turn * axis / np.linalg.norm(axis))
    moved[cap] = rotation.apply(x[cap] - x[n]) + x[n]
    return moved


def build(residues):
    """Topology and positions of ACE-residues-NME with all atoms; no conformation to start from."""
    pdb = chain_of_alanines(len(residues))
    x = np.array(pdb.positions.value_in_unit(unit.nanometer))
    if residues == ["PRO"]:  # its ring has no room elsewhere
        x = turn_phi(pdb.topology, x, math.radians(-70))
    text = StringIO()
    app.PDBFile.writeFile(pdb.topology, x * unit.nanometer, text, keepIds=True)
    fixer = PDBFixer(pdbfile=StringIO(text.getvalue()))
    inner = [r for r in fixer.topology.residues() if r.name == "ALA"]
    changes = zip(inner, residues, strict=True)
    fixer.applyMutations([f"ALA-{r.id}-{new}" for r, new in changes if new != "ALA"], "A")
    fixer.missingResidues = {}
    fixer.findMissingAtoms()
    fixer.addMissingAtoms(seed=SEED)
    fixer.addMissingHydrogens(7.0)
    return fixer.topology, fixer.positions


def peptide_bonds(topology):
    """CA-C-N-CA of neighbouring residues; a cap has a methyl group instead."""
    number = {(atom.residue.index, atom.name): atom.index for atom in topology.atoms()}
    quartets = []
    for k in range(topology.getNumResidues() - 1):
        first = number.get((k, "CA"), number.get((k, "CH3")))
        last = number.get((k + 1, "CA"), number.get((k + 1, "C")))
        quartets.append((first, number[k, "C"], number[k + 1, "N"], last))
    return quartets


def relax(topology, positions):
    """Positions in nm after minimisation, hot and cold dynamics, and minimisation."""
    system = app.ForceField(*FORCE_FIELD).createSystem(topology, nonbondedMethod=app.NoCutoff)
    # Side chains are built through their neighbours, which may turn peptide bonds.
    trans = openmm.CustomTorsionForce("held * 400 * (1 + cos(theta))")
    trans.addGlobalParameter("held", 1.0)
    for quartet in peptide_bonds(topology):
        trans.addTorsion(*quartet)
    system.addForce(trans)
    integrator = openmm.LangevinMiddleIntegrator(
        TEMPERATURES_K[0], 5 / unit.picosecond, 0.001 * unit.picosecond
    )
    integrator.setRandomNumberSeed(SEED)
    platform = openmm.Platform.getPlatformByName("CPU")
    context = openmm.Context(system, integrator, platform, {"Threads": "1"})
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    for kelvin in TEMPERATURES_K:
        integrator.setTemperature(kelvin)
        context.setVelocitiesToTemperature(kelvin, SEED)
        integrator.step(N_STEPS)
    context.setParameter("held", 0.0)
    openmm.LocalEnergyMinimizer.minimize(context)
    state = context.getState(positions=True)
    return state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)


#: Three substituents of a centre, and the sign of the volume that they span: L-amino acids,
#: isoleucine (2S,3S), threonine (2S,3R).
CENTRES = (
    (None, "CA", ("N", "C", "CB"), 1),
    ("ILE", "CB", ("CA", "CG1", "CG2"), 1),
    ("THR", "CB", ("OG1", "CA", "CG2"), -1),
)


def check_conformation(name, topology, x):
    """Refuse D-amino acids and cis peptide bonds."""
    for residue in topology.residues():
        index = {atom.name: atom.index for atom in residue.atoms()}
        for only, centre, around, sign in CENTRES:
            if (only or residue.name) == residue.name and {centre, *around} <= set(index):
                bonds = [x[index[other]] - x[index[centre]] for other in around]
                if sign * np.linalg.det(bonds) <= 0:
                    raise ValueError(f"{name}: {residue.name} {residue.id}: {centre} is inverted")
    angles = dihedral_angles(x, peptide_bonds(topology))
    if (np.abs(angles) < np.pi / 2).any():
        raise ValueError(f"{name}: a peptide bond is cis: {np.degrees(angles).round()} degrees")


def write_pdb(path, topology, x):
    """Write a PDB file without the date."""
    with open(path, "w") as file:
        app.PDBFile.writeModel(topology, x * unit.nanometer, file, keepIds=True)
        app.PDBFile.writeFooter(topology, file)


def write_with_system(folder, name, system, topology, positions):
    """Write a PDB file, and the System beside it."""
    for index, force in reversed(list(enumerate(system.getForces()))):
        if isinstance(force, openmm.CMMotionRemover):
            system.removeForce(index)
    positions = np.array(positions.value_in_unit(unit.nanometer))
    write_pdb(folder / f"{name}.pdb", topology, positions)
    (folder / f"{name}.xml").write_text(openmm.XmlSerializer.serialize(system))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(HERE), help="existing folder")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some molecules")
    args = parser.parse_args()
    folder, chosen = Path(args.output), set(args.only or [*PEPTIDES, "toluene", *DRUGS])
    for name, residues in PEPTIDES.items():
        if name in chosen:
            topology, positions = build(residues)
            x = relax(topology, positions)
            check_conformation(name, topology, x)
            write_pdb(folder / f"{name}.pdb", topology, x)
            print(f"{name}: {len(x)} atoms", flush=True)
    if "toluene" in chosen:
        made = TolueneImplicitOBC2(constraints=None)
        write_with_system(folder, "toluene", made.system, made.topology, made.positions)
    for name in DRUGS:
        if name in chosen:
            source = HERE / name
            prmtop = app.AmberPrmtopFile(f"{source}.prmtop")
            system = prmtop.createSystem(implicitSolvent=app.OBC2)
            positions = app.AmberInpcrdFile(f"{source}.inpcrd").positions
            write_with_system(folder, name, system, prmtop.topology, positions)


if __name__ == "__main__":
    main()
