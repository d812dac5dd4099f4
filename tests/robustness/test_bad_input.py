"""Bad molecules and frames are refused by an error that names the argument."""

import copy

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.systems.dataset import MDDataset
from tests.support.molecules import graph_molecule
from tests.support.refusals import cases, from_shell, refused

ZIGZAG = np.array([[0, 0, 0], [0.1, 0.1, 0], [0.2, 0, 0], [0.3, 0.1, 0.05], [0.4, 0, 0.05]])


@pytest.fixture(scope="module")
def frames(molecule):
    return MDDataset.shipped(molecule, stride=2000).positions


def system_of(topology, bonds=None, masses=None):
    """Harmonic bonds and the elements' masses, or other ones."""
    system, force = openmm.System(), openmm.HarmonicBondForce()
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    for index, mass in enumerate(masses or ()):
        system.setParticleMass(index, mass)
    if bonds is None:
        bonds = [(first.index, second.index) for first, second in topology.bonds()]
    for first, second in bonds:
        force.addBond(first, second, 0.14, 1000.0)
    system.addForce(force)
    return system


CHAIN = [(0, 1), (1, 2), (2, 3), (3, 4)]


def chain(elements="CCCCC", bonds=CHAIN, **changes):
    topology, positions = graph_molecule(CHAIN, ZIGZAG, elements)
    return tsf.MolecularSystem(system_of(topology, bonds, **changes), topology, positions)


@cases(
    ("changes", "message"),
    [
        ("another order of atoms", {"bonds": [(0, 2), (2, 1), (1, 3), (3, 4)]},
         r"topology: expected the System's bonds .* 2 of 4 bonds the System has no term; the "
         r"first is between MOL1-C0 and MOL1-C1 \(atoms 0 and 1\)"),
        ("a bond that the System does not have", {"bonds": CHAIN[:3]},
         r"1 of 4 bonds .* MOL1-C3 and MOL1-C4"),
        ("same bonds, another order of elements",
         {"elements": "COCCC", "masses": [16.0, 12.0, 12.0, 12.0, 12.0]},
         r"topology: expected the elements in the order of the System's masses, but 2 atoms .* "
         r"MOL1-C0 \(atom 0\), C with a mass of 16 amu"),
    ],
)  # fmt: skip
def test_system_and_topology_disagree(changes, message):
    with refused(ValueError, message):
        chain(**changes)


def test_systems_with_other_masses_and_terms_are_accepted():
    """Repartitioned masses, terms beyond the bonds, no terms, terms in a CustomCVForce."""
    chain("CHCHC", masses=[9.0, 4.0, 9.0, 4.0, 9.0])
    chain(bonds=[*CHAIN, (0, 2), (1, 3)])  # Urey-Bradley
    chain(bonds=[])
    topology, positions = graph_molecule(CHAIN, ZIGZAG)
    system = system_of(topology, [(0, 4)])
    hidden = openmm.CustomCVForce("bond")
    inner = openmm.HarmonicBondForce()
    inner.addBond(0, 1, 0.14, 1000.0)
    hidden.addCollectiveVariable("bond", inner)
    system.addForce(hidden)
    tsf.MolecularSystem(system, topology, positions)


def test_the_error_of_constrained_angles_shows_how_to_omit_them(molecule):
    system = copy.deepcopy(molecule.system)
    system.addConstraint(0, 2, 0.18)
    line = r"forcefield\.createSystem\(topology, nonbondedMethod=NoCutoff, constraints=HBonds or N"
    with refused(ValueError, f"system: expected constraints of bonds only, .*{line}"):
        tsf.MolecularSystem(system, molecule.topology, molecule.positions)


@pytest.fixture(scope="module")
def built(molecule, tmp_path_factory):
    """A function that writes a changed System and returns the arguments of the command line."""
    folder = tmp_path_factory.mktemp("molecules")
    with open(folder / "a.pdb", "w") as file:
        app.PDBFile.writeFile(molecule.topology, 10 * molecule.positions, file)

    def write(change):
        system = copy.deepcopy(molecule.system)
        change(system)
        (folder / "a.xml").write_text(openmm.XmlSerializer.serialize(system))
        return ["--pdb", folder / "a.pdb", "--system", folder / "a.xml"]

    return write


