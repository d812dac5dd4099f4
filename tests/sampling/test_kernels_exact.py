"""Flow kernels, OpenMM's dynamics and plain swaps: what they do beside leaving ensembles invariant.

That they do, and that mutants do not, is in test_invariance.py. Where walkers must be exact samples
here too, |z| < 4 for every mean, variance and histogram; seeds were fixed beforehand.
"""

import copy

import openmm
import pytest
import torch

from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.sampling.kernels import FlowIndependence, FlowWalk, OpenMMLangevin, PlainSwap
from openmm_tsf.units import KB
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_cases as exact
from tests.support.exact_tree import POSITIONS, TreePotential

LADDER = (300.0, 600.0)


def case_of(ladder):
    case = exact.TreeCase(pose_kept=False)
    case.ladder = ladder
    return case


@pytest.fixture
def case():
    return case_of(LADDER)


def test_torch_and_openmm_energies_agree(case, openmm_potential):
    x = case.tree.sample(200, 600.0, seeded_generator(0))
    expected = openmm_potential.energy(x)
    torch.testing.assert_close(case.potential.energy(x), expected, rtol=0, atol=1e-10)


def test_exact_samples_are_exact(case):
    exact.assert_exact(case.scores(case.start(4000, seeded_generator(1))))


def test_two_steps_in_one_call_are_two_calls(case):
    generator, flow, potential = torch.Generator(), case.flow, case.potential
    state = case.start(100, generator.manual_seed(23))
    walk = FlowWalk(flow, potential, LADDER, 0.15, n_steps=2)
    final, counted = walk(state, generator.manual_seed(24))

    generator.manual_seed(24)
    x, energy = state.x.flatten(0, 1), state.energy.flatten()
    tau = torch.tensor(LADDER, dtype=torch.float64).repeat(100) / flow.reference_temperature
    p = torch.randn(200, flow.n_momenta, generator=generator, dtype=torch.float64)
    p = p * tau.sqrt()[:, None]
    n_accepted = 0
    for _ in range(2):
        v, _ = flow.inverse_and_log_det(x, p)
        noise = torch.randn(v.shape, generator=generator, dtype=torch.float64)
        (x_new, p_new), log_det = flow.forward_and_log_det(v + 0.15 * tau.sqrt()[:, None] * noise)
        inside = torch.isfinite(log_det)
        x_new = flow.match_pose(torch.where(inside[:, None, None], x_new, x), like=x)
        energy_new = torch.where(inside, potential.energy(x_new), torch.inf)
        log_ratio = (energy - energy_new) / (KB * flow.reference_temperature) / tau
        log_ratio = log_ratio + (p.square() - p_new.square()).sum(dim=1) / (2 * tau)
        uniform = torch.rand(200, generator=generator, dtype=torch.float64)
        accepted = uniform.log() < log_ratio
        x = torch.where(accepted[:, None, None], x_new, x)
        p = torch.where(accepted[:, None], p_new, p)
        energy = torch.where(accepted, energy_new, energy)
        n_accepted += int(accepted.sum())
    assert int(counted.accepted.sum()) == n_accepted
    assert 20 < n_accepted < 380
    torch.testing.assert_close(final.x.flatten(0, 1), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(final.energy.flatten(), energy, rtol=0, atol=1e-7)


@pytest.fixture
def langevin(case, openmm_potential):
    """Make kernels of Langevin dynamics, and close them."""
    kernels = []

    def langevin(potential=openmm_potential, **settings):
        settings = {"friction": 20.0, **settings}
        kernels.append(OpenMMLangevin(potential, LADDER, case.tree.masses, case.flow, **settings))
        return kernels[-1]

    yield langevin
    for kernel in kernels:
        kernel.close()


def test_dynamics_without_metropolis_is_nearly_exact(case, openmm_potential, langevin):
    generator = seeded_generator(6)
    state = case.start(1500, generator)
    kernel = langevin(n_steps=10, timestep=0.004, metropolized=False)
    new, _ = exact.apply([kernel], state, generator, times=4)
    assert not kernel.exact
    exact.assert_exact(case.scores(new))
    exact.assert_energies_are_stored(openmm_potential, new)


def test_dynamics_does_not_depend_on_contexts(case, openmm_potential, langevin):
    state = case.start(7, seeded_generator(8))
    results = []
    for n_contexts in (1, 3):
        kernel, before = langevin(n_steps=30, n_contexts=n_contexts), openmm_potential.n_evaluations
        new, totals = exact.apply([kernel], state, seeded_generator(9), times=2)
        counted = openmm_potential.n_evaluations - before
        assert counted == totals["local"].n_evaluations == 2 * 14 * 31
        results.append(new)
    for name in ("x", "velocities", "energy"):
        assert torch.equal(*(getattr(result, name) for result in results))


def test_a_centre_of_mass_remover_is_left_out_of_dynamics(case, openmm_potential, langevin):
    system = case.tree.system()
    system.addForce(openmm.CMMotionRemover())
    state = case.start(3, seeded_generator(18))
    with OpenMMPotential(system, platform="Reference", n_contexts=1) as with_remover:
        results = [
            langevin(potential, n_steps=5)(state, seeded_generator(19))[0]
            for potential in (openmm_potential, with_remover)
        ]
    for name in ("velocities", "energy"):
        assert torch.equal(*(getattr(result, name) for result in results))


def test_a_trajectory_that_blows_up_is_rejected_and_counted(case, langevin, monkeypatch):
    generator = seeded_generator(10)
    state = case.start(5, generator)
    kernel = langevin(timestep=0.001, metropolized=False)
    propagate = kernel.propagate

    def blow_up(x, v):
        x, v, energy = propagate(x, v)
        energy[5] = torch.inf  # walker 2, rung 1
        return x, v, energy

    monkeypatch.setattr(kernel, "propagate", blow_up)
    new, info = kernel(state, generator)
    assert (info.rejected_non_finite, info.outside_domain) == (1, 0)
    assert info.accepted.tolist() == [5, 4]
    assert torch.equal(new.x[2, 1], state.x[2, 1])
    assert float(new.energy[2, 1]) == float(state.energy[2, 1])


def test_resetting_the_pose_is_noticed(case, openmm_potential, langevin):
    # Hamiltonian dynamics: without friction, which would hide the error.
    kernel = langevin(n_steps=100, timestep=0.008, friction=0.0)
    checks = {case.flow: exact.assert_exact, exact.WithoutPose(case.flow): exact.assert_noticed}
    for flow, check in checks.items():
        generator = seeded_generator(11)
        state = case.start(700, generator)
        walk = FlowWalk(flow, openmm_potential, LADDER, 0.05, round_trip_tolerance=10.0)
        new, _ = exact.apply([walk, walk, kernel] * 2 + [walk, walk], state, generator)
        outer = ("lab", "rotation", "translation", "rungs")
        check({k: z for k, z in case.scores(new).items() if not any(name in k for name in outer)})


class FailingContext(exact.Changed):
    """A Context that cannot return the state at the end of a trajectory."""

    message = "unforeseen"
    broken_for_good = False

    def getState(self, **what):
        if self.broken_for_good or "getVelocities" in what:
            raise openmm.OpenMMException(self.message)
        return self.unchanged.getState(**what)


class OneFailingContext(exact.Changed):
    """A potential that opens a failing Context, kept as `context`."""

    n_evaluations = 0

    def make_context(self, integrator):
        self.context = FailingContext(self.unchanged.make_context(integrator))
        return self.context


def test_an_infinite_number_in_openmm_is_a_rejection(case, openmm_potential, langevin):
    generator = seeded_generator(20)
    state = case.start(3, generator)
    potential = OneFailingContext(openmm_potential)
    kernel = langevin(potential, n_steps=2)
    for message in ("Energy or force is infinite", "overflow in neighbor list", "unforeseen"):
        potential.context.message = message
        after, info = kernel(state, generator)
        assert info.rejected_non_finite == 6
        assert torch.equal(after.x, state.x)
    potential.context.message, potential.context.broken_for_good = "device lost", True
    with pytest.raises(openmm.OpenMMException, match="device lost"):
        kernel(state, generator)


@pytest.mark.parametrize("scheme", ["even_odd", "random_pairs", [(0, 2), (3, 1)]])
def test_plain_swaps_exchange_all_of_a_replica(scheme):
    case = case_of((300.0, 350.0, 420.0, 500.0))
    generator = seeded_generator(12)
    state = case.start(400, generator)
    new, _ = exact.apply([PlainSwap(case.ladder, KB, scheme)], state, generator, times=6)
    moved = new.replica != state.replica
    assert float(moved.double().mean()) > 0.1
    for walker, rung in moved.nonzero()[:50].tolist():
        source = int(new.replica[walker, rung])
        assert torch.equal(new.x[walker, rung], state.x[walker, source])
        assert float(new.energy[walker, rung]) == float(state.energy[walker, source])
        scaled = (case.ladder[rung] / case.ladder[source]) ** 0.5 * state.velocities[walker, source]
        torch.testing.assert_close(new.velocities[walker, rung], scaled)


class InAField(TreePotential):
    """The tree in a uniform field: the energy depends on the pose."""

    def energy(self, x):
        return super().energy(x) + 40.0 * x[:, -1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [FlowWalk, FlowIndependence])
def test_energies_are_those_of_the_stored_configurations(kind, dtype):
    case, generator = case_of(LADDER), seeded_generator(18)
    case.potential = InAField(case.tree)
    flow = copy.deepcopy(case.flow).to(dtype)
    state = case.start(200, generator)
    kernel = kind(flow, case.potential, LADDER, round_trip_tolerance=1e-3)
    for _ in range(3):
        state, info = kernel(state, generator)
        assert int(info.accepted.sum()) > 0
    exact.assert_energies_are_stored(case.potential, state, atol=1e-9)


def test_a_pose_dependent_energy_is_sampled_exactly(case):
    # At a fixed pose the field's part of the energy is a function of the internal coordinates:
    # weights turn exact samples without the field into exact ones with it.
    tree, potential, n = case.tree, InAField(case.tree), 6000
    generator = seeded_generator(19)
    u = tree.sample_internal(n, 600.0, generator)
    like = torch.tensor(POSITIONS)[None].expand(n, -1, -1)
    x = tree.polar.place(u, like=like)
    field = (potential.energy(x) - case.potential.energy(x)) / (KB * 600.0)
    weight = torch.softmax(-field, 0)
    chosen = torch.multinomial(weight, n, replacement=True, generator=generator)
    draw = FlowIndependence(case.flow, potential, (600.0,))
    state = exact.fresh_state(potential, x[chosen][:, None], None)
    state, _ = exact.apply([draw] * 4, state, generator)
    height = x[:, -1, 2]
    expected = (weight * height).sum()
    after = state.x[:, 0, -1, 2]
    error_of_weights = (weight.square() * (height - expected).square()).sum()
    stderr = (2 * error_of_weights + after.var() / n).sqrt()
    assert abs(float((height.mean() - expected) / stderr)) > 2 * exact.LIMIT  # the field matters
    assert abs(float((after.mean() - expected) / stderr)) < exact.LIMIT
