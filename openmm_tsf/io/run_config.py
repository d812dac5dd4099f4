"""What ``config.json`` of a run directory has to say before any of it is used."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openmm_tsf.io.files import read_json
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.validation import check_int, check_positive

#: Names that go to terminals, pictures and tables.
_NAME = re.compile(r"[\w.+-][\w .+-]{0,39}")
#: Reference data are files of the package, without folders.
_REFERENCE = re.compile(r"[\w-]{1,60}\.npz")


def check_run_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a run's configuration that nothing could be made of.

    Entries that are missing are let pass: who needs them says so.

    Parameters
    ----------
    config, path
        What was read from where.

    Raises
    ------
    ValueError
        If an entry is not what it should be, naming the file.
    """
    checks: dict[str, Callable[[Any, str], Any]] = {
        "temperatures_K": _ladder,
        "n_walkers": check_int,
        "seed": lambda value, name: check_int(value, name, 0, 2**64 - 1),
        "boltzmann_constant": check_positive,
        "dihedrals": _dihedrals,
        "choices": _choices,
        "versions": _words,
        "energy_evaluations": _counts,
        "wall_seconds": _counts,
        "reference": _reference,
    }
    for name, check in checks.items():
        if name in config:
            try:
                check(config[name], name)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: damaged, {_short(error)}") from error
    if isinstance(config.get("choices"), dict) and config["choices"].get("molecule") is not None:
        try:  # a molecule's rungs have trajectories, which are named by their temperature
            check_distinct(as_temperatures(config.get("temperatures_K")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged, {_short(error)}") from error


def rung_file(kelvin: float) -> str:
    """Name of the trajectory of one temperature."""
    return f"T{kelvin:.2f}K.dcd"


def check_distinct(temperatures: tuple[float, ...]) -> None:
    """Refuse rungs whose trajectories would have one name.

    Raises
    ------
    ValueError
        If two are within 0.01 K.
    """
    if len(set(map(rung_file, temperatures))) < len(temperatures):
        raise ValueError(
            f"temperatures: expected rungs that differ by more than 0.01 K, got {temperatures}"
        )


def _ladder(value: Any, name: str) -> None:
    if not isinstance(value, list):
        raise TypeError(f"{name}: expected a list of temperatures in kelvin, got {value!r}")
    as_temperatures(value, name)


def _dihedrals(value: Any, name: str) -> None:
    for key, atoms in _object(value, name).items():
        if not _NAME.fullmatch(key):
            raise ValueError(f"{name}: expected names of letters and numbers, got {key[:40]!r}")
        if not isinstance(atoms, list) or len(atoms) != 4:
            raise ValueError(f"{name}: expected four atoms of {key}, got {atoms!r}")
        for atom in atoms:
            check_int(atom, f"{name}: {key}", least=0)


def _choices(value: Any, name: str) -> None:
    choices = _object(value, name)
    for key in ("seed", "sampler_seed"):
        if choices.get(key) is not None:
            check_int(choices[key], f"{name}.{key}", 0, 2**64 - 1)
    for key in ("save_interval", "torch_threads"):
        if key in choices:
            check_int(choices[key], f"{name}.{key}")


def _words(value: Any, name: str) -> None:
    for key, word in _object(value, name).items():
        if not isinstance(word, str):
            raise TypeError(f"{name}: expected text for {key[:40]!r}, got {word!r}")


def _counts(value: Any, name: str) -> None:
    for key, count in _object(value, name).items():
        number = isinstance(count, (int, float)) and not isinstance(count, bool)
        if count is not None and not (number and 0 <= count < math.inf):
            raise ValueError(f"{name}: expected a number for {key[:40]!r}, got {count!r}")


def check_reference_name(value: Any, name: str = "reference") -> None:
    """Refuse a name of reference data with anything of a path in it.

    Raises
    ------
    ValueError
        If it is none.
    """
    if not (isinstance(value, str) and _REFERENCE.fullmatch(value)):
        raise ValueError(f"{name}: expected the name of reference data, got {value!r}")


def _reference(value: Any, name: str) -> None:
    if value is not None:
        check_reference_name(value, name)


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name}: expected an object, got {value!r}")
    return value


def _short(error: Exception) -> str:
    """A stranger's values may be long."""
    text = str(error)
    return text if len(text) < 300 else f"{text[:300]}..."


RUN_FORMAT = 1


_IN_CHOICES = {"molecule", "flow", "kernels", "potential", "save_interval", "torch_threads"}


def read_run_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a run directory.

    Raises
    ------
    FileNotFoundError
        If the directory is no run directory.
    ValueError
        If it is damaged or was written in a newer format.
    """
    path = directory / "config.json"
    if not (path.exists() or path.is_symlink()):
        raise FileNotFoundError(f"{directory}: no run directory, config.json is missing")
    config = read_json(path)
    if not {"format", "temperatures_K", "n_walkers", "choices"} <= config.keys():
        raise ValueError(f"{path}: no config.json of a sampling run")
    if not isinstance(config["format"], int) or config["format"] > RUN_FORMAT:
        raise ValueError(
            f"{path}: written in format {config['format']} by a newer version; this one "
            f"reads up to format {RUN_FORMAT}"
        )
    check_run_config(config, path)
    choices = config["choices"]
    if not choices.keys() >= _IN_CHOICES:
        raise ValueError(f"{path}: damaged, choices are missing")
    return config
