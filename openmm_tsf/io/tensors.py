"""Atomic writing of tensors, and reading of tensor files that need not be trusted."""

import io
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.io.file_kinds import TORCH, but_got
from openmm_tsf.io.files import PathLike, check_regular_file, write_bytes
from openmm_tsf.io.npz import check_archive

_MAX_DEPTH = 40


def write_tensors(path: PathLike, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dictionaries for `read_tensors`, atomically.

    Tensors of a GPU are written as those of the CPU: the file can be read on any machine.
    """
    buffer = io.BytesIO()  # torch's own writer hides the reason when a disk is full
    torch.save(_on_cpu(dict(content)), buffer)
    write_bytes(path, buffer.getbuffer())


def _on_cpu(item: Any) -> Any:
    """Return the content with tensors of a GPU on the CPU, itself where there are none."""
    if isinstance(item, torch.Tensor):
        return item.detach().cpu() if item.device.type != "cpu" else item
    if isinstance(item, Mapping):
        moved = {key: _on_cpu(value) for key, value in item.items()}
        return moved if any(moved[key] is not item[key] for key in moved) else item
    if isinstance(item, (list, tuple)):
        parts = [_on_cpu(value) for value in item]
        changed = any(a is not b for a, b in zip(parts, item, strict=True))
        return type(item)(parts) if changed else item
    return item


def read_tensors(path: PathLike, what: str) -> dict[str, Any]:
    """Return what `write_tensors` wrote, without running code from the file."""
    path = check_regular_file(path, what)
    damaged = None
    try:
        with open(path, "rb") as file:
            with zipfile.ZipFile(file) as archive:
                check_archive(archive)
                damaged = archive.testzip()  # torch does not compare the checksums
            file.seek(0)
            content = {} if damaged else torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # of many types, with pages of advice
        got = but_got(path, (TORCH,))
        raise ValueError(f"{path}: not a readable {what} ({type(error).__name__}{got})") from error
    if damaged:
        raise ValueError(f"{path}: damaged {what}: the checksum of {damaged[:80]!r} is wrong")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a {what}, it holds {type(content).__name__}")
    _check_content(content, path, what)
    return content


def _check_content(content: dict[Any, Any], path: Path, what: str) -> None:
    """Refuse types that `write_tensors` does not write, and content larger than the file.

    A list can contain itself, or another list many times, and a tensor can repeat one number
    without limit: printing or copying them would take all memory.
    """
    budget = path.stat().st_size  # every item takes at least a byte
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        next_level: list[Any] = []
        for item in level:
            problem = _problem(item)
            if problem is not None:
                raise ValueError(f"{path}: not a readable {what}: expected {problem}")
            if type(item) in (dict, OrderedDict):
                next_level += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple)):
                next_level += item
            if len(next_level) > budget:
                raise ValueError(f"{path}: not a readable {what}: more items than bytes")
        budget -= len(next_level)
        if not next_level:
            return
        level = next_level
    raise ValueError(f"{path}: not a readable {what}: expected at most {_MAX_DEPTH} levels")


def _problem(item: Any) -> str | None:
    """Return what was expected instead of this item; None if it may occur."""
    if isinstance(item, torch.Tensor):
        if item.layout is not torch.strided or item.device.type != "cpu" or item.is_quantized:
            return f"dense tensors on the CPU, got one of {item.layout} on {item.device}"
        used, stored = item.numel() * item.element_size(), item.untyped_storage().nbytes()
        return f"{used} bytes of a tensor, got {stored}" if used > stored else None
    if item is None or isinstance(item, (bool, int, float, str, dict, list, tuple, torch.dtype)):
        return None
    return f"tensors, numbers, strings, lists and dictionaries, got {type(item).__name__}"
