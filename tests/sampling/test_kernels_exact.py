"""Flow moves, OpenMM's legs and plain swaps: what they do beside leaving the ensemble invariant.

That they do, and that mutants do not, is in test_invariance.py. Where walkers must be exact samples
here too, |z| < 4 for every mean, variance and histogram; seeds were fixed beforehand.
"""

import copy

import numpy as np
import openmm
import pytest
import torch

from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.sampling.kernels import (
    FlowIndependence,
    FlowWalk,
    OpenMMLangevin,
    PlainSwap,
    WalkerState,
)
from openmm_tsf.units import KB
from tests.support.exact_cases import WithoutPose
from tests.support.exact_tree import (
    POSITIONS,
    ExactTree,
    TreePotential,
    uniform_scores,
    velocity_scores,
)

LADDER = (300.0, 600.0)
FLOW = ("tsf", "volume", 0.3)
LIMIT = 4.0


@pytest.fixture(scope="module")
def tree():
    return ExactTree()


@pytest.fixture(scope="module")
def potential(tree):
    return TreePotential(tree)


@pytest.fixture(scope="module")
def openmm_potential(tree):
    with OpenMMPotential(tree.system(), platform="Reference", n_contexts=1) as potential:
        yield potential


@pytest.fixture(scope="module")
def flow(tree):
    return tree.flow(*FLOW)


def exact_state(tree, potential, ladder, n_walkers, generator):
    x = torch.stack([tree.sample(n_walkers, t, generator) for t in ladder], dim=1)
    v = torch.stack([tree.velocities(n_walkers, t, generator) for t in ladder], dim=1)
    energy = potential.energy(x.flatten(0, 1)).reshape(n_walkers, len(ladder))
    return WalkerState(x, v, energy, torch.arange(len(ladder)).repeat(n_walkers, 1))


def apply(kernels, state, generator):
    infos = []
    for kernel in kernels:
        state, info = kernel(state, generator)
        infos.append(info)
    return state, infos


def tree_scores(tree, state, ladder=LADDER):
    scores = {}
    for rung, temperature in enumerate(ladder):
        x, v = state.x[:, rung], state.velocities[:, rung]
        parts = uniform_scores(tree.pit(x, temperature))
        parts |= velocity_scores(tree, x, v, temperature)
        scores |= {f"{temperature:.0f} K {name}": z for name, z in parts.items()}
    return scores


def worst(scores):
    name = max(scores, key=lambda key: np.abs(scores[key]).max())
    return float(np.abs(scores[name]).max()), name


def assert_exact(scores):
    z, name = worst(scores)
    assert z < LIMIT, f"{name}: |z| = {z:.1f}"


def assert_noticed(scores):
    z, name = worst(scores)
    assert z > 1.5 * LIMIT, f"a mutant passes, the worst is {name}: |z| = {z:.1f}"


# -- the molecule itself -----------------------------------------------------------------------


