"""Give the program damaged files and unusual command lines, and count the outcomes.

    python -m tests.robustness.fuzz --examples 200 --output fuzz.json

Every input runs in a child process with limits of time and memory.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tests.robustness import commands, corpus, readers
from tests.robustness.sandbox import isolated


def try_inputs(
    subject: Any, cases: Any, n_examples: int, seed: int
) -> tuple[Counter[str], list[str]]:
    """Return the counts of verdicts on a subject's cases, and the failures in words.

    ``subject.run(case)`` is called in a child process, ``subject.verdict(case, outcome)`` here.
    """
    counts: Counter[str] = Counter()
    failures: list[str] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=n_examples, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases)
    def test(case: Any) -> None:
        verdict = subject.verdict(case, isolated(subject.run(case)))
        counts[verdict.split(":")[0]] += 1
        if verdict.startswith("FAILED"):
            failures.append(f"{case!r}: {verdict}")

    test()
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100, help="inputs for each (default: 100)")
    parser.add_argument("--output", required=True, help="JSON file with the counts")
    parser.add_argument("--only", nargs="+", help="parts of names (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, dict[str, Any]] = {}
    if args.only and Path(args.output).is_file():
        table = json.loads(Path(args.output).read_text())  # the other results stay
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        home = corpus.build(Path(name) / "good")
        files = readers.DamagedFiles(home, Path(name) / "box")
        lines = commands.CommandLines(home, Path(name) / "box")
        subjects: dict[str, Any] = {f"files: {part}": (files, part) for part in readers.NAMES}
        subjects |= {f"command line: {part}": (lines, part) for part in commands.COMMANDS}
        for title, (subject, part) in subjects.items():
            if args.only and not any(word in title for word in args.only):
                continue
            cases = subject.cases(part)
            counts, failures = try_inputs(subject, cases, args.examples, args.seed)
            table[title] = {
                "tried": sum(counts.values()), "refused": counts["refused"],
                "worked": counts["worked"], "failed": counts["FAILED"], "failures": failures[:20],
            }  # fmt: skip
            for failure in failures:
                print(failure, "\n", file=sys.stderr, flush=True)
            Path(args.output).write_text(json.dumps(table, indent=1) + "\n")
    columns = ("tried", "refused", "worked", "failed")
    print(" " * 32, *(f"{column:>8}" for column in columns))
    for title, row in table.items():
        print(f"{title:<32}", *(f"{row[column]:>8}" for column in columns))
    total = sum(row["tried"] for row in table.values())
    print(f"{total} inputs in {time.monotonic() - start:.0f} s")
    return 1 if any(row["failed"] for row in table.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
