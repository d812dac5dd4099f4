"""Moves through a flow in OpenMM's own replica exchange: exactness, against exact answers."""

import random

import numpy as np
import openmm.unit as unit
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.hosts.openmm_app import FlowReplicaExchangeSampler
from openmm_tsf.hosts.replica_moves import ReplicaMoves
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_tree, openmm_host
from tests.support.exact_cases import (
    WithoutJacobian,
    assert_exact,
    assert_noticed,
    the_tree,
    tree_flow,
)

LADDER = (300.0, 450.0)
#: Proposals enough for a mutant to be noticed in two iterations.
MANY = {"independentMoves": 10, "crankNicolsonMoves": 4, "steeredSweeps": 2}


class OtherMoves(FlowReplicaExchangeSampler):
    """The sampler with other moves through the flow."""

    moves = ReplicaMoves

    def makeFlowMoves(self, flow, potential):
        made = super().makeFlowMoves(flow, potential)
        made.__class__ = self.moves
        return made


class Hotter(FlowReplicaExchangeSampler):
    """Flow moves at 1.3 times the temperature."""

    def makeFlowMoves(self, flow, potential):
        hot = [1.5 * kelvin for kelvin in super().makeFlowMoves(flow, potential).temperatures]
        return ReplicaMoves(flow, potential, hot, 20, 10, 0.5, 2)


