"""Langevin dynamics, HMC and MALA: failures, arguments, seeds, tuning."""

import multiprocessing
import os
import signal
import warnings

import openmm.unit as unit
import pytest
import torch

from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.potentials.toy import GaussianWell
from openmm_tsf.sampling.kernels.cartesian import CartesianHMC, CartesianMALA
from openmm_tsf.sampling.kernels.dynamics import mass_per_coordinate
from openmm_tsf.sampling.kernels.langevin_openmm import OpenMMLangevin
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin, velocity_verlet
from openmm_tsf.sampling.kernels.schedule import Scheduled, SequenceSettings, default_kernels
from openmm_tsf.sampling.tempering import ParallelTempering
from openmm_tsf.sampling.tuning import HasStepSize, StepSizeTuner
from openmm_tsf.utils.random import seeded_generator
from tests.support.exact_cases import Changed, ModelWithVelocities, apply, fresh_state


def on_tree(case, kind, **settings):
    return kind(case.potential, case.ladder, case.masses, case.flow, **settings)


class Wall(GaussianWell):
    """A harmonic well whose energy is not finite beyond x_0 = 3."""

    def formula(self, x):
        return torch.where(x[:, 0] > 3.0, torch.inf, super().formula(x))


ALL = [
    (TorchLangevin, {}),
    (TorchLangevin, {"metropolized": False}),
    (TorchLangevin, {"integrator": "baoab"}),
    (CartesianHMC, {}),
    (CartesianMALA, {}),
]


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_rows_that_fail_stay_and_are_counted(kind, settings):
    potential = Wall(torch.eye(2, dtype=torch.float64))
    kernel = kind(potential, (1.0, 2.0), 1.0, timestep=1e-3, **settings)
    x = torch.zeros(3, 2, 2, dtype=torch.float64)
    x[1, 0, 0] = 3.0 - 1e-9
    x[2, 1] = 1e200  # the energy overflows: no walker may start there
    state = fresh_state(potential, x[:2], torch.zeros_like(x[:2]))
    for seed in range(20):  # until a velocity points at the wall
        new, info = kernel(state, seeded_generator(seed))
        if info.rejected_non_finite:
            break
    assert (info.rejected_non_finite, info.outside_domain, int(info.accepted[0])) == (1, 0, 1)
    assert torch.equal(new.x[1, 0], x[1, 0])
    assert float(new.energy[1, 0]) == float(state.energy[1, 0])
    assert bool(torch.isfinite(new.x).all() & torch.isfinite(new.velocities).all())
    assert not torch.equal(new.x[0], x[0])
    bad = fresh_state(potential, x[2:], torch.zeros_like(x[2:]))
    with pytest.raises(ValueError, match="current: expected finite log-weights"):
        kernel(bad, torch.Generator())


class Narrow(Changed):
    """A flow that has every third configuration outside its domain, every third a mirror image."""

    def is_in_domain(self, x):
        return torch.arange(len(x)) % 3 != 1

    def is_mirror_image(self, x):
        return torch.arange(len(x)) % 3 == 2


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_ends_outside_the_domain_and_mirror_images_are_counted_apart(case, kind, settings):
    settings = {"timestep": 1e-6, **settings}
    kernel = kind(case.potential, case.ladder, case.masses, Narrow(case.flow), **settings)
    generator = seeded_generator(35)
    state = case.start(6, generator)  # 12 rows, the rungs of each walker together
    new, info = kernel(state, generator)
    assert (info.rejected_non_finite, info.outside_domain, info.mirror_images) == (4, 4, 4)
    moved = (new.x != state.x).flatten(2).any(dim=2).flatten()
    assert moved.tolist() == [row % 3 == 0 for row in range(12)]


