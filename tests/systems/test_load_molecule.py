"""Molecules from the files of Amber, GROMACS and CHARMM, in Python and in the shell."""

import gzip
import itertools
import json
import logging
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest
import torch
from openmmtools.testsystems import get_data_filename

import openmm_tsf as tsf
from openmm_tsf.cli import main as cli
from openmm_tsf.io.file_kinds import describe_file
from openmm_tsf.systems import load_molecule
from openmm_tsf.systems.parameter_files import check_constraints, read_prmtop, read_psf, read_top
from tests.support.foreign_files import write_charmm, write_gromacs
from tests.support.molecules import force_field
from tests.support.refusals import cases, from_shell, refused
from tests.support.torch_cases import perturbed, reference_values
from tests.support.zoo import specimen

#: OpenMM's reader of GROMACS topologies leaves closing to Python.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

PRMTOP, INPCRD, AMBER_PDB = (
    get_data_filename(f"data/alanine-dipeptide-gbsa/alanine-dipeptide.{end}")
    for end in ("prmtop", "crd", "pdb")
)
EXPLICIT = [
    get_data_filename(f"data/alanine-dipeptide-explicit/alanine-dipeptide.{end}")
    for end in ("prmtop", "crd")
]
METHANOL = [get_data_filename(f"data/methanol-box/methanol-box.{end}") for end in ("prmtop", "crd")]


@pytest.fixture(scope="module")
def ethanol():
    return specimen("ethanol")


@pytest.fixture(scope="module")
def folder(ethanol, tmp_path_factory):
    """Ethanol in the formats of GROMACS and CHARMM, and as PDB."""
    path = tmp_path_factory.mktemp("ethanol")
    write_gromacs(path, ethanol)
    write_charmm(path, ethanol)
    with open(path / "a.pdb", "w") as file:
        app.PDBFile.writeFile(ethanol.topology, ethanol.positions * unit.nanometer, file)
    return path


def assert_same_energy(system, expected, x, tolerance):
    """Energies in kJ/mol, without a constant, and forces relative to the largest."""
    energies, forces = reference_values(system, x)
    exact_energies, exact_forces = reference_values(expected, x)
    assert (energies - exact_energies).abs().max() < tolerance
    assert (forces - exact_forces).abs().max() < 1e-4 * exact_forces.abs().max()


def test_gromacs(ethanol, folder):
    given = {"top": folder / "a.top", "include_dir": folder / "ff"}
    x = perturbed(ethanol.positions, 0, (0.002, 0.01))
    for coordinates in ({"gro": folder / "a.gro"}, {"pdb": folder / "a.pdb"}):
        molecule = load_molecule(**given, **coordinates)
        assert_same_energy(molecule.system, ethanol.system, x, 1e-6)
        np.testing.assert_allclose(molecule.positions, ethanol.positions, atol=6e-4)
        assert molecule.topology.getNumBonds() == ethanol.topology.getNumBonds()
        assert molecule.system.getNumConstraints() == 0
    objects = {
        "top": app.GromacsTopFile(str(folder / "a.top"), includeDir=str(folder / "ff")),
        "gro": app.GromacsGroFile(str(folder / "a.gro")),
    }
    again = load_molecule(**objects)
    assert again.fingerprint == load_molecule(**given, gro=folder / "a.gro").fingerprint
    with refused(ValueError, r"top: .*types.itp.*--include-dir"):
        load_molecule(top=folder / "a.top", gro=folder / "a.gro")


def test_charmm(ethanol, folder):
    files = [folder / "a.rtf", folder / "a.prm"]
    x = perturbed(ethanol.positions, 0, (0.002, 0.01))
    for coordinates in ({"crd": folder / "a.crd"}, {"pdb": folder / "a.pdb"}):
        molecule = load_molecule(psf=folder / "a.psf", parameters=files, **coordinates)
        assert_same_energy(molecule.system, ethanol.system, x, 1e-5)
        assert [a.element for a in molecule.topology.atoms()] == [
            a.element for a in ethanol.topology.atoms()
        ]
    objects = {
        "psf": app.CharmmPsfFile(str(folder / "a.psf")),
        "crd": app.CharmmCrdFile(str(folder / "a.crd")),
        "parameters": app.CharmmParameterSet(*map(str, files)),
    }
    from_files = load_molecule(psf=folder / "a.psf", crd=folder / "a.crd", parameters=files)
    assert load_molecule(**objects).fingerprint == from_files.fingerprint
    solvated = load_molecule(**objects, implicit_solvent=app.OBC2)
    assert type(solvated.system.getForces()[-1]) is openmm.CustomGBForce
    one = {"psf": folder / "a.psf", "crd": folder / "a.crd", "parameters": folder / "a.prm"}
    with refused(ValueError, "parameters: OpenMM cannot read .*a.prm"):
        load_molecule(**one)


