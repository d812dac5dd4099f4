"""What every test shares: no display, one thread, slow and GPU tests only when asked for."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tests' tensors are small: threads only cost
    # A shell ignores Ctrl-C for what it runs in the background; the tests of interrupts need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def molecule():
    """Alanine dipeptide in the default force field."""
    from openmm_tsf.systems.library import alanine_dipeptide

    return alanine_dipeptide()


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """Tiny directories of every stage: ``run``, ``killed``, ``train``, ``sample``, ``md``."""
    from tests.robustness import corpus

    return corpus.build(tmp_path_factory.mktemp("good") / "good")