def test_a_failed_row_stops_and_the_others_go_on():
    potential = Wall(torch.eye(1, dtype=torch.float64))
    mass = mass_per_coordinate(1.0, (1,))
    x = torch.tensor([[2.9], [0.5]], dtype=torch.float64)
    v = torch.tensor([[5.0], [0.0]], dtype=torch.float64)
    x_end, v_end, energy = velocity_verlet(potential, x, v, mass, 0.1, 7)
    alone = velocity_verlet(potential, x[1:], v[1:], mass, 0.1, 7)
    assert energy[0] == torch.inf
    assert potential.n_non_finite == 1  # it is not sent beyond the wall again
    assert float(x_end[0, 0]) == 2.9
    for both, expected in zip((x_end, v_end, energy), alone, strict=True):
        assert torch.equal(both[1:], expected)


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_seeds_decide_everything(kind, settings):
    case = ModelWithVelocities("double-well")
    state = case.start(20, seeded_generator(45))
    kernel = kind(case.potential, case.ladder, case.masses, timestep=0.2, **settings)
    ends = [apply([kernel], state, seeded_generator(seed), 3)[0] for seed in (1, 1, 2)]
    assert torch.equal(ends[0].x, ends[1].x)
    assert torch.equal(ends[0].velocities, ends[1].velocities)
    assert not torch.equal(ends[0].x, ends[2].x)
    copy = kind(case.potential, case.ladder, case.masses, timestep=0.9, **settings)
    copy.load_state_dict(kernel.state_dict())
    if isinstance(kernel, HasStepSize):
        assert copy.sigma.tolist() == [0.2, 0.2, 0.2]
        assert copy.settings() == kernel.settings()
    else:
        assert kernel.settings()["timestep_ps"] == 0.2
        assert (kernel.settings()["time_step_error"] is None) == kernel.exact


@pytest.mark.parametrize("kind", [TorchLangevin, CartesianHMC])
def test_arguments_are_checked(case, kind):
    def make(masses=case.masses, **settings):
        return kind(case.potential, case.ladder, masses, **settings)

    message = "masses: expected 7 positive masses, one for each atom"
    for masses in (case.masses[:3], -case.masses, 1.0):
        with pytest.raises(ValueError, match=message):
            make(masses)
    kernel = make(timestep=2 * unit.femtosecond)
    step = kernel.timestep if kind is TorchLangevin else kernel.sigma.tolist()
    assert step == pytest.approx(0.002 if kind is TorchLangevin else [0.002, 0.002])
    with pytest.raises(TypeError, match="timestep: expected a quantity in"):
        make(timestep=1 * unit.nanometer)
    state = case.start(2, seeded_generator(46)).evolve(velocities=None)
    kernel = make() if kind is TorchLangevin else make(persistence=0.5)
    with pytest.raises(ValueError, match="expects walkers with velocities, got None"):
        kernel(state, torch.Generator())


def test_step_sizes_are_positive(case):
    with pytest.raises(ValueError, match="sigma: expected positive"):
        on_tree(case, CartesianHMC).sigma = -1.0


def test_time_steps_are_tuned_to_each_kernels_target(case, tree_molecule):
    kernels = [
        on_tree(case, CartesianHMC, n_steps=4, timestep=0.002),
        Scheduled(on_tree(case, CartesianMALA, timestep=0.1), interval=2),
    ]
    parts = (tree_molecule, case.flow, case.ladder, 80, kernels, case.potential)
    sampler, start = ParallelTempering(*parts, seed=47), case.start(80, seeded_generator(48))
    sampler.set_positions(start.x, start.velocities)
    steps = sampler.tune(50, target_acceptance=0.2)
    sampler.run(10, progress=False)
    for name, target in (("hmc", 0.65), ("mala", 0.574)):
        assert bool(((steps[name] > 0.005) & (steps[name] < 0.05)).all()), steps
        acceptance = sampler.totals[name].acceptance
        assert float((acceptance - target).abs().max()) < 0.1, (name, acceptance)
    assert sampler.exact
    assert torch.equal(sampler.kernels["hmc"].state_dict()["sigma"], steps["hmc"])


def test_a_tuner_without_updates_leaves_the_steps_alone(case):
    kernel = on_tree(case, CartesianHMC, timestep=[0.001, 0.002])
    assert StepSizeTuner(kernel, 0.3).freeze().tolist() == [0.001, 0.002]


