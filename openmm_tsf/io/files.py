"""Files that are either whole or not there: written beside their place, then renamed.

What is written survives a kill at any moment, a full disk, and, being flushed to the disk before it
is renamed, a crash of the machine. Names are never followed through links: a temporary file is
always a new one, and the rename replaces a link instead of writing through it.
"""

import csv
import errno
import io
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PathLike = str | os.PathLike[str]

_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
_ABANDONED_SECONDS = 86_400.0
_writing: set[str] = set()  # names of this process's own temporary files


def write_bytes(path: PathLike, content: bytes | bytearray | memoryview) -> None:
    """Write a file, all or nothing.

    Raises
    ------
    OSError
        If the directory is not writable or full, naming the file. What was there before stays.
    """
    path = Path(path)
    partial = path.with_name(_temporary_name(path.name))
    _writing.add(partial.name)
    try:
        # Exclusive: never through somebody's link. The mode is what open() would give.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise named_error(error, path) from error
        raise
    finally:
        _writing.discard(partial.name)
    _sync_directory(path.parent)


def write_text(path: PathLike, content: str) -> None:
    """Write a UTF-8 text, all or nothing."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: PathLike, content: Any) -> None:
    """Write JSON, all or nothing; numbers must be finite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_csv(path: PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table with a header, all or nothing."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_arrays(path: PathLike, arrays: Mapping[str, Any]) -> None:
    """Write an ``.npz`` of plain arrays, all or nothing."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getbuffer())


def regular_file(path: PathLike, what: str) -> Path:
    """The path of a file that can be read to its end: no directory, pipe or device.

    Raises
    ------
    FileNotFoundError
        If there is nothing, or something else.
    ValueError
        If nobody can say what it is.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such {what}") from None
    except (OSError, ValueError) as error:  # a link to itself, a directory that is a file, NUL
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: expected a {what}, it cannot be read: {reason}") from error
    if not stat.S_ISREG(mode):
        raise FileNotFoundError(f"{path}: no such {what}, it is {_kind(mode)}")
    return path


def _kind(mode: int) -> str:
    """What a path is, in words."""
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a file" if stat.S_ISREG(mode) else "a pipe or device"


def read_json(path: PathLike) -> dict[str, Any]:
    """Read a JSON object: finite numbers, no key twice, not deeper than settings are.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or none that this program wrote.
    """
    path = regular_file(path, "JSON file")
    if (size := path.stat().st_size) > _LARGEST_JSON:
        raise ValueError(f"{path}: expected at most {_LARGEST_JSON} bytes of JSON, got {size}")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_distinct,
            parse_constant=_finite,
            parse_float=_finite,
        )
        deep = _deeper(content, _DEEPEST_JSON)
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{path}: no readable JSON file: {error}") from error
    if deep:
        raise ValueError(f"{path}: expected at most {_DEEPEST_JSON} levels of JSON, got more")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


_LARGEST_JSON = 64 * 2**20
_DEEPEST_JSON = 40


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected finite numbers, got {text[:40]}")
    return number


def _deeper(content: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than so many levels."""
    layer = [content]
    for _ in range(levels + 1):
        layer = [
            item
            for outer in layer
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(layer)


#: Files that are changed in place; all others are replaced, whatever other names they have.
_IN_PLACE = (".dcd", ".lock")


def refuse_links(directory: PathLike, names: Iterable[str] = ()) -> None:
    """Refuse a directory in which writing would reach outside it, or wait for ever.

    Parameters
    ----------
    directory
        Whose files are about to be changed in place, or read.
    names
        Files and folders in it, which need not exist.

    Raises
    ------
    ValueError
        If one of them is a link, a pipe or a device, or a file changed in place that has a
        second name elsewhere.
    """
    for name in names:
        path = Path(directory) / name
        try:
            found = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        expected = f"expected files of the run's own in {directory}"
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise ValueError(f"output: {path} is {_kind(found.st_mode)}; {expected}")
        in_place = str(name).endswith(_IN_PLACE) and stat.S_ISREG(found.st_mode)
        if in_place and found.st_nlink > 1:
            raise ValueError(
                f"output: {path} is a hard link, {found.st_nlink} names of one file; {expected}"
            )


@contextmanager
def written_together(directory: Path) -> Iterator[Path]:
    """A folder whose files, once all are written, replace those of `directory`.

    Nothing changes where writing one of them fails, or is killed.
    """
    folder = directory / _temporary_name("new")
    _writing.add(folder.name)
    try:
        folder.mkdir()
        yield folder
        for path in sorted(folder.iterdir()):
            os.replace(path, directory / path.name)
        _sync_directory(directory)
    except OSError as error:
        if not str(error.filename).startswith(str(folder)):
            raise
        # About the place that the user knows.
        name = str(error.filename).replace(str(folder), str(directory))
        raise type(error)(error.errno, error.strerror, name) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _writing.discard(folder.name)


def remove_stale_temporaries(directory: Path) -> None:
    """Remove temporary files and folders whose writers were killed."""
    for path in directory.glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None:
            continue
        # Windows has no signal that only asks whether a process lives.
        if found["host"] == _host() and os.name == "posix":
            # A process in a container often has the number that its killed predecessor had.
            own = int(found["pid"]) == os.getpid()
            dead = path.name not in _writing if own else not _alive(int(found["pid"]))
        else:
            dead = time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS
        if dead and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif dead:
            path.unlink(missing_ok=True)


_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def _temporary_name(name: str) -> str:
    return f".{name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _host() -> str:
    return re.sub(r"\W", "-", socket.gethostname())[:40]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def named_error(error: OSError, path: Path) -> OSError:
    """The same error about the file that the user knows, with what to do where that is clear."""
    if error.filename == str(path):
        return error
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason += " (free some space; --resume continues from the last checkpoint)"
    return type(error)(error.errno, reason, str(path))


def _sync_directory(folder: Path) -> None:
    """Make a rename last; not every file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)
