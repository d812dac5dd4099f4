"""Output directories: one process writes at a time, and results are never mixed or overwritten."""

import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import filelock

from openmm_tsf.io.files import (
    PathLike,
    is_running,
    read_json,
    refuse_links,
    remove_stale_temporaries,
    write_json,
)

logger = logging.getLogger(__name__)

LOCK = ".lock"
_OWNER = ".lock-owner.json"
_LOCK_FILES = {LOCK, _OWNER}
#: Where batch systems name the job of a process.
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
#: Time between checkpoints in s, unless the user chooses another: what a killed process loses.
CHECKPOINT_SECONDS = 30.0

#: Names of the results that analyses and certificates write.
_RESULTS = (
    r"summary\.json|report\.html|thermodynamics\.(csv|json|png)|(ramachandran|diagnostics|observables)\.png"
    r"|torsions(_\d+)?\.png"
    r"|certificate\.(json|png)"
)
#: Files and folders that stages write.
_FILES = re.compile(
    r"config\.json|checkpoint\.(pt|npz)|flow\.pt"
    r"|training\.(pt|csv)|topology\.pdb|system\.xml|positions\.npz|(md|T[\d.]+K)\.dcd"
    rf"|{_RESULTS}"
)
_STAGES = ("md", "train", "sample", "run")
_FOLDERS = ("segments", "training", "md", "shards")


class DirectoryInUse(OSError):
    """Another process, or another sampler of this process, is writing to the directory."""


class DirectoryLock:
    """The right to write to a directory, held by one owner at a time.

    The operating system releases it when the owner ends, also by a kill: a lock file that is left
    over blocks nobody. Reading needs no lock. The same object may be entered several times; a
    directory that another owner holds is `DirectoryInUse`.

    On some file systems of clusters the lock is known to one node only, and a job that was started
    again on another node takes the directory over. So the owner's note beside the lock has a token
    and the number of the attempt, and `check_held` compares it before every checkpoint: the first
    of two owners stops.

    Examples
    --------
    >>> from openmm_tsf.io.directory import DirectoryInUse, DirectoryLock
    >>> with DirectoryLock("."):
    ...     try:
    ...         DirectoryLock(".").__enter__()
    ...     except DirectoryInUse:
    ...         print("in use")
    in use
    """

    def __init__(self, directory: PathLike) -> None:
        self.directory = Path(directory)
        self._lock = filelock.FileLock(self.directory / LOCK, timeout=0, thread_local=False)
        self._note: dict[str, Any] = {}

    def is_of(self, path: PathLike) -> bool:
        """Return whether this is the lock of the directory `path`."""
        return self.directory.resolve() == Path(path).resolve()

    def __enter__(self) -> Self:
        first = not self._lock.is_locked
        refuse_links(self.directory, _LOCK_FILES)  # filelock opens and empties the file in place
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise DirectoryInUse(
                f"output: {self.directory} is in use{describe_owner(read_owner(self.directory))}; "
                "wait until it has ended, or choose another directory"
            ) from None
        except OSError as error:
            raise type(error)(
                error.errno, f"output: cannot write to it: {error.strerror}", str(self.directory)
            ) from error
        if first:
            try:
                remove_stale_temporaries(self.directory)
                self._write_note()
            except BaseException:  # a full disk
                self._lock.release()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self._lock.lock_counter == 1 and read_owner(self.directory) == self._note:
                with suppress(OSError):  # a full disk: it then looks like one that was killed
                    write_json(self.directory / _OWNER, self._note | {"ended": _now()})
        finally:
            self._lock.release()

    def _write_note(self) -> None:
        """Write who holds the lock, and say whether an owner on another host may still run."""
        before = read_owner(self.directory)
        attempt = before.get("attempt", 0)
        self._note = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": _now(),
            "job": next((os.environ[name] for name in _JOBS if name in os.environ), None),
            "attempt": attempt + 1 if isinstance(attempt, int) else 1,
            "token": secrets.token_hex(8),
        }
        write_json(self.directory / _OWNER, self._note)
        if "ended" not in before and before.get("host") not in (None, self._note["host"]):
            logger.warning(
                "%s was in use%s, which did not say that it ended; taken over as attempt %d. If it "
                "still runs, it stops at its next checkpoint",
                self.directory, describe_owner(before), self._note["attempt"],
            )  # fmt: skip

    def check_held(self) -> None:
        """Raise DirectoryInUse if another process has taken the directory over."""
        owner = read_owner(self.directory)
        if owner.get("token") != self._note.get("token"):
            raise DirectoryInUse(
                f"output: {self.directory} was taken over{describe_owner(owner)}; this process, "
                f"attempt {self._note.get('attempt')}, stops and writes nothing more to it"
            )


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def read_owner(directory: PathLike) -> dict[str, Any]:
    """Return the note of the process that writes, or last wrote, to a directory; empty without one.

    ``pid``, ``host``, ``since``, ``job`` of a batch system, ``attempt``, ``token``, and ``ended``
    unless it runs or was killed.
    """
    try:
        return read_json(Path(directory) / _OWNER)
    except (OSError, ValueError):
        return {}


