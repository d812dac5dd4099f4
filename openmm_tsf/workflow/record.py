"""What a stage was asked to do: ``settings.json``, the first file in its directory.

It is written before anything else and says how to begin again where a stage was killed before its
first checkpoint, with the choices that were measured at the first start.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.io.directory import list_contents
from openmm_tsf.io.files import PathLike, read_json, write_json
from openmm_tsf.io.serialization import from_plain_data, to_plain_data
from openmm_tsf.potentials.base import Potential, is_potential_choice, potential_choices
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.training import FitSettings
from openmm_tsf.utils.validation import max_threads
from openmm_tsf.utils.versions import package_versions
from openmm_tsf.workflow.settings import FlowSettings, SamplingSettings

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
_FORMAT = 1


def new_record(stage: str, molecule: MolecularSystem, **asked: Any) -> dict[str, Any]:
    """What a stage was asked, json-able."""
    return {
        "format": _FORMAT,
        "stage": stage,
        **to_plain_data(asked),
        "fingerprint": molecule.fingerprint,
        "torch_threads": torch.get_num_threads(),
        "versions": package_versions(),
    }


def warn_of_other_versions(where: PathLike, written: Any) -> None:
    """Say which packages changed since a stage began: its results are then valid, but others."""
    now = package_versions()
    if not isinstance(written, dict):
        return
    changes = [
        f"{name} {written[name]} -> {now[name]}"
        for name in sorted(now.keys() & written.keys())
        if written[name] != now[name]
    ]
    if changes:
        logger.warning(
            "%s: packages changed since it began (%s); it goes on, valid, but not the same bit by "
            "bit", where, ", ".join(changes),
        )  # fmt: skip


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write ``settings.json``."""
    write_json(folder / SETTINGS, record)


def note_potential(folder: Path, record: dict[str, Any], potential: Potential) -> None:
    """Keep which potential was chosen, for the same stage begun again."""
    if record.get("potential") is None:
        record["potential"] = potential_choices(potential)
        write_record(folder, record)


def read_record(folder: Path, stages: Sequence[str]) -> dict[str, Any] | None:
    """The record of a directory that is to be resumed; None where nothing was begun.

    Raises
    ------
    ValueError
        If the directory is of another stage, or the record is damaged.
    """
    if not folder.is_dir() or not list_contents(folder):
        return None
    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"output: {folder} holds nothing to resume (no {SETTINGS} in it)")
    record = read_json(path)
    if record.get("stage") not in stages:
        raise ValueError(
            f"output: {folder} holds no {' or '.join(stages)} to resume, it is of the stage "
            f"{record.get('stage')!r}"
        )
    if not isinstance(record.get("format"), int) or record["format"] > _FORMAT:
        raise ValueError(
            f"{path}: expected format {_FORMAT}, got {record.get('format')!r}, of another version"
        )
    for key, kind in (("settings", dict), ("seed", int), ("fingerprint", str)):
        if not isinstance(record.get(key), kind):
            raise ValueError(f"{path}: damaged, {key} is missing")
    potential = record.get("potential")
    if potential is not None and not is_potential_choice(potential):
        raise ValueError(f"{path}: damaged, potential is {potential!r}")
    warn_of_other_versions(folder, record.get("versions"))
    return record


def recorded_settings(folder: PathLike, cls: type, part: str | None = None) -> Any:
    """Settings of the stage in a directory that is to be resumed; None where none are recorded.

    Parameters
    ----------
    folder
        The directory.
    cls
        Their dataclass.
    part
        Which of several; None for all of them. Where a run was recorded, its sampling is meant
        where that is what `cls` is.

    Raises
    ------
    ValueError
        If the record is damaged.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return None
    found: Any = read_json(path).get("settings")
    if part is None and cls is SamplingSettings and isinstance(found, dict):
        part = "sampling" if "sampling" in found else None
    if part is not None:
        found = found.get(part) if isinstance(found, dict) else None
    return from_plain_data(cls, found, str(path))


def recorded_threads(folder: PathLike) -> int | None:
    """Threads of torch that a stage began with; None where that is not known."""
    path = Path(folder) / SETTINGS
    found = read_json(path).get("torch_threads") if path.is_file() else None
    return found if isinstance(found, int) and 0 < found <= max_threads() else None


def recorded_source(folder: PathLike) -> dict[str, Any]:
    """Where the frames of a training that is to be resumed came from, as far as is known."""
    path = Path(folder) / SETTINGS
    found = read_json(path).get("source") if path.is_file() else None
    return found if isinstance(found, dict) else {}


def check_same_record(
    folder: Path, before: dict[str, Any], now: dict[str, Any], growing: Sequence[str] = ()
) -> None:
    """Refuse to resume with another question than the one that was asked.

    Parameters
    ----------
    folder
        The directory, for the message.
    before, now
        Records.
    growing
        Settings that may differ, as ``"sampling.n_iterations"``.

    Raises
    ------
    ValueError
        If they differ in anything but versions and measured choices.
    """
    if before["fingerprint"] != now["fingerprint"]:
        raise ValueError(f"output: what is in {folder} is of another molecule")
    if before.get("torch_threads") != now.get("torch_threads"):
        logger.warning(
            "%s: begun with %s threads of torch, it goes on with %s: valid, but not the same bit "
            "by bit", folder, before.get("torch_threads"), now.get("torch_threads"),
        )  # fmt: skip
    skipped = {
        "versions", "potential", "costs", "fingerprint", "format", "frames", "torch_threads"
    }  # fmt: skip
    for name in sorted((before.keys() | now.keys()) - skipped):
        differ = _differences(with_later_fields(before.get(name)), now.get(name), name)
        for key, (was, is_now) in differ.items():
            if key.removeprefix("settings.") not in growing:
                raise ValueError(
                    f"{key}: what is in {folder} was made with {was!r}, got {is_now!r}"
                )


def with_later_fields(settings: Any) -> Any:
    """Settings as written by an earlier version, with the fields that have come since.

    Their defaults are what that version did.
    """
    if not isinstance(settings, dict):
        return settings
    found = {name: with_later_fields(value) for name, value in settings.items()}
    for known, defaults in (
        ("conditioner_dtype", FlowSettings()),
        ("kl_batch_size", FitSettings()),
        ("n_walkers", SamplingSettings()),
    ):
        if known in found:
            return to_plain_data(defaults) | found
    return found


def _differences(before: Any, now: Any, name: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in before.keys() | now.keys():
            found |= _differences(before.get(key), now.get(key), f"{name}.{key}")
        return dict(sorted(found.items()))
    return {} if before == now else {name: (before, now)}
