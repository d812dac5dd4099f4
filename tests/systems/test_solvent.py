"""Water and ions beside a molecule are refused before anything is built."""

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest

import openmm_tsf as tsf
from openmm_tsf.systems.consistency import check_no_solvent
from tests.support.molecules import force_field
from tests.support.refusals import cases, from_shell, refused


def topology_of(*residues, bonded=True):
    """A Topology of residues given by a name and elements; the first atom is bonded to the others.

    ``"-"`` is a virtual site.
    """
    topology = app.Topology()
    chain = topology.addChain()
    for name, elements in residues:
        residue = topology.addResidue(name, chain)
        atoms = []
        for index, symbol in enumerate(elements.split()):
            element = None if symbol == "-" else app.element.get_by_symbol(symbol)
            atoms.append(topology.addAtom(f"{symbol}{index}", element, residue))
        for atom in atoms[1:] if bonded else ():
            topology.addBond(atoms[0], atom)
    return topology


METHANE = ("MOL", "C H H H H")


@cases(
    ("residues", "n_water", "n_ions"),
    [
        ("water of any name", [METHANE, ("XYZ", "O H H")], 1, 0),
        ("four sites", [METHANE, ("T4P", "O H H -"), ("T4P", "O H H -")], 2, 0),
        ("heavy water before it", [("D2O", "O D D"), METHANE], 1, 0),
        ("crystal water", [METHANE, ("HOH", "O")], 1, 0),
        ("salt", [METHANE, ("NA", "Na"), ("Cl-", "Cl"), ("ion", "Mg")], 0, 3),
        ("both", [("SOL", "O H H"), ("K", "K"), METHANE], 1, 1),
        ("elements guessed from names", [METHANE, ("SOD", "S"), ("POT", "P"), ("CAL", "C")], 0, 3),
        ("no elements", [METHANE, ("TIP3", "- - -"), ("WAT", "- - -"), ("Cl-", "-")], 2, 1),
        ("a cluster of water", [("HOH", "H O H"), ("HOH", "O H H")], 1, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bonded", [True, False])
def test_solvent_is_refused(residues, n_water, n_ions, bonded):
    if residues[0][1] == "H O H":
        n_water += 1
    topology = topology_of(*residues, bonded=bonded)
    message = f"got {n_water} water molecules and {n_ions} ions among {len(residues)} fragments"
    with refused(ValueError, f"topology: expected one molecule .*{message}.*implicit/obc2.xml"):
        check_no_solvent(topology)


@cases(
    "residues",
    [
        ("a molecule", [METHANE]),
        ("water alone", [("HOH", "O H H")]),
        ("an ion alone", [("CL", "Cl")]),
        ("two molecules", [METHANE, ("MOH", "C O H H H H")]),
        ("a noble gas", [METHANE, ("AR", "Ar")]),
        ("hydroxide", [METHANE, ("OH", "O H")]),
        ("HCl", [METHANE, ("HCL", "H Cl")]),
    ],
)
def test_what_is_not_solvent_is_accepted(residues):
    check_no_solvent(topology_of(*residues))


def test_bonded_metals_and_residues_named_as_water_are_parts_of_a_molecule():
    topology = topology_of(("CYS", "S C H"), ("ZN", "Zn"), ("WAT", "C O H H"))
    atoms = list(topology.atoms())
    topology.addBond(atoms[0], atoms[3])
    topology.addBond(atoms[1], atoms[4])
    check_no_solvent(topology)


@pytest.fixture(scope="module")
def solvated(molecule, tmp_path_factory):
    """A folder with alanine dipeptide beside three waters and a chloride, and its PME System."""
    folder = tmp_path_factory.mktemp("solvated")
    modeller = app.Modeller(molecule.topology, molecule.positions * unit.nanometer)
    water = topology_of(*[("WAT", "O H H")] * 3, ("CL", "Cl"))
    for atom, name in zip(water.atoms(), ["O", "H1", "H2"] * 3 + ["CL"], strict=True):
        atom.name = name
    shape = np.array([[0, 0, 0], [0.0957, 0, 0], [-0.024, 0.0927, 0]])
    positions = np.concatenate(
        [*(shape + np.array([k, 2, 0]) for k in range(3)), [[3.0, 2.0, 0.0]]]
    )
    modeller.add(water, positions * unit.nanometer)
    topology = modeller.topology
    topology.setUnitCellDimensions(openmm.Vec3(5, 5, 5))
    with open(folder / "a.pdb", "w") as file:
        app.PDBFile.writeFile(topology, modeller.positions, file)
    forces = force_field("amber14-all.xml", "amber14/tip3p.xml")
    for residue in topology.residues():
        residue.name = "HOH" if residue.name == "WAT" else residue.name
    system = forces.createSystem(topology, nonbondedMethod=app.PME, rigidWater=False)
    (folder / "a.xml").write_text(openmm.XmlSerializer.serialize(system))
    return folder, system, topology, modeller.positions


def test_solvent_is_named_instead_of_the_periodic_box(solvated, tmp_path, capsys):
    folder, system, topology, positions = solvated
    files = ["--pdb", folder / "a.pdb"]
    for more in (
        ["--system", folder / "a.xml"],
        ["--forcefield", "amber14-all.xml", "implicit/obc2.xml", "amber14/tip3p.xml"],
    ):
        line = from_shell(["md", "--output", tmp_path / "out", *files, *more], capsys)
        assert "pdb: " in line
        assert "got 3 water molecules and 1 ions among 5 fragments" in line
        assert "deleteWater" in line
        assert not (tmp_path / "out").exists()
    with refused(ValueError, "topology: .* got 3 water molecules"):
        tsf.MolecularSystem(system, topology, positions)