def periodic(system):
    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)


@cases(
    ("change", "message"),
    [
        ("periodic", periodic, "system: expected no periodic box"),
        ("barostat", lambda s: s.addForce(openmm.MonteCarloBarostat(1.0, 300.0)), "barostats"),
        ("virtual site",
         lambda s: s.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5)),
         "virtual sites are not supported, particle 2"),
        ("constraint", lambda s: s.addConstraint(0, 2, 0.18), "constraints=HBonds or None"),
        ("atoms", lambda s: s.addParticle(12.0), "expected the System's 23 atoms"),
    ],
)  # fmt: skip
def test_systems_from_the_shell(built, change, message, tmp_path, capsys):
    command = ["md", "--output", tmp_path / "out", *built(change), "--frames", "1"]
    assert message in from_shell(command, capsys)
    assert not (tmp_path / "out").exists()


def put(x, index, value):
    changed = x.copy()
    changed[index] = value
    return changed


@cases(
    ("change", "message"),
    [
        ("NaN", lambda x: put(x, 3, np.nan), "positions: expected finite numbers"),
        ("infinity", lambda x: put(x, 3, np.inf), "positions: expected finite numbers"),
        ("overlap", lambda x: put(x, 2, x[0]),
         r"positions: expected atoms at least 0\.03 nm apart, but ACE1-H1 and ACE1-H2 are at 0 "),
        ("Angstrom", lambda x: 10 * x,
         r"positions: expected bonds of at most 0\.\d+ nm, but ACE1-\w+ and ACE1-\w+ are bonded "
         r"at 1\.\d+ nm \(21 of 21 bonds .*lengths are in nm \(not Angstrom\)"),
        ("broken across a box", lambda x: put(x, slice(10, None), np.add(x[10:], [3.0, 0, 0])),
         r"bonded at [23]\.\d+ nm .*broken across a periodic box"),
        ("nm / 10", lambda x: x / 10, "at least 0.03 nm apart"),
        ("order", lambda x: x[::-1].copy(), "too long"),
    ],
)  # fmt: skip
def test_reference_positions(molecule, change, message):
    with refused(ValueError, message):
        tsf.MolecularSystem(molecule.system, molecule.topology, change(molecule.positions))


def test_reference_positions_without_bond_lengths_in_the_system():
    topology, positions = graph_molecule(CHAIN, 10 * ZIGZAG)
    system = system_of(topology, [])
    with refused(ValueError, r"expected bonds of at most 0\.5 nm, but MOL1-C0 and MOL1-C1"):
        tsf.MolecularSystem(system, topology, positions)


@cases(
    ("bonds", "elements", "positions", "message"),
    [
        ("an atom", [], "C", ZIGZAG[:1], "expected at least 4 atoms, got 1"),
        ("an ion", [(0, 1)], "HO", ZIGZAG[:2], "expected at least 4 atoms, got 2"),
        ("no bonds", [], "CCCCC", ZIGZAG, "expected bonds, got none"),
        ("two molecules", [(0, 1), (1, 2), (3, 4)], "CCCCC", ZIGZAG,
         r"one molecule connected by bonds, got 2 fragments .*MOL1-C0, MOL1-C3"),
        ("alkyne", [(0, 1), (1, 2), (2, 3)], "HCCH",
         [[0, 0, 0], [0.106, 0, 0], [0.226, 0, 0], [0.332, 0, 0]],
         r"topology: expected no linear angle .*MOL1-C1, MOL1-C2"),
        ("CO2", [(0, 1), (1, 2)], "OCO", [[0, 0, 0], [0.116, 0, 0], [0.232, 0, 0]],
         "expected at least 4 atoms, got 3"),
    ],
)  # fmt: skip
def test_molecules_without_internal_coordinates(bonds, elements, positions, message):
    topology, xyz = graph_molecule(bonds, np.asarray(positions, dtype=float), elements)
    molecule = tsf.MolecularSystem(system_of(topology), topology, xyz)
    dataset = MDDataset(torch.tensor(xyz).repeat(20, 1, 1), 600, molecule)
    with refused(ValueError, message):
        tsf.TemperatureSteerableFlow.from_dataset(dataset)


