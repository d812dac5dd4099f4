"""Untrusted XML of OpenMM: no code runs, and no class is in a wrong place."""

import contextlib
from itertools import pairwise

import openmm
import pytest

from openmm_tsf.io.openmm_xml import SAFE_FORCES, SAFE_FUNCTIONS, read_openmm_xml
from openmm_tsf.systems.files import load_molecule, write_molecule
from openmm_tsf.systems.library import alanine_dipeptide
from tests.robustness.sandbox import isolated
from tests.support.marker import WritesMarker
from tests.support.xml_cases import (
    BOX,
    EMPTY,
    SPRING,
    nested_in_atm,
    nested_in_cv,
    read,
    system_with,
)

EXTERNAL = SPRING.format("s", "CustomExternalForce")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


def python_force(marker):
    if not hasattr(openmm, "PythonForce"):
        pytest.skip("this OpenMM has no PythonForce")
    return openmm.PythonForce(WritesMarker(marker))


def refused(tmp_path, content, match, expected=openmm.System):
    with pytest.raises(ValueError, match=match) as caught:
        read(tmp_path, content, expected)
    assert str(caught.value).startswith("system: ")
    assert "given.xml" in str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [lambda force: force, nested_in_cv, nested_in_atm,
     lambda force: nested_in_cv(nested_in_atm(nested_in_cv(force)))],
    ids=["plain", "CustomCVForce", "ATMForce", "deep"],
)  # fmt: skip
def test_python_code_is_refused_and_does_not_run(tmp_path, marker, wrap):
    xml = openmm.XmlSerializer.serialize(system_with(wrap(python_force(marker))))
    assert not marker.exists()
    refused(tmp_path, xml, r"line \d+.*PythonForce.*runs Python code")
    molecule = alanine_dipeptide()
    write_molecule(molecule, tmp_path)
    with pytest.raises(ValueError, match=r"system: .*PythonForce"):
        load_molecule(tmp_path / "topology.pdb", system=tmp_path / "given.xml")
    assert not marker.exists()
    with contextlib.suppress(Exception):  # OpenMM itself runs the code
        openmm.XmlSerializer.deserialize(xml)
    assert marker.exists()


def python_force_element(marker, tag="Force", kind="PythonForce"):
    xml = openmm.XmlSerializer.serialize(python_force(marker)).partition("?>")[2]
    xml = xml.replace("<Force", f"<{tag}").replace("</Force", f"</{tag}")
    return xml.replace('type="PythonForce"', f'type="{kind}"')


@pytest.mark.parametrize("tag", ["System", "Force", "Integrator", "State", "TabulatedFunction"])
def test_other_roots_are_refused(tmp_path, marker, tag):
    element = python_force_element(marker, tag)
    refused(tmp_path, element, "expected a serialized System")
    refused(tmp_path, element, "expected a serialized State", openmm.State)
    assert not marker.exists()


@pytest.mark.parametrize(
    "around",
    ["<Force>{}</Force>", "<Forces>{}</Forces>", "<Other>{}</Other>",
     EXTERNAL.replace("</Force>", "{}</Force>"), "<CollectiveVariables>{}</CollectiveVariables>",
     EXTERNAL.replace("</Force>", "<Functions>{}</Functions>") + "</Force>"],
)  # fmt: skip
@pytest.mark.parametrize("tag", ["Force", "Function", "force", "x:Force"])
def test_nested_and_renamed_code_is_refused(tmp_path, marker, around, tag):
    refused(tmp_path, EMPTY.format(around.format(python_force_element(marker, tag))), "system: ")
    assert not marker.exists()


KIND = 'type="PythonForce"'
# Where OpenMM's parser and the standard differ: a PythonForce for OpenMM's parser alone, by the
# text around it and its attribute.
TRICKS = {
    "comment": ("<!-- > -->{}<!-- < -->", KIND),
    "comment that closes early": ("<!-- <a> {} -->", KIND),
    "CDATA": ("<![CDATA[ ]]>{}", KIND),
    "inside CDATA": ("<![CDATA[>{}]]>", KIND),
    "processing instruction": ("<?a > {} ?>", KIND),
    "text": ("&lt;Force&gt; {}", KIND),
    "character references": ("{}", 'type="&#80;ython&#x46;orce"'),
    "a reference that OpenMM cuts off": ("{}", 'type="PythonForce&#256;"'),
    "zero character": ("{}", 'type="PythonForce&#0;"'),
    "type twice": ("{}", f'type="HarmonicBondForce" {KIND}'),
    "attribute in a namespace": ("{}", f'a:type="HarmonicBondForce" {KIND}'),
    "quotes": ("{}", "type='PythonForce'"),
}