def test_torch_and_openmm_energies_agree(tree, potential, openmm_potential):
    x = tree.sample(200, 600.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(potential.energy(x), openmm_potential.energy(x), rtol=0, atol=1e-10)


def test_exact_samples_are_exact(tree, potential):
    state = exact_state(tree, potential, LADDER, 4000, torch.Generator().manual_seed(1))
    assert_exact(tree_scores(tree, state))


# -- flow moves --------------------------------------------------------------------------------


def test_one_step_and_more_are_the_same_walk(tree, potential, flow):
    """With the momenta at hand, two steps in one call are two calls of one step."""
    generator = torch.Generator()
    state = exact_state(tree, potential, LADDER, 100, generator.manual_seed(23))
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


@pytest.mark.parametrize("n_steps", [0, 1.5, True])
def test_the_number_of_steps_is_checked(tree, potential, flow, n_steps):
    with pytest.raises(ValueError, match=r"n_steps: expected an integer of at least 1"):
        FlowWalk(flow, potential, LADDER, n_steps=n_steps)


def test_a_flow_that_does_not_round_trip_is_refused(tree, potential):
    flow = tree.flow(*FLOW).float()
    state = exact_state(tree, potential, LADDER, 50, torch.Generator().manual_seed(5))
    kernel = FlowWalk(flow, potential, LADDER, round_trip_tolerance=1e-9)
    with pytest.raises(RuntimeError, match=r"round trip .* misses the positions .*float32"):
        kernel(state, torch.Generator().manual_seed(5))


# -- dynamics ----------------------------------------------------------------------------------


def leg(tree, openmm_potential, flow, **settings):
    settings = {"friction": 20.0, **settings}
    return OpenMMLangevin(openmm_potential, LADDER, tree.masses, flow, **settings)


def test_a_leg_without_metropolis_is_nearly_exact(tree, openmm_potential, flow):
    generator = torch.Generator().manual_seed(6)
    state = exact_state(tree, openmm_potential, LADDER, 1500, generator)
    kernel = leg(
        tree,
        openmm_potential,
        flow,
        n_steps=10,
        timestep=0.004,
        metropolized=False,
    )
    new, infos = apply([kernel] * 4, state, generator)
    kernel.close()
    assert not kernel.exact
    assert sum(infos[1:], infos[0]).mirror_images > 0
    assert_exact(tree_scores(tree, new))
    torch.testing.assert_close(
        new.energy.flatten(), openmm_potential.energy(new.x.flatten(0, 1)), rtol=0, atol=1e-8
    )


def test_legs_do_not_depend_on_contexts(tree, openmm_potential, flow):
    state = exact_state(tree, openmm_potential, LADDER, 7, torch.Generator().manual_seed(8))
    results = []
    for n_contexts in (1, 3):
        kernel = leg(tree, openmm_potential, flow, n_steps=30, n_contexts=n_contexts)
        before = openmm_potential.n_evaluations
        new, infos = apply([kernel] * 2, state, torch.Generator().manual_seed(9))
        assert openmm_potential.n_evaluations - before == 2 * 14 * 31
        assert sum(info.n_evaluations for info in infos) == 2 * 14 * 31
        kernel.close()
        results.append(new)
    assert torch.equal(results[0].x, results[1].x)
    assert torch.equal(results[0].velocities, results[1].velocities)
    assert torch.equal(results[0].energy, results[1].energy)


def test_a_centre_of_mass_remover_is_left_out_of_dynamics(tree, openmm_potential, flow):
    system = tree.system()
    system.addForce(openmm.CMMotionRemover())
    state = exact_state(tree, openmm_potential, LADDER, 3, torch.Generator().manual_seed(18))
    results = []
    with OpenMMPotential(system, platform="Reference", n_contexts=1) as with_remover:
        for potential in (openmm_potential, with_remover):
            kernel = leg(tree, potential, flow, n_steps=5)
            results.append(kernel(state, torch.Generator().manual_seed(19))[0])
            kernel.close()
    assert torch.equal(results[0].velocities, results[1].velocities)
    assert torch.equal(results[0].energy, results[1].energy)


def test_a_leg_that_blows_up_is_rejected_and_counted(tree, openmm_potential, flow, monkeypatch):
    generator = torch.Generator().manual_seed(10)
    state = exact_state(tree, openmm_potential, LADDER, 5, generator)
    kernel = leg(tree, openmm_potential, flow, timestep=0.001, metropolized=False)
    propagate = kernel.propagate

    def blow_up(x, v):
        x, v, energy = propagate(x, v)
        energy[5] = torch.inf  # walker 2, rung 1
        return x, v, energy

    monkeypatch.setattr(kernel, "propagate", blow_up)
    new, info = kernel(state, generator)
    kernel.close()
    assert info.rejected_non_finite == 1
    assert info.outside_domain == 0
    assert info.accepted.tolist() == [5, 4]
    assert torch.equal(new.x[2, 1], state.x[2, 1])
    assert float(new.energy[2, 1]) == float(state.energy[2, 1])


def test_resetting_the_pose_is_noticed(tree, openmm_potential, flow):
    """Flow moves and dynamics in turn: exact as they are, wrong if the pose is forgotten."""
    # Hamiltonian dynamics: without friction, which would hide the error.
    kernel = leg(tree, openmm_potential, flow, n_steps=100, timestep=0.008, friction=0.0)
    for mover, check in ((flow, assert_exact), (WithoutPose(flow), assert_noticed)):
        generator = torch.Generator().manual_seed(11)
        state = exact_state(tree, openmm_potential, LADDER, 700, generator)
        walk = FlowWalk(mover, openmm_potential, LADDER, 0.05, round_trip_tolerance=10.0)
        new, _ = apply([walk, walk, kernel] * 2 + [walk, walk], state, generator)
        scores = tree_scores(tree, new)
        check({name: z for name, z in scores.items() if "lab" not in name})
    kernel.close()


# -- swaps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["even_odd", "random_pairs", [(0, 2), (3, 1)]])
def test_what_a_plain_swap_takes_along(tree, potential, scheme):
    ladder = (300.0, 350.0, 420.0, 500.0)
    generator = torch.Generator().manual_seed(12)
    state = exact_state(tree, potential, ladder, 400, generator)
    kernel = PlainSwap(ladder, KB, scheme)
    new, _ = apply([kernel] * 6, state, generator)
    moved = new.replica != state.replica
    assert float(moved.double().mean()) > 0.1
    for walker, rung in moved.nonzero()[:50].tolist():
        home = int(new.replica[walker, rung])
        assert torch.equal(new.x[walker, rung], state.x[walker, home])
        assert float(new.energy[walker, rung]) == float(state.energy[walker, home])
        scale = (ladder[rung] / ladder[home]) ** 0.5
        torch.testing.assert_close(
            new.velocities[walker, rung], scale * state.velocities[walker, home]
        )


# -- energies belong to what is stored ---------------------------------------------------------


class InAField(TreePotential):
    """The tree in a uniform field: the energy depends on the pose."""

    def energy(self, x):
        return super().energy(x) + 40.0 * x[:, -1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [FlowWalk, FlowIndependence])
def test_energies_are_those_of_the_stored_configurations(tree, flow, kind, dtype):
    potential, generator = InAField(tree), torch.Generator().manual_seed(18)
    flow = copy.deepcopy(flow).to(dtype)
    state = exact_state(tree, potential, LADDER, 200, generator)
    kernel = kind(flow, potential, LADDER, round_trip_tolerance=1e-3)
    for _ in range(3):
        state, info = kernel(state, generator)
        assert int(info.accepted.sum()) > 0
    torch.testing.assert_close(
        potential.energy(state.x.flatten(0, 1)).reshape(200, 2), state.energy, rtol=0, atol=1e-9
    )


def test_a_pose_dependent_energy_is_sampled_exactly(tree, flow):
    # At a fixed pose the field's part of the energy is a function of the internal coordinates:
    # weights turn exact samples without the field into exact ones with it.
    potential, plain, n = InAField(tree), TreePotential(tree), 6000
    generator = torch.Generator().manual_seed(19)
    u = tree.sample_internal(n, 600.0, generator)
    like = torch.tensor(POSITIONS)[None].expand(n, -1, -1)
    x = tree.polar.place(u, like=like)
    field = (potential.energy(x) - plain.energy(x)) / (KB * 600.0)
    weight = torch.softmax(-field, 0)
    chosen = torch.multinomial(weight, n, replacement=True, generator=generator)
    start = x[chosen]
    state = WalkerState(
        start[:, None], None, potential.energy(start)[:, None], torch.zeros(n, 1, dtype=torch.int64)
    )
    state, _ = apply([FlowIndependence(flow, potential, (600.0,))] * 4, state, generator)
    height = x[:, -1, 2]
    expected = (weight * height).sum()
    after = state.x[:, 0, -1, 2]
    error_of_weights = (weight.square() * (height - expected).square()).sum()
    stderr = (2 * error_of_weights + after.var() / n).sqrt()
    assert abs(float((height.mean() - expected) / stderr)) > 2 * LIMIT  # the field matters
    assert abs(float((after.mean() - expected) / stderr)) < LIMIT


class FailingContext:
    """A Context that cannot return the state at the end of a trajectory."""

    message = "unforeseen"
    broken_for_good = False

    def __init__(self, context):
        self.working = context

    def __getattr__(self, name):
        return getattr(self.working, name)

    def getState(self, **what):
        if self.broken_for_good or "getVelocities" in what:
            raise openmm.OpenMMException(self.message)
        return self.working.getState(**what)


class OneFailingContext:
    """A potential that opens a failing Context, kept as `context`."""

    def __init__(self, potential):
        self.working = potential

    def __getattr__(self, name):
        return getattr(self.working, name)

    def make_context(self, integrator):
        self.context = FailingContext(self.working.make_context(integrator))
        return self.context


def test_an_infinite_number_in_openmm_is_a_rejection(tree, openmm_potential):
    generator = torch.Generator().manual_seed(20)
    state = exact_state(tree, openmm_potential, LADDER, 3, generator)
    potential = OneFailingContext(openmm_potential)
    potential.n_evaluations = 0
    langevin = OpenMMLangevin(potential, LADDER, tree.masses, None, n_steps=2)
    for message in ("Energy or force is infinite", "overflow in neighbor list", "unforeseen"):
        potential.context.message = message
        after, info = langevin(state, generator)
        assert info.rejected_non_finite == 6
        assert torch.equal(after.x, state.x)
    potential.context.message, potential.context.broken_for_good = "device lost", True
    with pytest.raises(openmm.OpenMMException, match="device lost"):
        langevin(state, generator)
    langevin.close()