@pytest.mark.parametrize("solvent", [None, "none", "HCT", "obc1", "OBC2", "gbn", "GBn2"])
@pytest.mark.filterwarnings("ignore:Non-optimal GB parameters")  # of OpenMM itself, below
def test_amber(solvent, caplog):
    molecule = load_molecule(prmtop=PRMTOP, inpcrd=INPCRD, implicit_solvent=solvent)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    other_radii = "prmtop: OpenMM says: Non-optimal GB parameters detected for GB model"
    assert [text.startswith(other_radii) for text in messages] == [True] * (
        solvent in ("HCT", "gbn")
    )
    files = app.AmberPrmtopFile(PRMTOP), app.AmberInpcrdFile(INPCRD)
    model = next((m for m in ("HCT", "OBC1", "OBC2", "GBn", "GBn2")
                  if m.lower() == (solvent or "").lower()), None)  # fmt: skip
    expected = files[0].createSystem(implicitSolvent=model and getattr(app, model))
    x = torch.tensor(molecule.positions[None])
    assert_same_energy(molecule.system, expected, x, 1e-9)
    again = load_molecule(prmtop=files[0], inpcrd=files[1], implicit_solvent=model)
    assert again.fingerprint == molecule.fingerprint
    assert list(molecule.dihedrals) == ["phi", "psi"]


def test_amber_with_the_coordinates_of_a_pdb_file():
    molecule = load_molecule(prmtop=PRMTOP, pdb=AMBER_PDB, implicit_solvent="OBC2")
    assert molecule.n_atoms == 22


def test_force_fields_and_systems_as_objects(molecule, tmp_path):
    given = {"pdb": app.Modeller(molecule.topology, molecule.positions * unit.nanometer)}
    protein = "amber14/protein.ff14SB.xml"
    expected = force_field(protein, "implicit/gbn2.xml").createSystem(molecule.topology)
    x = torch.tensor(molecule.positions[None])
    for field, solvent in (
        ([protein, "implicit/gbn2.xml"], None),
        (protein, "GBn2"),
        (force_field(protein), "GBn2"),
        (force_field(protein, "implicit/gbn2.xml"), "none"),
    ):
        loaded = load_molecule(**given, force_field=field, implicit_solvent=solvent)
        assert_same_energy(loaded.system, expected, x, 1e-9)
    assert load_molecule(**given, system=molecule.system).fingerprint == molecule.fingerprint
    both = {"force_field": [protein, "implicit/obc2.xml"], "implicit_solvent": "obc2"}
    with refused(ValueError, "force_field: .*it has an implicit solvent of its own"):
        load_molecule(**given, **both)


def test_an_implicit_solvent_for_gromacs_is_that_of_openmm(folder, ethanol):
    """The same radii, from elements and bonds, as those of a PSF; a surface term beside it."""
    top = {"top": folder / "a.top", "gro": folder / "a.gro", "include_dir": folder / "ff"}
    x = perturbed(ethanol.positions, 1, (0.002, 0.01))
    for model in ("HCT", "OBC1", "OBC2", "GBn", "GBn2"):
        force = load_molecule(**top, implicit_solvent=model).system.getForces()[-1]
        psf = app.CharmmPsfFile(str(folder / "a.psf"))
        files = app.CharmmParameterSet(str(folder / "a.prm"), str(folder / "a.rtf"))
        system = psf.createSystem(files, implicitSolvent=getattr(app, model), gbsaModel="ACE")
        (expected,) = (f for f in system.getForces() if isinstance(f, openmm.CustomGBForce))
        got = [alone(f, len(x[0])) for f in (force, expected)]
        assert_same_energy(*got, x, 1e-6)


def alone(force, n_atoms):
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(1.0)
    system.addForce(openmm.XmlSerializer.clone(force))
    return system


