"""Molecules: which Systems are accepted or refused, and what errors name."""

import copy

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest
from openmm import TwoParticleAverageSite

from openmm_tsf.analysis.reference import has_reference
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem, is_stereoisomer
from tests.support.molecules import capped as capped_residue
from tests.support.strained import dynamics, harmonic, ring


def changed(molecule, change):
    system = copy.deepcopy(molecule.system)
    change(system)
    return MolecularSystem(system, molecule.topology, molecule.positions)


def test_alanine_dipeptide(molecule):
    assert molecule.n_atoms == 22
    assert molecule.masses.sum() == pytest.approx(144.18, abs=0.05)
    assert molecule.mdtraj_topology.n_bonds == 21
    assert any(isinstance(f, openmm.GBSAOBCForce) for f in molecule.system.getForces())
    other = alanine_dipeptide("ff96-obc1")
    assert other.system.getNumConstraints() == 0
    dihedrals = {"phi": (4, 6, 8, 14), "psi": (6, 8, 14, 16)}
    assert molecule.dihedrals == other.dihedrals == dihedrals
    with pytest.raises(ValueError, match=r"force_field: expected .* got 'charmm'"):
        alanine_dipeptide("charmm")


def test_fingerprint_depends_on_the_system_but_not_on_the_version(molecule, monkeypatch):
    assert alanine_dipeptide().fingerprint == molecule.fingerprint
    heavier = changed(molecule, lambda system: system.setParticleMass(0, 4.0))
    assert heavier.fingerprint != molecule.fingerprint
    serialize = openmm.XmlSerializer.serialize
    xml = serialize(molecule.system)
    assert f'openmmVersion="{openmm.__version__}"' in xml

    def upgraded(thing):
        return serialize(thing).replace(openmm.__version__, "99.1")

    monkeypatch.setattr(openmm.XmlSerializer, "serialize", upgraded)
    again = MolecularSystem(molecule.system, molecule.topology, molecule.positions)
    assert again.fingerprint == molecule.fingerprint


def with_inverted_side_chain(topology, positions):
    """Return positions with the second residue's atoms beyond CB reflected in a plane by CA, CB."""
    atoms = {atom.name: atom.index for atom in topology.atoms() if atom.residue.index == 1}
    beta, x = positions[atoms["CB"]], positions.copy()
    normal = np.cross(positions[atoms["CA"]] - beta, [0.3, 0.2, 0.1])
    normal /= np.linalg.norm(normal)
    beyond = [i for name, i in atoms.items() if name[1:2] in ("B", "G", "D") and name != "CB"]
    x[beyond] -= 2 * ((x[beyond] - beta) @ normal)[:, None] * normal
    return x


def test_fingerprint_depends_on_the_handedness_but_not_on_the_conformation(molecule):
    system, topology = molecule.system, molecule.topology
    mirrored = MolecularSystem(system, topology, molecule.positions * [1, 1, -1])
    assert is_stereoisomer(mirrored.fingerprint, molecule.fingerprint)
    assert not has_reference(mirrored.fingerprint)
    assert has_reference(molecule.fingerprint)
    for frame in MDDataset.shipped(molecule, stride=800).positions.numpy():  # of 600 K
        assert MolecularSystem(system, topology, frame).fingerprint == molecule.fingerprint
    # Exchanged hydrogens of a methyl group: to the coordinates, another molecule.
    x = molecule.positions.copy()
    x[[12, 13]] = x[[13, 12]]
    exchanged = MolecularSystem(system, topology, x)
    assert is_stereoisomer(exchanged.fingerprint, molecule.fingerprint)
    assert exchanged.fingerprint != mirrored.fingerprint
    x[[11, 12, 13]] = molecule.positions[[12, 13, 11]]  # rotated by a third
    assert MolecularSystem(system, topology, x).fingerprint == molecule.fingerprint
    heavier = changed(molecule, lambda system: system.setParticleMass(0, 4.0))
    assert not is_stereoisomer(heavier.fingerprint, molecule.fingerprint)


def test_fingerprint_does_not_depend_on_how_bonds_are_listed():
    molecule = harmonic(ring("housane"))
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    names = [(atom.name, atom.element) for atom in molecule.topology.atoms()]
    atoms = [topology.addAtom(*name, residue) for name in names]
    bonds = [(one.index, other.index) for one, other in molecule.topology.bonds()]
    for first, second in [*reversed(bonds), bonds[0]]:  # one of them twice
        topology.addBond(atoms[second], atoms[first])
    listed = MolecularSystem(molecule.system, topology, molecule.positions)
    assert listed.fingerprint == molecule.fingerprint


