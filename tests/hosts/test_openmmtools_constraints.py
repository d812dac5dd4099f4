"""Moves of molecules with constraints in openmmtools' samplers."""

import copy

import numpy as np
import openmm.unit as unit
import pytest
import torch
from openmmtools.states import ThermodynamicState

from openmm_tsf.hosts.openmmtools import TSFIndependenceMove
from openmm_tsf.sampling.kernels.rattle import Rattle
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB
from openmm_tsf.utils.random import seeded_generator
from tests.support.constrained_cases import LIGHT, ConstrainedCase, constrained_tree
from tests.support.exact_cases import assert_exact, fresh_state
from tests.support.openmmtools_cases import positions_of, reference_cache, sampler_state

KELVIN, N_STEPS = 300.0, 8


def case_of(measure="rigid"):
    """Return the exact distribution at one temperature."""
    case = ConstrainedCase("tsf-volume", measure=measure)
    case.ladder = (KELVIN,)
    return case


def molecule_of(measure="rigid"):
    tree = constrained_tree("star", measure)
    system = tree.system()
    for atom, mass in enumerate(LIGHT):
        system.setParticleMass(atom, mass)
    (x,) = tree.sample_stiff(1, KELVIN, seeded_generator(1))
    return MolecularSystem(system, tree.topology, x.numpy(), measure)


def save_flow(path, molecule, measure="rigid"):
    """Write the flow of a measure as one for a molecule."""
    flow = copy.deepcopy(case_of(measure).flow)
    flow.fingerprint = molecule.fingerprint
    flow.save(path)
    return path


@pytest.fixture(scope="module")
def molecule():
    return molecule_of()


@pytest.fixture(scope="module")
def flow(tmp_path_factory, molecule):
    return save_flow(tmp_path_factory.mktemp("flow") / "flow.pt", molecule)


def state_of(system, kelvin=KELVIN):
    return ThermodynamicState(system, temperature=kelvin * unit.kelvin)


def moved(path, molecule, n, seed):
    """Return exact samples with tangent velocities, as walkers after a move, and the move."""
    case, generator = case_of(), seeded_generator(seed)
    start, rattle = case.start(n, generator), Rattle(case.tree.constraints)
    x = start.x[:, 0]
    v = rattle.project(start.velocities[:, 0], rattle.locate(x))
    move = TSFIndependenceMove(path, molecule, n_steps=N_STEPS, seed=seed)
    state, cache = state_of(molecule.system), reference_cache()
    ends = [sampler_state(*pair) for pair in zip(x, v.numpy(), strict=True)]
    for end in ends:
        move.apply(state, end, cache)
    velocity = unit.nanometer / unit.picosecond
    v = torch.tensor(np.array([end.velocities.value_in_unit(velocity) for end in ends]))
    return case, positions_of(ends), v, move


def test_positions_and_velocities_are_those_of_constrained_dynamics(flow, molecule):
    case, x, v, move = moved(flow, molecule, 150, seed=31)
    assert move.n_accepted > 50
    generator, rattle = seeded_generator(32), Rattle(case.tree.constraints)
    at = rattle.locate(x)
    torch.testing.assert_close(rattle.project(v, at), v, rtol=0, atol=1e-12)
    # Tangent velocities of a temperature, with the others drawn, are velocities of free atoms.
    noise = case.tree.velocities(len(x), KELVIN, generator)
    free = noise + rattle.project(v - noise, at)
    assert_exact(case.scores(fresh_state(case.potential, x[:, None], free[:, None])))
    tangent = 3 * molecule.n_atoms - len(molecule.constraints.pairs)
    kinetic = 0.5 * (case.tree.masses[:, None] * v.square()).sum((1, 2)) / (KB * KELVIN)
    z = (kinetic.mean() - tangent / 2) / np.sqrt(tangent / 2 / len(x))
    assert abs(z) < 4
    # What a projection would leave of velocities that belong to other positions is too cold.
    kept = rattle.project(v.roll(1, 0), at)
    cold = 0.5 * (case.tree.masses[:, None] * kept.square()).sum((1, 2)) / (KB * KELVIN)
    lost = kinetic.roll(1, 0) - cold
    assert lost.mean() > 10 * lost.std() / np.sqrt(len(x))


def test_masses_of_constrained_atoms_are_those_of_the_flow(flow, molecule):
    """They enter the density by the metric of the constraints."""
    move = TSFIndependenceMove(flow, molecule, seed=1)
    start = sampler_state(molecule.positions)
    system = copy.deepcopy(molecule.system)
    system.setParticleMass(4, 4.0)
    with pytest.raises(ValueError, match="another set of masses"):
        move.apply(state_of(system), copy.deepcopy(start), reference_cache())
    move.apply(state_of(molecule.system), start, reference_cache())


def test_the_measure_is_that_of_dynamics(tmp_path):
    other = molecule_of("stiff")
    path = save_flow(tmp_path / "stiff.pt", other, "stiff")
    with pytest.raises(ValueError, match=r"molecule: expected the measure 'rigid', .*got 'stiff'"):
        TSFIndependenceMove(path, other)


def test_distances_are_those_of_the_constraints_to_the_tolerance_of_dynamics(flow, molecule):
    x = np.array(molecule.positions)
    close, far = x.copy(), x.copy()
    close[4] += 5e-6 * (x[4] - x[1])
    far[4] += 5e-3 * (x[4] - x[1])
    move = TSFIndependenceMove(flow, molecule, n_steps=40, seed=3)
    end = sampler_state(close)
    move.apply(state_of(molecule.system), end, reference_cache())
    assert move.n_accepted > 0
    assert float(molecule.constraints.deviations(positions_of([end])).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="sampler_state: expected constrained distances"):
        move.apply(state_of(molecule.system), sampler_state(far), reference_cache())
