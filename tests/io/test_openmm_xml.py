"""XML of OpenMM from strangers: no code runs, and no class is out of place."""

import contextlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import openmm
import pytest

from openmm_tsf.io.openmm_xml import SAFE_FORCES, SAFE_FUNCTIONS, read_openmm_xml
from openmm_tsf.systems.files import load_molecule, write_molecule
from openmm_tsf.systems.library import alanine_dipeptide
from tests.support.xml_cases import (
    BOX,
    EMPTY,
    SPRING,
    nested_in_atm,
    nested_in_cv,
    read,
    system_with,
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
        f"<Particles>{SPRING.format('s', 'CustomExternalForce')}</Particles>",
        SPRING.format("s", "CustomExternalForce"),
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
        "import sys, openmm\nfrom openmm_tsf.io.openmm_xml import read_openmm_xml\n"
        "for path in sys.argv[1:]:\n    try: read_openmm_xml(path, openmm.System, 'system')\n"
        "    except ValueError: print('refused')\n"
    )
    paths = [str(Path(tmp_path) / name) for name in ("a.xml", "b.xml")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, env={**os.environ}
    )
    assert done.stdout.split() == ["refused", "refused"], done.stderr
