"""Output directories: claimed by one process at a time, never mixed, never lost."""

import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import filelock

from openmm_tsf.io.files import (
    PathLike,
    read_json,
    refuse_links,
    remove_stale_temporaries,
    write_json,
)

logger = logging.getLogger(__name__)

LOCK = ".lock"
_OWNER = ".lock-owner.json"
_OURS = {LOCK, _OWNER}

#: Files that stages write, and folders.
_FILES = re.compile(
    r"(settings|config|summary|thermodynamics)\.json|checkpoint\.(pt|npz)|flow\.pt"
    r"|training\.(pt|csv)|topology\.pdb|system\.xml|positions\.npz|(md|T[\d.]+K)\.dcd"
    r"|(ramachandran|diagnostics|thermodynamics)\.(png|csv)"
)
_STAGES = ("md", "train", "sample", "run")
_FOLDERS = ("segments", "training", "md")


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
        refuse_links(self.directory, _OURS)  # the lock is opened, and emptied, in place
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
                remove_stale_temporaries(self.directory)
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
            note = read_json(self.directory / _OWNER)
            return f" by process {note['pid']} on {note['host']} since {note['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def list_contents(directory: PathLike) -> list[str]:
    """Names of what lies in a directory, without locks and temporary files, sorted."""
    names = (path.name for path in Path(directory).iterdir())
    return sorted(n for n in names if n not in _OURS and not (n[0] == "." and n.endswith(".tmp")))


@contextmanager
def open_output_directory(output: PathLike, *, resume: bool = False) -> Iterator[DirectoryLock]:
    """Hold the lock of an output directory: a new or an empty one, or any with `resume`.

    Raises
    ------
    FileExistsError
        If it is not empty and `resume` is false: results are never mixed or overwritten.
    NotADirectoryError
        If the path is a file.
    DirectoryInUse
        If somebody is writing to it.
    ValueError
        If it is to be resumed and nothing in it is of a stage, or something in it is a link: what
        is written would be somewhere else.
    OSError
        If it cannot be made or written.
    """
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output: {path} is a file, expected a directory")
    if path.is_dir() and not _is_known(path):  # not even given a lock
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
            _refuse_foreign(path)
        else:
            logger.warning("nothing to resume in %s: from the beginning", path)
        yield lock


def _is_known(path: Path) -> bool:
    """Whether a stage has begun in a directory, as far as names and its first words say."""
    if all((path / name).exists() for name in _OURS) or (path / "settings.json").exists():
        return True
    try:
        found = read_json(path / "config.json")
    except (OSError, ValueError):
        return False
    return "temperatures_K" in found or found.get("stage") in _STAGES


def _refuse_foreign(path: Path) -> None:
    """Refuse links, pipes and devices among what the stages write, or read to go on."""
    names = [entry.name for entry in path.iterdir()]
    refuse_links(path, [name for name in names if name in _FOLDERS or _FILES.fullmatch(name)])
    for folder in _FOLDERS:
        if (path / folder).is_dir():
            refuse_links(path / folder, [entry.name for entry in (path / folder).iterdir()])


def _refuse_used(path: Path) -> None:
    if list_contents(path):
        raise FileExistsError(
            f"output: {path} is not empty; choose another directory, or delete this one if its "
            f"results are no longer needed{_what_can_be_done(path)}"
        )


def _what_can_be_done(path: Path) -> str:
    """How the results in a directory can be used or continued, as the end of a sentence."""
    stage = read_stage(path)
    possible = {
        "flow.pt": f"its flow can be used: sample --flow {path}",
        "md/md.dcd": f"its frames can be used: --trajectory {path / 'md'}",
    }
    there = [text for name, text in possible.items() if (path / name).is_file()]
    if stage is not None:
        there.insert(0, f"the {stage} stage in it continues with {stage} --resume")
    return "".join(f"; {text}" for text in there)


def read_stage(path: PathLike) -> str | None:
    """Which stage writes to a directory; None if no stage of the command line does."""
    for name in ("settings.json", "config.json"):
        try:
            found = read_json(Path(path) / name)
        except (OSError, ValueError):
            continue
        if found.get("stage") in _STAGES:
            return str(found["stage"])
    return None
