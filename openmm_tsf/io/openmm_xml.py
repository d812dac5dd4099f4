"""Reading of serialized OpenMM objects that need not be trusted.

``openmm.XmlSerializer.deserialize`` trusts its input. A PythonForce is a pickle, which runs code
when it is loaded; a Force of a plugin may load a library. The class that an element names is not
compared with the class that is expected, so that memory is read as the wrong type. And OpenMM's
parser is lenient: it can find elements that a standard parser does not.

Here a strict parser reads the file, compares elements with lists of known ones, and writes the XML
that OpenMM is given.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from xml.parsers import expat

import openmm

from openmm_tsf.io.file_kinds import XML_SYSTEM, but_got

T = TypeVar("T")

#: Forces that hold only numbers and expressions. The names are listed because a Force of a later
#: OpenMM may contain code, as PythonForce does.
SAFE_FORCES = frozenset({
    "ATMForce", "AmoebaGeneralizedKirkwoodForce", "AmoebaMultipoleForce",
    "AmoebaTorsionTorsionForce", "AmoebaVdwForce", "AmoebaWcaDispersionForce",
    "AndersenThermostat", "CMAPTorsionForce", "CMMotionRemover", "ConstantPotentialForce",
    "CustomAngleForce", "CustomBondForce", "CustomCVForce", "CustomCentroidBondForce",
    "CustomCompoundBondForce", "CustomExternalForce", "CustomGBForce", "CustomHbondForce",
    "CustomManyParticleForce", "CustomNonbondedForce", "CustomTorsionForce", "CustomVolumeForce",
    "DrudeForce", "GBSAOBCForce", "GayBerneForce", "HarmonicAngleForce", "HarmonicBondForce",
    "HippoNonbondedForce", "LCPOForce", "MonteCarloAnisotropicBarostat", "MonteCarloBarostat",
    "MonteCarloFlexibleBarostat", "MonteCarloMembraneBarostat", "NonbondedForce",
    "OrientationRestraintForce", "PeriodicTorsionForce", "RBTorsionForce", "RGForce", "RMSDForce",
    "RPMDMonteCarloBarostat",
})  # fmt: skip
SAFE_FUNCTIONS = frozenset(
    f"{kind}{n}DFunction" for kind in ("Continuous", "Discrete") for n in (1, 2, 3)
)

#: OpenMM does not check the names of these children.
_ONLY_CHILD = {
    "Forces": "Force",
    "CollectiveVariables": "CollectiveVariable",
    "CollectiveVariable": "Force",
    "Functions": "Function",
}
#: A type that is not a class: a number (particles, stages of computation) or a word of ATMForce.
_NO_CLASS = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?|fixed|offset")
#: OpenMM's parser and its decoder are recursive, without a limit.
_MAX_DEPTH = 100
#: OpenMM's parser counts characters in a C int.
_MAX_LENGTH = 2**31 - 16

_ESCAPES = {
    "&": "&amp;", '"': "&quot;", "<": "&lt;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"
}  # fmt: skip
_SPECIAL = re.compile('[&"<\n\r\t]')


def read_openmm_xml(path: str | os.PathLike[str], expected: type[T], argument: str) -> T:
    """Read a serialized System or State without running code from the file.

    Anything that is not known to be data is a ValueError: a PythonForce, a plugin's Force, a class
    in the wrong place, a document type. Messages begin with `argument`, the caller's.
    """
    if expected not in (openmm.System, openmm.State):
        raise TypeError(f"expected: expected openmm.System or openmm.State, got {expected!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: no such file {path}")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = but_got(path)
        raise ValueError(f"{argument}: OpenMM cannot read {path}: not XML{got}: {error}") from error
    checked = _StrictReader(expected.__name__, argument, path).rewrite(text)
    try:
        result = openmm.XmlSerializer.deserialize(checked)
    except Exception as error:
        raise ValueError(f"{argument}: OpenMM cannot read {path}: {error}") from error
    if not isinstance(result, expected):
        raise ValueError(
            f"{argument}: expected a serialized {expected.__name__} in {path}, "
            f"got {type(result).__name__}"
        )
    return result


@dataclass
class _Element:
    tag: str
    kind: str | None
    n_children: int = 0


class _StrictReader:
    """Parses XML, refuses unknown elements, and writes the others."""

    def __init__(self, root: str, argument: str, path: Any) -> None:
        self._root, self._argument, self._path = root, argument, path
        self._open: list[_Element] = []
        self._pieces: list[str] = []

    def rewrite(self, text: str) -> str:
        """Return XML with the elements and attributes of `text`, all of them checked."""
        self._parser = parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = self._doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        try:
            parser.Parse(text, True)
        except expat.ExpatError as error:
            raise ValueError(
                f"{self._argument}: OpenMM cannot read {self._path}: not XML, or damaged"
                f"{but_got(self._path, (XML_SYSTEM,))}: {error}"
            ) from error
        result = "".join(self._pieces)
        if len(result.encode()) > _MAX_LENGTH:
            raise self._refused(f"expected less than {_MAX_LENGTH} bytes, got more")
        return result

    def _refused(self, problem: str) -> ValueError:
        line = self._parser.CurrentLineNumber
        return ValueError(f"{self._argument}: {self._path} (line {line}): {problem}")

    def _doctype(self, *_: Any) -> None:
        raise self._refused("expected no document type declaration, got one")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        kind = attributes.get("type")
        if not self._open:
            if (tag, kind) != (self._root, self._root):
                raise ValueError(
                    f"{self._argument}: expected a serialized {self._root} in {self._path}, got "
                    f"{_shown(tag, kind)}"
                )
        else:
            self._check_child(tag, kind)
        self._open.append(_Element(tag, kind))
        if len(self._open) > _MAX_DEPTH:
            raise self._refused(f"expected at most {_MAX_DEPTH} levels of elements, got more")
        written = (f' {name}="{_escaped(value)}"' for name, value in attributes.items())
        self._pieces.append(f"<{tag}{''.join(written)}>\n")

    def _check_child(self, tag: str, kind: str | None) -> None:
        parent = self._open[-1]
        parent.n_children += 1
        only = _ONLY_CHILD.get(parent.tag, tag)
        if tag != only:
            raise self._refused(f"expected <{only}> in <{parent.tag}>, got {_shown(tag, kind)}")
        if kind is None or _NO_CLASS.fullmatch(kind):
            return
        # A Force is in a list, is a collective variable, or is in a Force element of ATMForce.
        holds_force = parent.tag in ("Forces", "CollectiveVariable") or (
            parent.tag == "Force" and parent.kind is None
        )
        if self._root == "System" and tag == "Force" and holds_force and kind in SAFE_FORCES:
            return
        if tag == "Function" and parent.tag == "Functions" and kind in SAFE_FUNCTIONS:
            return
        reason = "it runs Python code when it is read" if kind == "PythonForce" else "unknown"
        raise self._refused(
            f"expected forces and functions of OpenMM that hold data only, got {_shown(tag, kind)} "
            f"in <{parent.tag}> ({reason})"
        )

    def _end(self, tag: str) -> None:
        element = self._open.pop()
        is_wrapper = tag == "CollectiveVariable" or (tag == "Force" and element.kind is None)
        if self._root == "System" and is_wrapper and element.n_children != 1:
            shown = _shown(tag, None)
            raise self._refused(f"expected one Force in {shown}, got {element.n_children}")
        self._pieces.append(f"</{tag}>\n")


def _shown(tag: str, kind: str | None) -> str:
    """Return an element for a message; names in the file may be long."""
    return f"<{tag[:40]}>" if kind is None else f"<{tag[:40]} type={kind[:40]!r}>"


def _escaped(value: str) -> str:
    """Return an attribute's value so that OpenMM's parser reads it unchanged."""
    if not _SPECIAL.search(value):
        return value
    parts = [_ESCAPES.get(character, character) for character in value]
    # OpenMM's parser drops a single character after the last escape.
    if len(value) > 1 and len(parts[-2]) > 1 and len(parts[-1].encode()) == 1:
        parts[-1] = f"&#{ord(value[-1])};"
    return "".join(parts)
