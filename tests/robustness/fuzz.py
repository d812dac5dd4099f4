"""Feeds the program damaged files and odd command lines, and counts how it takes them.

    python -m tests.robustness.fuzz --examples 200 --output fuzz.json

Every input runs in a process of its own, with a limit of time and memory.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.robustness import commands, corpus, readers
from tests.robustness.sandbox import isolated


def tried(
    strategy: Any, run: Any, verdict: Any, n: int, number: int
) -> tuple[Counter[str], list[str]]:
    """Verdicts of n inputs, and the failures in words."""
    counts: Counter[str] = Counter()
    failures: list[str] = []

    @seed(number)
    @settings(
        max_examples=n, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def test(case: Any) -> None:
        found = verdict(case, isolated(run(case)))
        counts[found.split(":")[0]] += 1
        if found.startswith("FAILED"):
            failures.append(f"{case!r}: {found}")

    test()
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100, help="inputs for each (default: 100)")
    parser.add_argument("--output", required=True, help="JSON file with the counts")
    parser.add_argument("--only", nargs="+", help="readers and commands, anew; all by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, dict[str, Any]] = {}
    if args.only and Path(args.output).is_file():
        table = json.loads(Path(args.output).read_text())  # what is not tried anew stays
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        home = corpus.build(Path(name) / "good")
        good = readers.Corpus(home, Path(name) / "box")
        subjects: dict[str, Any] = {}
        for reader in dict.fromkeys(case[2] for case in readers.ALL):
            subjects[f"files: {reader}"] = (good.cases(reader), good.run, good.verdict)
        for command in commands.COMMANDS:
            lines = commands.Lines(home, Path(name) / "box")
            subjects[f"command line: {command}"] = (
                lines.cases(command), lines.run, lines.verdict,
            )  # fmt: skip
        for subject, (strategy, run, verdict) in subjects.items():
            if args.only and not any(word in subject for word in args.only):
                continue
            counts, failures = tried(strategy, run, verdict, args.examples, args.seed)
            table[subject] = {
                "tried": sum(counts.values()),
                "refused": counts["refused"],
                "worked": counts["worked"],
                "failed": counts["FAILED"],
                "failures": failures[:20],
            }
            for failure in failures:
                print(failure, "\n", file=sys.stderr, flush=True)
            Path(args.output).write_text(json.dumps(table, indent=1) + "\n")
    print(f"{'':<32}{'tried':>8}{'refused':>9}{'worked':>8}{'failed':>8}")
    for subject, row in table.items():
        figures = row["tried"], row["refused"], row["worked"], row["failed"]
        print(
            f"{subject:<32}"
            + "".join(f"{n:>{w}}" for n, w in zip(figures, (8, 9, 8, 8), strict=True))
        )
    total = sum(row["tried"] for row in table.values())
    print(f"{total} inputs in {time.monotonic() - start:.0f} s")
    return 1 if any(row["failed"] for row in table.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
