"""Settings and fixtures of all tests: no display, one thread."""

import logging
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENMM_CPU_THREADS", "1")  # two that share a core wait for each other
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

LOGGER = logging.getLogger("openmm_tsf")


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tensors of the tests are small: more threads are slower
    # A shell makes its background processes ignore Ctrl-C; the tests of interrupts need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def level_of_messages():
    """The program sets the level of the package's logger: not for later tests."""
    level = LOGGER.level
    yield
    LOGGER.setLevel(level)


@pytest.fixture(scope="session")
def molecule():
    """Alanine dipeptide in the default force field."""
    from openmm_tsf.systems.library import alanine_dipeptide

    return alanine_dipeptide()


@pytest.fixture(scope="session")
def good(tmp_path_factory, worker_id):
    """A folder with a tiny directory of every stage; see `tests.robustness.corpus.build`.

    It is only read, and one for all processes of pytest-xdist.
    """
    from filelock import FileLock

    from tests.robustness import corpus

    base, level = tmp_path_factory.getbasetemp(), LOGGER.level
    home = (base if worker_id == "master" else base.parent) / "good"
    with FileLock(f"{home}.lock"):
        if not (home / "complete").exists():
            try:
                corpus.build(home / "good")
            finally:
                LOGGER.setLevel(level)
            (home / "complete").touch()
    return home / "good"