def test_fingerprints_of_diastereomers_differ():
    topology, positions = capped_residue("ILE")
    system = app.ForceField("amber14-all.xml").createSystem(topology)
    allo = with_inverted_side_chain(topology, positions)
    shapes = {
        name: MolecularSystem(system, topology, x).fingerprint
        for name, x in (
            ("isoleucine", positions),
            ("alloisoleucine", allo),
            ("their mirror images", -positions),
            ("and the other", -allo),
        )
    }
    assert len(set(shapes.values())) == 4
    assert len({fingerprint[:48] for fingerprint in shapes.values()}) == 1


@pytest.mark.parametrize("name", ["spiropentane", "quadricyclane"])
def test_hot_frames_of_small_rings_have_one_fingerprint(name):
    molecule = harmonic(ring(name))
    prints = {
        MolecularSystem(molecule.system, molecule.topology, frame).fingerprint
        for frame in dynamics(molecule, 600.0, 60)
    }
    assert prints == {molecule.fingerprint}


def peptide(n_residues, capped):
    """A peptide of alanines, backbone only, with masses and no Forces."""
    topology, system = app.Topology(), openmm.System()
    chain = topology.addChain()
    names = ["ACE"] * capped + ["ALA"] * n_residues + ["NME"] * capped
    previous = None
    for name in names:
        residue = topology.addResidue(name, chain)
        for label in {"ACE": ("C",), "NME": ("N",)}.get(name, ("N", "CA", "C")):
            element = app.Element.getBySymbol(label[0])
            atom = topology.addAtom(label, element, residue)
            system.addParticle(element.mass)
            if previous is not None:
                topology.addBond(previous, atom)
            previous = atom
    positions = np.random.default_rng(0).normal(scale=0.1, size=(system.getNumParticles(), 3))
    return MolecularSystem(system, topology, positions)


@pytest.mark.parametrize(
    ("n_residues", "capped", "first_atoms"),
    [
        (1, True, {"phi": 0, "psi": 1}),
        (1, False, {}),
        (2, False, {"phi2": 2, "psi1": 0}),
        (2, True, {"phi2": 0, "phi3": 3, "psi2": 1, "psi3": 4}),
        (3, False, {"phi2": 2, "phi3": 5, "psi1": 0, "psi2": 3}),
    ],
)
def test_dihedrals_are_named_by_their_residue(n_residues, capped, first_atoms):
    expected = {name: tuple(range(first, first + 4)) for name, first in first_atoms.items()}
    assert peptide(n_residues, capped).dihedrals == expected


def test_removal_of_the_centre_of_mass_motion_is_allowed(molecule):
    changed(molecule, lambda system: system.addForce(openmm.CMMotionRemover()))


def test_positions_are_a_frozen_copy_and_quantities_are_converted(molecule):
    given = molecule.positions.copy()
    built = MolecularSystem(molecule.system, molecule.topology, 10 * given * unit.angstrom)
    np.testing.assert_allclose(built.positions, given)
    with pytest.raises(ValueError, match="read-only"):
        built.positions[0, 0] = 1.0


def make_periodic(system):
    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            force.setNonbondedMethod(openmm.NonbondedForce.PME)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.addConstraint(0, 2, 0.18), "constrained angles are not supported; build"),
        (lambda s: s.setParticleMass(3, 0.0), "particle 3 has no mass"),
        (lambda s: s.setVirtualSite(2, TwoParticleAverageSite(0, 1, 1, 0)), "particle 2 is one"),
        (lambda s: s.addForce(openmm.MonteCarloBarostat(1.0, 300.0)), "MonteCarloBarostat"),
        (lambda s: s.addForce(openmm.AndersenThermostat(1, 1)), "AndersenThermostat; leave it out"),
        (make_periodic, "expected no periodic box, but NonbondedForce uses one"),
    ],
)
def test_unsupported_systems_name_the_offender(molecule, change, message):
    with pytest.raises(ValueError, match=message):
        changed(molecule, change)


def test_wrong_arguments(molecule):
    system, topology, positions = molecule.system, molecule.topology, molecule.positions
    empty, broken = app.Topology(), positions.copy()
    broken[5, 1] = np.nan
    for error, message, *arguments in (
        (TypeError, r"system: expected an openmm\.System, got str", "a.xml", topology, positions),
        (TypeError, "to_openmm", system, molecule.mdtraj_topology, positions),
        (ValueError, "topology: expected the System's 22 atoms, got 0", system, empty, positions),
        (ValueError, r"positions: expected shape \(22, 3\)", system, topology, positions[:-1]),
        (ValueError, "positions: expected finite", system, topology, broken),
    ):
        with pytest.raises(error, match=message):
            MolecularSystem(*arguments)