def describe_owner(note: dict[str, Any]) -> str:
    """Return who an owner's note names, as the end of a sentence; empty if it names nobody."""
    if not {"pid", "host", "since"} <= note.keys():
        return ""
    job = "" if note.get("job") is None else f" of job {note['job']}"
    attempt = "" if note.get("attempt", 1) == 1 else f", attempt {note['attempt']},"
    return f" by process {note['pid']}{job}{attempt} on {note['host']} since {note['since']}"


def is_owned(note: dict[str, Any]) -> bool | None:
    """Return whether the owner of a note still runs; None if it is of another host."""
    if not note or "ended" in note:
        return False
    if note.get("host") != socket.gethostname():
        return None
    return isinstance(note.get("pid"), int) and is_running(note["pid"])


def list_contents(directory: PathLike) -> list[str]:
    """Return the sorted names in a directory, without lock files and temporary files."""
    names = (path.name for path in Path(directory).iterdir())
    return sorted(
        n for n in names if n not in _LOCK_FILES and not (n[0] == "." and n.endswith(".tmp"))
    )


@contextmanager
def open_output_directory(output: PathLike, *, resume: bool = False) -> Iterator[DirectoryLock]:
    """Make an output directory if needed, and hold its lock.

    It must be new or empty, or with `resume` one that a stage wrote, without links: files would be
    written outside of it. A used one is a FileExistsError, one that is locked DirectoryInUse.
    """
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output: {path} is a file, expected a directory")
    if path.is_dir() and not _is_of_a_stage(path):  # refused before a lock file is written
        if not resume:
            _refuse_used(path)
        elif list_contents(path):
            raise ValueError(f"output: {path} holds nothing to resume")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"output: cannot make this directory: {error.strerror}"
        raise type(error)(error.errno, reason, str(path)) from error
    except ValueError as error:  # a NUL in the name
        raise ValueError(f"output: cannot make this directory: {error}") from error
    with DirectoryLock(path) as lock:
        if not resume:
            _refuse_used(path)
        elif list_contents(path):
            _refuse_links(path)
        else:
            logger.warning("nothing to resume in %s: starting from the beginning", path)
        yield lock


def check_results_directory(output: PathLike | None, run: PathLike | None) -> Path:
    """Return the directory of results; refuse one that cannot be theirs before the work.

    It is the run directory by default. Another one is new, empty, or of earlier results.
    """
    target = Path(run if output is None else output)  # type: ignore[arg-type]
    if target.exists() and not target.is_dir():
        if output is None:
            return target  # it is no run directory
        raise NotADirectoryError(f"output: {target} is a file, expected a directory")
    if target.is_dir() and (run is None or target.resolve() != Path(run).resolve()):
        others = [name for name in list_contents(target) if not re.fullmatch(_RESULTS, name)]
        if others:
            raise FileExistsError(
                f"output: expected a directory that is new, empty or of an earlier analysis or "
                f"certificate, {target} holds {others[0]}"
            )
    folder = next((f for f in (target, *target.absolute().parents) if f.is_dir()), target)
    if not os.access(folder, os.W_OK | os.X_OK) and (output is not None or target.is_dir()):
        raise PermissionError(
            f"output: {folder} cannot be written to; name another directory for the tables and "
            "figures (--output)"
        )
    return target


def _is_of_a_stage(path: Path) -> bool:
    """Whether a stage or a sampler wrote to the directory, by its lock files or ``config.json``."""
    is_locked = all((path / name).exists() for name in _LOCK_FILES)
    return is_locked or read_stage(path) is not None or "temperatures_K" in _read_config(path)


def _read_config(path: Path) -> dict[str, Any]:
    """The content of ``config.json``; empty if it cannot be read."""
    try:
        return read_json(path / "config.json")
    except (OSError, ValueError):
        return {}


def _refuse_links(path: Path) -> None:
    """Refuse links, pipes and devices in place of files that stages write or read."""
    names = [entry.name for entry in path.iterdir()]
    refuse_links(path, [name for name in names if name in _FOLDERS or _FILES.fullmatch(name)])
    for folder in _FOLDERS:
        if (path / folder).is_dir():
            refuse_links(path / folder, [entry.name for entry in (path / folder).iterdir()])


def _refuse_used(path: Path) -> None:
    if list_contents(path):
        raise FileExistsError(
            f"output: {path} is not empty; choose another directory, or delete this one if its "
            f"results are no longer needed{_possible_uses(path)}"
        )


def _possible_uses(path: Path) -> str:
    """How the results in a directory can be used or continued, as the end of a sentence."""
    stage = read_stage(path)
    possible = {
        "flow.pt": f"its flow can be used: sample --flow {path}",
        "md/md.dcd": f"its frames can be used: --trajectory {path / 'md'}",
    }
    uses = [text for name, text in possible.items() if (path / name).is_file()]
    if stage is not None:
        uses.insert(0, f"the {stage} stage in it continues with {stage} --resume")
    return "".join(f"; {text}" for text in uses)


def read_stage(path: PathLike) -> str | None:
    """Return the stage that wrote to a directory, or None if no known stage did."""
    stage = _read_config(Path(path)).get("stage")
    return stage if stage in _STAGES else None
