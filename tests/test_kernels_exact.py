"""Every kernel leaves the exact distribution invariant, velocities included; mutants do not.

Walkers start from exact samples of their rung; after some applications they must still be exact
samples. |z| < 4 for every mean, variance and histogram; seeds were fixed beforehand.
"""

import copy

import numpy as np
import openmm
import pytest
import torch
from exact_tree import (
    POSITIONS,
    ExactTree,
    Marginal,
    TreePotential,
    uniform_scores,
    velocity_scores,
)

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.potentials.models import DoubleWell, GaussianWell
from openmm_tsf.sampling.kernels import (
    Every,
    FlowIndependence,
    FlowWalk,
    LangevinLeg,
    PlainSwap,
    WalkerState,
)
from openmm_tsf.sampling.tempering import ParallelTempering
from openmm_tsf.systems import MolecularSystem
from openmm_tsf.units import KB

LADDER = (300.0, 600.0)
FLOWS = {
    "tsf-volume": ("tsf", "volume", 0.3),
    "tsf-plain": ("tsf", "plain", 0.3),
    "realnvp-plain": ("realnvp", "plain", 0.5),
}
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
def flows(tree):
    made = {name: tree.flow(*choice) for name, choice in FLOWS.items()}
    for name in ("tsf-volume", "realnvp-plain"):
        made[f"{name}-mixed"] = copy.deepcopy(made[name])
        made[f"{name}-mixed"].conditioner_dtype = torch.float32
    return made


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


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("move", ["walk", "independence"])
def test_flow_moves_are_exact(tree, potential, flows, name, move):
    generator = torch.Generator().manual_seed(2)
    state = exact_state(tree, potential, LADDER, 3000, generator)
    kernel = (
        FlowWalk(flows[name], potential, LADDER, [0.15, 0.2])
        if move == "walk"
        else FlowIndependence(flows[name], potential, LADDER)
    )
    new, infos = apply([kernel] * 5, state, generator)
    total = sum(infos[1:], infos[0])
    assert bool((total.acceptance > 0.02).all())
    assert bool((total.acceptance < 0.95).all())
    assert total.rejected_non_finite > 0
    assert total.mirror_images > 0
    assert 0 < total.outside_domain <= total.rejected_non_finite
    assert_exact(tree_scores(tree, new))
    torch.testing.assert_close(
        new.energy.flatten(), potential.energy(new.x.flatten(0, 1)), rtol=0, atol=1e-8
    )
    assert new.velocities is state.velocities
    # Walkers keep the place of their root and the axes that they carry, and really moved.
    for before, after in zip(
        tree.plain.pose(state.x.flatten(0, 1)), tree.plain.pose(new.x.flatten(0, 1)), strict=True
    ):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-9)
    assert float((new.x - state.x).abs().amax(dim=(2, 3)).gt(1e-4).double().mean()) > 0.05


@pytest.mark.parametrize("name", [*FLOWS, "tsf-volume-mixed", "realnvp-plain-mixed"])
@pytest.mark.parametrize("move", ["walk", "independence"])
def test_steps_that_share_their_momenta_are_exact(tree, potential, flows, name, move):
    generator = torch.Generator().manual_seed(22)
    state = exact_state(tree, potential, LADDER, 3000, generator)
    kernel = (
        FlowWalk(flows[name], potential, LADDER, [0.15, 0.2], n_steps=4)
        if move == "walk"
        else FlowIndependence(flows[name], potential, LADDER, n_steps=4)
    )
    evaluations = potential.n_evaluations
    new, infos = apply([kernel] * 3, state, generator)
    total = sum(infos[1:], infos[0])
    assert total.proposed.tolist() == [3 * 4 * 3000] * 2
    assert bool(((total.acceptance > 0.02) & (total.acceptance < 0.95)).all())
    assert total.n_evaluations == potential.n_evaluations - evaluations
    # What is outside the domain is not evaluated, and nothing else.
    not_evaluated = 2 * 3 * 4 * 3000 - total.n_evaluations
    assert not_evaluated == total.outside_domain + total.mirror_images
    assert total.outside_domain <= total.rejected_non_finite
    assert_exact(tree_scores(tree, new))
    torch.testing.assert_close(
        new.energy.flatten(), potential.energy(new.x.flatten(0, 1)), rtol=0, atol=1e-8
    )


