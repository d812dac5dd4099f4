"""Langevin dynamics in torch, HMC and MALA: reversible, with the trajectories of OpenMM.

That the metropolised ones leave ensembles invariant, and that mutants do not, is in
test_invariance.py. Small steps without acceptance are here: |z| < 4 from exact samples.
"""

import math

import numpy as np
import openmm
import openmm.unit as unit
import pytest
import torch

from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.potentials import OpenMMPotential, TorchPotential
from openmm_tsf.potentials.toy import GaussianWell
from openmm_tsf.sampling.initial import maxwell_boltzmann
from openmm_tsf.sampling.kernels import CartesianHMC, CartesianMALA, OpenMMLangevin, TorchLangevin
from openmm_tsf.sampling.kernels.base import Kernel
from openmm_tsf.sampling.kernels.dynamics import mass_per_coordinate
from openmm_tsf.sampling.kernels.langevin_torch import velocity_verlet
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.units import KB
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_cases as exact


def on_tree(case, kind, **settings):
    return kind(case.potential, case.ladder, case.masses, case.flow, **settings)


@pytest.mark.parametrize("settings", [{"metropolized": False}, {"integrator": "baoab"}])
def test_small_steps_are_nearly_exact_on_the_tree(case, settings):
    settings = {"timestep": 0.004, "friction": 20.0, "n_steps": 10, **settings}
    kernel = on_tree(case, TorchLangevin, **settings)
    generator = seeded_generator(31)
    state = case.start(1200, generator)
    before = case.potential.n_evaluations
    new, totals = exact.apply([kernel], state, generator, times=4)
    info = totals[kernel.name]
    n_evaluations = 4 * 2 * 1200 * (kernel.n_steps + 1)
    assert case.potential.n_evaluations - before == info.n_evaluations == n_evaluations
    assert isinstance(kernel, Kernel)
    assert not kernel.exact
    exact.assert_exact(case.scores(new))
    exact.assert_energies_are_stored(case.potential, new)


@pytest.mark.parametrize("potential", ["gaussian", "double-well"])
def test_small_steps_are_nearly_exact_on_models(potential):
    case = exact.ModelWithVelocities(potential)
    settings = {"timestep": 0.1, "friction": 0.5, "n_steps": 5, "integrator": "baoab"}
    kernel = TorchLangevin(case.potential, case.ladder, case.masses, **settings)
    generator = seeded_generator(32)
    new, _ = exact.apply([kernel], case.start(3000, generator), generator, times=8)
    exact.assert_exact(case.scores(new))
    exact.assert_energies_are_stored(case.potential, new)


@pytest.mark.parametrize("kind", [CartesianHMC, CartesianMALA])
def test_walkers_without_velocities(kind):
    case = exact.ModelCase("double-well")
    kernel = kind(case.potential, case.ladder, 1.0, timestep=0.4)
    generator = seeded_generator(33)
    new, _ = exact.apply([kernel], case.start(3000, generator), generator, times=6)
    assert new.velocities is None
    exact.assert_exact(case.scores(new))


def test_hmc_reaches_equilibrium_from_far_away():
    case = exact.ModelCase("gaussian")
    kernel = CartesianHMC(case.potential, case.ladder, 1.0, timestep=0.3, n_steps=6)
    generator = seeded_generator(34)
    x = torch.full((4000, 3, 3), 2.0, dtype=torch.float64)
    state = exact.fresh_state(case.potential, x, None)
    new, _ = exact.apply([kernel], state, generator, times=40)
    exact.assert_exact(case.scores(new))


