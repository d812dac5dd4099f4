"""Folders of the md stage, whose frames are read with what is recorded of them."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from openmm_tsf.io.run_config import CONFIG, read_config
from openmm_tsf.utils.validation import require_entry

TRAJECTORY = "md.dcd"


class MDRecord(NamedTuple):
    """What a folder of the md stage says of its frames."""

    folder: Path
    temperature: float  #: in K
    n_evaluations: int
    fingerprint: str | None  #: of the molecule

    @property
    def trajectory(self) -> Path:
        """The file of the frames."""
        return self.folder / TRAJECTORY


def is_folder(path: Any) -> bool:
    """Return whether one path is given, of a directory."""
    return isinstance(path, (str, os.PathLike)) and os.path.isdir(path)


def holds_md(folder: Path) -> bool:
    """Return whether a directory has the files of the md stage."""
    return (folder / TRAJECTORY).is_file() and (folder / CONFIG).is_file()


def read_md_record(path: str | os.PathLike[str]) -> MDRecord:
    """Read what a folder of the md stage says of its frames."""
    folder = Path(path)
    if not holds_md(folder):
        raise IsADirectoryError(
            f"path: expected trajectory files or a folder of the md stage ({TRAJECTORY}, {CONFIG}),"
            f" got the directory {folder}"
        )
    config = read_config(folder)
    if config.get("stage") != "md":
        raise ValueError(f"trajectory: {folder} is not a directory of the md stage")
    try:
        choices = require_entry(config, "choices", dict)
        settings = require_entry(choices, "settings", dict)
        temperature = require_entry(settings, "temperature", int | float)
        progress = require_entry(config, "progress", dict)
        n_evaluations = require_entry(progress, "n_evaluations", int | float)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: damaged, {error}") from error
    return MDRecord(folder, float(temperature), int(n_evaluations), choices.get("molecule"))