def test_one_step_and_more_are_the_same_walk(tree, potential, flows):
    """With the momenta at hand, two steps in one call are two calls of one step."""
    flow, generator = flows["tsf-volume"], torch.Generator()
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
        x_new = flow.place(torch.where(inside[:, None, None], x_new, x), like=x)
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


class Mutant:
    """A flow with one thing changed."""

    def __init__(self, flow):
        self._flow = flow

    def __getattr__(self, name):
        return getattr(self._flow, name)


class WithoutJacobian(Mutant):
    def forward_and_log_det(self, v):
        image, log_det = self._flow.forward_and_log_det(v)
        return image, torch.where(torch.isfinite(log_det), 0.0, log_det)

    def inverse_and_log_det(self, x, momenta):
        v, log_det = self._flow.inverse_and_log_det(x, momenta)
        return v, torch.where(torch.isfinite(log_det), 0.0, log_det)


class WithoutPose(Mutant):
    def place(self, x, like):
        return x


class WalkWithoutMomenta(FlowWalk):
    def _log_weight(self, energy, kt, momenta, tau, log_det):
        return -energy / kt + log_det


class IndependenceWithoutMomenta(FlowIndependence):
    def _log_weight(self, energy, kt, momenta, tau, log_det):
        return -energy / kt + log_det


class IndependenceWithoutPrior(FlowIndependence):
    def _reverse(self, v, tau):
        return torch.zeros_like(tau)


class ForgetsTheLatent(FlowWalk):
    """Walks on from proposals that were rejected: v and x no longer belong together."""

    def _propose(self, v, tau, generator):
        self._v = super()._propose(getattr(self, "_v", v), tau, generator)
        return self._v


def test_a_latent_that_is_not_the_walkers_is_noticed(tree, potential, flows):
    generator = torch.Generator().manual_seed(25)
    state = exact_state(tree, potential, LADDER, 3000, generator)
    for _ in range(6):
        kernel = ForgetsTheLatent(flows["tsf-volume"], potential, LADDER, 0.15, n_steps=4)
        state, _ = kernel(state, generator)
    assert_noticed(tree_scores(tree, state))


@pytest.mark.parametrize("n_steps", [0, 1.5, True])
def test_the_number_of_steps_is_checked(tree, potential, flows, n_steps):
    with pytest.raises(ValueError, match=r"n_steps: expected an integer of at least 1"):
        FlowWalk(flows["tsf-volume"], potential, LADDER, n_steps=n_steps)


@pytest.mark.parametrize("name", ["tsf-plain", "realnvp-plain"])
def test_dropping_the_jacobian_is_noticed(tree, potential, flows, name):
    generator = torch.Generator().manual_seed(3)
    state = exact_state(tree, potential, LADDER, 3000, generator)
    kernel = FlowWalk(WithoutJacobian(flows[name]), potential, LADDER, 0.2)
    new, _ = apply([kernel] * 30, state, generator)
    assert_noticed(tree_scores(tree, new))


@pytest.mark.parametrize(
    ("cls", "strength", "n_walkers", "times"),
    [
        (WalkWithoutMomenta, 0.8, 3000, 30),
        (IndependenceWithoutMomenta, 0.3, 3000, 20),
        (IndependenceWithoutPrior, 0.3, 2000, 8),
    ],
)
def test_dropping_a_term_is_noticed(tree, potential, cls, strength, n_walkers, times):
    generator = torch.Generator().manual_seed(4)
    state = exact_state(tree, potential, LADDER, n_walkers, generator)
    kernel = cls(tree.flow("tsf", "volume", strength), potential, LADDER)
    new, _ = apply([kernel] * times, state, generator)
    assert_noticed(tree_scores(tree, new))


def test_a_flow_that_does_not_round_trip_is_refused(tree, potential):
    flow = tree.flow(*FLOWS["tsf-volume"]).float()
    state = exact_state(tree, potential, LADDER, 50, torch.Generator().manual_seed(5))
    kernel = FlowWalk(flow, potential, LADDER, round_trip_tolerance=1e-9)
    with pytest.raises(RuntimeError, match=r"round trip .* misses the positions .*float32"):
        kernel(state, torch.Generator().manual_seed(5))


# -- dynamics ----------------------------------------------------------------------------------


