"""Flow files: written atomically, read without pickled code."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.tensor_files import write_tensors

FILE_FORMAT = 1


def write_flow_file(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write tensors, numbers, strings, lists and dictionaries to a file, all or nothing."""
    write_tensors(path, content)


def read_flow_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The raw content of a flow file, checked for its format.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a flow file, damaged, or of a newer format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such flow file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself does not look at the checksums
        content = None if damaged else torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path}: not a readable flow file ({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path}: damaged flow file: the checksum of {damaged} is wrong")
    if not isinstance(content, dict) or "kind" not in content or "format" not in content:
        raise ValueError(f"{path}: not a flow file")
    number = content["format"]
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{path}: not a flow file (format: expected a number, got {number!r})")
    if number > FILE_FORMAT:
        raise ValueError(
            f"{path}: written in format {number} by a newer version; "
            f"this one reads up to format {FILE_FORMAT}"
        )
    return content
