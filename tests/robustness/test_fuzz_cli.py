"""Command lines of every command with all kinds of values: an answer in words, and soon.

What would work for long is cut short behind the doors (see ``commands.without_work``).
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.robustness import commands
from tests.robustness.sandbox import isolated

LIMITS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip


def check(lines, n_examples, command=None):
    @settings(LIMITS, max_examples=n_examples)
    @given(lines.cases(command))
    def test(arguments):
        verdict = lines.verdict(arguments, isolated(lines.run(arguments)))
        assert not verdict.startswith("FAILED"), f"{arguments}: {verdict}"

    test()


@pytest.fixture
def lines(good, tmp_path):
    return commands.Lines(good, tmp_path / "box")


@pytest.mark.parametrize(
    "line",
    [
        "md --output new --frames 2",
        "train --output new --trajectory frames.dcd --temperature 600",
        "sample --output new --flow train --walkers 2 --iterations 1",
        "run --output new --trajectory frames.dcd --temperature 600",
        "analyze sample",
        "doctor sample",
    ],
)
def test_good_lines_work(lines, line):
    """Else all would end at the first door."""
    arguments = line.split()
    outcome = isolated(lines.run(arguments))
    assert lines.verdict(arguments, outcome) == "worked", outcome


def test_command_lines(lines):
    check(lines, 30)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands.COMMANDS)
def test_many_command_lines(lines, command):
    check(lines, 500, command)