@pytest.mark.parametrize(
    ("settings", "x2", "v2"),
    [
        # U = x^2/2, m = 1, dt = 1. Verlet conserves v^2/2 + (1 - dt^2/4) x^2/2 exactly; BAOAB has
        # exact positions (Leimkuhler and Matthews 2013) and velocities that are too cold.
        ({"metropolized": False}, 1 / 0.75, 1.0),
        ({"metropolized": True}, 1.0, 1.0),
        ({"integrator": "baoab"}, 1.0, 0.75),
    ],
)
def test_time_step_errors_of_a_harmonic_well(settings, x2, v2):
    potential, n = GaussianWell(torch.eye(2, dtype=torch.float64)), 20000
    settings = {"n_steps": 2, "timestep": 1.0, "friction": 0.7, **settings}
    kernel = TorchLangevin(potential, (1.0,), 1.0, **settings)
    generator = seeded_generator(37)
    x, v = torch.randn(2, n, 1, 2, generator=generator, dtype=torch.float64)
    state, _ = exact.apply([kernel], exact.fresh_state(potential, x, v), generator, times=15)
    for values, expected in ((state.x, x2), (state.velocities, v2)):
        z = (float(values.square().mean()) / expected - 1) * math.sqrt(2 * n / 2)
        assert abs(z) < 4


def test_energy_error_is_of_second_order(case):
    generator = seeded_generator(38)
    state = case.start(100, generator)
    x, v = state.x[:, 0], state.velocities[:, 0]
    mass = mass_per_coordinate(case.masses, (7, 3))

    def total(energy, v):
        return energy + 0.5 * (mass * v.square()).flatten(1).sum(dim=1)

    errors = []
    for n_steps in (20, 40, 80):
        _, v_end, energy = velocity_verlet(case.potential, x, v, mass, 0.08 / n_steps, n_steps)
        error = total(energy, v_end) - total(state.energy[:, 0], v)
        errors.append(float(error.square().mean().sqrt()))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(orders - 2).max() < 0.1, orders


def test_verlet_steps_are_reversible(case):
    state = case.start(50, seeded_generator(39))
    x, v = state.x[:, 1], state.velocities[:, 1]
    mass = mass_per_coordinate(case.masses, (7, 3))
    x_end, v_end, _ = velocity_verlet(case.potential, x, v, mass, 0.005, 30)
    assert float((x_end - x).abs().max()) > 0.05
    x_back, v_back, energy = velocity_verlet(case.potential, x_end, -v_end, mass, 0.005, 30)
    assert float(torch.stack([x_back - x, v_back + v]).abs().max()) < 1e-10
    torch.testing.assert_close(energy, state.energy[:, 1], rtol=0, atol=1e-8)


@pytest.fixture(scope="module")
def alanine():
    molecule = alanine_dipeptide()
    frames = MDDataset.shipped(molecule, stride=2500).positions
    with OpenMMPotential(molecule.system, platform="Reference", n_contexts=1) as potential:
        yield molecule, frames, potential


def test_trajectories_are_those_of_openmm(alanine):
    molecule, frames, potential = alanine
    x = frames[:4]
    masses = torch.tensor(molecule.masses, dtype=torch.float64)
    kt = torch.tensor([KB * 600.0], dtype=torch.float64)
    generator = seeded_generator(40)
    v = maxwell_boltzmann((4, 1, *x.shape[1:]), kt, masses, generator)[:, 0]
    kernel = OpenMMLangevin(potential, (600.0,), masses, n_steps=20, timestep=0.001)
    by_openmm = kernel.propagate(x, v)
    kernel.close()
    mass = mass_per_coordinate(masses, x.shape[1:])
    in_torch = velocity_verlet(potential, x, v, mass, 0.001, 20)
    for values, expected in zip(in_torch, by_openmm, strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-8)

    integrator = openmm.VerletIntegrator(0.001)  # leapfrog: velocities half a step behind
    context = potential.make_context(integrator)
    context.setPositions(x[0].numpy())
    force = context.getState(getForces=True).getForces(asNumpy=True)._value
    context.setVelocities(v[0].numpy() - 0.0005 * force / masses.numpy()[:, None])
    integrator.step(20)
    end = context.getState(getPositions=True).getPositions(asNumpy=True)
    assert np.abs(in_torch[0][0].numpy() - end.value_in_unit(unit.nanometer)).max() < 1e-8


