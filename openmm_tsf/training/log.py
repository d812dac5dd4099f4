"""One table from the logs of several trainings."""

import csv
import io
import re
from pathlib import Path

from openmm_tsf.io.files import check_regular_file, write_csv

_NAME = re.compile(r"round_(\d{2,6})\.csv")


def merge_logs(folder: Path) -> None:
    """Write ``training.csv`` from ``training/round_00.csv``, ``round_01.csv``, ...

    Rounds have different columns (later ones validate at more temperatures): the table has all of
    them, empty where a round has none, and the round's number in front.

    Raises
    ------
    ValueError
        If one of them is no table.
    """
    rows: list[dict[str, str]] = []
    for path in sorted((folder / "training").iterdir()):
        if found := _NAME.fullmatch(path.name):
            rows += [{"round": str(int(found[1])), **row} for row in _rows(path)]
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
