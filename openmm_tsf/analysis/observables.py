"""Observables of a molecule: a dihedral, an angle, a distance, or any function of a trajectory."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
#: A map from a trajectory of F frames to F numbers.
FrameFunction = Callable[[mdtraj.Trajectory], npt.ArrayLike]
#: What an observable is given as: a definition in words, or a function.
Definition = str | FrameFunction

DIHEDRAL, FUNCTION = "dihedral", "function"
#: The number of atoms and the unit of each kind.
_N_ATOMS = {DIHEDRAL: 4, "angle": 3, "distance": 2}
_UNITS = {DIHEDRAL: "rad", "angle": "rad", "distance": "nm", FUNCTION: ""}
_COMPUTE = {
    DIHEDRAL: mdtraj.compute_dihedrals,
    "angle": mdtraj.compute_angles,
    "distance": mdtraj.compute_distances,
}
_EXPECTED = (
    "a torsion of the molecule by name, dihedral:A,B,C,D, angle:A,B,C, distance:A,B (atoms by "
    "number from 0, or as ALA2:CA), module:function or file.py:function"
)
_NAME = re.compile(r"[A-Za-z][\w.-]{0,39}", re.ASCII)
_FUNCTION = re.compile(r"(?P<home>[^\n]+):(?P<function>[A-Za-z_]\w*)")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
#: Quantities of every run, and words of targets.
_RESERVED = {"U", "C_V", "dF", "P", "cos", "sin", "energy"}


@dataclass(frozen=True)
class Observable:
    """An observable of a molecule, with a name.

    Parameters
    ----------
    name
        What reports and targets of precision call it.
    definition
        In words, as ``"distance:3,17"``; of a function its home and name.
    kind
        ``"dihedral"``, ``"angle"``, ``"distance"`` or ``"function"``.
    atoms
        The indices of its atoms; none of a function.
    function
        Of mdtraj trajectories with F frames; returns F numbers.
    """

    name: str
    definition: str
    kind: str
    atoms: tuple[int, ...] = ()
    function: FrameFunction | None = None

    @property
    def unit(self) -> str:
        """``"rad"``, ``"nm"``, or ``""`` for a function."""
        return _UNITS[self.kind]

    @property
    def is_angle(self) -> bool:
        """Whether values are in rad."""
        return self.unit == "rad"

    def evaluate(self, frames: mdtraj.Trajectory) -> Array:
        """Return the values [F] of frames: rad, nm, or what a function returns.

        ValueError if the function fails, or returns anything but one finite number per frame.
        """
        if self.function is None:
            compute = _COMPUTE[self.kind]
            values = compute(frames, [list(self.atoms)], periodic=False)[:, 0]
            return np.asarray(values, dtype=np.float64)
        try:
            result = np.asarray(self.function(frames))
        except Exception as error:  # whatever the user's code raises
            raise ValueError(f"observe: {self.name}: {self.definition} raised {error!r}") from error
        n = frames.n_frames
        if result.dtype.kind not in "biuf" or result.shape not in ((n,), (n, 1)):
            raise ValueError(
                f"observe: {self.name}: expected {n} numbers, one for each frame, from "
                f"{self.definition}, got {result.dtype} of shape {result.shape}"
            )
        values = result.reshape(n).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(
                f"observe: {self.name}: expected finite numbers from {self.definition}, got "
                f"{values[~np.isfinite(values)][0]}"
            )
        return values


def split_definitions(texts: Iterable[str]) -> dict[str, str]:
    """Return the definitions of texts ``NAME=DEFINITION``, or the name of a torsion, by name.

    Examples
    --------
    >>> from openmm_tsf.analysis.observables import split_definitions
    >>> split_definitions(["d=distance:3,17", "psi"])
    {'d': 'distance:3,17', 'psi': 'psi'}
    """
    definitions: dict[str, str] = {}
    for text in texts:
        name, is_named, definition = text.partition("=")
        name, definition = name.strip(), definition.strip()
        if name in definitions:
            raise ValueError(f"observe: expected different names, got {name!r} twice")
        definitions[name] = definition if is_named else name
    return definitions


def check_definitions(value: Any, name: str = "observe") -> dict[str, Definition]:
    """Return a mapping from names to definitions; refuse other types and names."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name}: expected names with their definitions, got {type(value).__name__}"
        )
    for key, definition in value.items():
        if not (isinstance(key, str) and _NAME.fullmatch(key)) or key in _RESERVED:
            raise ValueError(
                f"{name}: expected a name of letters, digits, '_', '.' and '-' that is none of "
                f"{', '.join(sorted(_RESERVED))}, got {key!r}"
            )
        if not (isinstance(definition, str) or callable(definition)):
            raise TypeError(
                f"{name}: {key}: expected {_EXPECTED}, or a function, got {definition!r}"
            )
    return dict(value)