def leg(tree, openmm_potential, flow, **settings):
    return LangevinLeg(openmm_potential, LADDER, tree.masses, flow, friction=20.0, **settings)


@pytest.mark.parametrize(
    ("metropolized", "timestep"), [(True, 0.02), (False, 0.004)], ids=["exact", "small-step"]
)
def test_langevin_legs(tree, openmm_potential, flows, metropolized, timestep):
    generator = torch.Generator().manual_seed(6)
    state = exact_state(tree, openmm_potential, LADDER, 1500, generator)
    kernel = leg(
        tree,
        openmm_potential,
        flows["tsf-volume"],
        n_steps=10,
        timestep=timestep,
        metropolized=metropolized,
    )
    new, infos = apply([kernel] * 4, state, generator)
    kernel.close()
    assert kernel.exact == metropolized
    total = sum(infos[1:], infos[0])
    assert total.mirror_images > 0
    if metropolized:
        assert bool((total.acceptance < 0.97).all())
    assert_exact(tree_scores(tree, new))
    torch.testing.assert_close(
        new.energy.flatten(), openmm_potential.energy(new.x.flatten(0, 1)), rtol=0, atol=1e-8
    )


def test_a_large_step_without_metropolis_is_noticed(tree, openmm_potential, flows):
    generator = torch.Generator().manual_seed(7)
    state = exact_state(tree, openmm_potential, LADDER, 1500, generator)
    kernel = leg(
        tree,
        openmm_potential,
        flows["tsf-volume"],
        n_steps=10,
        timestep=0.02,
        metropolized=False,
    )
    new, _ = apply([kernel] * 4, state, generator)
    kernel.close()
    assert_noticed(tree_scores(tree, new))


def test_legs_do_not_depend_on_contexts(tree, openmm_potential, flows):
    state = exact_state(tree, openmm_potential, LADDER, 7, torch.Generator().manual_seed(8))
    results = []
    for n_contexts in (1, 3):
        kernel = leg(tree, openmm_potential, flows["tsf-volume"], n_steps=30, n_contexts=n_contexts)
        before = openmm_potential.n_evaluations
        new, infos = apply([kernel] * 2, state, torch.Generator().manual_seed(9))
        assert openmm_potential.n_evaluations - before == 2 * 14 * 31
        assert sum(info.n_evaluations for info in infos) == 2 * 14 * 31
        kernel.close()
        results.append(new)
    assert torch.equal(results[0].x, results[1].x)
    assert torch.equal(results[0].velocities, results[1].velocities)
    assert torch.equal(results[0].energy, results[1].energy)


def test_a_centre_of_mass_remover_is_left_out_of_dynamics(tree, openmm_potential, flows):
    system = tree.system()
    system.addForce(openmm.CMMotionRemover())
    state = exact_state(tree, openmm_potential, LADDER, 3, torch.Generator().manual_seed(18))
    results = []
    with OpenMMPotential(system, platform="Reference", n_contexts=1) as with_remover:
        for potential in (openmm_potential, with_remover):
            kernel = leg(tree, potential, flows["tsf-volume"], n_steps=5)
            results.append(kernel(state, torch.Generator().manual_seed(19))[0])
            kernel.close()
    assert torch.equal(results[0].velocities, results[1].velocities)
    assert torch.equal(results[0].energy, results[1].energy)


def test_a_leg_that_blows_up_is_rejected_and_counted(tree, openmm_potential, flows, monkeypatch):
    generator = torch.Generator().manual_seed(10)
    state = exact_state(tree, openmm_potential, LADDER, 5, generator)
    kernel = leg(tree, openmm_potential, flows["tsf-volume"], timestep=0.001, metropolized=False)
    propagate = kernel._propagate

    def blow_up(x, v):
        x, v, energy = propagate(x, v)
        energy[5] = torch.inf  # walker 2, rung 1
        return x, v, energy

    monkeypatch.setattr(kernel, "_propagate", blow_up)
    new, info = kernel(state, generator)
    kernel.close()
    assert info.rejected_non_finite == 1
    assert info.outside_domain == 0
    assert info.accepted.tolist() == [5, 4]
    assert torch.equal(new.x[2, 1], state.x[2, 1])
    assert float(new.energy[2, 1]) == float(state.energy[2, 1])


