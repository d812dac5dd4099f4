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
from tests.support.refusals import from_shell, refused

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


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(
            lambda: chain(bonds=[(0, 2), (2, 1), (1, 3), (3, 4)]),
            r"topology: expected the System's bonds .* 2 of 4 bonds the System has no term; the "
            r"first is between MOL1-C0 and MOL1-C1 \(atoms 0 and 1\)",
            id="another order of atoms",
        ),
        pytest.param(
            lambda: chain(bonds=CHAIN[:3]),
            r"1 of 4 bonds .* MOL1-C3 and MOL1-C4",
            id="a bond that the System does not have",
        ),
        pytest.param(
            lambda: chain("COCCC", masses=[16.0, 12.0, 12.0, 12.0, 12.0]),
            r"topology: expected the elements in the order of the System's masses, but 2 atoms .* "
            r"MOL1-C0 \(atom 0\), C with a mass of 16 amu",
            id="same bonds, another order of elements",
        ),
    ],
)
def test_system_and_topology_disagree(build, message):
    with refused(ValueError, message):
        build()


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


def test_the_error_of_constraints_shows_how_to_omit_them(molecule):
    system = copy.deepcopy(molecule.system)
    system.addConstraint(0, 1, 0.1)
    line = r"forcefield\.createSystem\(topology, nonbondedMethod=NoCutoff, constraints=None"
    with refused(ValueError, f"system: constraints are not supported, got 1 .*{line}"):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(periodic, "system: expected no periodic box", id="periodic"),
        pytest.param(
            lambda s: s.addForce(openmm.MonteCarloBarostat(1.0, 300.0)), "barostats", id="barostat"
        ),
        pytest.param(
            lambda s: s.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5)),
            "virtual sites are not supported, particle 2",
            id="virtual site",
        ),
        pytest.param(lambda s: s.addConstraint(0, 1, 0.1), "constraints=None", id="constraint"),
        pytest.param(lambda s: s.addParticle(12.0), "expected the System's 23 atoms", id="atoms"),
    ],
)
def test_systems_from_the_shell(built, change, message, tmp_path, capsys):
    command = ["md", "--output", tmp_path / "out", *built(change), "--frames", "1"]
    assert message in from_shell(command, capsys)
    assert not (tmp_path / "out").exists()


def moved(molecule, change):
    positions = molecule.positions.copy()
    change(positions)
    return tsf.MolecularSystem(molecule.system, molecule.topology, positions)


def put(atom, position):
    return lambda x: x.__setitem__(atom, position(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(put(3, lambda x: np.nan), "positions: expected finite numbers", id="NaN"),
        pytest.param(put(3, lambda x: np.inf), "positions: expected finite numbers", id="infinity"),
        pytest.param(
            put(2, lambda x: x[0]),
            r"positions: expected atoms at least 0\.03 nm apart, but ACE1-H1 and ACE1-H2 are at 0 ",
            id="overlap",
        ),
        pytest.param(
            lambda x: np.multiply(x, 10, out=x),
            r"positions: expected bonds of at most 0\.\d+ nm, but ACE1-\w+ and ACE1-\w+ are bonded "
            r"at 1\.\d+ nm \(21 of 21 bonds .*lengths are in nm \(not Angstrom\)",
            id="Angstrom",
        ),
        pytest.param(
            lambda x: np.add(x[10:], [3.0, 0, 0], out=x[10:]),
            r"bonded at [23]\.\d+ nm .*broken across a periodic box",
            id="broken across a box",
        ),
        pytest.param(lambda x: np.divide(x, 10, out=x), "at least 0.03 nm apart", id="nm / 10"),
        pytest.param(lambda x: x.__setitem__(slice(None), x[::-1].copy()), "too long", id="order"),
    ],
)
def test_reference_positions(molecule, change, message):
    with refused(ValueError, message):
        moved(molecule, change)


def test_reference_positions_without_bond_lengths_in_the_system():
    topology, positions = graph_molecule(CHAIN, 10 * ZIGZAG)
    system = system_of(topology, [])
    with refused(ValueError, r"expected bonds of at most 0\.5 nm, but MOL1-C0 and MOL1-C1"):
        tsf.MolecularSystem(system, topology, positions)


def flow_for(bonds, elements, positions):
    topology, xyz = graph_molecule(bonds, np.asarray(positions, dtype=float), elements)
    molecule = tsf.MolecularSystem(system_of(topology), topology, xyz)
    x = torch.tensor(xyz).repeat(20, 1, 1)
    return tsf.TemperatureSteerableFlow.from_dataset(MDDataset(x, 600, molecule))


