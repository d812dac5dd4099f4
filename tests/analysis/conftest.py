"""Fixtures of the analysis tests."""

import pytest

from tests.support.analysis_runs import small_run


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One run directory for all tests that only read."""
    path = tmp_path_factory.mktemp("shared") / "run"
    energy, phi, psi = small_run(path)
    return path, energy, phi, psi