def test_the_shell(folder, tmp_path, capsys):
    md = ["--frames", "40", "--steps-per-frame", "1", "--equilibration-steps", "1", "--quiet"]
    md += ["--platform", "Reference"]
    for number, files in enumerate((
        ["--prmtop", PRMTOP, "--inpcrd", INPCRD, "--implicit-solvent", "obc2"],
        ["--top", folder / "a.top", "--gro", folder / "a.gro", "--include-dir", folder / "ff"],
        ["--psf", folder / "a.psf", "--crd", folder / "a.crd", "--parameters", folder / "a.rtf",
         folder / "a.prm", "--constraints", "none"],
    )):  # fmt: skip
        output = tmp_path / str(number)
        arguments = ["md", "--output", output, *files, *md]
        assert cli.main([str(argument) for argument in arguments]) == 0
        assert json.loads((output / "config.json").read_text())["stage"] == "md"
        dataset = tsf.MDDataset.load(output, load_of(number, folder), stride=2)
        assert len(dataset) == 20
    line = from_shell(["md", "--output", tmp_path / "a", "--prmtop", PRMTOP], capsys)
    assert "inpcrd: expected one file of coordinates beside prmtop, got none" in line


def load_of(number, folder):
    return (
        lambda: load_molecule(prmtop=PRMTOP, inpcrd=INPCRD, implicit_solvent="OBC2"),
        lambda: load_molecule(
            top=folder / "a.top", gro=folder / "a.gro", include_dir=folder / "ff"
        ),
        lambda: load_molecule(
            psf=folder / "a.psf", crd=folder / "a.crd",
            parameters=[folder / "a.rtf", folder / "a.prm"],
        ),
    )[number]()  # fmt: skip