def test_openmm_and_torch_have_the_same_dynamics(case, openmm_potential):
    settings = {"n_steps": 20, "timestep": 0.01, "friction": 5.0}
    arguments = (openmm_potential, case.ladder, case.masses, case.flow)
    first, second = OpenMMLangevin(*arguments, **settings), TorchLangevin(*arguments, **settings)
    assert first.settings() == second.settings()
    assert first.name == second.name == "local"
    state = case.start(100, seeded_generator(41))
    one, one_info = first(state, seeded_generator(42))
    two, two_info = second(state, seeded_generator(42))
    first.close()
    assert bool((one_info.accepted < 100).all())
    assert torch.equal(two_info.accepted, one_info.accepted)
    assert torch.equal(two_info.proposed, one_info.proposed)
    assert one_info.n_evaluations == two_info.n_evaluations == 200 * 21
    assert one_info.mirror_images == two_info.mirror_images
    for name in ("x", "velocities", "energy"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=0, atol=1e-8)


def test_mala_has_the_acceptance_of_its_proposal_densities(case):
    h = 0.02
    kernel = on_tree(case, CartesianMALA, timestep=h)
    state = case.start(40, seeded_generator(43))
    x, kt = state.x.flatten(0, 1), KB * torch.tensor(case.ladder, dtype=torch.float64).repeat(40)
    v = kernel.refresh_before(torch.zeros_like(x), kt, seeded_generator(44))
    x_new, v_new, _ = kernel.propagate(x, v)
    mass, column = case.masses[:, None], kt[:, None, None]
    energy, force = case.potential.energy_and_forces(x)
    energy_new, force_new = case.potential.energy_and_forces(x_new)

    def log_q(to, start, force):  # N(start + h^2 F / 2m, h^2 kT / m)
        away = to - start - 0.5 * h**2 * force / mass
        return -(mass * away.square() / (2 * h**2 * column)).sum(dim=(1, 2))

    by_density = -(energy_new - energy) / kt + log_q(x, x_new, force_new) - log_q(x_new, x, force)
    change = energy_new + kernel.kinetic_energy(v_new) - energy - kernel.kinetic_energy(v)
    by_energy = -change / kt
    assert float(by_energy.abs().max()) > 0.3
    torch.testing.assert_close(by_energy, by_density, rtol=0, atol=1e-9)


def averages(molecule, coordinates, frames, energies):
    """Return mean energy, bonds, angles and their squares of every walker [W, K]."""
    n_kept, n_walkers = energies.shape
    r, theta, _ = coordinates.bonds_angles_torsions(frames.flatten(0, 1))
    internal = torch.cat([r, theta], dim=1).reshape(n_kept, n_walkers, -1)
    values = torch.cat([energies[..., None], internal], dim=2)
    return torch.cat([values, values**2], dim=2).mean(dim=0)


