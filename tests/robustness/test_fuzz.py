"""Damaged files and unusual command lines end in a clear message, never in a crash or a hang.

``fuzz.py`` beside this file tries more of them with the same strategies. Long computations are
replaced (see ``commands.without_work``).
"""

import pytest

from tests.robustness import commands, readers
from tests.robustness.fuzz import try_inputs
from tests.robustness.sandbox import isolated


@pytest.fixture
def files(good, tmp_path):
    return readers.DamagedFiles(good, tmp_path / "box")


@pytest.fixture
def lines(good, tmp_path):
    return commands.CommandLines(good, tmp_path / "box")


def some_and_many(some, many, parts):
    """Parametrize a test with some inputs of all parts, and, if slow, many of each."""
    slow = [pytest.param(many, part, marks=pytest.mark.slow) for part in parts]
    return pytest.mark.parametrize(("n", "part"), [(some, None), *slow])


def check(subject, n_examples, part=None):
    assert try_inputs(subject, subject.cases(part), n_examples, seed=0)[1] == []


def test_undamaged_files_are_read(files):
    """Otherwise everything would be refused for another reason."""
    for folder, file, reader in {case[2]: case for case in reversed(readers.ALL)}.values():
        damage = readers.Damage("none", files.files[f"{folder}/{file}"])
        case = readers.Case(folder, file, reader, damage)
        outcome = isolated(files.run(case))
        assert files.verdict(case, outcome) == "worked", (case, outcome)


@some_and_many(25, 400, readers.NAMES)
def test_damaged_files(files, n, part):
    check(files, n, part)


@pytest.mark.parametrize(
    ("file", "reader"),
    [("T500.00K.dcd", "analyze"), ("flow.pt", "analyze"), ("config.json", "load_run"),
     ("segments/segment_000000.npz", "load_run"), ("topology.json", "load_run"),
     ("checkpoint.pt", "sample --resume")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_pipes_and_directories_are_named(files, file, reader, kind):
    case = readers.Case("sample", file, reader, readers.Damage(kind, not_file=kind))
    outcome = isolated(files.run(case))
    assert files.verdict(case, outcome) == "refused", outcome
    assert file in outcome.message + outcome.stderr


@pytest.mark.parametrize(
    "line",
    ["md --output new --frames 2", "train --output new --trajectory frames.dcd --temperature 600",
     "sample --output new --flow train --walkers 2 --iterations 1", "doctor sample",
     "run --output new --trajectory frames.dcd --temperature 600", "analyze sample"],
)  # fmt: skip
def test_good_command_lines_work(lines, line):
    """Otherwise all would be refused for another reason."""
    arguments = line.split()
    outcome = isolated(lines.run(arguments))
    assert lines.verdict(arguments, outcome) == "worked", outcome


@some_and_many(20, 500, commands.COMMANDS)
def test_command_lines(lines, n, part):
    check(lines, n, part)
