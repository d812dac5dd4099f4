"""Kernels through a flow share one inverse in an iteration, and never one of other walkers."""

import dataclasses

import pytest
import torch

from openmm_tsf.sampling.kernels import FlowIndependence, FlowWalk, PlainSwap, SteeredSwap
from openmm_tsf.sampling.state import Latents
from openmm_tsf.utils.random import seeded_generator
from tests.support import invariance
from tests.support.exact_cases import Changed, assert_exact


class Counting(Changed):
    """A flow that counts its inverses."""

    n_inverses = 0

    def inverse_and_log_det(self, x, momenta, copies=None):
        self.n_inverses += 1
        return self.unchanged.inverse_and_log_det(x, momenta, copies)


class RoundedByBatch(Changed):
    """A flow whose images depend on the number of rows, as products in low precision may."""

    n_rows = 0  # of batches that are rounded as those of the inverse

    def forward_and_log_det(self, v):
        (x, momenta), log_det = self.unchanged.forward_and_log_det(v)
        return (x, momenta + 1e-5 * (len(v) != self.n_rows)), log_det


def through(flow, case):
    """Return the kernels of an iteration."""
    parts = (flow, case.potential, case.ladder)
    walk = FlowWalk(*parts, sigma=0.3, n_steps=2)
    return [FlowIndependence(*parts, n_steps=3), walk, SteeredSwap(*parts)]


@pytest.fixture(params=["tree", "gaussian"])
def case(request):
    return invariance.tree() if request.param == "tree" else invariance.model()


def apply(kernels, state, generator):
    for kernel in kernels:
        state, _ = kernel(state, generator)
    return state


def test_one_inverse_serves_the_kernels_of_an_iteration(case):
    flow, generator = Counting(case.flow), seeded_generator(1)
    kernels, state = through(flow, case), case.start(50, generator)
    state = apply(kernels, state, generator)
    assert flow.n_inverses == 1
    # They are those of the stored configurations.
    known = state.latents
    parts = known.x.flatten(0, 1), known.momenta.flatten(0, 1)
    v, log_det = case.flow.inverse_and_log_det(*parts)
    torch.testing.assert_close(known.v.flatten(0, 1), v, rtol=0, atol=1e-8)
    torch.testing.assert_close(known.log_det.flatten(), -log_det, rtol=0, atol=1e-8)
    apply(kernels, state.evolve(iteration=1), generator)
    assert flow.n_inverses == 2


def test_another_flow_does_not_use_them(case):
    flows, generator = [Counting(case.flow), Counting(case.flow)], seeded_generator(2)
    state = case.start(5, generator)
    for _ in range(2):
        for flow in flows:
            state, _ = through(flow, case)[1](state, generator)
    assert [flow.n_inverses for flow in flows] == [2, 2]


def test_whoever_changes_the_walkers_drops_the_latents(case):
    state = apply(through(case.flow, case), case.start(5, seeded_generator(3)), seeded_generator(3))
    known = state.latents
    assert known is not None
    assert state.evolve(energy=state.energy.clone()).latents is known
    assert state.evolve(x=state.x + 0.1).latents is None
    assert state.evolve(x=state.x.clone()).latents is None
    assert state.evolve(iteration=1).latents is None
    assert dataclasses.replace(state, x=state.x.flip(1)).latents is None
    values = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    assert type(state)(**{**values, "x": state.x.flip(1)}).latents is None
    assert "latents" not in state.state_dict()
    assert type(state).from_state_dict(state.state_dict()).latents is None
    swap = PlainSwap(case.ladder, case.potential.boltzmann_constant)
    assert swap(state, seeded_generator(4))[0].latents is None


class KeepsLatents:
    """A plain swap that claims that the latents of an iteration are those after it."""

    def __init__(self, swap):
        self.swap = swap

    def __call__(self, state, generator):
        end, info = self.swap(state, generator)
        known = state.latents
        values = known.momenta, known.v, known.log_det
        kept = Latents(known.flow, end.x, end.iteration, *values)
        return end.evolve(latents=kept), info


@pytest.mark.parametrize("mutant", [False, True])
def test_a_swap_between_them_is_exact_unless_latents_survive_it(mutant):
    case, generator = invariance.model(), seeded_generator(5)
    independence, walk, steered = through(case.flow, case)
    swap = PlainSwap(case.ladder, case.potential.boltzmann_constant)
    kernels = [independence, KeepsLatents(swap) if mutant else swap, walk, steered]
    if mutant:  # the statistics have to see it without the check of the round trip
        steered.round_trip_tolerance = 1e9
    state = case.start(4000, generator)
    for _ in range(4):
        state = apply(kernels, state, generator)
        state = state.evolve(iteration=state.iteration + 1)
    if mutant:
        with pytest.raises(AssertionError):
            assert_exact(case.scores(state))
    else:
        assert_exact(case.scores(state))


def test_walkers_that_a_users_kernel_changed_in_place_have_new_latents(case):
    """No kernel should do that; if one does, the next one through the flow must not be wrong."""
    flow, generator = Counting(case.flow), seeded_generator(6)
    kernels, state = through(flow, case), case.start(20, generator)
    state = apply(kernels, state, generator)
    known = state.latents
    assert known.is_valid
    state.x[:, [0, 1]] = state.x[:, [1, 0]]
    state.energy[:, [0, 1]] = state.energy[:, [1, 0]]
    assert not known.is_valid
    state = apply(kernels, state, generator)
    assert flow.n_inverses == 2
    parts = state.latents.x.flatten(0, 1), state.latents.momenta.flatten(0, 1)
    v, _ = case.flow.inverse_and_log_det(*parts)
    torch.testing.assert_close(state.latents.v.flatten(0, 1), v, rtol=0, atol=1e-8)


def test_latents_are_shared_in_inference_mode(case):
    flow, generator = Counting(case.flow), seeded_generator(7)
    with torch.inference_mode():
        state = apply(through(flow, case), case.start(5, generator), generator)
    assert flow.n_inverses == 1
    assert state.latents.is_valid


def test_the_round_trip_is_checked_in_the_batches_of_the_proposals(case):
    """Several steps of independent draws are one batch, larger than that of the inverse."""
    flow, generator = RoundedByBatch(case.flow), seeded_generator(6)
    state = case.start(5, generator).evolve(iteration=1)  # no check of equal batches is due
    flow.n_rows = n = 5 * len(case.ladder)
    independence, walk, _ = through(flow, case)
    state = apply([walk, walk], state, generator)
    sizes = f"a batch of {n}, proposals of {3 * n}"
    with pytest.raises(RuntimeError, match=rf"misses the momenta by 1e-05 .*{sizes}"):
        independence(state, generator)
