"""Measure the robustness of the program, and print a table.

    python -m tests.robustness.report                  # measures everything: about two hours
    python -m tests.robustness.report --from-results   # only the table, from the JSON files

The tests of bad input, the fuzzer, the kills and the long runs write a JSON file each into
``examples/results/``; the table is ``robustness.md`` there.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "results"
BAD_INPUT = [
    "robustness/test_bad_input.py", "robustness/test_bad_numbers.py", "io/test_bad_files.py",
    "io/test_untrusted_files.py",
]  # fmt: skip
FUZZ, KILLS = "fuzz.py --examples 60 --seed 11", "kills.py --kills 120"
SHARDS = "shard_kills.py --kills 60"
LONG_RUN = "long_run.py"


def bad_input():
    """Run the tests of bad input and write their counts."""
    tests = [str(ROOT / "tests" / name) for name in BAD_INPUT]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)}
    content = json.dumps({"tests": BAD_INPUT, **counts}, indent=1)
    (RESULTS / "bad_input.json").write_text(content + "\n")


def measure():
    """Write all JSON files."""
    bad_input()
    for line in (FUZZ, KILLS, SHARDS, LONG_RUN):
        script, *arguments = line.split()
        name = script.removesuffix(".py")
        command = [sys.executable, "-m", f"tests.robustness.{name}", *arguments]
        target = str(RESULTS / f"{name}.json")
        subprocess.run([*command, "--output", target], check=False)  # failures are in the file


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows():
    """Return the subject, figures and command of each line of the table."""
    bad, fuzz, kills, long = map(read, ("bad_input", "fuzz", "kills", "long_run"))
    shards = read("shard_kills")
    tried, refused, worked, failed = (
        sum(row[key] for row in fuzz.values()) for key in ("tried", "refused", "worked", "failed")
    )
    means = sum((Counter(stage["by_means"]) for stage in kills["stages"].values()), Counter())
    toy, peptide = long["memory_toy"], long["memory_alanine_dipeptide"]
    large, checkpoints = long["large"], long["checkpoints"]
    size = peptide["MB_for_1e6_samples"]
    stages = ", ".join(f"{name} {stage['kills']}" for name, stage in kills["stages"].items())
    return [
        ("wrong inputs, one by one",
         f"{bad['passed']} cases refused with a message or harmless, {bad.get('failed', 0)} not",
         f"pytest {' '.join('tests/' + name for name in bad['tests'])}"),
        (f"fuzzing: {len(fuzz)} readers and commands",
         f"{tried} inputs: {refused} refused with a message, {worked} worked, {failed} failed",
         FUZZ),
        ("kills, each resumed, compared bit by bit",
         f"{kills['kills']} ({stages}); {kills['mismatches']} mismatches", KILLS),
        ("by", _counts(means), ""),
        ("one of two processes that sample shards of a run killed, resumed, compared",
         f"{shards['kills']} ({_counts(shards['by_means'])}); {shards['mismatches']} mismatches",
         SHARDS),
        ("memory over a run, MiB at a tenth and at the end",
         f"{toy['iterations']:,} iterations, toy: {toy['resident_MiB_at_a_tenth']:.0f}, "
         f"{toy['resident_MiB_at_the_end']:.0f}; {peptide['iterations']:,}, alanine dipeptide: "
         f"{peptide['resident_MiB_at_a_tenth']:.0f}, {peptide['resident_MiB_at_the_end']:.0f}",
         LONG_RUN),
        ("MB on disk for 10^6 samples of alanine dipeptide",
         f"{size['frames']:.0f} frames, {size['numbers']:.0f} numbers", LONG_RUN),
        (f"a run of {large['frames']:,} frames, {large['segments']} segments",
         f"opened in {large['open_seconds']:.1f} s and {large['open_MiB']:.0f} MiB; energies of "
         f"a rung in {large['energies_seconds']:.1f} s, {large['energies_MiB']:.0f} MiB", LONG_RUN),
        ("checkpoints of a run of the default size",
         f"{100 * checkpoints['share']:.2f} % of the time ({checkpoints['checkpoints']}, "
         f"{1000 * checkpoints['seconds_each']:.0f} ms each)", LONG_RUN),
    ]  # fmt: skip


def _counts(numbers):
    return ", ".join(f"{name} {n}" for name, n in sorted(numbers.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from-results", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.from_results:
        measure()
    lines = ["| | result | command in `tests/robustness/` |", "|---|---|---|"]
    for what, figure, command in rows():
        lines.append(f"| {what} | {figure} | {f'`{command}`' if command else ''} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "robustness.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
