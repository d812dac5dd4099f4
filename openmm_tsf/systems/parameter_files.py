"""Systems from the parameters of other programs: Amber, GROMACS, CHARMM; OpenMM's force fields."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import openmm
import openmm.app as app
from openmm.app.internal import customgbforces

from openmm_tsf.io.file_kinds import CHARMM_PARAMETERS, FORCE_FIELD, PRMTOP, PSF, TOP, check_kind
from openmm_tsf.systems.structures import is_box

#: Names of implicit solvents, as in ``openmm.app``; the files and classes of OpenMM by that name.
IMPLICIT_SOLVENTS = ("HCT", "OBC1", "OBC2", "GBn", "GBn2")
_CONSTRAINTS = {"none": None, "hbonds": app.HBonds, "allbonds": app.AllBonds}
_OPTIONS = {"nonbondedMethod": app.NoCutoff, "rigidWater": False, "removeCMMotion": False}

Create = Callable[[str | None, Any], openmm.System]


class Parameters(NamedTuple):
    """A Topology with what makes its System."""

    argument: str
    name: str  #: of the file, for messages
    topology: app.Topology
    #: The System of an implicit solvent and constraints.
    create: Create

    @property
    def has_box(self) -> bool:
        """Whether the file has a periodic box."""
        return is_box(self.topology.getPeriodicBoxVectors())


def check_implicit_solvent(value: Any) -> str | None:
    """Return one of `IMPLICIT_SOLVENTS`, or None for vacuum, from a name or OpenMM's object."""
    text = str(value).lower()
    for name in IMPLICIT_SOLVENTS:
        if text == name.lower():
            return name
    if value is None or text == "none":
        return None
    expected = f"one of {', '.join(IMPLICIT_SOLVENTS)} or 'none'"
    raise ValueError(f"implicit_solvent: expected {expected}, got {value!r}")


def check_constraints(value: Any) -> Any:
    """Return ``openmm.app``'s object for the bonds that are constrained, from a name or itself."""
    if value in _CONSTRAINTS.values():
        return value
    if isinstance(value, str) and value.lower() in _CONSTRAINTS:
        return _CONSTRAINTS[value.lower()]
    expected = ", ".join(map(repr, _CONSTRAINTS))
    raise ValueError(f"constraints: expected one of {expected}, got {value!r}")


def read_prmtop(value: Any) -> Parameters:
    """Read an Amber topology, a file or an ``AmberPrmtopFile``."""
    file, name = _loaded("prmtop", value, "an Amber topology", PRMTOP, app.AmberPrmtopFile)

    def create(solvent: str | None, constraints: Any) -> openmm.System:
        model = None if solvent is None else getattr(app, solvent)
        return file.createSystem(implicitSolvent=model, constraints=constraints, **_OPTIONS)

    return Parameters("prmtop", name, file.topology, create)


def read_psf(value: Any, parameters: Any) -> Parameters:
    """Read a CHARMM PSF with its parameters: files or ``openmm.app``'s objects."""
    file, name = _loaded("psf", value, "a CHARMM PSF", PSF, app.CharmmPsfFile)
    if not isinstance(parameters, app.CharmmParameterSet):
        expected = "CHARMM parameters (prm, rtf or str)"
        paths = _paths(parameters, "parameters", f"{expected} or a CharmmParameterSet")
        for path in paths:
            check_kind(path, "parameters", expected, (CHARMM_PARAMETERS,))
        parameters = _try("parameters", paths, app.CharmmParameterSet, *paths)
    _try("parameters", f"the parameters of {name}", file.loadParameters, parameters)

    def create(solvent: str | None, constraints: Any) -> openmm.System:
        model = None if solvent is None else getattr(app, solvent)
        options = {"implicitSolvent": model, "constraints": constraints, **_OPTIONS}
        return file.createSystem(parameters, flexibleConstraints=False, **options)

    return Parameters("psf", name, file.topology, create)


