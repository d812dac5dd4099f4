"""Structure files: encodings, formats, and bonds that only the System has."""

import copy
import gzip
import itertools
from io import StringIO

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest

import openmm_tsf as tsf
from openmm_tsf.systems.bonds import add_bonds_of_system
from openmm_tsf.systems.files import load_molecule
from openmm_tsf.utils.topology import bonds_of
from tests.support.molecules import capped, force_field, graph_molecule
from tests.support.refusals import cases, refused


def text_of(writer, topology, positions):
    text = StringIO()
    writer.writeFile(topology, positions * unit.nanometer, text)
    return text.getvalue()


def names(topology):
    return [(a.name, a.element, a.residue.name, a.residue.id) for a in topology.atoms()]


def pairs(topology):
    return {tuple(sorted(pair)) for pair in bonds_of(topology).tolist()}


@pytest.fixture(scope="module")
def texts(molecule):
    given = molecule.topology, molecule.positions
    return {"pdb": text_of(app.PDBFile, *given), "cif": text_of(app.PDBxFile, *given)}


@pytest.fixture(scope="module")
def xml(molecule, tmp_path_factory):
    path = tmp_path_factory.mktemp("xml") / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(molecule.system))
    return path


REMARK = "REMARK   Å, β-Sheet von Jürgen, 25 °C\n"
LATIN = "REMARK   Ångström, 25 °C, Jürgen\n"


@cases(
    ("name", "form", "change"),
    [
        ("mark before ATOM", "a.pdb", "pdb", lambda t: t[t.index("HETATM"):].encode("utf-8-sig")),
        ("mark before mmCIF", "a.cif", "cif", lambda t: t.encode("utf-8-sig")),
        ("UTF-8", "a.pdb", "pdb", lambda t: (REMARK + t).encode()),
        ("Latin-1", "a.ent", "pdb", lambda t: (LATIN + t).encode("latin-1")),
        ("UTF-16", "a.pdb", "pdb", lambda t: (REMARK + t).encode("utf-16")),
        ("UTF-16, big end first", "a.cif", "cif", lambda t: ("\ufeff" + t).encode("utf-16-be")),
        ("Windows lines, capitals", "A.PDB", "pdb", lambda t: t.replace("\n", "\r\n").encode()),
        ("old lines", "a.pdb", "pdb", lambda t: t.replace("\n", "\r").encode()),
        ("compressed", "a.pdb.gz", "pdb", lambda t: gzip.compress(t.encode())),
        ("compressed Latin-1", "a", "pdb", lambda t: gzip.compress((LATIN + t).encode("latin-1"))),
        ("mmCIF", "a.mmcif", "cif", str.encode),
        ("mmCIF, compressed, capitals", "A.CIF.GZ", "cif", lambda t: gzip.compress(t.encode())),
        ("mmCIF called PDB", "a.pdb", "cif", lambda t: ("# é\n\n" + t).encode("latin-1")),
        ("PDB called mmCIF", "a.cif", "pdb", str.encode),
    ],
)  # fmt: skip
def test_structures_are_read_whatever_the_file(molecule, texts, xml, tmp_path, name, form, change):
    text = texts[form].replace("ATOM  ", "HETATM") if form == "pdb" else texts[form]
    (tmp_path / name).write_bytes(change(text))
    loaded = load_molecule(tmp_path / name, xml)
    assert names(loaded.topology) == names(molecule.topology)
    assert pairs(loaded.topology) == pairs(molecule.topology)
    np.testing.assert_allclose(loaded.positions, molecule.positions, atol=6e-5)


def test_a_force_field_is_applied_to_mmcif_with_a_mark(molecule, texts, tmp_path):
    (tmp_path / "a.cif").write_bytes(texts["cif"].encode("utf-8-sig"))
    given = ["amber99sbildn.xml", "amber96_obc.xml"]
    loaded = load_molecule(tmp_path / "a.cif", None, given)
    assert names(loaded.topology) == names(molecule.topology)
    np.testing.assert_array_equal(loaded.masses, molecule.masses)


