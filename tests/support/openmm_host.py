"""OpenMM's own replica exchange of the exactly solvable molecule, with and without a flow."""

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import torch

from openmm_tsf.hosts.openmm_app import FlowReplicaExchangeSampler
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_tree
from tests.support.exact_cases import the_tree, tree_flow


def make_simulation(system=None, topology=None, positions=None, integrator=None):
    """Return a Simulation on the Reference platform; by default the exactly solvable molecule."""
    tree = the_tree()
    if integrator is None:
        integrator = openmm.LangevinMiddleIntegrator(300.0, 10.0, 0.0005)
        integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatform("Reference")
    system = tree.system() if system is None else system
    topology = tree.topology if topology is None else topology
    simulation = app.Simulation(topology, system, integrator, platform)
    positions = exact_tree.POSITIONS if positions is None else positions
    simulation.context.setPositions(positions)
    return simulation


def make_sampler(temperatures, flow="tsf-volume", steps=0, kind=None, simulation=None, **options):
    """Return the sampler at states of these temperatures, K; `flow` is a name, a flow or None."""
    states = [{"temperature": kelvin * unit.kelvin} for kelvin in temperatures]
    options.setdefault("seed", 5)
    flow = tree_flow(flow) if isinstance(flow, str) else flow
    simulation = make_simulation() if simulation is None else simulation
    return (kind or FlowReplicaExchangeSampler)(states, simulation, steps, flow=flow, **options)


def set_replicas(sampler, x, v):
    """Put replicas at positions and velocities [n, N, 3], each at the state of its number."""
    context = sampler.simulation.context
    for index in range(len(x)):
        context.setPositions(x[index].numpy())
        context.setVelocities(v[index].numpy())
        sampler.replicaConformation[index] = context.getState(
            positions=True, velocities=True, parameters=True, integratorParameters=True
        )
    sampler.replicaStateIndex = list(range(len(x)))
    sampler._previousReplicaStateIndex = list(range(len(x)))  # as OpenMM's reporter does


def start_exactly(sampler, generator):
    """Put all replicas at exact samples, with velocities, of their temperatures."""
    tree = the_tree()
    kelvins = np.array([s["temperature"].value_in_unit(unit.kelvin) for s in sampler.states])
    x = torch.empty(len(kelvins), tree.n_atoms, 3, dtype=torch.float64)
    v = torch.empty_like(x)
    for kelvin in np.unique(kelvins):
        rows = torch.from_numpy(np.flatnonzero(kelvins == kelvin))
        x[rows] = tree.sample(len(rows), kelvin, generator)
        v[rows] = tree.velocities(len(rows), kelvin, generator)
    set_replicas(sampler, x, v)


def arrays_of(sampler):
    """Return the positions and velocities [n, N, 3] of all replicas in nm and nm/ps."""
    x = [c.getPositions(asNumpy=True)._value for c in sampler.replicaConformation]
    v = [c.getVelocities(asNumpy=True)._value for c in sampler.replicaConformation]
    return np.array(x), np.array(v)


def exact_scores(temperatures, n_copies, n_rounds, n_iterations, seed=11, n_plain=None, **options):
    """Return z values of replicas that started as exact samples, after some iterations.

    Every temperature has `n_copies` states; every round starts anew. An iteration has `n_plain`
    exchanges of random pairs, by default as many as replicas.
    """
    ladder = np.repeat(temperatures, n_copies)
    sampler, tree, generator = make_sampler(ladder, **options), the_tree(), seeded_generator(seed)
    sampler.exchangesPerIteration = len(ladder) if n_plain is None else n_plain
    collected = {kelvin: ([], []) for kelvin in temperatures}
    for _ in range(n_rounds):
        start_exactly(sampler, generator)
        sampler.simulate(n_iterations)
        for index in range(len(ladder)):  # velocities are rescaled when dynamics begin
            sampler.simulateReplica(index, 0)
        x, v = arrays_of(sampler)
        kelvins = ladder[sampler.replicaStateIndex]
        for kelvin, (positions, velocities) in collected.items():
            positions.append(x[kelvins == kelvin])
            velocities.append(v[kelvins == kelvin])
    scores = {}
    for kelvin, parts in collected.items():
        x, v = (torch.from_numpy(np.concatenate(part)) for part in parts)
        pit = tree.pit(x, kelvin)
        parts = exact_tree.uniform_scores(pit)
        # All coordinates together, which a wrong temperature makes narrower or wider.
        parts["spread"] = ((pit - 0.5) ** 2 - 1 / 12).mean() * np.sqrt(180 * pit.size)
        parts |= exact_tree.velocity_scores(tree, x, v, kelvin)
        scores |= {f"{kelvin:g} K {name}": z for name, z in parts.items()}
    return scores, sampler


def mean_energy(kelvin):
    """Return <U> of the exactly solvable molecule in kJ/mol, by quadrature of every coordinate."""
    tree, total = the_tree(), 0.0
    for index, marginal in enumerate(tree.marginals(kelvin)):
        u = tree.centre.repeat(len(marginal.grid), 1)
        u[:, index] = torch.from_numpy(marginal.grid)
        energy = tree.term_energies(u)[:, index].numpy()
        weights = np.diff(marginal.cdf)
        total += float((weights * 0.5 * (energy[1:] + energy[:-1])).sum())
    return total


def batch_error(values, n_batches=25):
    """Return the standard error of the mean of a correlated series [n], by means of batches."""
    means = np.array([batch.mean() for batch in np.array_split(np.asarray(values), n_batches)])
    return means.std(ddof=1) / np.sqrt(n_batches)
