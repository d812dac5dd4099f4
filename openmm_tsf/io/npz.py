"""Files of arrays (``.npz``): nothing in them is executed, and nothing is believed about sizes.

An entry takes as much memory as it has bytes in the file, whatever its header says.
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

from openmm_tsf.io.files import PathLike, regular_file

#: What reading damaged archives and arrays raises.
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, TypeError,
    AttributeError, IndexError, MemoryError, NotImplementedError, RuntimeError, OverflowError,
    SyntaxError, tokenize.TokenError,
)  # fmt: skip
_SUFFIX = ".npy"
_LONGEST_NAME = 200


def array_names(archive: zipfile.ZipFile) -> frozenset[str]:
    """Names of the arrays in an archive as `numpy.savez` writes it.

    Raises
    ------
    ValueError
        If it holds something else, a name twice, or compressed entries: a few bytes of those may
        stand for any number.
    """
    check_entries(archive)
    names = [info.filename for info in archive.infolist()]
    for name in names:
        if not (name.endswith(_SUFFIX) and name.isprintable() and len(name) < _LONGEST_NAME):
            raise ValueError(f"expected arrays, got the entry {name[:40]!r}")
    return frozenset(name.removesuffix(_SUFFIX) for name in names)


def check_entries(archive: zipfile.ZipFile) -> None:
    """Refuse an archive that promises more than it holds.

    Raises
    ------
    ValueError
        If an entry is compressed or there twice, or all together are larger than the file.
    """
    entries = archive.infolist()
    if len({info.filename for info in entries}) < len(entries):
        raise ValueError("an entry of the archive is there twice")
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries):
        raise ValueError("an entry of the archive is compressed")
    stream = archive.fp
    assert stream is not None
    size = stream.seek(0, io.SEEK_END)
    if sum(info.file_size for info in entries) > size:
        raise ValueError("the archive's entries are larger than its file")


def array_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array, its size compared with the entry's.

    Raises
    ------
    ValueError
        If it is no array of numbers, or has another size than its header says.
    """
    with archive.open(f"{name}{_SUFFIX}") as stream:
        shape, _, dtype = _header(stream)
        start = stream.tell()
    _check_size(name, shape, dtype, archive.getinfo(f"{name}{_SUFFIX}").file_size - start)
    return shape, dtype


def array_of(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """One array of numbers; its checksum is compared.

    Raises
    ------
    ValueError
        As `array_header`; errors of the archive (`UNREADABLE`) are let through.
    """
    stream = io.BytesIO(archive.read(f"{name}{_SUFFIX}"))
    shape, is_fortran, dtype = _header(stream)
    data = stream.getbuffer()[stream.tell() :]
    _check_size(name, shape, dtype, len(data))
    array: npt.NDArray[Any] = np.frombuffer(data, dtype).copy()
    return array.reshape(shape, order="F" if is_fortran else "C")


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
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
    """Arrays that `openmm_tsf.io.files.write_arrays` wrote: finite numbers of the given shapes.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is something else, or damaged.
    """
    path = regular_file(path, what)
    try:
        with zipfile.ZipFile(path) as archive:
            array_names(archive)
            found = {name: array_of(archive, name) for name in shapes}
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable {what} ({_brief(error)})") from error
    for name, shape in shapes.items():
        array = found[name]
        if array.shape != shape or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise ValueError(f"{path}: not a readable {what} ({name}: not numbers {list(shape)})")
    return found


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__