@pytest.mark.parametrize(
    ("bonds", "elements", "positions", "message"),
    [
        pytest.param([], "C", ZIGZAG[:1], "expected at least 4 atoms, got 1", id="an atom"),
        pytest.param([(0, 1)], "HO", ZIGZAG[:2], "expected at least 4 atoms, got 2", id="an ion"),
        pytest.param([], "CCCCC", ZIGZAG, "expected bonds, got none", id="no bonds"),
        pytest.param(
            [(0, 1), (1, 2), (3, 4)],
            "CCCCC",
            ZIGZAG,
            r"one molecule connected by bonds, got 2 fragments .*MOL1-C0, MOL1-C3",
            id="two molecules",
        ),
        pytest.param(
            [(0, 1), (1, 2), (0, 3), (0, 4)],
            "CCNHH",
            [[0, 0, 0], [0.146, 0, 0], [0.261, 0, 0], [-0.04, 0.1, 0], [-0.04, -0.05, 0.09]],
            r"no linear angle, but MOL1-N2 MOL1-C1 MOL1-C0 is at 180\.00 degrees",
            id="nitrile",
        ),
        pytest.param(
            [(0, 1), (1, 2), (2, 3)],
            "HCCH",
            [[0, 0, 0], [0.106, 0, 0], [0.226, 0, 0], [0.332, 0, 0]],
            "expected no linear angle",
            id="alkyne",
        ),
        pytest.param(
            [(0, 1), (1, 2)],
            "OCO",
            [[0, 0, 0], [0.116, 0, 0], [0.232, 0, 0]],
            "expected at least 4 atoms, got 3",
            id="CO2",
        ),
    ],
)
def test_molecules_without_internal_coordinates(bonds, elements, positions, message):
    with refused(ValueError, message):
        flow_for(bonds, elements, positions)


def test_a_flat_centre_is_named():
    flat = np.array([[0, 0, 0], [0.1, 0, 0], [-0.1, 0, 0], [0, 0.1, 0], [0, -0.1, 0]])
    flat[1:] += [[0, 0.02, 0], [0, 0.03, 0], [0.02, 0, 0], [0.03, 0, 0]]
    topology, positions = graph_molecule([(0, 1), (0, 2), (0, 3), (0, 4)], flat, "CFHON")
    with refused(ValueError, "positions: expected tetrahedral centres with a handedness"):
        InternalCoordinates.from_topology(topology, positions)


def swapped(x, first, second):
    order = list(range(x.shape[1]))
    order[first], order[second] = second, first
    return x[:, order]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda x: x[:, :10], r"expected shape \[F, 22, 3\], got", id="fewer atoms"),
        pytest.param(
            lambda x: x.roll(1, 1),
            r"positions: expected this molecule's bonds, up to a factor of 2, but 20 of 20 frames "
            r"have others; the first is frame 0, with \S+ and \S+ at 0\.\d+ nm \(reference",
            id="another order",
        ),
        pytest.param(
            lambda x: swapped(x, 0, 1),
            r"positions: expected the molecule's atoms in its order, but ACE1-\w+ and ACE1-\w+ are "
            r"bonded at 0\.\d+ nm in the mean of 20 frames \(reference positions: 0\.\d+ nm\)",
            id="two neighbours exchanged",
        ),
        pytest.param(
            lambda x: x.index_fill(0, torch.tensor([4, 7]), torch.nan),
            "expected finite numbers, got NaN or infinity in 2 frames, the first is frame 4",
            id="NaN",
        ),
        pytest.param(lambda x: 10 * x, r"at 1\.\d+ nm .* lengths are in nm", id="Angstrom"),
        pytest.param(lambda x: x / 10, r"at 0\.01\d+ nm .* lengths are in nm", id="nm / 10"),
        pytest.param(
            lambda x: x.numpy() * unit.kelvin,
            "expected a quantity in nanometer, got one in kelvin",
            id="another quantity",
        ),
        pytest.param(lambda x: "x.dcd", r"expected numbers \[F, \*event\], got str", id="a string"),
        pytest.param(lambda x: None, r"expected numbers \[F, \*event\], got NoneType", id="None"),
        pytest.param(lambda x: x[:0], r"with F >= 1, got \(0, 22, 3\)", id="no frames"),
    ],
)
def test_frames(molecule, frames, change, message):
    with refused((TypeError, ValueError), message):
        MDDataset(change(frames), 600, molecule)


def test_one_bad_frame(molecule, frames):
    x = frames.clone()
    x[7, 21] += 5.0
    message = r"1 of 20 frames have others; the first is frame 7, with \S+ and NME3-H3 at 8\.\d+ nm"
    with refused(ValueError, message):
        MDDataset(x, 600, molecule)


def test_overlapping_atoms_that_are_not_bonded():
    """A chain that overlaps itself, with correct bonds."""
    topology, positions = graph_molecule(CHAIN, ZIGZAG)
    molecule = tsf.MolecularSystem(system_of(topology, []), topology, positions)
    x = torch.tensor(ZIGZAG).repeat(6, 1, 1)
    x[2:4, 2:] = x[2:4, 1:2] + torch.tensor([[-0.1, -0.1, 0.0], [0.0, -0.1, 0.1], [0.1, 0, 0]])
    x[2:4, 4] = x[2:4, 3] + torch.tensor([-0.1, -0.1, 0.0])
    message = r"in 2 of 6 frames some are closer; the first is frame 2, with MOL1-C0 and MOL1-C2"
    with refused(ValueError, message):
        MDDataset(x, 600, molecule)
    MDDataset(x.flatten(1), 600)  # a potential on R^d has no atoms