@pytest.mark.parametrize(("around", "attribute"), TRICKS.values(), ids=TRICKS)
def test_differences_between_parsers_run_no_code(tmp_path, marker, around, attribute):
    force = python_force_element(marker).replace(KIND, attribute)
    try:
        system = read(tmp_path, EMPTY.format(around.format(force)))
    except ValueError:
        system = None
    assert system is None or system.getNumForces() == 0
    assert not marker.exists()


def test_openmm_is_given_only_checked_elements(tmp_path, marker):
    """A comment in standard XML, a PythonForce for OpenMM's parser."""
    hidden = EMPTY.format(f"<!-- x > {python_force_element(marker)} -->")
    assert read(tmp_path, hidden).getNumForces() == 0
    assert not marker.exists()
    with contextlib.suppress(Exception):
        openmm.XmlSerializer.deserialize(hidden)
    assert marker.exists()


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
def test_unknown_classes(tmp_path, kind, tag):
    element = f'<{tag} type="{kind}" version="1" time="0" min="0" max="1">{BOX}</{tag}>'
    refused(tmp_path, EMPTY.format(element), f"line 5.*expected .*<{tag} type='{kind}'>")


@pytest.mark.parametrize(
    "body",
    ["<CollectiveVariables><CollectiveVariable/></CollectiveVariables>",
     "<CollectiveVariables><Foo/></CollectiveVariables>", "<Forces><Force/></Forces>", EXTERNAL,
     "<Functions><Force/></Functions>", f"<Particles>{EXTERNAL}</Particles>",
     f"<Functions>{EXTERNAL}</Functions>",
     f"<Forces><Force>{SPRING.format('a', 'RGForce') * 2}</Force></Forces>"],
)  # fmt: skip
def test_children_that_openmm_does_not_check(tmp_path, body):
    refused(tmp_path, EMPTY.format(f'<Force type="ATMForce">{body}</Force>'), "expected .* got")


def test_a_state_holds_no_forces(tmp_path):
    text = '<State type="State" version="1" time="0">{}</State>'
    assert isinstance(read(tmp_path, text.format(BOX), openmm.State), openmm.State)
    forces = f"<Forces>{EXTERNAL}</Forces>"
    refused(tmp_path, text.format(BOX + forces), "CustomExternalForce", openmm.State)


def test_the_list_of_forces_is_that_of_the_tested_openmm():
    def names(base):
        classes = [value for value in vars(openmm).values() if isinstance(value, type)]
        return {c.__name__ for c in classes if issubclass(c, base) and c is not base}

    assert names(openmm.Force) - {"PythonForce"} == SAFE_FORCES
    assert names(openmm.TabulatedFunction) == SAFE_FUNCTIONS


ENTITIES = (f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in pairwise("abcdefghi"))
LAUGHS = f'<!DOCTYPE System [<!ENTITY a "ha">{"".join(ENTITIES)}]>'


@pytest.mark.parametrize(
    ("content", "match"),
    [
        *((content, "no element found") for content in (b"", b"\n")),
        *((content, "not XML") for content in (bytes(range(256)), b"\x00" * 64, b"CORD\x00\x00",
                                               b"no XML at all", EMPTY.encode("utf-16"))),
        (EMPTY[:200], "not XML, or damaged"),
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
    ],
)  # fmt: skip
def test_damaged_and_foreign_files(tmp_path, content, match):
    refused(tmp_path, content, match)


def test_missing_file_and_other_class(tmp_path):
    for path in (tmp_path / "none.xml", tmp_path):
        with pytest.raises(FileNotFoundError, match="state: no such file"):
            read_openmm_xml(path, openmm.State, "state")
    with pytest.raises(TypeError, match=r"expected openmm\.System or openmm\.State"):
        read_openmm_xml(tmp_path / "none.xml", openmm.Integrator, "state")


def test_reading_what_crashes_openmm_leaves_the_process_alive(tmp_path):
    """In a child process, in case one is not refused."""
    texts = (EMPTY.format(f'<Foo type="State">{BOX}</Foo>'),
             '<System type="System">' + "<a>" * 50 + "</a>" * 50)  # fmt: skip
    for text in texts:
        outcome = isolated(lambda text=text: read(tmp_path, text))
        assert outcome.error == "ValueError", outcome
