"""XML of OpenMM from strangers: no code runs, no class out of place, and no number is changed."""

import contextlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch_zoo

from openmm_tsf.inputs import load_molecule, write_molecule
from openmm_tsf.openmm_xml import SAFE_FORCES, SAFE_FUNCTIONS, read_openmm_xml
from openmm_tsf.systems import MolecularSystem, alanine_dipeptide

EMPTY = """<?xml version="1.0" ?>
<System openmmVersion="8.1" type="System" version="1">
 <PeriodicBoxVectors><A x="2" y="0" z="0"/><B x="0" y="2" z="0"/><C x="0" y="0" z="2"/>
 </PeriodicBoxVectors>
 <Particles><Particle mass="1"/></Particles><Constraints/><Forces>{}</Forces>
</System>
"""
SPRING = (
    '<Force energy="x^2" forceGroup="0" name="{}" type="{}" version="1"><PerParticleParameters/>'
    '<GlobalParameters/><Particles><Particle index="0"/></Particles></Force>'
)
BOX = (
    '<PeriodicBoxVectors><A x="2" y="0" z="0"/><B x="0" y="2" z="0"/><C x="0" y="0" z="2"/>'
    "</PeriodicBoxVectors>"
)


class MakesMarker:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __call__(self, state):
        return 0.0, None

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


def python_force(marker):
    if not hasattr(openmm, "PythonForce"):
        pytest.skip("this OpenMM has no PythonForce")
    return openmm.PythonForce(MakesMarker(marker))


def system_with(*forces):
    system = openmm.System()
    system.addParticle(1.0)
    for force in forces:
        system.addForce(force)
    return system


def nested_in_cv(force):
    outer = openmm.CustomCVForce("a")
    outer.addCollectiveVariable("a", force)
    return outer


def nested_in_atm(force):
    outer = openmm.ATMForce(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    outer.addForce(force)
    outer.addParticle()
    return outer


def read(tmp_path, content, expected=openmm.System):
    path = tmp_path / "given.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_openmm_xml(path, expected, "system")


def refused(tmp_path, content, match, expected=openmm.System):
    with pytest.raises(ValueError, match=match) as caught:
        read(tmp_path, content, expected)
    assert str(caught.value).startswith("system: ")
    assert "given.xml" in str(caught.value)


# -- code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda force: force,
        nested_in_cv,
        nested_in_atm,
        lambda force: nested_in_cv(nested_in_atm(nested_in_cv(force))),
    ],
    ids=["plain", "CustomCVForce", "ATMForce", "deep"],
)
def test_python_code_is_refused_and_does_not_run(tmp_path, marker, wrap):
    xml = openmm.XmlSerializer.serialize(system_with(wrap(python_force(marker))))
    assert not marker.exists()
    refused(tmp_path, xml, r"line \d+.*PythonForce.*runs Python code")
    molecule = alanine_dipeptide()
    write_molecule(molecule, tmp_path)
    with pytest.raises(ValueError, match=r"system: .*PythonForce"):
        load_molecule(tmp_path / "topology.pdb", system=tmp_path / "given.xml")
    assert not marker.exists()
    with contextlib.suppress(Exception):  # why all this is needed
        openmm.XmlSerializer.deserialize(xml)
    assert marker.exists()


def python_force_element(marker, tag="Force", kind="PythonForce"):
    xml = openmm.XmlSerializer.serialize(python_force(marker))
    return (
        xml.partition("?>")[2]
        .replace("<Force", f"<{tag}")
        .replace("</Force", f"</{tag}")
        .replace('type="PythonForce"', f'type="{kind}"')
    )


@pytest.mark.parametrize("tag", ["System", "Force", "Integrator", "State", "TabulatedFunction"])
def test_no_root_but_the_expected_one(tmp_path, marker, tag):
    refused(tmp_path, python_force_element(marker, tag), "expected a serialized System")
    refused(
        tmp_path, python_force_element(marker, tag), "expected a serialized State", openmm.State
    )
    assert not marker.exists()