class SwappedStates(FlowReplicaExchangeSampler):
    """After the exchanges every replica has another's state."""

    def exchangeReplicas(self):
        super().exchangeReplicas()
        n = len(self.states)
        self.replicaStateIndex = [(state + n // 2) % n for state in self.replicaStateIndex]


class ForgetsConformations(OtherMoves):
    """Steered swaps exchange the states alone, without the conformations that were accepted."""

    class moves(ReplicaMoves):
        def exchange(self, x, energy, rung, iteration, generator):
            _, _, new = super().exchange(x, energy, rung, iteration, generator)
            return x, energy, new


@pytest.mark.parametrize("flow", ["tsf-volume", "realnvp-polar"])
def test_exact_samples_remain_exact(flow):
    scores, sampler = openmm_host.exact_scores(LADDER, 60, 4, 2, flow=flow, **MANY)
    assert_exact(scores)
    statistics = sampler.flowStatistics
    for name in ("flow_independent", "flow_crank_nicolson", "swap_steered", "exchange"):
        accepted, proposed = (statistics[name][key].sum() for key in ("accepted", "proposed"))
        assert 0 < accepted < proposed, name


@pytest.mark.slow
@pytest.mark.parametrize("flow", ["tsf-volume", "tsf-polar", "realnvp-polar"])
@pytest.mark.parametrize("steps", [0, 20])
@pytest.mark.parametrize("reinitialize", [False, True])
def test_many_exact_samples_remain_exact(flow, steps, reinitialize):
    options = {"steps": steps, "reinitializeVelocities": reinitialize}
    scores, _ = openmm_host.exact_scores(LADDER, 200, 25, 3, seed=12, flow=flow, **options)
    assert_exact(scores)


@pytest.mark.slow
def test_temperatures_that_occur_differently_often():
    scores, _ = openmm_host.exact_scores((300.0, 300.0, 400.0, 520.0), 60, 30, 3, seed=13)
    assert_exact(scores)


def test_mutant_without_the_jacobian_is_noticed():
    flow = WithoutJacobian(tree_flow("realnvp-polar"))
    assert_noticed(openmm_host.exact_scores(LADDER, 60, 6, 2, n_plain=0, flow=flow, **MANY)[0])


@pytest.mark.parametrize("mutant", [Hotter, SwappedStates, ForgetsConformations])
def test_mutant_is_noticed(mutant):
    scores, _ = openmm_host.exact_scores((300.0, 600.0), 60, 5, 2, n_plain=0, kind=mutant, **MANY)
    assert_noticed(scores)


def series(sampler, n):
    """Run n iterations; return energies [n, S] and positions [n, S, N, 3] by state."""
    energies, positions = [], []

    def keep(sampler):
        order = np.argsort(sampler.replicaStateIndex)
        energies.append([sampler.replicaStateEnergy[i][0]._value for i in order])
        positions.append(openmm_host.arrays_of(sampler)[0][order])

    sampler.reporters.append(keep)
    sampler.simulate(n)
    return np.array(energies), np.array(positions)


def check_marginals(n, n_walkers, n_native):
    """Compare one ladder of OpenMM's sampler with exact answers and the native sampler."""
    tree, ladder = the_tree(), (300.0, 400.0, 520.0)
    options = {"steps": 100, "independentMoves": 4}
    sampler = openmm_host.make_sampler(ladder, "tsf-volume", **options)
    generator = seeded_generator(3)
    openmm_host.start_exactly(sampler, generator)
    energies, positions = series(sampler, n)
    molecule = tsf.MolecularSystem(tree.system(), tree.topology, exact_tree.POSITIONS)
    native = tsf.ParallelTempering(molecule, tree_flow("tsf-volume"), ladder, n_walkers, seed=4)
    native.set_positions(torch.stack([tree.sample(n_walkers, t, generator) for t in ladder], 1))
    native_energies = []
    native.reporters.append(KeepEnergies(native_energies))
    native.run(n_native, progress=False)
    native_energies = np.array(native_energies)
    for state, kelvin in enumerate(ladder):
        exact, error = openmm_host.mean_energy(kelvin), openmm_host.batch_error(energies[:, state])
        assert abs(energies[:, state].mean() - exact) < 4 * error, kelvin
        of_walkers = native_energies[:, :, state].mean(axis=0)
        native_error = of_walkers.std(ddof=1) / np.sqrt(n_walkers)
        difference = energies[:, state].mean() - of_walkers.mean()
        assert abs(difference) < 4 * np.hypot(error, native_error), kelvin
        pit = tree.pit(torch.from_numpy(positions[:, state]), kelvin)
        for column in pit.T:  # uniform: mean 1/2 and mean square deviation 1/12
            for values, expected in ((column, 0.5), ((column - 0.5) ** 2, 1 / 12)):
                error = openmm_host.batch_error(values)
                assert abs(values.mean() - expected) < 4.5 * error, kelvin


class KeepEnergies:
    """A reporter of the native sampler that keeps energies [W, R]."""

    interval = 1

    def __init__(self, energies):
        self.energies = energies

    def __call__(self, sampler, state):
        self.energies.append(state.energy.numpy())


def test_one_ladder_has_the_exact_marginals_and_those_of_the_native_sampler():
    check_marginals(150, 60, 2)


@pytest.mark.slow
def test_a_long_ladder_has_the_exact_marginals_and_those_of_the_native_sampler():
    check_marginals(8000, 400, 20)


def test_only_the_seed_decides():
    """Same seed, same bits; the global generators are neither used nor changed."""
    results = []
    for seed, global_seed in ((5, 1), (5, 2), (6, 1)):
        random.seed(global_seed)
        before = random.getstate()
        options = {"seed": seed, "reinitializeVelocities": True}
        sampler = openmm_host.make_sampler((300.0, 400.0, 520.0), **options)
        openmm_host.start_exactly(sampler, seeded_generator(1))
        sampler.simulate(4)
        assert random.getstate() == before
        results.append(openmm_host.arrays_of(sampler))
    for same, other, another in zip(*results, strict=True):
        np.testing.assert_array_equal(same, other)
        assert not np.array_equal(same, another)


def test_exchanges_cannot_overflow_and_refuse_what_is_not_finite():
    """The base class raises OverflowError for such energies."""
    sampler = openmm_host.make_sampler((300.0, 450.0), flow=None)
    sampler.exchangesPerIteration = 50
    accepted = {}
    for name, energies in {
        "always": ([1e7, 1e7], [-1e7, -1e7]),
        "never": ([-1e7, -1e7], [1e7, 1e7]),
        "infinite": ([np.inf, np.inf], [0.0, 0.0]),
        "not a number": ([0.0, 0.0], [np.nan, np.nan]),
    }.items():
        sampler.replicaStateIndex = [0, 1]
        before = sampler.flowStatistics
        sampler.replicaStateEnergy = unit.Quantity(np.array(energies), unit.kilojoule_per_mole)
        sampler.exchangesPerIteration = 1
        sampler.exchangeReplicas()
        after = sampler.flowStatistics
        accepted[name] = after["exchange"]["accepted"].sum() - before["exchange"]["accepted"].sum()
        rejected = after["rejectedNonFinite"] - before["rejectedNonFinite"]
        assert rejected == (name in ("infinite", "not a number"))
    assert accepted == {"always": 1, "never": 0, "infinite": 0, "not a number": 0}


def test_a_mirror_image_is_left_to_dynamics_and_exchanges():
    sampler = openmm_host.make_sampler((300.0, 400.0, 520.0), crankNicolsonMoves=0)
    tree, generator = the_tree(), seeded_generator(2)
    x = torch.cat([tree.sample(1, t, generator) for t in (300.0, 400.0, 520.0)])
    x[1, :, 0] *= -1
    openmm_host.set_replicas(sampler, x, torch.zeros_like(x))
    sampler.exchangesPerIteration = 0
    sampler.simulate(6)
    statistics = sampler.flowStatistics
    assert statistics["replicasOutside"] == 6
    np.testing.assert_array_equal(openmm_host.arrays_of(sampler)[0][1], x[1].numpy())
    assert statistics["flow_independent"]["proposed"].tolist() == [6, 0, 6]
    # The others are neighbours without it.
    assert statistics["swap_steered"]["proposed"][0, 2] == 6
    assert statistics["swap_steered"]["proposed"].sum() == 6
