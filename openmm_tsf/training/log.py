"""Tables of validations: of one training, and of several merged."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from openmm_tsf.io.files import check_regular_file, write_csv
from openmm_tsf.training.validation import Validation

_NAME = re.compile(r"round_(\d{2,6})\.csv")


def write_log(path: Path, history: Sequence[Validation]) -> None:
    """Write a CSV file with a row per validation."""
    rows = [validation.row() for validation in history]
    write_csv(path, list(rows[0]), rows)


def merge_logs(folder: Path) -> None:
    """Write ``training.csv`` from ``training/round_00.csv``, ``round_01.csv``, ...

    The table has the columns of all rounds, empty where one has none, after the round's number.
    """
    rows: list[dict[str, str]] = []
    for path in sorted((folder / "training").iterdir()):
        if match := _NAME.fullmatch(path.name):
            rows += [{"round": str(int(match[1])), **row} for row in _rows(path)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(folder / "training.csv", columns or ["round"], rows)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        text = check_regular_file(path, "table of a training").read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable table of a training: {error}") from error
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{path}: not a readable table of a training: a row has other columns")
    return rows
