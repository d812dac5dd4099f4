"""Files of tensors: written all or nothing, read without running anything that is in them."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.files import PathLike, write_bytes


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
        If it is something else, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such {what}")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch's reader raises many kinds, with pages of advice
        raise ValueError(f"{path}: not a readable {what} ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a {what}, it holds {type(content).__name__}")
    return content
