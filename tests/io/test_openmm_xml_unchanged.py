"""Ordinary Systems and States of OpenMM pass the strict reader, and no number is changed."""

import numpy as np
import openmm
import pytest

from openmm_tsf.io.openmm_xml import SAFE_FORCES, read_openmm_xml
from openmm_tsf.systems.files import write_molecule
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from tests.support import torch_zoo
from tests.support.xml_cases import EMPTY, SPRING, nested_in_atm, nested_in_cv, read, system_with


def assert_unchanged(tmp_path, thing, expected=openmm.System):
    """Check that reading changes nothing; return the XML text."""
    xml = openmm.XmlSerializer.serialize(thing)
    assert openmm.XmlSerializer.serialize(read(tmp_path, xml, expected)) == xml
    return xml


@pytest.mark.parametrize("force_field", ["amber99sbildn-obc2", "ff96-obc1"])
def test_alanine_dipeptide_keeps_its_fingerprint(tmp_path, force_field):
    molecule = alanine_dipeptide(force_field)
    assert_unchanged(tmp_path, molecule.system)
    write_molecule(molecule, tmp_path)
    system = read_openmm_xml(tmp_path / "system.xml", openmm.System, "system")
    again = MolecularSystem(system, molecule.topology, molecule.positions)
    assert again.fingerprint == molecule.fingerprint


def test_forces_of_the_other_tests(tmp_path):
    assert_unchanged(tmp_path, torch_zoo.everything())
    rng = np.random.default_rng(0)
    for builder in torch_zoo.PLAIN:
        assert_unchanged(tmp_path, system_with(builder(rng)))


def functions():
    rng = np.random.default_rng(1)
    limits = [0.0, 1.0]
    return [
        openmm.Continuous1DFunction(rng.normal(size=4), *limits),
        openmm.Continuous2DFunction(2, 2, rng.normal(size=4), *limits * 2),
        openmm.Continuous3DFunction(2, 2, 2, rng.normal(size=8), *limits * 3),
        openmm.Discrete1DFunction(rng.normal(size=4)),
        openmm.Discrete2DFunction(2, 2, rng.normal(size=4)),
        openmm.Discrete3DFunction(2, 2, 2, rng.normal(size=8)),
    ]


def many_particle():
    force = openmm.CustomManyParticleForce(3, "distance(p1,p2)")
    force.addParticle([], 2)
    force.setTypeFilter(0, {1, 2})
    return force


def born():
    force = openmm.CustomGBForce()
    force.addComputedValue("I", "r", openmm.CustomGBForce.ParticlePairNoExclusions)
    force.addEnergyTerm("I^2", openmm.CustomGBForce.SingleParticle)
    return force


#: Arguments of constructors that need some.
ARGUMENTS = {
    "CustomAngleForce": ("theta",), "CustomBondForce": ("r",), "CustomCentroidBondForce": (1, "x1"),
    "CustomCompoundBondForce": (1, "x1"), "CustomHbondForce": ("distance(a1,d1)",),
    "CustomNonbondedForce": ("r",), "CustomTorsionForce": ("theta",), "CustomExternalForce": ("x",),
    "CustomVolumeForce": ("v",), "AndersenThermostat": (300, 1), "MonteCarloBarostat": (1, 300),
    "MonteCarloAnisotropicBarostat": ([1, 1, 1], 300),
    "MonteCarloMembraneBarostat": (1, 1, 300, 0, 0), "MonteCarloFlexibleBarostat": (1, 300),
    "RMSDForce": ([[0, 0, 0]], [0]), "OrientationRestraintForce": (1, [[0, 0, 0]], [0]),
}  # fmt: skip
BUILT = {
    "CustomCVForce": lambda: nested_in_cv(nested_in_atm(openmm.HarmonicBondForce())),
    "ATMForce": lambda: nested_in_atm(nested_in_cv(openmm.HarmonicBondForce())),
    "CustomGBForce": born,
    "CustomManyParticleForce": many_particle,
}
#: OpenMM itself cannot write these.
NOT_SERIALIZABLE = {"RPMDMonteCarloBarostat"}


