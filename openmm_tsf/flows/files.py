"""Flow files: written atomically, read without pickled code."""

import os
from typing import Any

from openmm_tsf.io.tensors import read_tensors, write_tensors

#: 2: copies that overlap, which readers of format 1 would take for walls.
FILE_FORMAT = 2


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
    content = read_tensors(path, "flow file")
    if "kind" not in content or "format" not in content:
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