@cases(
    ("given", "message"),
    [
        ("two sources", {"prmtop": "a", "top": "b", "gro": "c"}, "prmtop, top: expected one of"),
        ("no source", {"gro": "a"}, "top: expected one beside gro, got none"),
        ("a PDB alone", {"pdb": "a"}, "system, force_field: expected exactly one of the two"),
        ("no coordinates", {"psf": "a", "parameters": "p"}, "crd: expected one file"),
        ("two coordinates", {"prmtop": "a", "inpcrd": "b", "gro": "c"}, "got inpcrd and gro"),
        ("System without PDB", {"system": "a", "inpcrd": "b"}, "pdb: expected a PDB file beside"),
        ("no parameters", {"psf": "a", "crd": "b"}, "parameters: expected CHARMM parameter files"),
        ("lone parameters", {"prmtop": "a", "inpcrd": "b", "parameters": "p"}, "belongs to psf"),
        ("lone folder", {"prmtop": "a", "inpcrd": "b", "include_dir": "p"}, "belongs to top"),
        ("model", {"prmtop": "a", "inpcrd": "b", "implicit_solvent": "tip3p"}, "one of HCT, OBC1"),
        ("bonds", {"prmtop": "a", "inpcrd": "b", "constraints": "all"}, "'hbonds', 'allbonds'"),
        ("only a model", {"implicit_solvent": "OBC2"}, "implicit_solvent: expected files of"),
        ("only bonds", {"constraints": "hbonds"}, "constraints: expected files of a molecule"),
        ("System with a model", {"pdb": AMBER_PDB, "system": "b", "implicit_solvent": "OBC2"},
         "implicit_solvent: expected none, it is part of the System"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_together(given, message):
    with refused(ValueError, message):
        load_molecule(**given)


@pytest.mark.parametrize("name", ["system", "force_field", "parameters"])
@pytest.mark.parametrize("value", [3, [3]])
def test_objects_that_are_no_files(folder, name, value):
    source = "psf" if name == "parameters" else name
    with refused(TypeError, rf"^{name}: expected .*, got \[?3"):
        load_molecule(**(complete(folder)[source] | {name: value}))


@pytest.mark.parametrize("name", ["prmtop", "top", "psf", "inpcrd", "gro", "crd", "pdb"])
def test_other_objects_and_absent_files(folder, name):
    with refused(TypeError, f"{name}: expected .*, got"):
        load_molecule(**(complete(folder)[partner(name)] | {name: 3}))
    with refused(FileNotFoundError, f"{name}: no such file nowhere"):
        load_molecule(**(complete(folder)[partner(name)] | {name: "nowhere"}))
    with refused(IsADirectoryError, f"{name}: expected .*, got the directory"):
        load_molecule(**(complete(folder)[partner(name)] | {name: folder}))


def partner(name):
    return {"inpcrd": "prmtop", "gro": "top", "crd": "psf", "pdb": "force_field"}.get(name, name)


def complete(folder):
    """For each source, arguments of existing files."""
    return {
        "prmtop": {"prmtop": PRMTOP, "inpcrd": INPCRD},
        "top": {"top": folder / "a.top", "gro": folder / "a.gro", "include_dir": folder / "ff"},
        "psf": {
            "psf": folder / "a.psf", "crd": folder / "a.crd",
            "parameters": [folder / "a.rtf", folder / "a.prm"],
        },
        "force_field": {"pdb": AMBER_PDB, "force_field": ["amber14-all.xml"]},
        "system": {"pdb": AMBER_PDB, "system": folder / "a.pdb"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def zoo_of_files(molecule, folder, tmp_path_factory):
    """Files of many kinds, each with the words that name it."""
    path = tmp_path_factory.mktemp("kinds")
    system = molecule.system
    context = openmm.Context(system, openmm.VerletIntegrator(0.001))
    context.setPositions(molecule.positions)
    state = openmm.XmlSerializer.serialize(context.getState(positions=True))
    (path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    (path / "state.xml").write_text(state)
    (path / "field.xml").write_text("<!-- a -->\n<ForceField>\n</ForceField>")
    (path / "integrator.xml").write_text(
        openmm.XmlSerializer.serialize(openmm.VerletIntegrator(0.001))
    )
    trajectory = mdtraj.Trajectory(molecule.positions[None], molecule.mdtraj_topology)
    for ending in ("dcd", "nc", "xtc", "trr"):
        trajectory.save(str(path / f"a.{ending}"))
    with open(path / "a.cif", "w") as file:
        app.PDBxFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file)
    (path / "a.mol2").write_text("@<TRIPOS>MOLECULE\nx\n")
    (path / "a.sdf").write_text("x\n  prog\n\n  3  2  0  0  0  0  0  0  0  0999 V2000\n")
    (path / "a.prmtop.gz").write_bytes(gzip.compress(Path(PRMTOP).read_bytes()))
    (path / "a.json").write_text("{}")
    (path / "empty").touch()
    np.savez(path / "a.npz", x=np.zeros(3))
    torch.save({"x": torch.zeros(2)}, path / "a.pt")
    return {
        PRMTOP: "an Amber topology", INPCRD: "Amber coordinates", AMBER_PDB: "a PDB file",
        folder / "a.top": "a GROMACS topology", folder / "a.gro": "GROMACS coordinates",
        folder / "ff" / "types.itp": "a GROMACS topology", folder / "a.psf": "a CHARMM PSF",
        folder / "a.crd": "CHARMM coordinates", folder / "a.prm": "CHARMM parameters",
        folder / "a.rtf": "CHARMM parameters", path / "system.xml": "a serialized System",
        path / "state.xml": "a serialized State", path / "field.xml": "a force field of OpenMM",
        path / "integrator.xml": "a serialized Integrator", path / "a.dcd": "a DCD trajectory",
        path / "a.nc": "a NetCDF file", path / "a.xtc": "an XTC trajectory",
        path / "a.trr": "a TRR trajectory", path / "a.cif": "an mmCIF file",
        path / "a.mol2": "a Mol2 file", path / "a.sdf": "an SDF or MOL file",
        path / "a.prmtop.gz": "a file compressed by gzip", path / "a.json": "a JSON file",
        path / "empty": "an empty file", path / "a.npz": "arrays of NumPy",
        path / "a.pt": "a file of torch",
        "tests/support/ala2_mdtraj.h5": "an HDF5 file",
    }  # fmt: skip


def test_files_are_known_by_their_content(zoo_of_files):
    for path, words in zoo_of_files.items():
        assert (describe_file(path) or "").startswith(words), path


ACCEPTED = {
    "prmtop": ("an Amber topology",),
    "inpcrd": ("Amber coordinates", "a NetCDF file"),
    "top": ("a GROMACS topology",),
    "gro": ("GROMACS coordinates",),
    "psf": ("a CHARMM PSF",),
    "crd": ("CHARMM coordinates",),
    "parameters": ("CHARMM parameters",),
    "pdb": ("a PDB file", "an mmCIF file", "a file compressed by gzip"),
    "force_field": ("a force field of OpenMM",),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_wrong_kind_of_file_is_named_in_every_argument(zoo_of_files, folder, name):
    source = {"parameters": "psf", "force_field": "force_field"}.get(name, partner(name))
    for path, words in zoo_of_files.items():
        if words in ACCEPTED[name]:
            continue
        value = [str(path)] if name in ("parameters", "force_field") else path
        with refused(ValueError, rf"^{name}: expected .*, got {words}"):
            load_molecule(**(complete(folder)[source] | {name: value}))


def test_a_wrong_kind_of_file_is_named_for_systems_and_flows(zoo_of_files, folder):
    for path, words in zoo_of_files.items():
        is_xml = str(path).endswith(".xml")
        if words != "a serialized System":
            name = "<State" if "State" in words else "<" if is_xml else f"got {words}"
            with refused(ValueError, f"^system: .*{name}"):
                load_molecule(**(complete(folder)["system"] | {"system": path}))
        if words != "a file of torch":
            with refused(ValueError, f"not a readable flow.*got {words}"):
                tsf.load_flow(path, None)


def test_water_is_seen_in_every_format(ethanol, tmp_path, capsys):
    message = "expected one molecule without explicit solvent, got {} water molecules and {} ions"
    with refused(ValueError, "prmtop: .*" + message.format(749, 0)):
        load_molecule(prmtop=EXPLICIT[0], inpcrd=EXPLICIT[1])
    write_gromacs(tmp_path, ethanol, box=3.0, water=2)
    given = {"top": tmp_path / "a.top", "include_dir": tmp_path / "ff", "gro": tmp_path / "a.gro"}
    with refused(ValueError, "top: .*" + message.format(2, 0)):
        load_molecule(**given)
    files = itertools.chain(*((f"--{k.replace('_', '-')}", v) for k, v in given.items()))
    line = from_shell(["md", "--output", tmp_path / "out", *files], capsys)
    assert "strip them" in line
    assert "--implicit-solvent OBC2" in line


def test_a_periodic_box_asks_for_a_solvent(ethanol, tmp_path):
    """A molecule that was stripped of its water, or is in another solvent."""
    write_gromacs(tmp_path, ethanol, box=3.0)
    given = {"top": tmp_path / "a.top", "include_dir": tmp_path / "ff", "gro": tmp_path / "a.gro"}
    with refused(ValueError, "implicit_solvent: expected one of HCT, .* has a periodic box"):
        load_molecule(**given)
    for solvent, n_forces in (("none", 4), ("OBC2", 5)):
        system = load_molecule(**given, implicit_solvent=solvent).system
        assert system.getNumForces() == n_forces
        assert not system.usesPeriodicBoundaryConditions()
    with refused(ValueError, "implicit_solvent: expected one of HCT, .* has a periodic box"):
        load_molecule(prmtop=METHANOL[0], inpcrd=METHANOL[1])


def test_a_molecule_of_a_crystal_in_vacuum_is_a_warning(molecule, tmp_path, caplog):
    """CRYST1 records are common; those of 1 Angstrom are place holders."""
    topology = molecule.topology
    given = {"force_field": ["amber14-all.xml"], "pdb": tmp_path / "a.pdb"}
    with open(tmp_path / "a.pdb", "w") as file:
        app.PDBFile.writeFile(topology, molecule.positions * unit.nanometer, file)
    text = (tmp_path / "a.pdb").read_text()
    for edge, solvent, n_warnings in ((1, None, 0), (30, None, 1), (30, "OBC2", 0)):
        record = f"CRYST1{edge:9.3f}{edge:9.3f}{edge:9.3f}  90.00  90.00  90.00 P 1           1\n"
        (tmp_path / "a.pdb").write_text(record + text)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "openmm_tsf"):
            load_molecule(**given, implicit_solvent=solvent)
        assert ["in vacuum" in r.getMessage() for r in caplog.records] == [True] * n_warnings


def test_atoms_in_another_order_and_number_are_refused(folder, tmp_path):
    lines = (folder / "a.gro").read_text().splitlines(True)
    given = {"top": folder / "a.top", "include_dir": folder / "ff", "gro": tmp_path / "a.gro"}
    (tmp_path / "a.gro").write_text("".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    with refused(ValueError, "gro: expected the atoms in the order of .*: atom 0 is"):
        load_molecule(**given)
    (tmp_path / "a.gro").write_text("".join([lines[0], "    8\n", *lines[2:10], lines[-1]]))
    with refused(ValueError, "gro: expected the 9 atoms of .*a.top, got 8 in .*a.gro"):
        load_molecule(**given)


def test_constraints_reach_the_system(folder):
    """12 of alanine dipeptide's and 6 of ethanol's bonds are to hydrogen."""
    parameters = [folder / "a.rtf", folder / "a.prm"]
    for given, n_hydrogen, n_all in (
        (read_prmtop(PRMTOP), 12, 21),
        (read_top(folder / "a.top", folder / "ff"), 6, 8),
        (read_psf(folder / "a.psf", parameters), 6, 8),
    ):
        for bonds, number in (("none", 0), ("hbonds", n_hydrogen), (app.AllBonds, n_all)):
            system = given.create(None, check_constraints(bonds))
            assert system.getNumConstraints() == number
