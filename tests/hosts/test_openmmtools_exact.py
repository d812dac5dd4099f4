"""Moves through a flow in openmmtools sample the Boltzmann distribution of every state."""

import numpy as np
import openmm.unit as unit
import pytest
import torch
from openmmtools.mcmc import LangevinDynamicsMove, SequenceMove
from pymbar.timeseries import statistical_inefficiency

import openmm_tsf as tsf
from openmm_tsf.hosts.openmmtools import TSFIndependenceMove, TSFMove
from openmm_tsf.units import KB
from tests.support.exact_cases import WithoutJacobian, assert_exact, assert_noticed, the_tree
from tests.support.exact_tree import BONDS, TreePotential, uniform_scores
from tests.support.openmmtools_cases import (
    LADDER,
    apply_to_all,
    create_sampler,
    exact_states,
    mean_energy,
    positions_of,
    save_flow,
    tree_molecule,
)


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    """The paths of two flows, one with a Jacobian that is not constant."""
    folder = tmp_path_factory.mktemp("flows")
    kinds = ("tsf", "volume"), ("realnvp", "polar")
    return {kind: save_flow(folder / f"{kind}.pt", kind, metric) for kind, metric in kinds}


def scores(states, kelvin):
    """Return z values of independent conformations: of their coordinates and energies."""
    x = positions_of(states)
    pit, n_bonds = the_tree().pit(x, kelvin), len(BONDS)
    energy, (mean, width) = TreePotential(the_tree()).energy(x).numpy(), mean_energy(kelvin)
    bonds = (pit[:, :n_bonds] - 0.5).mean(axis=0) * np.sqrt(12 * len(x))
    return uniform_scores(pit) | {
        "energy": (energy.mean() - mean) / (width / np.sqrt(len(x))),
        "all bonds": bonds.sum() / np.sqrt(n_bonds),
    }


@pytest.mark.parametrize("kelvin", LADDER)
def test_moves_keep_the_distribution(flows, kelvin):
    path = flows["realnvp" if kelvin == LADDER[1] else "tsf"]
    walk = TSFMove(path, tree_molecule(), sigma=0.3, seed=1)
    steps = TSFMove(path, tree_molecule(), beta=0.5, seed=1)
    draw = TSFIndependenceMove(path, tree_molecule(), n_steps=8, seed=1)
    states = exact_states(40, kelvin, seed=20)
    apply_to_all(SequenceMove([walk, steps, draw]), states, kelvin)
    assert min(move.n_accepted for move in (walk, steps, draw)) > 10
    assert_exact(scores(states, kelvin))


class WrongTemperature(TSFIndependenceMove):
    """Accepts at 1.4 times the temperature of the state."""

    def _make_kernel(self, flow, potential, kelvin):
        kernel = super()._make_kernel(flow, potential, kelvin)
        kernel.kt = 1.4 * kernel.kt
        return kernel


class ForgetsJacobian(TSFIndependenceMove):
    """Forgets log|J|."""

    def _make_kernel(self, flow, potential, kelvin):
        return super()._make_kernel(WithoutJacobian(flow), potential, kelvin)


@pytest.mark.parametrize(("mutant", "n"), [(WrongTemperature, 160), (ForgetsJacobian, 240)])
def test_mutants_are_noticed(flows, mutant, n):
    move = mutant(flows["realnvp"], tree_molecule(), n_steps=8, seed=2)
    states = exact_states(n, LADDER[1], seed=21)
    apply_to_all(move, states, LADDER[1])
    assert_noticed(scores(states, LADDER[1]))


def z_of_means(series, expected):
    """Return z values of the means of correlated series against (mean, stderr) pairs."""
    out = []
    for values, (mean, stderr) in zip(series, expected, strict=True):
        g = statistical_inefficiency(values)
        out.append(
            (values.mean() - mean) / np.hypot(values.std() * np.sqrt(g / len(values)), stderr)
        )
    return np.array(out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ReplicaExchangeSampler", "ParallelTemperingSampler"])
def test_replica_exchange_agrees_with_exact_values_and_the_native_sampler(flows, tmp_path, kind):
    """Energies at every rung; Langevin steps too short for a bias that can be seen."""
    path = flows["tsf"]
    md = LangevinDynamicsMove(timestep=0.1 * unit.femtosecond, n_steps=2)
    draw = TSFIndependenceMove(path, tree_molecule(), n_steps=8, seed=3)
    walk = TSFMove(path, tree_molecule(), sigma=0.2, n_steps=2, seed=4)
    moves = SequenceMove([md, draw, walk])
    sampler, reporter = create_sampler(kind, moves, tmp_path / "run.nc", n_iterations=400)
    sampler.run()
    reduced, *_ = reporter.read_energies()
    at = reporter.read_replica_thermodynamic_states()
    reporter.close()
    energies = np.empty((len(reduced) - 1, len(LADDER)))
    for k in range(len(LADDER)):
        rows, replica = np.nonzero(np.array(at)[1:] == k)
        assert (rows == np.arange(len(energies))).all()
        energies[:, k] = np.array(reduced)[1:][rows, replica, k] * KB * LADDER[k]
    exact = [(mean_energy(t)[0], 0.0) for t in LADDER]
    assert np.abs(z_of_means(energies.T, exact)).max() < 4

    flow = tsf.TemperatureSteerableFlow.load(path, tree_molecule())
    potential = tree_molecule().potential("torch")
    kernels = [
        tsf.kernels.FlowIndependence(flow, potential, LADDER, n_steps=8),
        tsf.kernels.PlainSwap(LADDER, KB),
    ]
    native = tsf.ParallelTempering(tree_molecule(), flow, LADDER, 400, kernels, potential, seed=5)
    starts = [positions_of(exact_states(400, t, seed)) for seed, t in enumerate(LADDER)]
    native.set_positions(torch.stack(starts, dim=1))
    native.run(30, progress=False)
    energy = native.state.energy.numpy()
    means = list(zip(energy.mean(axis=0), energy.std(axis=0) / np.sqrt(len(energy)), strict=True))
    assert np.abs(z_of_means(energies.T, means)).max() < 4
    assert np.abs([(m - e) / s for (m, s), (e, _) in zip(means, exact, strict=True)]).max() < 4
