"""Output directories: claimed by one process at a time, never mixed, never lost."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import filelock

from openmm_tsf.files import PathLike, sweep, write_json

logger = logging.getLogger(__name__)

LOCK = ".lock"
_OWNER = ".lock-owner.json"
_OURS = {LOCK, _OWNER}


class DirectoryInUse(OSError):
    """Another process, or another sampler in this one, is writing to the directory."""


class DirectoryLock:
    """The right to write to a directory, held by one owner at a time.

    The operating system gives it back when the owner ends, however it ends: what a killed job
    leaves behind stops nobody. Reading needs no lock. May be entered several times.

    Parameters
    ----------
    directory
        An existing directory.

    Raises
    ------
    DirectoryInUse
        On entering, if somebody else holds it.
    OSError
        On entering, if the directory cannot be written.
    """

    def __init__(self, directory: PathLike) -> None:
        self.directory = Path(directory)
        self._lock = filelock.FileLock(self.directory / LOCK, timeout=0, thread_local=False)

    def is_of(self, path: PathLike) -> bool:
        """Whether it locks that directory."""
        return self.directory.resolve() == Path(path).resolve()

    def __enter__(self) -> Self:
        first = not self._lock.is_locked
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise DirectoryInUse(
                f"output: {self.directory} is in use{self._owner()}; wait until it has ended, or "
                "choose another directory"
            ) from None
        except OSError as error:
            raise type(error)(
                error.errno, f"output: cannot write there: {error.strerror}", str(self.directory)
            ) from error
        if first:
            try:
                sweep(self.directory)
                owner = {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                }
                write_json(self.directory / _OWNER, owner)
            except BaseException:  # a full disk
                self._lock.release()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def _owner(self) -> str:
        """Who holds it, as far as is known: the note may be that of an earlier owner."""
        try:
            note = json.loads((self.directory / _OWNER).read_text(encoding="utf-8"))
            return f" by process {note['pid']} on {note['host']} since {note['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def contents(directory: PathLike) -> list[str]:
    """Names of what lies in a directory, without locks and temporary files, sorted."""
    names = (path.name for path in Path(directory).iterdir())
    return sorted(n for n in names if n not in _OURS and not (n[0] == "." and n.endswith(".tmp")))


@contextmanager
def claimed(output: PathLike, *, resume: bool = False) -> Iterator[DirectoryLock]:
    """Hold the lock of an output directory: a new or an empty one, or any with `resume`.

    Raises
    ------
    FileExistsError
        If it is not empty and `resume` is false: results are never mixed or overwritten.
    NotADirectoryError
        If the path is a file.
    DirectoryInUse
        If somebody is writing to it.
    OSError
        If it cannot be made or written.
    """
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output: {path} is a file, expected a directory")
    known = path.is_dir() and (path / LOCK).exists()
    if path.is_dir() and not known and not resume:
        _refuse_used(path)  # somebody else's directory is not even given a lock
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"output: cannot make this directory: {error.strerror}"
        raise type(error)(error.errno, reason, str(path)) from error
    with DirectoryLock(path) as lock:
        if not resume:
            _refuse_used(path)
        elif not contents(path):
            logger.warning("nothing to resume in %s: from the beginning", path)
        yield lock


def _refuse_used(path: Path) -> None:
    if contents(path):
        raise FileExistsError(
            f"output: {path} is not empty; choose another directory, or delete this one if its "
            f"results are no longer needed{_what_can_be_done(path)}"
        )


def _what_can_be_done(path: Path) -> str:
    """How the results in a directory can be used or continued, as the end of a sentence."""
    stage = stage_of(path)
    possible = {
        "flow.pt": f"its flow can be used: sample --flow {path}",
        "md/md.dcd": f"its frames can be used: --trajectory {path / 'md'}",
    }
    there = [text for name, text in possible.items() if (path / name).is_file()]
    if stage is not None:
        there.insert(0, f"the {stage} stage in it continues with {stage} --resume")
    return "".join(f"; {text}" for text in there)


def stage_of(path: PathLike) -> str | None:
    """Which stage writes to a directory; None if no stage of the command line does."""
    for name in ("settings.json", "config.json"):
        try:
            found: Any = json.loads((Path(path) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("stage") in ("md", "train", "sample", "run"):
            return str(found["stage"])
    return None
