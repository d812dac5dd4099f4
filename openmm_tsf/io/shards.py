"""The shards of a run: its walkers in several run directories, ``shards/0000/``, ``0001/``, ...

Walkers never interact, and in production flow and step sizes are frozen: each shard is sampled by
itself, with its own random numbers, lock and checkpoint, and is a run directory like any other. The
run's own directory has what they share: ``config.json``, the flow and the molecule.
"""

import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openmm_tsf.io.directory import describe_owner, is_owned, list_contents, read_owner
from openmm_tsf.io.files import PathLike
from openmm_tsf.io.npz import UNREADABLE
from openmm_tsf.io.run_config import read_run_config
from openmm_tsf.io.segments import Segments, segment_paths

logger = logging.getLogger(__name__)

SHARDS = "shards"
_CHECKPOINT = "checkpoint.pt"
#: States of a shard.
MISSING, DAMAGED, RUNNING = "not started", "damaged", "running"
INTERRUPTED, UNKNOWN, FINISHED = "interrupted", "running or killed", "finished"
#: What all shards of a run have in common, among the choices.
_SHARED = ("molecule", "flow", "sigma", "save_interval", "numbers_interval")


def shard_directory(run: PathLike, number: int) -> Path:
    """Return the directory of one shard of a run.

    Examples
    --------
    >>> from openmm_tsf.io.shards import shard_directory
    >>> shard_directory("run", 3).as_posix()
    'run/shards/0003'
    """
    return Path(run) / SHARDS / f"{number:04d}"


def count_shards(config: Mapping[str, Any]) -> int:
    """Return the number of shards of a run from its ``config.json``; 1 where it has none."""
    return int(config.get("n_shards", 1))


@dataclass(frozen=True)
class Shard:
    """One shard as it was when it was looked at.

    Attributes
    ----------
    number, directory
        Which one of the run's, from 0, and where it is.
    n_iterations
        Iterations saved so far.
    problem
        Why its samples cannot be used, in words; empty if they can.
    state
        Not started, damaged, running, interrupted, running or killed (on another host), finished.
    owner
        Who writes to it, or wrote last, in words; empty if that is not known.
    config
        Its ``config.json``.
    """

    number: int
    directory: Path
    n_iterations: int = 0
    problem: str = ""
    state: str = MISSING
    owner: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its directory, ``"0003"``."""
        return self.directory.name

    def open_segments(self) -> Segments:
        """Open its numbers as they are now."""
        n_rungs = len(self.config["temperatures_K"])
        shape = self.config["n_walkers"], n_rungs, len(self.config["dihedrals"])
        return Segments(self.directory / "segments", *shape)


def read_shard(run: PathLike, number: int, config: Mapping[str, Any]) -> Shard:
    """Look at one shard of a run with this ``config.json``: every byte of its numbers is checked.

    Nothing is kept of them. What is wrong is told in the result, and raises no error.
    """
    directory = shard_directory(run, number)
    note = read_owner(directory)
    owner = describe_owner(note)
    if not directory.exists() or (directory.is_dir() and not list_contents(directory)):
        return Shard(number, directory, problem="not started", owner=owner)
    if not directory.is_dir():
        return Shard(number, directory, problem="not a directory", state=DAMAGED)
    is_running = is_owned(note)
    try:
        own = read_run_config(directory)
        _check_of_run(own, number, config)
        shard = Shard(number, directory, owner=owner, config=own)
        _check_segments(directory)
        n_iterations = len(shard.open_segments().iteration)
    except FileNotFoundError as error:
        has_samples = any((directory / "segments").glob("segment_*.npz"))
        if not has_samples and not (directory / _CHECKPOINT).exists():  # none are written yet
            state = MISSING if is_running is False else _state(is_running)
            return Shard(number, directory, problem="no samples yet", state=state, owner=owner)
        return Shard(number, directory, problem=str(error), state=DAMAGED, owner=owner)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return Shard(number, directory, problem=str(error), state=DAMAGED, owner=owner)
    problem = "" if n_iterations else "no samples yet"
    is_finished = n_iterations >= target_iterations(config)
    state = FINISHED if is_finished else _state(is_running)
    return Shard(number, directory, n_iterations, problem, state, owner, own)


def read_shards(run: PathLike, config: Mapping[str, Any]) -> list[Shard]:
    """Look at all shards of a run."""
    return [read_shard(run, number, config) for number in range(count_shards(config))]


def _state(is_running: bool | None) -> str:
    return UNKNOWN if is_running is None else RUNNING if is_running else INTERRUPTED


def target_iterations(config: Mapping[str, Any]) -> int:
    """Return the number of iterations that each shard of a run saves in all."""
    choices = config["choices"]
    settings = choices["settings"].get("sampling", choices["settings"])
    interval = choices.get("numbers_interval") or choices.get("save_interval", 1)
    return int(settings["n_iterations"]) // int(interval)


def _check_of_run(own: Mapping[str, Any], number: int, config: Mapping[str, Any]) -> None:
    """Refuse the directory of another run or shard: its samples would be counted twice."""
    expected = {
        "temperatures_K": config["temperatures_K"],
        "dihedrals": config["dihedrals"],
        "n_walkers": config["n_walkers"] // count_shards(config),
    }
    for name, value in expected.items():
        if own[name] != value:
            raise ValueError(f"{name}: expected {value} as the run has, got {own[name]}")
    choices = own["choices"]
    for name in _SHARED:
        if choices.get(name) != config["choices"].get(name):
            raise ValueError(f"{name}: expected that of the run, got another one")
    # Here, as below: they import torch, which the reader of a single directory does not need.
    from openmm_tsf.utils.random import Purpose, derive_seed

    seed = derive_seed(config["choices"]["seed"], Purpose.SAMPLING, number)
    if choices.get("sampler_seed") != seed:
        raise ValueError(
            f"sampler_seed: expected {seed}, that of shard {number} of this run, got "
            f"{choices.get('sampler_seed')}: it is a copy of another one"
        )


def _check_segments(directory: Path) -> None:
    """Refuse missing segments and those with a wrong checksum; each is read once."""
    from openmm_tsf.io.tensors import read_tensors

    checkpoint = read_tensors(directory / _CHECKPOINT, "checkpoint")
    paths = segment_paths(directory / "segments")
    n_expected = checkpoint.get("n_segments", 0)
    if len(paths) < n_expected:
        raise ValueError(
            f"{directory / 'segments'}: expected {n_expected} segments, as the checkpoint counts, "
            f"got {len(paths)}"
        )
    for path in paths:
        try:
            with zipfile.ZipFile(path) as file:
                wrong = file.testzip()
        except UNREADABLE as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        if wrong is not None:
            raise ValueError(f"{path}: the checksum of {wrong[:80]!r} is wrong")
