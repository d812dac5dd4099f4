"""Reading of ``.npz`` archives that need not be trusted.

No pickle in them is loaded, and an entry takes as much memory as it has bytes in the file, whatever
its header says.
"""

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from openmm_tsf.io.files import PathLike, check_regular_file

#: Errors that damaged archives and arrays raise.
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, TypeError,
    AttributeError, IndexError, MemoryError, NotImplementedError, RuntimeError, OverflowError,
    SyntaxError, tokenize.TokenError,
)  # fmt: skip
_SUFFIX = ".npy"
_MAX_NAME_LENGTH = 200


def read_array_names(archive: zipfile.ZipFile) -> frozenset[str]:
    """Return the names of the arrays in an archive written by `numpy.savez`.

    Raises
    ------
    ValueError
        If `check_archive` refuses the archive, or an entry is not an array.
    """
    check_archive(archive)
    names = [info.filename for info in archive.infolist()]
    for name in names:
        if not (name.endswith(_SUFFIX) and name.isprintable() and len(name) < _MAX_NAME_LENGTH):
            raise ValueError(f"expected arrays, got the entry {name[:40]!r}")
    return frozenset(name.removesuffix(_SUFFIX) for name in names)


def check_archive(archive: zipfile.ZipFile) -> None:
    """Refuse an archive whose content could be larger than its file.

    Raises
    ------
    ValueError
        If an entry is compressed or occurs twice, or the entries together exceed the file's size.
    """
    entries = archive.infolist()
    if len({info.filename for info in entries}) < len(entries):
        raise ValueError("an entry of the archive occurs twice")
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries):
        raise ValueError("an entry of the archive is compressed")
    stream = archive.fp
    assert stream is not None
    size = stream.seek(0, io.SEEK_END)
    if sum(info.file_size for info in entries) > size:
        raise ValueError("the archive's entries are larger than its file")


def read_array_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and dtype of an array.

    Raises
    ------
    ValueError
        If the array does not hold numbers, or its size differs from that of its entry.
    """
    with archive.open(f"{name}{_SUFFIX}") as stream:
        shape, _, dtype = _read_header(stream)
        start = stream.tell()
    _check_size(name, shape, dtype, archive.getinfo(f"{name}{_SUFFIX}").file_size - start)
    return shape, dtype


def read_array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """Return an array of numbers, after a comparison of its checksum; see `read_array_header`."""
    stream = io.BytesIO(archive.read(f"{name}{_SUFFIX}"))
    shape, is_fortran, dtype = _read_header(stream)
    data = stream.getbuffer()[stream.tell() :]
    _check_size(name, shape, dtype, len(data))
    array: npt.NDArray[Any] = np.frombuffer(data, dtype).copy()
    return array.reshape(shape, order="F" if is_fortran else "C")


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"expected an array of version 1 or 2, got {version}")
    return shape, is_fortran, dtype


def _check_size(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], n_bytes: int) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize == 0:
        raise ValueError(f"{name}: expected numbers, got {str(dtype)[:40]}")
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != n_bytes:
        raise ValueError(f"{name}: expected {list(shape)} of {dtype}, got {n_bytes} bytes")


def read_arrays(
    path: PathLike, what: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, npt.NDArray[Any]]:
    """Return the finite arrays that `openmm_tsf.io.files.write_arrays` wrote.

    Parameters
    ----------
    path
        The file.
    what
        What the file should be, for the message.
    shapes
        Names of the arrays to read, and the shapes that they must have.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file cannot be read, or an array is missing, not finite or of another shape.
    """
    path = check_regular_file(path, what)
    try:
        with zipfile.ZipFile(path) as archive:
            read_array_names(archive)
            arrays = {name: read_array(archive, name) for name in shapes}
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: not a readable {what} ({reason})") from error
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise ValueError(f"{path}: not a readable {what} ({name}: not numbers {list(shape)})")
    return arrays