def define_observables(
    definitions: Mapping[str, Definition],
    topology: mdtraj.Topology,
    torsions: Mapping[str, Collection[int]],
) -> dict[str, Observable]:
    """Return observables by name; functions that are given as text are imported.

    Parameters
    ----------
    definitions
        By name: the name of a torsion, ``dihedral:A,B,C,D``, ``angle:A,B,C``, ``distance:A,B`` with
        atoms by index or as ``ALA2:CA`` (name and number of the residue in the Topology, name of
        the atom), ``module:function``, ``file.py:function``, or a function.
    topology
        Of the molecule.
    torsions
        Named torsions with their atoms, those that a run records.

    Raises
    ------
    ValueError
        For other texts, atoms that the molecule does not have, names of other torsions, and
        functions that cannot be imported.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.analysis.observables import define_observables
    >>> molecule = tsf.systems.alanine_dipeptide()
    >>> definitions = {"d": "distance:ACE1:CH3,NME3:C", "turn": "dihedral:4,6,8,14"}
    >>> known = define_observables(definitions, molecule.mdtraj_topology, molecule.dihedrals)
    >>> known["d"].atoms, known["d"].unit, known["turn"].kind
    ((1, 18), 'nm', 'dihedral')
    """
    checked = check_definitions(definitions)
    labels = _atom_labels(topology) if any(isinstance(d, str) for d in checked.values()) else {}
    known = {}
    for name, definition in checked.items():
        if not isinstance(definition, str):
            known[name] = Observable(name, _home_of(definition), FUNCTION, function=definition)
            continue
        known[name] = _define(name, definition, labels, torsions)
        if name in torsions and tuple(torsions[name]) != known[name].atoms:
            raise ValueError(
                f"observe: expected another name than {name!r}, which is a torsion of the molecule"
            )
    return known


def is_function(definition: str) -> bool:
    """Return whether a definition names a function, which would have to be imported."""
    return ":" in definition and definition.partition(":")[0] not in _N_ATOMS


def check_functions(observables: Mapping[str, Observable], structure: mdtraj.Trajectory) -> None:
    """Call every function with two frames of a structure: refuse one that fails there."""
    frames = mdtraj.Trajectory(np.repeat(structure.xyz[:1], 2, axis=0), structure.topology)
    for each in observables.values():
        if each.function is not None:
            each.evaluate(frames)


def _define(
    name: str,
    definition: str,
    labels: Mapping[str, list[int]],
    torsions: Mapping[str, Collection[int]],
) -> Observable:
    if definition in torsions:
        atoms = tuple(torsions[definition])
        return Observable(name, f"dihedral:{','.join(map(str, atoms))}", DIHEDRAL, atoms)
    kind, has_atoms, text = definition.partition(":")
    if not has_atoms:
        known = ", ".join(torsions) or "none"
        raise ValueError(
            f"observe: {name}: expected {_EXPECTED}, got {definition!r} (torsions: {known})"
        )
    if kind not in _N_ATOMS:
        return Observable(name, definition, FUNCTION, function=_import(name, definition))
    words = [word.strip() for word in text.split(",")]
    if len(words) != _N_ATOMS[kind] or not all(words):
        raise ValueError(
            f"observe: {name}: expected {_N_ATOMS[kind]} atoms of a {kind}, separated by commas, "
            f"got {definition!r}"
        )
    atoms = tuple(_find_atom(name, word, labels) for word in words)
    if len(set(atoms)) < len(atoms):
        raise ValueError(f"observe: {name}: expected different atoms, got {definition!r}")
    return Observable(name, f"{kind}:{','.join(map(str, atoms))}", kind, atoms)


def _atom_labels(topology: mdtraj.Topology) -> dict[str, list[int]]:
    """Return the indices of the atoms that a word means: ``6``, ``ALA2:N``, ``ALA2-N``, ``N``."""
    labels: dict[str, list[int]] = {}
    for atom in topology.atoms:
        residue = f"{atom.residue.name}{atom.residue.resSeq}"
        for label in {f"{residue}:{atom.name}", f"{residue}-{atom.name}", atom.name}:
            labels.setdefault(label, []).append(atom.index)
    return labels | {str(index): [index] for index in range(topology.n_atoms)}


def _find_atom(name: str, word: str, labels: Mapping[str, list[int]]) -> int:
    atoms = labels.get(word, [])
    if len(atoms) == 1:
        return atoms[0]
    if atoms:
        numbers = ", ".join(map(str, atoms[:6])) + (", ..." if len(atoms) > 6 else "")
        raise ValueError(
            f"observe: {name}: expected one atom, got {word!r}, which {len(atoms)} have: give one "
            f"of the numbers {numbers}, or its residue as in ALA2:CA"
        )
    close = get_close_matches(word, labels, 3, 0.5)
    more = f" (like it: {', '.join(close)})" if close else ""
    last = max((index for known in labels.values() for index in known), default=-1)
    raise ValueError(
        f"observe: {name}: expected an atom by its number, 0 to {last}, or as ALA2:CA, got "
        f"{word!r}{more}"
    )


def _home_of(function: FrameFunction) -> str:
    """Return module and name of a function, for records."""
    module = getattr(function, "__module__", type(function).__module__)
    return f"{module}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def _import(name: str, definition: str) -> FrameFunction:
    match = _FUNCTION.fullmatch(definition)
    is_file = match is not None and match["home"].endswith(".py")
    if match is None or not (is_file or _MODULE.fullmatch(match["home"])):
        raise ValueError(f"observe: {name}: expected {_EXPECTED}, got {definition!r}")
    home, attribute = match["home"], match["function"]
    if is_file and not Path(home).is_file():
        raise ValueError(f"observe: {name}: expected a Python file, there is no {home}")
    try:
        module = _import_file(home) if is_file else importlib.import_module(home)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"observe: {name}: {home} cannot be imported: {error!r}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        got = "no such name" if function is None else type(function).__name__
        raise ValueError(f"observe: {name}: expected a function {attribute} in {home}, got {got}")
    return function


def _import_file(path: str) -> Any:
    """Return the module of a file, under a name that hides no other module."""
    label = f"_observed_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(label, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
