"""Files of tensors: written all or nothing, read without running anything that is in them."""

import io
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.io.files import PathLike, regular_file, write_bytes
from openmm_tsf.io.npz import check_entries

_DEEPEST = 40


def write_tensors(path: PathLike, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dictionaries for `read_tensors`."""
    buffer = io.BytesIO()  # torch's own writer hides the reason when a disk is full
    torch.save(dict(content), buffer)
    write_bytes(path, buffer.getbuffer())


def read_tensors(path: PathLike, what: str) -> dict[str, Any]:
    """What `write_tensors` wrote; nothing in the file is executed.

    Parameters
    ----------
    path
        The file.
    what
        What it should be, for the message.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is something else, or damaged; if a checksum is wrong.
    """
    path = regular_file(path, what)
    damaged = None
    try:
        with open(path, "rb") as file:
            with zipfile.ZipFile(file) as archive:
                check_entries(archive)
                damaged = archive.testzip()  # torch itself does not look at the checksums
            file.seek(0)
            content = {} if damaged else torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch's reader raises many kinds, with pages of advice
        raise ValueError(f"{path}: not a readable {what} ({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path}: damaged {what}: the checksum of {damaged[:80]!r} is wrong")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a {what}, it holds {type(content).__name__}")
    _check_content(content, path, what)
    return content


def _check_content(content: dict[Any, Any], path: Path, what: str) -> None:
    """Refuse what `write_tensors` is never given: other types, and few bytes that mean many.

    Lists may hold themselves, or each other many times over, and tensors may repeat one number for
    ever: printing or copying them would take all memory.
    """
    budget = path.stat().st_size  # nothing takes less than a byte
    layer: list[Any] = [content]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for item in layer:
            problem = _problem(item)
            if problem is not None:
                raise ValueError(f"{path}: not a readable {what}: expected {problem}")
            if type(item) in (dict, OrderedDict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple)):
                below += item
            if len(below) > budget:
                raise ValueError(
                    f"{path}: not a readable {what}: it holds more than its bytes can say"
                )
        budget -= len(below)
        if not below:
            return
        layer = below
    raise ValueError(f"{path}: not a readable {what}: expected at most {_DEEPEST} levels, got more")


def _problem(item: Any) -> str | None:
    """What was expected instead of this item, and what it is; None where nothing is wrong."""
    if isinstance(item, torch.Tensor):
        if item.layout is not torch.strided or item.device.type != "cpu" or item.is_quantized:
            return f"plain tensors, got one of {item.layout} on {item.device}"
        used, held = item.numel() * item.element_size(), item.untyped_storage().nbytes()
        return f"{used} bytes of a tensor, got {held}" if used > held else None
    if item is None or isinstance(item, (bool, int, float, str, dict, list, tuple, torch.dtype)):
        return None
    return f"tensors, numbers, strings, lists and dictionaries, got {type(item).__name__}"
