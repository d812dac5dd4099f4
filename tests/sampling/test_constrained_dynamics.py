"""Dynamics of alanine dipeptide with constrained bonds to hydrogen: choices, refusals, OpenMM's."""

import openmm
import openmm.app as app
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.metropolis import InvalidWalker
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.sampling.initial import maxwell_boltzmann
from openmm_tsf.sampling.kernels import CartesianHMC, OpenMMLangevin, TorchLangevin
from openmm_tsf.units import KB
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_cases as exact
from tests.support.constrained_cases import LIGHT, ConstrainedCase, Star


@pytest.fixture(scope="module")
def molecule():
    shipped = tsf.systems.alanine_dipeptide()
    xml = app.ForceField("amber99sbildn.xml", "amber96_obc.xml")
    settings = {"nonbondedMethod": app.NoCutoff, "constraints": app.HBonds}
    return tsf.MolecularSystem(
        xml.createSystem(shipped.topology, **settings), shipped.topology, shipped.positions
    )


@pytest.fixture(scope="module")
def potential(molecule):
    with OpenMMPotential(molecule.system, platform="Reference", n_contexts=1) as potential:
        yield potential


def start(molecule, potential, n_walkers, temperature, seed):
    """Return walkers at the reference conformation, on the constraints, with velocities."""
    x = molecule.constraints.project(torch.tensor(molecule.positions)[None])
    x = x.repeat(n_walkers, 1, 1)[:, None]
    kt = torch.tensor([KB * temperature], dtype=torch.float64)
    v = maxwell_boltzmann(tuple(x.shape), kt, molecule.masses, seeded_generator(seed))
    return exact.fresh_state(potential, x, v)


def kernel_of(kind, molecule, potential, **settings):
    parts = {"timestep": 0.002, "constraints": molecule.constraints, **settings}
    return kind(potential, (600.0,), molecule.masses, **parts)


@pytest.mark.parametrize("kind", [TorchLangevin, CartesianHMC, OpenMMLangevin])
def test_two_femtoseconds(molecule, potential, kind):
    kernel = kernel_of(kind, molecule, potential, n_steps=10)
    state = start(molecule, potential, 4, 600.0, 1)
    before = potential.n_evaluations
    state, totals = exact.apply([kernel], state, seeded_generator(2), times=6)
    info = totals[kernel.name]
    n_trajectories = 24 * (2 if kind is OpenMMLangevin else 1)  # that is run back as well
    assert potential.n_evaluations - before == info.n_evaluations == n_trajectories * 11
    assert int(info.accepted.sum()) > 16
    assert info.not_reversible == info.rejected_non_finite == 0
    assert kernel.exact
    assert kernel.settings()["n_constraints"] == 12
    assert float(molecule.constraints.deviations(state.x[:, 0]).abs().max()) < 1e-11
    exact.assert_energies_are_stored(potential, state)
    if hasattr(kernel, "close"):
        kernel.close()