def read_top(value: Any, include_dir: Any) -> Parameters:
    """Read a GROMACS topology, a file or a ``GromacsTopFile``."""

    def read(path: str) -> app.GromacsTopFile:
        return app.GromacsTopFile(path, includeDir=include_dir and os.fspath(include_dir))

    if include_dir is not None and not Path(include_dir).is_dir():
        raise NotADirectoryError(f"include_dir: expected a folder, got {include_dir}")
    try:
        file, name = _loaded("top", value, "a GROMACS topology", TOP, app.GromacsTopFile, read)
    except ValueError as error:
        if "#include" in str(error):
            advice = "name the folder of GROMACS's force fields (include_dir, --include-dir)"
            raise ValueError(f"{error}; {advice}") from error
        raise

    def create(solvent: str | None, constraints: Any) -> openmm.System:
        system = file.createSystem(constraints=constraints, **_OPTIONS)
        if solvent is not None:
            _add_implicit_solvent(system, file.topology, solvent)
        return system

    return Parameters("top", name, file.topology, create)


def read_force_field(value: Any, topology: app.Topology) -> Parameters:
    """Read files of OpenMM's force fields, or take a ``ForceField``, for a Topology."""
    is_loaded = isinstance(value, app.ForceField)
    files = [] if is_loaded else _paths(value, "force_field", "names of files or a ForceField")
    for file in files:
        if Path(file).exists():  # others are those of OpenMM and of packages
            check_kind(file, "force_field", "a force field of OpenMM (XML)", (FORCE_FIELD,))

    def create(solvent: str | None, constraints: Any) -> openmm.System:
        more = [] if solvent is None or is_loaded else [f"implicit/{solvent.lower()}.xml"]
        field = value if is_loaded else app.ForceField(*files, *more)
        system = field.createSystem(topology, constraints=constraints, **_OPTIONS)
        if solvent is not None and is_loaded:
            _add_implicit_solvent(system, topology, solvent)
        if solvent is not None and _n_implicit_solvents(system) > 1:
            raise ValueError("it has an implicit solvent of its own, expected no other beside it")
        return system

    return Parameters("force_field", ", ".join(files) or "ForceField", topology, create)


def has_implicit_solvent(system: openmm.System) -> bool:
    """Return whether a System has a Force of a generalised Born model."""
    return _n_implicit_solvents(system) > 0


def _n_implicit_solvents(system: openmm.System) -> int:
    kinds = openmm.GBSAOBCForce, openmm.CustomGBForce, openmm.AmoebaGeneralizedKirkwoodForce
    return sum(isinstance(force, kinds) for force in system.getForces())


def _add_implicit_solvent(system: openmm.System, topology: app.Topology, model: str) -> None:
    """Add a generalised Born Force with surface area (ACE), as ``implicit/obc2.xml`` does."""
    (nonbonded,) = (f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    nonbonded.setReactionFieldDielectric(1.0)
    force = getattr(customgbforces, f"GBSA{model}Force")(SA="ACE")
    for index, radius_and_scale in enumerate(force.getStandardParameters(topology)):
        charge, *_ = nonbonded.getParticleParameters(index)
        force.addParticle([charge, *radius_and_scale])
    force.finalize()
    system.addForce(force)


def _loaded(
    argument: str, value: Any, expected: str, kind: str, cls: Any, read: Any = None
) -> tuple[Any, str]:
    """Return an object of OpenMM's class `cls`, as given or read from a file, and its name."""
    if isinstance(value, cls):
        return value, cls.__name__
    if not isinstance(value, (str, os.PathLike)):
        got = type(value).__name__
        raise TypeError(f"{argument}: expected a path or an object {cls.__name__}, got {got}")
    path = check_kind(value, argument, expected, (kind,))
    return _try(argument, path, read or cls, str(path)), str(value)


def _paths(value: Any, argument: str, expected: str) -> list[str]:
    """Return one or several paths as a list."""
    is_one = isinstance(value, (str, os.PathLike))
    try:
        return [os.fspath(path) for path in ([value] if is_one else value)]
    except TypeError:
        raise TypeError(f"{argument}: expected {expected}, got {value!r}") from None


def _try(argument: str, given: Any, call: Any, *arguments: Any) -> Any:
    """Return what one of OpenMM's readers returns; its errors are of many types."""
    try:
        return call(*arguments)
    except Exception as error:
        shown = ", ".join(map(str, given)) if isinstance(given, list) else given
        raise ValueError(f"{argument}: OpenMM cannot read {shown}: {error}") from error