def test_resetting_the_pose_is_noticed(tree, openmm_potential, flows):
    """Flow moves and dynamics in turn: exact as they are, wrong if the pose is forgotten."""
    kernel = leg(tree, openmm_potential, flows["tsf-volume"], n_steps=100, timestep=0.008)
    kernel._keep = 1.0  # Hamiltonian dynamics: no friction that would hide the error
    for flow, check in (
        (flows["tsf-volume"], assert_exact),
        (WithoutPose(flows["tsf-volume"]), assert_noticed),
    ):
        generator = torch.Generator().manual_seed(11)
        state = exact_state(tree, openmm_potential, LADDER, 700, generator)
        walk = FlowWalk(flow, openmm_potential, LADDER, 0.05, round_trip_tolerance=10.0)
        new, _ = apply([walk, walk, kernel] * 2 + [walk, walk], state, generator)
        scores = tree_scores(tree, new)
        check({name: z for name, z in scores.items() if "lab" not in name})
    kernel.close()


# -- swaps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["even_odd", "random_pairs", [(0, 2), (3, 1)]])
def test_swaps_are_exact(tree, potential, scheme):
    ladder = (300.0, 350.0, 420.0, 500.0)
    generator = torch.Generator().manual_seed(12)
    state = exact_state(tree, potential, ladder, 3000, generator)
    kernel = PlainSwap(ladder, KB, scheme)
    new, infos = apply([kernel] * 6, state, generator)
    total = sum(infos[1:], infos[0])
    assert total.accepted.shape == kernel.counts_shape
    if scheme == "even_odd":
        assert total.proposed.tolist() == [9000, 9000, 9000]
        assert bool(((total.acceptance > 0.05) & (total.acceptance < 0.95)).all())
    elif scheme != "random_pairs":
        assert total.proposed.nonzero().tolist() == [[0, 2], [1, 3]]
    else:
        assert int(total.proposed.sum()) == 6 * 2 * 3000
        assert bool((total.proposed.triu(1) == total.proposed).all())
        assert bool((total.acceptance[0, 1:] > 0.01).all())
    assert_exact(tree_scores(tree, new, ladder))
    assert torch.equal(new.replica.sort(dim=1).values, state.replica)
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


def test_swaps_without_scaled_velocities_are_noticed(tree, potential):
    generator = torch.Generator().manual_seed(13)
    state = exact_state(tree, potential, LADDER, 3000, generator)
    kernel = PlainSwap(LADDER, KB)
    kernel._kelvin = torch.ones(2, dtype=torch.float64)
    new, _ = apply([kernel] * 6, state, generator)
    assert_noticed(tree_scores(tree, new))


# -- energies belong to what is stored ---------------------------------------------------------


class InAField(TreePotential):
    """The tree in a uniform field: the energy depends on the pose."""

    def energy(self, x):
        return super().energy(x) + 40.0 * x[:, -1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [FlowWalk, FlowIndependence])
def test_energies_are_those_of_the_stored_configurations(tree, flows, kind, dtype):
    potential, generator = InAField(tree), torch.Generator().manual_seed(18)
    flow = copy.deepcopy(flows["tsf-volume"]).to(dtype)
    state = exact_state(tree, potential, LADDER, 200, generator)
    kernel = kind(flow, potential, LADDER, round_trip_tolerance=1e-3)
    for _ in range(3):
        state, info = kernel(state, generator)
        assert int(info.accepted.sum()) > 0
    torch.testing.assert_close(
        potential.energy(state.x.flatten(0, 1)).reshape(200, 2), state.energy, rtol=0, atol=1e-9
    )


def test_a_pose_dependent_energy_is_sampled_exactly(tree, flows):
    # At a fixed pose the field's part of the energy is a function of the internal coordinates:
    # weights turn exact samples without the field into exact ones with it.
    potential, plain, n = InAField(tree), TreePotential(tree), 6000
    flow, generator = flows["tsf-volume"], torch.Generator().manual_seed(19)
    u = tree.sample_internal(n, 600.0, generator)
    like = torch.tensor(POSITIONS)[None].expand(n, -1, -1)
    x = tree.plain.place(u, like=like)
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