@pytest.mark.slow
@pytest.mark.parametrize(("integrator", "timestep"), [("baoab", 0.002), ("verlet", 0.001)])
def test_ensemble_averages_are_those_of_openmms_integrator(alanine, integrator, timestep):
    """BAOAB has the same error at a large step; the Metropolised kernel none, at a small one."""
    molecule, _, potential = alanine
    n_walkers, n_kept, temperature, interval = 40, 150, 600.0, 0.1
    frames = MDDataset.shipped(molecule, stride=500).positions[: 2 * n_walkers]
    coordinates = InternalCoordinates.from_topology(molecule.topology, molecule.positions, "polar")
    generator = seeded_generator(50)
    kt = torch.tensor([KB * temperature], dtype=torch.float64)
    shape = (n_walkers, 1, molecule.n_atoms, 3)
    v = maxwell_boltzmann(shape, kt, torch.tensor(molecule.masses), generator)
    n_steps = round(interval / timestep)

    settings = {"timestep": timestep, "integrator": integrator}
    settings["n_steps"] = n_steps if integrator == "baoab" else 10
    kernel = TorchLangevin(potential, (temperature,), molecule.masses, **settings)
    state, kept = exact.fresh_state(potential, frames[::2][:, None], v), []
    for iteration in range(n_kept + 10):  # the first ten are discarded
        state, _ = exact.apply([kernel], state, generator, times=n_steps // kernel.n_steps)
        if iteration >= 10:
            kept.append((state.x[:, 0], state.energy[:, 0]))
    parts = (torch.stack(part) for part in zip(*kept, strict=True))
    by_kernel = averages(molecule, coordinates, *parts)

    positions = torch.zeros(n_kept, n_walkers, molecule.n_atoms, 3, dtype=torch.float64)
    energies = torch.zeros(n_kept, n_walkers, dtype=torch.float64)
    middle = openmm.LangevinMiddleIntegrator(temperature, 1.0, timestep)
    middle.setRandomNumberSeed(51)
    context = potential.make_context(middle)
    for walker in range(n_walkers):
        context.setPositions(frames[1::2][walker].numpy())
        context.setVelocitiesToTemperature(temperature, 52 + walker)
        middle.step(10 * n_steps)
        for k in range(n_kept):
            middle.step(n_steps)
            end = context.getState(getPositions=True, getEnergy=True)
            positions[k, walker] = torch.from_numpy(end.getPositions(asNumpy=True)._value)
            energies[k, walker] = end.getPotentialEnergy()._value
    by_openmm = averages(molecule, coordinates, positions, energies)

    variance = (by_kernel.var(dim=0) + by_openmm.var(dim=0)) / n_walkers
    z = (by_kernel.mean(dim=0) - by_openmm.mean(dim=0)) / variance.sqrt()
    largest, rms = float(z.abs().max()), float(z.square().mean().sqrt())
    print(f"{integrator}: |z| of {len(z)} averages: largest {largest:.2f}, rms {rms:.2f}")
    assert largest < 4


def test_forces_in_single_precision_leave_the_kernel_exact(case, tree):
    potential = TorchPotential.from_system(tree.system())
    settings = {"n_steps": 12, "timestep": 0.012, "single_precision": True}
    parts = (potential, case.ladder, case.masses, case.flow)
    kernel, generator = TorchLangevin(*parts, **settings), seeded_generator(41)
    assert kernel.exact
    assert kernel.settings()["forces"] == "float32"
    state = case.start(600, generator)
    potential.n_evaluations = 0
    new, totals = exact.apply([kernel], state, generator, times=2)
    info = totals[kernel.name]
    assert 0.3 < float(info.acceptance.min()) < float(info.acceptance.max()) < 1.0
    assert potential.n_evaluations == info.n_evaluations == 2 * 2 * 600 * (12 + 2)
    exact.assert_exact(case.scores(new))
    exact.assert_energies_are_stored(case.potential, new)  # those of double precision
    x, (energy, forces) = new.x.flatten(0, 1), potential.energy_and_forces(new.x.flatten(0, 1))
    single_energy, single_forces = potential.single_precision_forces(x)
    assert single_forces.dtype == torch.float64
    for value, other in ((energy, single_energy), (forces, single_forces)):
        difference = float((value - other).abs().max())
        assert 0 < difference < 1e-4 * float(value.abs().max())


def test_single_precision_is_refused_where_it_would_not_be_exact(case, tree):
    parts = (case.ladder, case.masses, case.flow)
    with pytest.raises(ValueError, match="single_precision: expected False with a"):
        TorchLangevin(case.potential, *parts, single_precision=True)
    potential = TorchPotential.from_system(tree.system())
    for settings in ({"metropolized": False}, {"integrator": "baoab"}):
        with pytest.raises(ValueError, match="expected False without metropolized"):
            TorchLangevin(potential, *parts, single_precision=True, **settings)