def test_a_flat_centre_is_named():
    flat = np.array([[0, 0, 0], [0.1, 0, 0], [-0.1, 0, 0], [0, 0.1, 0], [0, -0.1, 0]])
    flat[1:] += [[0, 0.02, 0], [0, 0.03, 0], [0.02, 0, 0], [0.03, 0, 0]]
    topology, positions = graph_molecule([(0, 1), (0, 2), (0, 3), (0, 4)], flat, "CFHON")
    with refused(ValueError, "positions: expected tetrahedral centres with a handedness"):
        InternalCoordinates.from_topology(topology, positions)


@cases(
    ("change", "message"),
    [
        ("fewer atoms", lambda x: x[:, :10], r"expected shape \[F, 22, 3\], got"),
        ("another order", lambda x: x.roll(1, 1),
         r"positions: expected this molecule's bonds, up to a factor of 2, but 20 of 20 frames "
         r"have others; the first is frame 0, with \S+ and \S+ at 0\.\d+ nm \(reference"),
        ("two neighbours exchanged", lambda x: x[:, [1, 0, *range(2, 22)]],
         r"positions: expected the molecule's atoms in its order, but ACE1-\w+ and ACE1-\w+ are "
         r"bonded at 0\.\d+ nm in the mean of 20 frames \(reference positions: 0\.\d+ nm\)"),
        ("one bad frame", lambda x: torch.tensor(put(x.numpy(), (7, 21), x.numpy()[7, 21] + 5)),
         r"1 of 20 frames have others; the first is frame 7, with \S+ and NME3-H3 at 8\.\d+ nm"),
        ("NaN", lambda x: x.index_fill(0, torch.tensor([4, 7]), torch.nan),
         "expected finite numbers, got NaN or infinity in 2 frames, the first is frame 4"),
        ("Angstrom", lambda x: 10 * x, r"at 1\.\d+ nm .* lengths are in nm"),
        ("nm / 10", lambda x: x / 10, r"at 0\.01\d+ nm .* lengths are in nm"),
        ("another quantity", lambda x: x.numpy() * unit.kelvin,
         "expected a quantity in nanometer, got one in kelvin"),
        ("a string", lambda x: "x.dcd", "expected numbers, got 'x.dcd'"),
        ("None", lambda x: None, "expected numbers, got NoneType"),
        ("no frames", lambda x: x[:0], r"with F >= 1, got \(0, 22, 3\)"),
    ],
)  # fmt: skip
def test_frames(molecule, frames, change, message):
    with refused((TypeError, ValueError), message):
        MDDataset(change(frames), 600, molecule)


def test_overlapping_atoms_that_are_not_bonded():
    """A chain that overlaps itself, with correct bonds."""
    topology, positions = graph_molecule(CHAIN, ZIGZAG)
    system, repulsion = system_of(topology, []), openmm.NonbondedForce()
    for _ in ZIGZAG:
        repulsion.addParticle(0.0, 0.2, 1.0)
    system.addForce(repulsion)
    molecule = tsf.MolecularSystem(system, topology, positions)
    x = torch.tensor(ZIGZAG).repeat(6, 1, 1)
    x[2:4, 2:] = x[2:4, 1:2] + torch.tensor([[-0.1, -0.1, 0.0], [0.0, -0.1, 0.1], [0.1, 0, 0]])
    x[2:4, 4] = x[2:4, 3] + torch.tensor([-0.1, -0.1, 0.0])
    message = r"in 2 of 6 frames some are closer; the first is frame 2, with MOL1-C0 and MOL1-C2"
    with refused(ValueError, message):
        MDDataset(x, 600, molecule)
    MDDataset(x.flatten(1), 600)  # a potential on R^d has no atoms