def test_an_infinite_number_in_openmm_is_a_rejection(tree, openmm_potential):
    generator = torch.Generator().manual_seed(20)
    state = exact_state(tree, openmm_potential, LADDER, 3, generator)
    leg = LangevinLeg(openmm_potential, LADDER, tree.masses, None, n_steps=2)
    worker = leg._workers[0]
    working = worker._context

    class Context:
        """OpenMM's Context, out of which one leg's state does not come."""

        def __init__(self, message, broken_for_good=False):
            self.message, self.broken_for_good = message, broken_for_good

        def __getattr__(self, name):
            return getattr(working, name)

        def getState(self, **what):
            if self.broken_for_good or "getVelocities" in what:
                raise openmm.OpenMMException(self.message)
            return working.getState(**what)

    for message in ("Energy or force is infinite", "overflow in neighbor list", "unforeseen"):
        worker._context = Context(message)
        after, info = leg(state, generator)
        assert info.rejected_non_finite == 6
        assert torch.equal(after.x, state.x)
    worker._context = Context("device lost", broken_for_good=True)
    with pytest.raises(openmm.OpenMMException, match="device lost"):
        leg(state, generator)
    leg.close()


# -- everything together -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tsf-volume", "realnvp-plain"])
def test_the_whole_mixture_is_exact(tree, openmm_potential, flows, name):
    ladder = (300.0, 400.0, 520.0)
    molecule = MolecularSystem(tree.system(), tree.topology, POSITIONS)
    flow = flows[name]
    schedule = [
        FlowIndependence(flow, openmm_potential, ladder),
        Every(FlowWalk(flow, openmm_potential, ladder, 0.15), repeats=3),
        LangevinLeg(openmm_potential, ladder, tree.masses, flow, n_steps=12, timestep=0.012),
        Every(PlainSwap(ladder, KB, "even_odd"), interval=2),
        PlainSwap(ladder, KB, "random_pairs", name="swap_random"),
    ]
    sampler = ParallelTempering(molecule, flow, ladder, 800, schedule, openmm_potential, seed=14)
    start = exact_state(tree, openmm_potential, ladder, 800, torch.Generator().manual_seed(15))
    sampler.set_positions(start.x, start.velocities)
    sampler.run(4, progress=False)
    assert sampler.exact
    assert_exact(tree_scores(tree, sampler.state, ladder))
    local = sampler.kernels["local"]
    assert isinstance(local, LangevinLeg)
    local.close()


def well(potential, i, temperature):
    a, b, c = (float(values[i]) for values in (potential.a, potential.b, potential.c))
    return Marginal(lambda y: -(a * y + b * y**2 + c * y**4) / temperature, -7.0, 7.0)


@pytest.mark.parametrize("which", ["gaussian", "double-well"])
def test_potentials_that_are_not_molecules(which):
    ladder, d = (0.7, 1.0, 1.6), 3
    generator = torch.Generator().manual_seed(16)
    flow = TemperatureSteerableFlow(d, 2, 2, (12,), 1.0, seed=3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.15 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    if which == "gaussian":
        mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
        precision = mixing @ mixing.T / d + torch.eye(d, dtype=torch.float64)
        potential = GaussianWell(precision)
        root = torch.linalg.cholesky(precision)
    else:
        coefficients = ([0.2, 0.5, -0.3], [-1.5, -1.0, 1.0], [0.5, 0.4, 0.0])
        a, b, c = (torch.tensor(row, dtype=torch.float64) for row in coefficients)
        potential = DoubleWell(a, b, c)
    n = 4000
    x = torch.stack([potential.sample(n, t, generator) for t in ladder], dim=1)
    sampler = ParallelTempering(None, flow, ladder, n, potential=potential, seed=17)
    sampler.set_positions(x)
    assert sampler.state.velocities is None
    sampler.run(5, progress=False)
    for name in ("flow_walk", "flow_independent", "swap_plain"):
        acceptance = sampler.totals[name].acceptance
        assert bool(((acceptance > 0.05) & (acceptance < 0.97)).all()), (name, acceptance)
    for rung, temperature in enumerate(ladder):
        samples = sampler.state.x[:, rung]
        if which == "gaussian":
            unit = samples @ root / temperature**0.5
            pit = torch.special.ndtr(unit).numpy()
        else:
            terms = [well(potential, i, temperature) for i in range(d)]
            pit = np.stack([terms[i].pit(samples[:, i].numpy()) for i in range(d)], axis=1)
        assert_exact(uniform_scores(pit))