def test_torch_and_openmm_take_the_same_steps(molecule, potential):
    state = start(molecule, potential, 3, 600.0, 3)
    x, v = state.x[:, 0], state.velocities[:, 0]
    in_torch = kernel_of(TorchLangevin, molecule, potential, n_steps=20)
    by_openmm = kernel_of(OpenMMLangevin, molecule, potential, n_steps=20)
    v = in_torch.rattle.project(v, in_torch.rattle.locate(x))
    ends = in_torch.propagate(x, v), by_openmm.propagate(x, v)
    by_openmm.close()
    assert float((ends[0][0] - x).abs().max()) > 0.01
    for value, expected in zip(*ends, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_a_molecule_with_constraints_starts_on_them(molecule, potential):
    """The default start is minimised, the velocities are of the System's own masses."""
    case = ConstrainedCase()
    tree = case.tree
    own = tsf.MolecularSystem(tree.system(), tree.topology, exact.exact_tree.POSITIONS)
    settings = tsf.kernels.SequenceSettings(local_interval=1, local_timestep=0.004)
    for potential in (case.openmm_potential(), case.potential):
        kernels = tsf.kernels.default_kernels(
            potential, case.flow, case.ladder, own.dynamics_masses, settings
        )
        local = kernels[0].kernel
        assert isinstance(local, TorchLangevin)
        assert (local.exact, local.measure) == (True, "rigid")
        assert local.masses.tolist() == list(LIGHT)
        assert local.settings()["n_constraints"] == 5
        sampler = tsf.ParallelTempering(own, case.flow, case.ladder, 3, kernels, potential, 5)
        assert float(tree.constraints.deviations(sampler.state.x.flatten(0, 1)).abs().max()) < 1e-12
        x = sampler.state.x + 1e-6
        x[0, 0, 4] += 1e-6
        sampler.set_positions(x)
        sampler.run(2, progress=False)
        assert float(tree.constraints.deviations(sampler.state.x.flatten(0, 1)).abs().max()) < 1e-11
        with pytest.raises(ValueError, match="x: expected the 5 constrained distances"):
            sampler.set_positions(1.01 * x)
    case.openmm_potential().close()


def test_other_constraints_masses_and_measures_are_refused(molecule, potential):
    heavy = molecule.heavy_hydrogen_masses
    with pytest.raises(ValueError, match=r"masses: expected those of the constraints, .* 4 amu"):
        TorchLangevin(potential, (600.0,), heavy, constraints=molecule.constraints)
    with pytest.raises(ValueError, match="constraints: expected the 12 of the potential's System"):
        OpenMMLangevin(potential, (600.0,), molecule.masses)
    stiff = {"constraints": molecule.constraints, "measure": "stiff"}
    with pytest.raises(ValueError, match="measure: expected 'rigid' with OpenMM's dynamics"):
        OpenMMLangevin(potential, (600.0,), molecule.masses, **stiff)
    with pytest.raises(ValueError, match="measure: expected 'rigid' for trajectories that are not"):
        TorchLangevin(potential, (600.0,), molecule.masses, metropolized=False, **stiff)
    with pytest.raises(ValueError, match="measure: expected one of rigid, stiff, got 'soft'"):
        TorchLangevin(potential, (600.0,), molecule.masses, measure="soft")
    with pytest.raises(TypeError, match="constraints: expected Constraints, got list"):
        TorchLangevin(potential, (600.0,), molecule.masses, constraints=[(0, 1)])
    few = Constraints([[0, 1]], [0.1], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="constraints: expected 22 atoms, got 3"):
        TorchLangevin(potential, (600.0,), molecule.masses, constraints=few)


def test_constraints_are_those_of_the_flow():
    case = ConstrainedCase()
    parts = (case.potential, case.ladder, case.masses, case.flow)
    assert TorchLangevin(*parts).constraints.n_constraints == 5
    assert TorchLangevin(*parts, constraints=case.tree.constraints).measure == "rigid"
    with pytest.raises(ValueError, match="measure: expected that of the flow, 'rigid'"):
        TorchLangevin(*parts, measure="stiff")
    other = Constraints([[0, 1]], [0.15], LIGHT)
    with pytest.raises(ValueError, match="constraints: expected the 5 of the flow's coordinates"):
        TorchLangevin(*parts, constraints=other)


def test_flows_and_dynamics_are_of_the_molecules_constraints():
    """In any order; the measure and the masses of constrained atoms are the molecule's, too."""
    case = ConstrainedCase()

    def sampler(pairs=None, measure="rigid", masses=LIGHT):
        system = case.tree.system()
        lengths = {frozenset(c[:2]): c[2] for c in map(system.getConstraintParameters, range(5))}
        for index in reversed(range(5)):
            system.removeConstraint(index)
        for pair in pairs or case.tree.constraints.pairs.tolist():
            system.addConstraint(*pair, lengths[frozenset(pair)])
        for atom, mass in enumerate(masses):
            system.setParticleMass(atom, mass)
        parts = case.tree.topology, exact.exact_tree.POSITIONS, measure
        kernel = tsf.kernels.FlowIndependence(case.flow, case.potential, case.ladder)
        molecule = tsf.MolecularSystem(system, *parts)
        return tsf.ParallelTempering(molecule, case.flow, case.ladder, 2, [kernel], case.potential)

    sampler()
    sampler([pair[::-1] for pair in case.tree.constraints.pairs.tolist()[::-1]])
    with pytest.raises(ValueError, match="expected flow_independent with the molecule's measure"):
        sampler(measure="stiff")
    with pytest.raises(ValueError, match="expected flow_independent with the 5 constraints"):
        sampler(masses=(*LIGHT[:4], 4.0, *LIGHT[5:]))


def test_walkers_off_their_constraints_are_refused():
    star = Star((12.0, 1.0, 1.0))
    state = star.start(3, seeded_generator(4))
    kernel = CartesianHMC(star, (1.0,), star.masses, constraints=star.constraints)
    x = state.x.clone()
    x[1, 0, 1] += 1e-8
    with pytest.raises(InvalidWalker, match="on their constraints to 1e-09 nm"):
        kernel(state.evolve(x=x), seeded_generator(5))


@pytest.mark.slow
def test_averages_are_those_of_openmms_constrained_dynamics(molecule, potential):
    """600 K, 2 fs: mean energy, free bonds, angles and their squares, |z| < 4."""
    n_walkers, n_kept, n_steps, temperature = 40, 80, 50, 600.0
    shipped = tsf.MDDataset.shipped(tsf.systems.alanine_dipeptide(), stride=400)
    starts = molecule.constraints.project(shipped.positions[: 2 * n_walkers])
    layer = InternalCoordinates.from_topology(molecule.topology, molecule.positions, "polar")

    def averages(frames, energies):
        r, theta, _ = layer.bonds_angles_torsions(torch.stack(frames).flatten(0, 1))
        values = torch.cat([torch.stack(energies).flatten()[:, None], r, theta], dim=1)
        values = values.reshape(len(frames), n_walkers, -1)
        return torch.cat([values, values**2], dim=2).mean(dim=0)

    generator = seeded_generator(6)
    kernel = kernel_of(TorchLangevin, molecule, potential, n_steps=10)
    v = start(molecule, potential, n_walkers, temperature, 7).velocities
    state = exact.fresh_state(potential, starts[::2][:, None], v)
    frames, energies = [], []
    for iteration in range(n_kept + 20):
        state, totals = exact.apply([kernel], state, generator, times=n_steps // 10)
        if iteration >= 20:
            frames.append(state.x[:, 0])
            energies.append(state.energy[:, 0])
    assert float(totals["local"].acceptance) > 0.8
    by_kernel = averages(frames, energies)

    middle = openmm.LangevinMiddleIntegrator(temperature, 1.0, 0.002)
    middle.setRandomNumberSeed(8)
    context = potential.make_context(middle)
    shape = (n_kept, n_walkers)
    x = torch.zeros(*shape, molecule.n_atoms, 3, dtype=torch.float64)
    u = torch.zeros(shape, dtype=torch.float64)
    for walker in range(n_walkers):
        context.setPositions(starts[1::2][walker].numpy())
        context.setVelocitiesToTemperature(temperature, 9 + walker)
        middle.step(20 * n_steps)
        for k in range(n_kept):
            middle.step(n_steps)
            end = context.getState(getPositions=True, getEnergy=True)
            x[k, walker] = torch.from_numpy(end.getPositions(asNumpy=True)._value)
            u[k, walker] = end.getPotentialEnergy()._value
    by_openmm = averages(list(x), list(u))

    free = by_kernel.var(dim=0) > 1e-14  # not the constrained bonds
    assert int((~free).sum()) == 2 * molecule.constraints.n_constraints
    variance = (by_kernel.var(dim=0) + by_openmm.var(dim=0)) / n_walkers
    z = ((by_kernel.mean(dim=0) - by_openmm.mean(dim=0)) / variance.sqrt())[free]
    print(f"|z| of {len(z)} averages: largest {float(z.abs().max()):.2f}")
    print(f"mean energy {float(by_kernel[:, 0].mean()):.2f}, {float(by_openmm[:, 0].mean()):.2f}")
    print(f"with a standard error of {float(variance[0].sqrt()):.2f} kJ/mol of the difference")
    print("in order", [round(float(each), 2) for each in z])
    assert float(z.abs().max()) < 4