@pytest.mark.parametrize(
    "around",
    [
        "<Force>{}</Force>",
        SPRING.format("s", "CustomExternalForce").replace("</Force>", "{}</Force>"),
        SPRING.format("s", "CustomExternalForce").replace("</Force>", "<Functions>{}</Functions>")
        + "</Force>",
        "<Forces>{}</Forces>",
        "<Other>{}</Other>",
        "<CollectiveVariables>{}</CollectiveVariables>",
    ],
)
@pytest.mark.parametrize("tag", ["Force", "Function", "force", "x:Force"])
def test_not_anywhere_and_by_no_other_name(tmp_path, marker, around, tag):
    refused(tmp_path, EMPTY.format(around.format(python_force_element(marker, tag))), "system: ")
    assert not marker.exists()


# Where OpenMM's parser and the standard differ: what would become a PythonForce for OpenMM alone.
TRICKS = {
    "comment": "<!-- > -->{force}<!-- < -->",
    "comment that closes early": "<!-- <a> {force} -->",
    "CDATA": "<![CDATA[ ]]>{force}",
    "inside CDATA": "<![CDATA[>{force}]]>",
    "processing instruction": "<?a > {force} ?>",
    "text": "&lt;Force&gt; {force}",
    "character references": "{referenced}",
    "a reference that OpenMM cuts off": "{cut}",
    "zero character": "{zero}",
    "type twice": "{twice}",
    "attribute in a namespace": "{namespaced}",
    "quotes": "{quotes}",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_parsers_that_disagree_are_no_way_in(tmp_path, marker, trick):
    force = python_force_element(marker)
    kind = 'type="PythonForce"'
    text = TRICKS[trick].format(
        force=force,
        referenced=force.replace(kind, 'type="&#80;ython&#x46;orce"'),
        cut=force.replace(kind, 'type="PythonForce&#256;"'),
        zero=force.replace(kind, 'type="PythonForce&#0;"'),
        twice=force.replace(kind, f'type="HarmonicBondForce" {kind}'),
        namespaced=force.replace(kind, f'a:type="HarmonicBondForce" {kind}'),
        quotes=force.replace(kind, "type='PythonForce'"),
    )
    try:
        system = read(tmp_path, EMPTY.format(text))
    except ValueError:
        system = None
    assert system is None or system.getNumForces() == 0
    assert not marker.exists()


def test_openmm_is_given_only_what_was_understood(tmp_path, marker):
    """A comment for the standard, a PythonForce for OpenMM's parser alone."""
    hidden = EMPTY.format(f"<!-- x > {python_force_element(marker)} -->")
    assert read(tmp_path, hidden).getNumForces() == 0
    assert not marker.exists()
    with contextlib.suppress(Exception):
        openmm.XmlSerializer.deserialize(hidden)
    assert marker.exists()


# -- other classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "TorchForce",
        "PlumedForce",
        "State",
        "VerletIntegrator",
        "Continuous1DFunction",
        "System",
        "",
    ],
)
@pytest.mark.parametrize("tag", ["Force", "Foo"])
def test_a_class_that_is_no_known_force(tmp_path, kind, tag):
    element = f'<{tag} type="{kind}" version="1" time="0" min="0" max="1">{BOX}</{tag}>'
    refused(tmp_path, EMPTY.format(element), f"line 5.*expected .*<{tag} type='{kind}'>")


@pytest.mark.parametrize(
    "body",
    [
        "<CollectiveVariables><CollectiveVariable/></CollectiveVariables>",
        "<CollectiveVariables><Foo/></CollectiveVariables>",
        "<Forces><Force/></Forces>",
        "<Functions><Force/></Functions>",
        f"<Functions>{SPRING.format('s', 'CustomExternalForce')}</Functions>",
        f"<Forces><Force>{SPRING.format('a', 'RGForce') * 2}</Force></Forces>",
    ],
)
def test_what_openmm_takes_for_granted(tmp_path, body):
    refused(tmp_path, EMPTY.format(f'<Force type="ATMForce">{body}</Force>'), "expected .* got")


def test_a_state_holds_no_forces(tmp_path):
    text = '<State type="State" version="1" time="0">{}</State>'
    assert isinstance(read(tmp_path, text.format(BOX), openmm.State), openmm.State)
    inside = f"<Forces>{SPRING.format('s', 'CustomExternalForce')}</Forces>"
    refused(tmp_path, text.format(BOX + inside), "CustomExternalForce", openmm.State)


