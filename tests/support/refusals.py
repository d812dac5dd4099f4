"""Assertions about refused input."""

import pytest

from openmm_tsf.cli import main as cli


def cases(names, table):
    """Parametrize a test with rows of an identifier and values."""
    return pytest.mark.parametrize(names, [pytest.param(*row, id=name) for name, *row in table])


def refused(error, message):
    return pytest.raises(error, match=message)


def from_shell(arguments, capsys):
    """Return the error message of a command line that must fail."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    (line,) = [line for line in lines if line.startswith("openmm-tsf: error: ")]
    assert "unexpected" not in line
    return line
