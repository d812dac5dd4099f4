"""``config.json``: the settings and inputs of a stage, and every choice made since.

All stages write the same file. It is the first file in their directory, and holds

``format``
    Version of this layout; others are refused.
``stage``
    ``"md"``, ``"train"``, ``"sample"`` or ``"run"``; absent for a sampler that was run from Python.
``choices``
    The settings, seed and inputs that were given, then what was measured (platform, number of
    Contexts, step sizes), with the fingerprint of the ``molecule``, its ``measure`` if bonds are
    constrained, the ``basins`` of the training frames, and the definitions of ``observables``,
    functions by name only.
``versions``
    Of the packages.
``progress``, ``costs``
    How far MD is; what a run had cost after each of its steps.
``n_shards``
    In how many shards the walkers of a run are (`openmm_tsf.io.shards`), if in more than one.
``temperatures_K``, ``n_walkers``, ``seed``, ``dihedrals``, ``boltzmann_constant``, ...
    Added when replica exchange starts to write samples, see `SAMPLING_ENTRIES`.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openmm_tsf.io.files import read_json
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.validation import check_int, check_positive, check_seed, optional

CONFIG = "config.json"
CONFIG_FORMAT = 2
#: What a directory with samples has to say.
REQUIRED_FOR_SAMPLES = ("temperatures_K", "n_walkers", "seed", "dihedrals", "boltzmann_constant")
#: Entries that are added when sampling starts.
SAMPLING_ENTRIES = (
    *REQUIRED_FOR_SAMPLES,
    "device",
    "energy_evaluations",
    "wall_seconds",
    "reference",
    "n_shards",
)

#: Names that go to terminals, pictures and tables.
_NAME = re.compile(r"[\w.+-][\w .+-]{0,39}")
#: Reference data are files of the package, without folders.
_REFERENCE = re.compile(r"[\w-]{1,60}\.npz")


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of ``config.json`` in a directory of any stage."""
    path = directory / CONFIG
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such run directory")
    if not (path.exists() or path.is_symlink()):
        raise FileNotFoundError(f"{directory}: not a run directory, {CONFIG} is missing")
    config = read_json(path)
    number = config.get("format")
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{path}: format: expected a number, got {number!r}")
    if number > CONFIG_FORMAT:
        raise ValueError(
            f"{path}: written in format {number} by a newer version; this one reads {CONFIG_FORMAT}"
        )
    if number < CONFIG_FORMAT:
        raise ValueError(
            f"{path}: written in format {number} by an older version, which this one does not read"
        )
    check_config(config, path)
    return config


def read_run_config(directory: Path) -> dict[str, Any]:
    """Return the content of ``config.json`` in a directory with samples.

    It is a FileNotFoundError if sampling has not started, a ValueError in a stage without samples.
    """
    config = read_config(directory)
    stage = config.get("stage")
    missing = [name for name in REQUIRED_FOR_SAMPLES if name not in config]
    if missing and stage in ("md", "train"):
        raise ValueError(f"{directory}: expected a directory with samples, got one of {stage}")
    started = (directory / "checkpoint.pt").exists()  # it is written after these entries
    if missing and stage in ("sample", "run") and "temperatures_K" in missing and not started:
        raise FileNotFoundError(f"{directory}: no samples, the {stage} has not started sampling")
    if missing:
        raise ValueError(f"{directory / CONFIG}: damaged, has no {missing[0]!r}")
    return config


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse entries of a wrong type or range; missing ones are the reader's to refuse."""
    checks: dict[str, Callable[[Any, str], Any]] = {
        "temperatures_K": _check_temperatures,
        "n_walkers": check_int,
        "n_shards": check_int,
        "seed": check_seed,
        "boltzmann_constant": check_positive,
        "dihedrals": _check_dihedrals,
        "choices": _check_choices,
        "versions": _check_texts,
        "energy_evaluations": _check_counts,
        "wall_seconds": _check_counts,
        "progress": _check_counts,
        "costs": _check_object,
        "reference": optional(check_reference_name),
    }
    try:
        for name, check in checks.items():
            if name in config:
                check(config[name], name)
        if "temperatures_K" in config and config.get("choices", {}).get("molecule") is not None:
            # A molecule's trajectories are named by their temperature.
            check_distinct_temperatures(as_temperatures(config["temperatures_K"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, {_shortened(error)}") from error


def trajectory_name(kelvin: float) -> str:
    """Return the name of the trajectory of one temperature."""
    return f"T{kelvin:.2f}K.dcd"


def check_distinct_temperatures(temperatures: tuple[float, ...]) -> None:
    """Refuse temperatures whose trajectories would have the same name."""
    if len(set(map(trajectory_name, temperatures))) < len(temperatures):
        raise ValueError(
            f"temperatures: expected rungs that differ by more than 0.01 K, got {temperatures}"
        )


def check_reference_name(value: Any, name: str = "reference") -> None:
    """Refuse a name of reference data that contains a path."""
    if not (isinstance(value, str) and _REFERENCE.fullmatch(value)):
        raise ValueError(f"{name}: expected the name of reference data, got {value!r}")


def _check_temperatures(value: Any, name: str) -> None:
    if not isinstance(value, list):
        raise TypeError(f"{name}: expected a list of temperatures in kelvin, got {value!r}")
    as_temperatures(value, name)


def _check_dihedrals(value: Any, name: str) -> None:
    for key, atoms in _check_object(value, name).items():
        if not _NAME.fullmatch(key):
            raise ValueError(f"{name}: expected names of letters and numbers, got {key[:40]!r}")
        if not isinstance(atoms, list) or len(atoms) != 4:
            raise ValueError(f"{name}: expected four atoms of {key}, got {atoms!r}")
        for atom in atoms:
            check_int(atom, f"{name}: {key}", least=0)


def _check_choices(value: Any, name: str) -> None:
    choices = _check_object(value, name)
    for key in ("seed", "sampler_seed"):
        optional(check_seed)(choices.get(key), f"{name}.{key}")
    for key in ("save_interval", "numbers_interval", "threads", "torch_threads"):
        if key in choices:
            check_int(choices[key], f"{name}.{key}")
    _check_texts(choices.get("observables", {}), f"{name}.observables")


def _check_texts(value: Any, name: str) -> None:
    for key, text in _check_object(value, name).items():
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected text for {key[:40]!r}, got {text!r}")


def _check_counts(value: Any, name: str) -> None:
    for key, count in _check_object(value, name).items():
        is_number = isinstance(count, (int, float)) and not isinstance(count, bool)
        if count is not None and not (is_number and 0 <= count < math.inf):
            raise ValueError(f"{name}: expected a number for {key[:40]!r}, got {count!r}")


def _check_object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name}: expected an object, got {value!r}")
    return value


def _shortened(error: Exception) -> str:
    """The message, cut: values from a file may be long."""
    text = str(error)
    return text if len(text) < 300 else f"{text[:300]}..."
