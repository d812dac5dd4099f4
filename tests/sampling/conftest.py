"""The exactly solvable molecule of seven atoms, its potential in OpenMM, and samplers of it."""

import numpy as np
import pytest

from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.kernels import SequenceSettings, default_kernels
from openmm_tsf.systems import MolecularSystem
from tests.support.exact_cases import TreeCase, the_tree, tree_flow
from tests.support.exact_tree import POSITIONS

LADDER = (300.0, 420.0, 600.0)


@pytest.fixture(scope="session")
def tree():
    return the_tree()


@pytest.fixture(scope="session")
def tree_molecule(tree):
    return MolecularSystem(tree.system(), tree.topology, POSITIONS)


@pytest.fixture(scope="session")
def openmm_potential(tree):
    with OpenMMPotential(tree.system(), platform="Reference", n_contexts=1) as potential:
        yield potential


@pytest.fixture
def potential(openmm_potential):
    return openmm_potential


@pytest.fixture(scope="session")
def flow():
    return tree_flow("tsf-volume")


@pytest.fixture
def case():
    """The molecule at 300 and 450 K, which moves as a whole."""
    return TreeCase(pose_kept=False)


@pytest.fixture
def make(tree_molecule, openmm_potential, flow):
    """Make a sampler with the default kernels; two with the same seed do the same."""

    def make(seed=3, n_walkers=4, ladder=LADDER, flow=flow, potential=openmm_potential, **settings):
        settings = SequenceSettings(**{"local_interval": 2, **settings})
        kernels = default_kernels(potential, flow, ladder, tree_molecule.masses, settings)
        parts = (tree_molecule, flow, ladder, n_walkers, kernels, potential, seed)
        return ParallelTempering(*parts)

    return make


def run_numbers(path):
    """Return all numbers of a run, joined over its segments, and the bytes of its DCD files."""
    parts = [dict(np.load(file)) for file in sorted((path / "segments").iterdir())]
    series = ("energy", "replica", "iteration", "dihedrals")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in series}
    counts = ("accepted_", "proposed_", "rejected_non_finite", "mirror_images", "n_evaluations")
    for name in parts[0]:
        if name.startswith(counts):
            joined[name] = sum(part[name] for part in parts)
    for dcd in sorted(path.glob("*.dcd")):
        joined[dcd.name] = np.frombuffer(dcd.read_bytes(), dtype=np.uint8)
    return joined


def assert_same_run(first, second):
    one, two = run_numbers(first), run_numbers(second)
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)