def test_systems_and_force_fields_may_begin_with_a_mark(molecule, texts, xml, tmp_path):
    (tmp_path / "a.pdb").write_text(texts["pdb"])
    (tmp_path / "a.xml").write_bytes(b"\xef\xbb\xbf" + xml.read_bytes())
    assert load_molecule(tmp_path / "a.pdb", tmp_path / "a.xml").n_atoms == 22
    (tmp_path / "ff.xml").write_text("\ufeff<ForceField/>", encoding="utf-8")
    given = ["amber99sbildn.xml", str(tmp_path / "ff.xml")]
    assert load_molecule(tmp_path / "a.pdb", None, given).n_atoms == 22


@cases(
    ("content", "message"),
    [
        ("Mol2", b"# by hand\n@<TRIPOS>MOLECULE\nx\n", "expected .*, got a Mol2 file: .*a.pdb"),
        ("SDF", b"x\n  prog\n\n  3  2  0  0  0  0  0  0  0  0999 V2000\n", "got an SDF or MOL"),
        ("prmtop", b"%VERSION  VERSION_STAMP = V0001.000\n%FLAG TITLE\n", "got an Amber topology"),
        ("PSF", b"PSF EXT CMAP\n\n 2 !NTITLE\n", "got a CHARMM PSF"),
        ("XML", b"<?xml version='1.0'?><System/>", "got a serialized System"),
        ("trajectory", b"T\0\0\0CORD\xd0\x07\0\0", "expected a PDB or mmCIF file, got a DCD"),
        ("broken gzip", gzip.compress(b"ATOM" * 99)[:-9], "cannot read .*not a readable gzip file"),
        ("crystal CIF", b"data_x\nloop_\n_atom_site_label\nC1\n", "without .* _atom_site"),
        ("xyz", b"1\n\nC 0 0 0\n", "got an XYZ file"),
        ("numbers", b"1 2 3\n", "cannot read .*no atoms in it, expected ATOM or HETATM"),
        ("nothing", b"", "got an empty file"),
    ],
)  # fmt: skip
def test_other_files_are_named(xml, tmp_path, content, message):
    (tmp_path / "a.pdb").write_bytes(content)
    with refused(ValueError, f"pdb: .*{message}"):
        load_molecule(tmp_path / "a.pdb", xml)


def with_unknown_names(topology, which=lambda residue: True):
    """A copy with residues renamed and without any bonds, as a PDB file has for ligands."""
    renamed = copy.deepcopy(topology)
    for residue in renamed.residues():
        if which(residue):
            residue.name = "LIG"
    return renamed


def write_without_conect(topology, positions, path):
    text = text_of(app.PDBFile, topology, positions)
    path.write_text("".join(line for line in text.splitlines(True) if line[:6] != "CONECT"))


def written(tmp_path, system, topology, positions):
    write_without_conect(topology, positions, tmp_path / "a.pdb")
    (tmp_path / "a.xml").write_text(openmm.XmlSerializer.serialize(system))
    return tmp_path / "a.pdb", tmp_path / "a.xml"


@cases(
    ("which", "residue_name"),
    [
        ("all residues", lambda residue: True, "ALA"),
        ("proline's ring", lambda residue: True, "PRO"),
        ("one in a peptide", lambda residue: residue.name == "ASN", "ASN"),
    ],
)
def test_bonds_come_from_the_system(tmp_path, caplog, which, residue_name):
    """Also where every angle has a Urey-Bradley term, as in CHARMM's force fields."""
    topology, positions = capped(residue_name)
    system = force_field("amber14/protein.ff14SB.xml").createSystem(topology, constraints=None)
    (angles,) = (f for f in system.getForces() if isinstance(f, openmm.HarmonicAngleForce))
    springs = openmm.HarmonicBondForce()
    for index in range(angles.getNumAngles()):
        first, _, last, *_ = angles.getAngleParameters(index)
        springs.addBond(first, last, 0.25, 1e3)
    system.addForce(springs)
    files = written(tmp_path, system, with_unknown_names(topology, which), positions)
    assert len(pairs(app.PDBFile(str(files[0])).topology)) < len(pairs(topology))
    with caplog.at_level("INFO", "openmm_tsf"):
        loaded = load_molecule(*files)
    assert pairs(loaded.topology) == pairs(topology)
    assert "that the structure file lacks are taken from the System" in caplog.text


RING = [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4)]  # three carbons with a tail
PLACES = np.array([[0, 0, 0], [0.15, 0, 0], [0.075, 0.13, 0], [0.075, 0.28, 0], [0.19, 0.37, 0.1]])