@pytest.mark.parametrize("name", sorted(SAFE_FORCES - NOT_SERIALIZABLE))
def test_every_force_of_openmm(tmp_path, name):
    if not hasattr(openmm, name):
        pytest.skip(f"this OpenMM has no {name}")
    force = BUILT[name]() if name in BUILT else getattr(openmm, name)(*ARGUMENTS.get(name, ()))
    if hasattr(force, "addTabulatedFunction"):
        for number, function in enumerate(functions()):
            force.addTabulatedFunction(f"f{number}", function)
    force.setName("a <name> & 'others' \"quoted\"")
    assert f'type="{name}"' in assert_unchanged(tmp_path, system_with(force))


def test_virtual_sites_and_constraints(tmp_path):
    system = openmm.System()
    for _ in range(4):
        system.addParticle(1.0)
    system.addConstraint(0, 1, 0.1)
    site = openmm.LocalCoordinatesSite(
        [0, 1, 2], [1, 0, 0], [-1, 1, 0], [-1, 0, 1], openmm.Vec3(0, 0, 0)
    )
    system.setVirtualSite(3, site)
    system.addForce(openmm.CMMotionRemover())
    assert_unchanged(tmp_path, system)


@pytest.mark.parametrize(
    "text",
    [
        "x^2;\n y=1", "x\ty", "x\r\nz", "a&b", "a'", "b\"", "<>", "&amp;amp;", "x < y", "ü € 😀é",
        "&é", "  x  y  ", "a'b", "\ta", "a\t",
    ],
)  # fmt: skip
def test_text_is_unchanged(tmp_path, text):
    """Even where OpenMM's parser drops the last character."""
    force = openmm.CustomExternalForce(text)
    force.setName(text)
    xml = openmm.XmlSerializer.serialize(system_with(force))
    system = read(tmp_path, xml)  # kept: a Force lives as long as its System
    again = system.getForce(0)
    assert again.getName() == text
    assert again.getEnergyFunction() == text


def test_comments_encodings_and_byte_order_marks(tmp_path):
    text = EMPTY.format("<!-- > < -->" + SPRING.format("ü", "CustomExternalForce"))
    for content in (text, text.encode("utf-8-sig"), text.replace("?>", 'encoding="latin-1"?>')):
        system = read(tmp_path, content)
        assert system.getForce(0).getName() == "ü"


def integrators():
    custom = openmm.CustomIntegrator(0.001)
    custom.addGlobalVariable("type", 1.5)
    custom.addPerDofVariable("p", 0.0)
    compound = openmm.CompoundIntegrator()
    compound.addIntegrator(openmm.VerletIntegrator(0.001))
    compound.addIntegrator(openmm.LangevinIntegrator(300, 1, 0.001))
    middle, nose_hoover = openmm.LangevinMiddleIntegrator, openmm.NoseHooverIntegrator
    return [middle(300, 1, 0.001), nose_hoover(300, 1, 0.001), custom, compound]


@pytest.mark.parametrize("integrator", integrators(), ids=lambda item: type(item).__name__)
def test_states_are_unchanged(tmp_path, integrator):
    name = "kind" if isinstance(integrator, openmm.CustomIntegrator) else "type"
    force = openmm.CustomExternalForce(f"{name}*x^2")
    force.addGlobalParameter(name, 1.25)  # an attribute of that name, with a number
    force.addParticle(0)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system_with(force), integrator, platform)
    context.setPositions(np.array([[1 / 3, 1e-300, -1e300]]))
    context.setVelocities(np.array([[0.1, 2 / 3, 7e22]]))
    parts = ("positions", "velocities", "forces", "energy", "parameters", "integratorParameters")
    state = context.getState(**dict.fromkeys(parts, True))
    assert_unchanged(tmp_path, state, openmm.State)
