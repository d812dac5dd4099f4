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
    """Return the names of the arrays in an archive written by `numpy.savez`."""
    check_archive(archive)
    names = [info.filename for info in archive.infolist()]
    for name in names:
        if not (name.endswith(_SUFFIX) and name.isprintable() and len(name) < _MAX_NAME_LENGTH):
            raise ValueError(f"expected arrays, got the entry {name[:40]!r}")
    return frozenset(name.removesuffix(_SUFFIX) for name in names)


def check_archive(archive: zipfile.ZipFile) -> None:
    """Refuse an archive whose content could be larger than its file."""
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
    """Return the shape and dtype of an array of numbers; the size of its entry must fit them."""
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
    """Return finite arrays of the given shapes that `openmm_tsf.io.files.write_arrays` wrote."""
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