def ring(with_angles):
    """A System of the ring with its tail; and the Topology, without bonds."""
    topology, positions = graph_molecule([], PLACES)
    system = openmm.System()
    bonds, angles = openmm.CustomBondForce("r"), openmm.CustomAngleForce("theta")
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    for first, second in RING[::-1]:
        bonds.addBond(second, first)
    system.addForce(bonds)
    for one, other in itertools.combinations(RING, 2) if with_angles else ():
        if common := set(one) & set(other):
            (vertex,) = common
            first, last = set(one) ^ set(other)
            angles.addAngle(first, vertex, last)
    system.addForce(angles)
    return system, topology, positions


@pytest.mark.parametrize("with_angles", [True, False])
def test_a_three_membered_ring_is_closed(with_angles):
    system, topology, positions = ring(with_angles)
    add_bonds_of_system(topology, system, positions)
    assert pairs(topology) == set(RING)


def test_a_ring_is_closed_where_angles_are_terms_of_another_kind():
    """As at planar atoms in AMOEBA: no angle term has the closing bond as a side."""
    system, topology, positions = ring(with_angles=False)
    angles = openmm.HarmonicAngleForce()
    for first in range(3):
        angles.addAngle(first, first + 1, first + 2, 2.0, 100.0)
    system.addForce(angles)
    add_bonds_of_system(topology, system, positions)
    assert pairs(topology) == set(RING)


def test_other_terms_of_two_atoms_are_no_bonds():
    """Urey-Bradley and 1-4 terms, a tether within and one to a far fragment."""
    system, topology, positions = ring(with_angles=True)
    residue = topology.addResidue("FAR", topology.addChain())
    positions = np.concatenate([positions, positions[:2] + 0.8])
    extra, tether = openmm.HarmonicBondForce(), openmm.CustomBondForce("r^2")
    for name in ("C5", "H6"):  # a diatomic, without an angle
        topology.addAtom(name, app.element.carbon, residue)
        system.addParticle(12.0)
    extra.addBond(5, 6, 0.15, 1e5)
    extra.addBond(1, 3, 0.25, 1e4)
    extra.addBond(2, 4, 0.25, 1e4)
    tether.addBond(0, 4)
    tether.addBond(3, 5)
    system.addForce(extra)
    system.addForce(tether)
    add_bonds_of_system(topology, system, positions)
    assert pairs(topology) == {*RING, (5, 6)}


def test_bonds_that_are_nowhere_are_asked_for(tmp_path):
    system, topology, positions = ring(with_angles=False)
    while system.getNumForces():
        system.removeForce(0)
    loaded = load_molecule(*written(tmp_path, system, topology, positions))
    frames = tsf.MDDataset(np.repeat(positions[None], 40, axis=0), 300, loaded)
    with refused(ValueError, "topology: expected bonds, got none; .*CONECT"):
        tsf.TemperatureSteerableFlow.from_dataset(frames)
    given = ["amber14-all.xml"]
    with refused(ValueError, r"force_field: .* no bonds for atoms of MOL1: add its CONECT"):
        load_molecule(tmp_path / "a.pdb", None, given)


def test_alternatives_insertions_models_and_large_serials_are_read_as_before(
    molecule, texts, xml, tmp_path
):
    """As OpenMM reads them: the first alternative of an atom, the first model."""
    lines = []
    for line in texts["pdb"].splitlines(True):
        if line.startswith(("ATOM", "HETATM")):
            line = line[:6] + "A" + line[7:26] + "B" + line[27:]  # hybrid-36, insertion code
            if line[12:16] == " CA ":
                lines.append(line[:16] + "A" + line[17:])
                line = line[:16] + "B" + line[17:30] + "   9.000" + line[38:]
        elif line.startswith(("CONECT", "END")):
            continue
        lines.append(line)
    model = "".join(lines)
    moved = model.replace(" 1.00  0.00", " 0.50  0.00")
    (tmp_path / "a.pdb").write_text(
        f"MODEL        1\n{model}ENDMDL\nMODEL        2\n{moved}ENDMDL\n"
    )
    expected = app.PDBFile(str(tmp_path / "a.pdb"))
    loaded = load_molecule(tmp_path / "a.pdb", xml)
    np.testing.assert_array_equal(loaded.positions, np.array(expected.positions._value))
    np.testing.assert_allclose(loaded.positions, molecule.positions, atol=6e-5)
    assert pairs(loaded.topology) == pairs(molecule.topology)
