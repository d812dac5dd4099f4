"""Flow files: written atomically, read without pickled code."""

import os
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.files import write_tensors

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
        If it is not a flow file, or of a newer format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such flow file")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path}: not a readable flow file ({type(error).__name__})") from error
    if not isinstance(content, dict) or "kind" not in content or "format" not in content:
        raise ValueError(f"{path}: not a flow file")
    if content["format"] > FILE_FORMAT:
        raise ValueError(
            f"{path}: written in format {content['format']} by a newer version; "
            f"this one reads up to format {FILE_FORMAT}"
        )
    return content
