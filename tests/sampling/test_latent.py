"""Steered swaps, latent MALA and HMC, the walk without a flow: what they change, arguments.

That they leave ensembles invariant, and that mutants do not, is in test_invariance.py.
"""

import copy
import json

import pytest
import torch

from openmm_tsf.flows import RealNVPFlow
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.internal_walk import InternalWalk, WhitenedCoordinates
from openmm_tsf.sampling.kernels.latent import LatentBatch, LatentHMC, LatentMALA
from openmm_tsf.sampling.kernels.multiple_try import FlowMultipleTry
from openmm_tsf.sampling.kernels.pairing import Pairing
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.sampling.tempering import ParallelTempering
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.utils.random import seeded_generator
from tests.support.exact_cases import (
    Changed,
    ModelCase,
    apply,
    assert_energies_are_stored,
    fresh_state,
)
from tests.support.invariance import KERNELS, layers, model, tree


def internal_walk(mode="conditional"):
    case = tree()
    return InternalWalk(layers(case, mode), case.potential, case.ladder, sigma=0.25)


def test_steered_swaps_exchange_replicas():
    """Pose, velocities and name of a replica are kept; its conformation changes."""
    case = tree("tsf-volume", 7)
    generator = seeded_generator(36)
    start = case.start(100, generator)
    end, info = SteeredSwap(case.flow, case.potential, case.ladder, [(1, 4)])(start, generator)
    moved = (end.replica[:, 1] != 1).nonzero().flatten()
    assert 10 < len(moved) == int(info.accepted[1, 4]) < 90
    still = torch.ones_like(end.replica, dtype=torch.bool)
    for source, target in ((1, 4), (4, 1)):
        still[moved, target] = False
        assert end.replica[moved, target].tolist() == [source] * len(moved)
        before, after = start.x[moved, source], end.x[moved, target]
        for a, b in zip(case.tree.polar.pose(before), case.tree.polar.pose(after), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        assert float((after - before).abs().amax()) > 1e-3
        scale = (case.ladder[target] / case.ladder[source]) ** 0.5
        expected = scale * start.velocities[moved, source]
        torch.testing.assert_close(end.velocities[moved, target], expected)
    for name in ("x", "velocities", "energy", "replica"):
        assert torch.equal(getattr(end, name)[still], getattr(start, name)[still])


def test_a_perfect_flow_always_swaps():
    case = ModelCase("gaussian", noise=0.0, ladder=(0.5, 4.0))
    case.potential.precision = torch.eye(3, dtype=torch.float64)
    generator = seeded_generator(37)
    x = torch.randn(500, 2, 3, generator=generator, dtype=torch.float64)
    x = x * torch.tensor(case.ladder)[None, :, None].sqrt()
    state = case.start(500, generator)
    state = state.evolve(x=x, energy=case.potential.energy(x.flatten(0, 1)).reshape(500, 2))
    _, steered = SteeredSwap(case.flow, case.potential, case.ladder)(state, generator)
    _, plain = PlainSwap(case.ladder, 1.0)(state, generator)
    assert int(steered.accepted) == 500
    assert int(plain.accepted) < 250


def test_openmm_gradients_give_the_same_chain():
    case = tree()
    start = case.start(20, seeded_generator(41))
    with OpenMMPotential(case.tree.system(), platform="Reference", n_contexts=1) as potential:
        for kind in (LatentMALA, LatentHMC):
            ends = []
            for target in (case.potential, potential):
                kernel = kind(case.flow, target, case.ladder, 0.2, n_steps=3)
                before = target.n_evaluations
                end, info = kernel(start, seeded_generator(42))
                assert target.n_evaluations - before == info.n_evaluations
                ends.append(end)
            torch.testing.assert_close(ends[0].x, ends[1].x, rtol=0, atol=1e-7)
            assert float((ends[0].x - start.x).abs().amax()) > 1e-2


@pytest.fixture(scope="module")
def peptide(molecule):
    """Alanine dipeptide: frames, energies, a flow, and walkers with turned methyl groups."""
    dataset = MDDataset.shipped(molecule, stride=20)
    flow = RealNVPFlow.from_dataset(dataset, n_blocks=1, hidden=(8,))
    with OpenMMPotential(molecule.system, platform="Reference", n_contexts=1) as potential:
        generator = seeded_generator(59)
        x = dataset.positions[torch.randint(len(dataset), (12,), generator=generator)]
        shift = torch.randint(3, (12, len(flow.coordinates.labelling)), generator=generator)
        x = flow.coordinates.relabel(x, shift).reshape(6, 2, -1, 3)
        yield dataset, flow, potential, fresh_state(potential, x, None)


def test_labels_are_kept_with_the_pose(peptide):
    dataset, flow, potential, start = peptide
    ladder, layer = (500.0, 600.0), flow.coordinates
    swap = SteeredSwap(flow, potential, ladder)
    walk = InternalWalk.from_dataset(dataset, potential, ladder, sigma=0.05, n_steps=10)
    mala = LatentMALA(flow, potential, ladder, 0.05, n_steps=5)
    hmc = LatentHMC(flow, potential, ladder, 0.05, n_leapfrog=2)
    assert len(layer.labelling) > 0
    labels = layer.labels(start.x.flatten(0, 1)).reshape(6, 2, -1)
    assert len(labels.unique()) == 3
    state, totals = apply([mala, hmc, walk, swap], start, seeded_generator(60), 3)
    for info in totals.values():
        assert int(info.accepted.sum()) > 0
    rows = torch.arange(6)[:, None]
    labels_after = layer.labels(state.x.flatten(0, 1)).reshape(6, 2, -1)
    assert torch.equal(labels_after, labels[rows, state.replica])
    assert_energies_are_stored(potential, state)


def test_the_gradient_is_that_of_the_target(peptide):
    _, flow, potential, start = peptide
    kernel = LatentMALA(flow, potential, (500.0, 600.0))
    x = start.x[:, 0]
    tau, kt = (torch.full((6,), value, dtype=torch.float64) for value in (0.9, 4.2))
    rows = LatentBatch(tau, kt, x, torch.ones(6, 1, dtype=torch.float64))
    v, _ = flow.inverse_and_log_det(x, x.new_zeros(6, 0))
    point, n_evaluations = kernel.evaluate_at(v, rows)
    assert n_evaluations == 6
    torch.testing.assert_close(point.x, x, rtol=0, atol=1e-9)
    generator = seeded_generator(61)
    direction = torch.randn(v.shape, generator=generator, dtype=torch.float64)
    step = 1e-5
    up, down = (kernel.evaluate_at(v + sign * step * direction, rows)[0] for sign in (1, -1))
    expected = (up.log_weight - down.log_weight) / (2 * step)
    derivative = (point.gradient * direction).sum(dim=1)
    torch.testing.assert_close(derivative, expected, rtol=1e-5, atol=1e-4)


class Mirroring(Changed):
    """A flow that mirrors half of its images after `n_good` calls; their log|J| is unchanged."""

    def __init__(self, flow, n_good):
        super().__init__(flow)
        self.n_good = n_good

    def forward_and_log_det(self, v):
        (x, momenta), log_det = self.unchanged.forward_and_log_det(v)
        self.n_good -= 1
        if self.n_good >= 0:
            return (x, momenta), log_det
        flip = torch.where(torch.arange(len(x)) % 2 == 0, -1.0, 1.0)[:, None].to(x)
        # Not in place: gradients in latent space pass through here.
        return (torch.cat([x[..., :2], x[..., 2:] * flip[:, None]], dim=2), momenta), log_det


MIRRORED = {
    "walk": lambda *what: FlowWalk(*what, 0.02, n_steps=3),
    "independence": lambda *what: FlowIndependence(*what, n_steps=3),
    "multiple try": lambda *what: FlowMultipleTry(*what, n_tries=3),
    "mala": lambda *what: LatentMALA(*what, 0.02, n_steps=3),
    "hmc": lambda *what: LatentHMC(*what, 0.02, n_steps=3, n_leapfrog=2),
    "steered": lambda *what: SteeredSwap(*what),
}


@pytest.mark.parametrize("which", MIRRORED)
def test_mirror_images_are_refused_whatever_their_log_determinant(which):
    case = tree()
    # Kernels with gradients map their walkers first, which are not mirror images.
    flow = Mirroring(case.flow, n_good=1 if which in ("mala", "hmc") else 0)
    kernel = MIRRORED[which](flow, case.potential, case.ladder)
    kernel.round_trip_tolerance = 1e9  # that check would see it first
    generator = seeded_generator(61)
    state = case.start(60, generator).evolve(iteration=1)
    new, info = kernel(state, generator)
    assert not bool(case.flow.is_mirror_image(new.x.flatten(0, 1)).any())
    assert int(info.accepted.sum()) > 0
    if which == "steered":
        # Pairs whose first member is mirrored, and mirror images of the unchanged flow.
        assert 30 <= info.mirror_images < 60
        assert info.n_evaluations == 2 * (60 - info.mirror_images - info.outside_domain)
    else:
        # Every second row of 120, except for mirror images of the unchanged flow.
        assert 0.8 < info.mirror_images / (3 * 60) <= 1.1
    assert 0 <= info.outside_domain <= info.rejected_non_finite


@pytest.mark.parametrize("kind", [LatentMALA, LatentHMC])
def test_a_walker_that_fails_does_not_affect_others(kind, monkeypatch):
    case = tree()
    start = case.start(30, seeded_generator(49))
    kernel = kind(case.flow, case.potential, case.ladder, 0.1)
    good, info = kernel(start, seeded_generator(50))
    evaluate, calls = case.potential.energy_and_forces, []

    def fail(x):
        energy, forces = evaluate(x)
        calls.append(len(x))
        if len(calls) == 2:
            energy[7], forces[7] = torch.inf, 0.0  # walker 3, rung 1
        return energy, forces

    monkeypatch.setattr(case.potential, "energy_and_forces", fail)
    end, broken = kernel(start, seeded_generator(50))
    others = torch.arange(60).reshape(30, 2) != 7
    assert int(info.accepted.sum()) - int(broken.accepted.sum()) == 1
    assert broken.rejected_non_finite == info.rejected_non_finite + 1
    assert torch.equal(end.x[3, 1], start.x[3, 1])
    torch.testing.assert_close(end.x[others], good.x[others], rtol=0, atol=1e-12)
    assert broken.n_evaluations == sum(calls)


def test_a_flow_that_does_not_round_trip_is_refused():
    case = tree()
    start, flow = case.start(10, seeded_generator(57)), copy.deepcopy(case.flow).float()
    for kind in (FlowWalk, SteeredSwap, LatentMALA, LatentHMC):
        kernel = kind(flow, case.potential, case.ladder, round_trip_tolerance=1e-9)
        with pytest.raises(RuntimeError, match=r"round trip .* misses the positions .*float32"):
            kernel(start, seeded_generator(58))


def test_layers_are_checked():
    case = tree()
    with pytest.raises(TypeError, match="layers: expected WhitenedCoordinates"):
        InternalWalk(case.flow, case.potential, case.ladder)
    with pytest.raises(ValueError, match="whitening: expected 15 coordinates"):
        WhitenedCoordinates(layers(model()).whitening, internal_walk().layers.coordinates, 300.0)
    with pytest.raises(ValueError, match="mode: expected one of"):
        internal_walk(mode="sideways")


def test_one_rung_has_no_pairs():
    case, generator = ModelCase(ladder=(1.0,)), seeded_generator(51)
    start = case.start(5, generator)
    end, info = SteeredSwap(case.flow, case.potential, case.ladder)(start, generator)
    assert end is start
    assert info.proposed.shape == (0,)


def test_both_swaps_pair_rungs_alike():
    ladder = (0.7, 1.0, 1.6)
    case = ModelCase("gaussian", "tsf", ladder)
    state = case.start(50, seeded_generator(52))
    for scheme in ("even_odd", "random_pairs", [(2, 0)]):
        plain = PlainSwap(ladder, 1.0, scheme)
        steered = SteeredSwap(case.flow, case.potential, ladder, scheme)
        assert plain.counts_shape == steered.counts_shape
        for call in range(3):
            assert plain.state_dict() == steered.state_dict() == {"calls": call}
            infos = [k(state, seeded_generator(53))[1] for k in (plain, steered)]
            assert torch.equal(infos[0].proposed, infos[1].proposed)


def test_random_pairs_are_reproducible():
    low, high = Pairing("random_pairs", 5).draw(4, seeded_generator(52))
    assert low.tolist() == [[2, 0], [1, 0], [0, 2], [0, 3]]
    assert high.tolist() == [[3, 1], [3, 4], [1, 4], [2, 4]]


def test_settings_and_states_restore_a_kernel():
    case = tree()
    kinds = ("steered swap, random", "plain swap, random", "latent mala", "latent hmc", "walk")
    for kernel in [*(KERNELS[name](case) for name in kinds), internal_walk()]:
        assert json.loads(json.dumps(kernel.settings())) == kernel.settings()
    swap = SteeredSwap(case.flow, case.potential, case.ladder)
    start = case.start(20, seeded_generator(53))
    swap(start, seeded_generator(54))
    other = SteeredSwap(case.flow, case.potential, case.ladder)
    other.load_state_dict(swap.state_dict())
    assert int(other(start, seeded_generator(54))[1].proposed) == 0
    assert int(other(start, seeded_generator(54))[1].proposed) == 20
    hmc = LatentHMC(case.flow, case.potential, case.ladder, [0.1, 0.2])
    other = LatentHMC(case.flow, case.potential, case.ladder)
    other.load_state_dict(hmc.state_dict())
    assert other.sigma.tolist() == [0.1, 0.2]
    walk = internal_walk()
    assert walk.settings() == InternalWalk(walk.layers, case.potential, case.ladder).settings()
    assert walk.settings() != internal_walk(mode="full").settings()


def test_step_sizes_are_tuned_to_each_kernels_target():
    case = ModelCase("gaussian")
    kernels = [
        LatentMALA(case.flow, case.potential, case.ladder, 0.05),
        LatentHMC(case.flow, case.potential, case.ladder, 0.1, n_leapfrog=2),
        SteeredSwap(case.flow, case.potential, case.ladder),
    ]
    sampler = ParallelTempering(None, case.flow, case.ladder, 60, kernels, case.potential, 55)
    sampler.set_positions(case.start(60, seeded_generator(56)).x)
    tuned = sampler.tune(60)
    assert set(tuned) == {"latent_mala", "latent_hmc"}
    sampler.run(20, progress=False)
    for kernel in kernels[:2]:
        reached = sampler.totals[kernel.name].acceptance
        assert float((reached - kernel.target_acceptance).abs().max()) <= 0.08
