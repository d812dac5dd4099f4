"""One table from the logs of several trainings."""

import csv
from pathlib import Path

from openmm_tsf.files import write_csv


def merge_logs(folder: Path) -> None:
    """Write ``training.csv`` from ``training/round_00.csv``, ``round_01.csv``, ...

    Rounds have different columns (later ones validate at more temperatures): the table has all of
    them, empty where a round has none, and the round's number in front.
    """
    rows: list[dict[str, str]] = []
    for path in sorted((folder / "training").glob("round_*.csv")):
        with open(path, newline="") as file:
            number = str(int(path.stem.removeprefix("round_")))
            rows += [{"round": number, **row} for row in csv.DictReader(file)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(folder / "training.csv", columns or ["round"], rows)