def test_any_potential_gets_the_default_sequence(case, tree_molecule, openmm_potential, tmp_path):
    def make(potential):
        settings = SequenceSettings(local_interval=2, n_flow_walk=1)
        kernels = default_kernels(potential, case.flow, case.ladder, case.masses, settings)
        parts = (tree_molecule, case.flow, case.ladder, 3, kernels, potential)
        return ParallelTempering(*parts, seed=49)

    in_torch, by_openmm = samplers = make(case.potential), make(openmm_potential)
    assert type(in_torch.kernels["local"]) is TorchLangevin
    assert type(by_openmm.kernels["local"]) is OpenMMLangevin
    assert all(float(s.state.energy.max()) < 20.0 for s in samplers)  # they start at a minimum
    assert torch.equal(in_torch.state.x, make(case.potential).state.x)
    by_openmm.set_positions(in_torch.state.x, in_torch.state.velocities)
    for sampler in samplers:
        sampler.run(4, tmp_path / type(sampler.potential).__name__, progress=False)
        assert sampler.totals["local"].n_evaluations == 2 * 6 * 26
    by_openmm.close()
    with pytest.warns(UserWarning, match="written with potential .*resumed with"):
        resumed = make(case.potential).resume(tmp_path / "OpenMMPotential")
    assert resumed.state.iteration == 4


def test_dynamics_has_the_given_masses_in_openmm_too(case, openmm_potential):
    """Other masses than those of the System: the same trajectories as in torch, and accepted."""
    start, masses = case.start(20, seeded_generator(51)), 3.0 * case.masses.flip(0)
    ends = []
    for kind, potential in ((TorchLangevin, case.potential), (OpenMMLangevin, openmm_potential)):
        kernel = kind(potential, case.ladder, masses, n_steps=10, timestep=0.002)
        end, info = kernel(start, seeded_generator(52))
        assert float(info.acceptance.min()) > 0.8
        ends.append(end)
        if isinstance(kernel, OpenMMLangevin):
            kernel.close()
    for name in ("x", "velocities", "energy"):
        torch.testing.assert_close(*(getattr(end, name) for end in ends), rtol=1e-5, atol=1e-4)


def test_velocities_are_drawn_for_the_masses_of_the_dynamics(case, tree_molecule):
    kt = case.potential.boltzmann_constant * torch.tensor(case.ladder, dtype=torch.float64)
    for masses in (tree_molecule.masses, tree_molecule.heavy_hydrogen_masses, 7.0):
        amu = torch.as_tensor(masses, dtype=torch.float64).expand(tree_molecule.n_atoms)
        kernels = default_kernels(case.potential, case.flow, case.ladder, amu)
        sampler = ParallelTempering(
            tree_molecule, case.flow, case.ladder, 400, kernels, case.potential, seed=50
        )
        v = sampler.state.velocities
        scaled = (amu[:, None] * v.square() / kt[:, None, None]).flatten(2).mean(dim=(0, 2))
        n = v[:, 0].numel()  # chi2 of n squares over n: variance 2/n
        assert bool(((scaled - 1.0).abs() < 4 * (2 / n) ** 0.5).all()), masses
    default = ParallelTempering(tree_molecule, case.flow, case.ladder, 2, None, case.potential)
    assert torch.equal(
        default.kernels["local"].masses, torch.tensor(tree_molecule.heavy_hydrogen_masses)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_wait_for_threads_of_the_parents_contexts(case, tree):
    potential = OpenMMPotential(tree.system(), "CPU", {"Threads": 2}, n_contexts=1)
    # With other masses than the System's, which the kernel's own Contexts have.
    kernel = OpenMMLangevin(potential, case.ladder, 3.0 * case.masses, n_steps=2)
    kernel(case.start(2, seeded_generator(53)), seeded_generator(54))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads
        child = os.fork()
    if child == 0:
        try:
            kernel.close()
            sender.send("closed")
        finally:
            os._exit(0)
    ended = receiver.poll(10.0)
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ended, "the forked child hangs"
    kernel.close()
    potential.close()
