"""The exactly solvable molecule of seven atoms, its potential in OpenMM, and samplers of it."""

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

    def make(seed=3, n_walkers=4, temperatures=LADDER, **settings):
        settings = SequenceSettings(**{"local_interval": 2, **settings})
        masses = tree_molecule.masses
        kernels = default_kernels(openmm_potential, flow, temperatures, masses, settings)
        return ParallelTempering(
            tree_molecule, flow, temperatures, n_walkers, kernels, openmm_potential, seed=seed
        )

    return make
