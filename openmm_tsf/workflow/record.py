"""The request to a stage: the first content of its ``config.json``, see `io.run_config`.

A stage that was killed before its first checkpoint starts again from it, and a stage is resumed
only with the same request.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.io.directory import list_contents
from openmm_tsf.io.files import PathLike
from openmm_tsf.io.run_config import CONFIG, CONFIG_FORMAT, read_config
from openmm_tsf.io.serialization import from_plain_data, to_plain_data
from openmm_tsf.potentials.base import is_potential_description
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.validation import max_threads, require_entry
from openmm_tsf.utils.versions import package_versions
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.settings import SamplingSettings

logger = logging.getLogger(__name__)

#: Others make the continuation differ in its last bits; they are warned of.
_ONLY_WARNED_OF = ("threads", "platform", "device")
#: What a continuation may be given differently, or not at all.
_NOT_COMPARED = (*_ONLY_WARNED_OF, "molecule", "frames", "requested_platform", "flow_file")


def new_config(stage: str, molecule: MolecularSystem, **request: Any) -> dict[str, Any]:
    """Return the ``config.json`` of a stage that starts, json-able."""
    choices = {**molecule.identity, "threads": torch.get_num_threads()}
    return {
        "format": CONFIG_FORMAT,
        "stage": stage,
        "choices": choices | to_plain_data(request),
        "versions": package_versions(),
    }


def read_stage_config(directory: Path, stage: str) -> dict[str, Any] | None:
    """Return the ``config.json`` of a stage that is to be resumed; None where there is nothing."""
    if not directory.is_dir() or not list_contents(directory):
        return None
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"output: {directory} holds nothing to resume (no {CONFIG} in it)")
    config = read_config(directory)
    _check_stage(directory, config, stage, (stage,))
    try:
        choices = require_entry(config, "choices", dict)
        require_entry(choices, "settings", dict)
        require_entry(choices, "molecule", str)
        if stage != "md":  # its seed is one of its settings
            require_entry(choices, "seed", int)
        potential = choices.get("potential")
        if potential is not None and not is_potential_description(potential):
            raise ValueError(f"potential: expected what a run records of it, got {potential!r}")
    except ValueError as error:
        raise ValueError(f"{path}: damaged, {error}") from error
    return config


def _check_stage(
    directory: PathLike, config: dict[str, Any], stage: str, accepted: Sequence[str | None]
) -> None:
    if config.get("stage") not in accepted:
        of = f"{directory} is of {config.get('stage')!r}"
        raise ValueError(f"output: expected a directory of the {stage} stage, {of}")


def resumed_choices(directory: Path, stage: str, options: RunOptions) -> dict[str, Any]:
    """Return the choices of the stage that is resumed; empty where it starts."""
    config = read_stage_config(directory, stage) if options.resume else None
    return {} if config is None else config["choices"]


def warn_of_other_versions(directory: PathLike, recorded: Any) -> None:
    """Warn of packages that changed since a stage started."""
    if not isinstance(recorded, dict):
        return
    now = package_versions()
    changes = [
        f"{name} {recorded[name]} -> {now[name]}"
        for name in sorted(now.keys() & recorded.keys())
        if recorded[name] != now[name]
    ]
    if changes:
        logger.warning(
            f"{directory}: packages changed since it started ({', '.join(changes)}); the "
            "continuation is valid, but not the same bit by bit"
        )


def recorded_choices(directory: PathLike, stage: str | None = None) -> dict[str, Any]:
    """Return the choices of what is in a directory; empty where nothing is recorded.

    A directory that `stage`, if given, cannot resume is a ValueError; sample can resume production
    of a run and of a sampler that was run from Python.
    """
    if not (Path(directory) / CONFIG).is_file():
        return {}
    config = read_config(Path(directory))
    if stage is not None:
        accepted = ("sample", "run", None) if stage == "sample" else (stage,)
        _check_stage(directory, config, stage, accepted)
    choices: dict[str, Any] = config.get("choices", {})
    return choices


def recorded_settings(directory: PathLike, stage: str, cls: type, part: str | None = None) -> Any:
    """Return the settings `cls` of a stage that is resumed; None where none are recorded.

    Without a `part` they are all of them, or those of the sampling of a run.
    """
    settings = recorded_choices(directory, stage).get("settings")
    if settings is None:
        return None
    if part is not None:
        settings = settings.get(part) if isinstance(settings, dict) else None
    elif cls is SamplingSettings:
        settings = sampling_part(settings)
    return from_plain_data(cls, settings, str(Path(directory) / CONFIG))


def sampling_part(settings: Any) -> Any:
    """Return the recorded SamplingSettings: all settings of sample, a part of those of run."""
    return settings.get("sampling", settings) if isinstance(settings, dict) else settings


def recorded_threads(directory: PathLike) -> int | None:
    """Return the number of torch's threads when a stage started; None where it is not known."""
    threads = recorded_choices(directory).get("threads")
    return threads if isinstance(threads, int) and 0 < threads <= max_threads() else None


def check_same_request(
    directory: Path, recorded: dict[str, Any], request: dict[str, Any], may_differ: Sequence[str]
) -> None:
    """Refuse to resume a stage with choices other than those recorded.

    `may_differ` names exceptions, as ``"sampling.n_iterations"``.
    """
    if "molecule" in request and recorded.get("molecule") != request["molecule"]:
        before, now = recorded.get("measure"), request.get("measure")  # None without constraints
        is_measure = None not in (before, now) and before != now
        what = f"measure, {before}" if is_measure else "molecule"
        raise ValueError(f"output: what is in {directory} is of another {what}")
    for name in _ONLY_WARNED_OF:
        before, now = recorded.get(name), request.get(name)
        if name == "device":  # not its index, which is that of a rank
            before, now = _device_type(before or "cpu"), _device_type(now)
        if name in request and before != now:
            logger.warning(
                f"{directory}: started with {name} {before}, continued with {now}: valid, but not "
                "the same bit by bit"
            )
    frames = request.get("frames_sha256")
    if frames is not None and frames == recorded.get("frames_sha256"):
        may_differ = (*may_differ, "source.stride")  # the frames themselves are the same
    for name in sorted(request.keys() - {*_NOT_COMPARED, "frames_sha256"}):
        for key, (before, now) in _differences(recorded.get(name), request[name], name).items():
            if key.removeprefix("settings.") not in may_differ:
                made = f"what is in {directory} was made with {_in_words(before)}"
                raise ValueError(f"{key}: {made}, got {_in_words(now)}")
    # Last: a setting such as the stride says more than a hash.
    if recorded.get("frames_sha256") != request.get("frames_sha256", recorded.get("frames_sha256")):
        raise ValueError(f"frames: those of the stage in {directory} are other ones")


def _device_type(device: Any) -> Any:
    """``"cuda"`` of ``"cuda:3"``. Of another card the sampler warns, which knows its name."""
    return device.partition(":")[0] if isinstance(device, str) else device


def _in_words(value: Any) -> str:
    """A choice; some are not recorded where they have their default."""
    return "the default" if value is None else repr(value)


def _differences(before: Any, now: Any, name: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        different: dict[str, tuple[Any, Any]] = {}
        for key in sorted(before.keys() | now.keys()):
            different |= _differences(before.get(key), now.get(key), f"{name}.{key}")
        return different
    return {} if before == now else {name: (before, now)}
