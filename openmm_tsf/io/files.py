"""Atomic writing of files, reading of JSON and of text, and checks of links.

A file is written to a temporary file beside it, flushed to the disk, then renamed: it is complete
or absent after a kill, on a full disk and after a crash of the machine. Links are never written
through: a temporary file is always new, and the rename replaces a link.
"""

import codecs
import csv
import errno
import gzip
import hashlib
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
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

PathLike = str | os.PathLike[str]

_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
_ABANDONED_SECONDS = 86_400.0
_MAX_JSON_BYTES = 64 * 2**20
_MAX_JSON_DEPTH = 40
_MAX_TEXT_BYTES = 2**28
#: Endings of files that are changed in place. All others are replaced, so that a hard link to them
#: keeps its content.
_IN_PLACE = (".dcd", ".lock")
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_writing: set[str] = set()  # names of this process's temporary files


def write_bytes(path: PathLike, content: bytes | bytearray | memoryview) -> None:
    """Write a file atomically; after an OSError, which names `path`, its previous content stays."""
    path = Path(path)
    partial = path.with_name(_temporary_name(path.name))
    _writing.add(partial.name)
    try:
        # O_EXCL: a link of this name is not followed. The mode is that of open().
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise error_with_path(error, path) from error
        raise
    finally:
        _writing.discard(partial.name)
    _sync_directory(path.parent)


def write_text(path: PathLike, content: str) -> None:
    """Write a UTF-8 text atomically."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: PathLike, content: Any) -> None:
    """Write JSON atomically; numbers must be finite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_csv(path: PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV table with a header atomically."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_arrays(path: PathLike, arrays: Mapping[str, Any]) -> None:
    """Write arrays of numbers to an ``.npz`` file atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getbuffer())


def check_new_file(path: PathLike) -> Path:
    """Return the path of an output file; refuse one that exists, or whose folder does not."""
    file = Path(path)
    if file.exists() or file.is_symlink():
        raise FileExistsError(f"output: {file} exists; choose another name, or remove it")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"output: {file.parent} is no folder")
    return file


def check_regular_file(path: PathLike, what: str) -> Path:
    """Return `path`; refuse directories, pipes and devices. `what` it should be is for messages."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such {what}") from None
    except (OSError, ValueError) as error:  # a link to itself, a path below a file, a NUL
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: expected a {what}, it cannot be read: {reason}") from error
    if not stat.S_ISREG(mode):
        raise FileNotFoundError(f"{path}: no such {what}, it is {_file_type(mode)}")
    return path


def hash_of_file(path: PathLike, what: str) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal digits."""
    with open(check_regular_file(path, what), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_type(mode: int) -> str:
    """Return the type of a file that is not a regular one, in words."""
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a link" if stat.S_ISLNK(mode) else "a pipe or device"


def read_json(path: PathLike) -> dict[str, Any]:
    """Read a JSON object with finite numbers, distinct keys and limited size and depth."""
    path = check_regular_file(path, "JSON file")
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_JSON_BYTES} bytes of JSON, got {size}")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_distinct_keys,
            parse_constant=_finite_number,
            parse_float=_finite_number,
        )
        too_deep = _is_deeper(content, _MAX_JSON_DEPTH)
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{path}: not a readable JSON file: {error}") from error
    if too_deep:
        raise ValueError(f"{path}: expected at most {_MAX_JSON_DEPTH} levels of JSON, got more")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_text(path: PathLike, what: str) -> str:
    """Read a text file of another program: UTF-8, UTF-16 or Latin-1, also compressed by gzip.

    A byte order mark is left out and lines end with a newline. `what` it should be is for messages.
    """
    path = check_regular_file(path, what)
    with open(path, "rb") as plain:
        is_compressed = plain.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if is_compressed else open(path, "rb") as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable gzip file: {error}") from error
    if len(content) > _MAX_TEXT_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_TEXT_BYTES} bytes of text, got more")
    text = decode_text(content)
    if "\0" in text:
        raise ValueError(f"{path}: expected a {what}, got a binary file")
    return text


def decode_text(content: bytes) -> str:
    """Return a text in UTF-8, UTF-16 or Latin-1 without its byte order mark; lines end with \\n."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16", "replace")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key[:40]!r} occurs twice")
        content[key] = value
    return content


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected finite numbers, got {text[:40]}")
    return number


def _is_deeper(content: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than `levels`."""
    layer = [content]
    for _ in range(levels + 1):
        layer = [
            item
            for outer in layer
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(layer)


def refuse_links(directory: PathLike, names: Iterable[str] = ()) -> None:
    """Refuse links, pipes and devices among the files of a directory.

    Writing through a link would change a file elsewhere; reading a pipe may never end. The `names`
    need not exist. Of files that are changed in place, hard links are refused, too.
    """
    for name in names:
        path = Path(directory) / name
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        is_regular, problem = stat.S_ISREG(status.st_mode), None
        if not (is_regular or stat.S_ISDIR(status.st_mode)):
            problem = _file_type(status.st_mode)
        elif is_regular and str(name).endswith(_IN_PLACE) and status.st_nlink > 1:
            problem = f"a hard link, {status.st_nlink} names of one file"
        if problem is not None:
            expected = f"expected regular files and folders in {directory}"
            raise ValueError(f"output: {path} is {problem}; {expected}")


@contextmanager
def replace_together(directory: Path) -> Iterator[Path]:
    """Give a temporary folder whose files replace those of `directory` on exit.

    If writing one of them fails or is killed, none is replaced.
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
        # The message names the directory that the user knows.
        name = str(error.filename).replace(str(folder), str(directory))
        raise type(error)(error.errno, error.strerror, name) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _writing.discard(folder.name)


def remove_stale_temporaries(directory: Path) -> None:
    """Remove temporary files and folders whose writers were killed."""
    for path in directory.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        # Windows has no signal that only tests whether a process is running.
        if match["host"] == host_name() and os.name == "posix":
            # In a container, the killed process often had the number of this one.
            is_mine = int(match["pid"]) == os.getpid()
            stale = path.name not in _writing if is_mine else not is_running(int(match["pid"]))
        else:
            stale = time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS
        if stale and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif stale:
            path.unlink(missing_ok=True)


def _temporary_name(name: str) -> str:
    return f".{name}.{host_name()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def host_name() -> str:
    """Return the name of this machine as it stands in names of temporary files."""
    return re.sub(r"\W", "-", socket.gethostname())[:40]


def is_running(pid: int) -> bool:
    """Return whether a process of this machine runs; it may be another one with its number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def error_with_path(error: OSError, path: Path) -> OSError:
    """Return the same error with the name of `path`, and with advice if the disk is full."""
    if error.filename == str(path):
        return error
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason += " (free some space; --resume continues from the last checkpoint)"
    return type(error)(error.errno, reason, str(path))


def _sync_directory(folder: Path) -> None:
    """Flush a rename to the disk, on file systems that support it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