def test_the_list_of_forces_is_that_of_the_tested_openmm():
    def names(base):
        classes = [value for value in vars(openmm).values() if isinstance(value, type)]
        return {c.__name__ for c in classes if issubclass(c, base) and c is not base}

    assert names(openmm.Force) - {"PythonForce"} == SAFE_FORCES
    assert names(openmm.TabulatedFunction) == SAFE_FUNCTIONS


# -- files that are nothing of the kind ------------------------------------------------------------

ENTITIES = (f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in pairwise("abcdefghi"))
LAUGHS = f'<!DOCTYPE System [<!ENTITY a "ha">{"".join(ENTITIES)}]>'


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no element found"),
        (b"\n", "no element found"),
        (bytes(range(256)), "no XML"),
        (b"\x00" * 64, "no XML"),
        (b"CORD\x00\x00", "no XML"),
        (b"no XML at all", "no XML"),
        (EMPTY[:200], "no XML, or damaged"),
        (EMPTY + "<System/>", "junk after document element"),
        (EMPTY.replace("</System>", "</Systen>"), "mismatched tag"),
        ('<ForceField type="System"/>', "got <ForceField type='System'>"),
        ("<System/>", "got <System>"),
        ('<System Type="System"/>', "got <System>"),
        ('<System type="State"/>', "got <System type='State'>"),
        ('<s:System xmlns:s="u" type="System"/>', "got <s:System type='System'>"),
        ('<System type="System"/>', "OpenMM cannot read.*version"),
        ('<System type="System" version="7"/>', "OpenMM cannot read.*version"),
        (LAUGHS + EMPTY.partition("?>")[2].replace('mass="1"', 'mass="&i;"'), "document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/hostname"><a/>', "document type"),
        (EMPTY.format("&unknown;"), "undefined entity"),
        ('<System type="System">' + "<a>" * 200_000, "100 levels"),
        (EMPTY.encode("utf-16"), "no XML"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, content, match):
    refused(tmp_path, content, match)


def test_missing_file_and_other_class(tmp_path):
    with pytest.raises(FileNotFoundError, match="state: no such file"):
        read_openmm_xml(tmp_path / "none.xml", openmm.State, "state")
    with pytest.raises(FileNotFoundError, match="state: no such file"):
        read_openmm_xml(tmp_path, openmm.State, "state")
    with pytest.raises(TypeError, match=r"expected openmm\.System or openmm\.State"):
        read_openmm_xml(tmp_path / "none.xml", openmm.Integrator, "state")


def test_reading_what_crashes_openmm_leaves_the_process_alive(tmp_path):
    """In a process of its own, should one get through."""
    (tmp_path / "a.xml").write_text(EMPTY.format(f'<Foo type="State">{BOX}</Foo>'))
    (tmp_path / "b.xml").write_text('<System type="System">' + "<a>" * 50 + "</a>" * 50)
    code = (
        "import sys, openmm\nfrom openmm_tsf.openmm_xml import read_openmm_xml\n"
        "for path in sys.argv[1:]:\n    try: read_openmm_xml(path, openmm.System, 'system')\n"
        "    except ValueError: print('refused')\n"
    )
    paths = [str(Path(tmp_path) / name) for name in ("a.xml", "b.xml")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, env={**os.environ}
    )
    assert done.stdout.split() == ["refused", "refused"], done.stderr


# -- what passes, passes unchanged -----------------------------------------------------------------


def assert_unchanged(tmp_path, thing, expected=openmm.System):
    xml = openmm.XmlSerializer.serialize(thing)
    assert openmm.XmlSerializer.serialize(read(tmp_path, xml, expected)) == xml


@pytest.mark.parametrize("force_field", ["amber99sbildn-obc2", "ff96-obc1"])
def test_alanine_dipeptide_keeps_its_fingerprint(tmp_path, force_field):
    molecule = alanine_dipeptide(force_field)
    assert_unchanged(tmp_path, molecule.system)
    write_molecule(molecule, tmp_path)
    system = read_openmm_xml(tmp_path / "system.xml", openmm.System, "system")
    again = MolecularSystem(system, molecule.topology, molecule.positions)
    assert again.fingerprint == molecule.fingerprint


def test_the_tests_other_forces(tmp_path):
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


def with_functions(force):
    for number, function in enumerate(functions()):
        force.addTabulatedFunction(f"f{number}", function)
    return force


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


#: As many classes as can be built of no particles or few.
BUILT = {
    "CustomAngleForce": lambda: openmm.CustomAngleForce("theta"),
    "CustomBondForce": lambda: openmm.CustomBondForce("r"),
    "CustomCVForce": lambda: nested_in_cv(nested_in_atm(openmm.HarmonicBondForce())),
    "CustomCentroidBondForce": lambda: openmm.CustomCentroidBondForce(1, "x1"),
    "CustomCompoundBondForce": lambda: openmm.CustomCompoundBondForce(1, "x1"),
    "CustomGBForce": born,
    "CustomHbondForce": lambda: openmm.CustomHbondForce("distance(a1,d1)"),
    "CustomManyParticleForce": many_particle,
    "CustomNonbondedForce": lambda: openmm.CustomNonbondedForce("r"),
    "CustomTorsionForce": lambda: openmm.CustomTorsionForce("theta"),
    "CustomExternalForce": lambda: openmm.CustomExternalForce("x"),
    "CustomVolumeForce": lambda: openmm.CustomVolumeForce("v"),
    "ATMForce": lambda: nested_in_atm(nested_in_cv(openmm.HarmonicBondForce())),
    "AndersenThermostat": lambda: openmm.AndersenThermostat(300, 1),
    "MonteCarloBarostat": lambda: openmm.MonteCarloBarostat(1, 300),
    "MonteCarloAnisotropicBarostat": lambda: openmm.MonteCarloAnisotropicBarostat([1, 1, 1], 300),
    "MonteCarloMembraneBarostat": lambda: openmm.MonteCarloMembraneBarostat(1, 1, 300, 0, 0),
    "MonteCarloFlexibleBarostat": lambda: openmm.MonteCarloFlexibleBarostat(1, 300),
    "RMSDForce": lambda: openmm.RMSDForce([[0, 0, 0]], [0]),
    "OrientationRestraintForce": lambda: openmm.OrientationRestraintForce(1, [[0, 0, 0]], [0]),
}
#: OpenMM itself cannot write it.
NOT_SERIALIZABLE = {"RPMDMonteCarloBarostat"}


@pytest.mark.parametrize("name", sorted(SAFE_FORCES - NOT_SERIALIZABLE))
def test_every_force_of_openmm(tmp_path, name):
    if not hasattr(openmm, name):
        pytest.skip(f"this OpenMM has no {name}")
    force = BUILT.get(name, getattr(openmm, name))()
    if hasattr(force, "addTabulatedFunction"):
        with_functions(force)
    force.setName("a <name> & 'others' \"quoted\"")
    xml = openmm.XmlSerializer.serialize(system_with(force))
    assert f'type="{name}"' in xml
    assert openmm.XmlSerializer.serialize(read(tmp_path, xml)) == xml


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
def test_text_arrives_as_it_was(tmp_path, text):
    """Also where OpenMM's own reader drops the last character."""
    force = openmm.CustomExternalForce(text)
    force.setName(text)
    xml = openmm.XmlSerializer.serialize(system_with(force))
    system = read(tmp_path, xml)  # kept: a Force lives as long as its System
    found = system.getForce(0)
    assert found.getName() == text
    assert found.getEnergyFunction() == text


def test_comments_encodings_and_marks_do_no_harm(tmp_path):
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
    return [
        openmm.LangevinMiddleIntegrator(300, 1, 0.001),
        openmm.NoseHooverIntegrator(300, 1, 0.001),
        custom,
        compound,
    ]


@pytest.mark.parametrize("integrator", integrators(), ids=lambda item: type(item).__name__)
def test_states_are_unchanged(tmp_path, integrator):
    name = "kind" if isinstance(integrator, openmm.CustomIntegrator) else "type"
    force = openmm.CustomExternalForce(f"{name}*x^2")
    force.addGlobalParameter(name, 1.25)  # an attribute of that name, with a number
    force.addParticle(0)
    context = openmm.Context(
        system_with(force), integrator, openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(np.array([[1 / 3, 1e-300, -1e300]]))
    context.setVelocities(np.array([[0.1, 2 / 3, 7e22]]))
    state = context.getState(
        positions=True, velocities=True, forces=True, energy=True, parameters=True,
        integratorParameters=True,
    )  # fmt: skip
    assert_unchanged(tmp_path, state, openmm.State)
