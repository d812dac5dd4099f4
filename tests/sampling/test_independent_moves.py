"""Multiple tries and Crank-Nicolson steps, step by step."""

import math

import pytest
import torch

from openmm_tsf.metropolis import metropolis
from openmm_tsf.sampling.kernels import FlowCrankNicolson, FlowMultipleTry
from openmm_tsf.sampling.tuning import StepSizeTuner
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_cases as exact

LADDER = (300.0, 450.0)


@pytest.fixture
def case():
    return exact.TreeCase()


class Recording(exact.Changed):
    """A potential that keeps the sizes of its batches."""

    def __init__(self, potential):
        super().__init__(potential)
        self.batches = []

    def energy(self, x):
        self.batches.append(len(x))
        return self.unchanged.energy(x)


def test_tries_are_evaluated_in_one_batch_and_weighed_step_by_step(case):
    """Each step compares with the weight last accepted; energies are of what is stored."""
    potential, decisions = Recording(case.potential), []
    kernel = FlowMultipleTry(case.flow, potential, LADDER, n_tries=3, n_steps=2)
    select = kernel.select

    def select_and_keep(current, tries, generator):
        chosen, accepted = select(current, tries, generator)
        taken = tries.gather(0, chosen[None])[0]
        decisions.append((current, torch.where(accepted, taken, current), accepted))
        return chosen, accepted

    kernel.select = select_and_keep
    state = case.start(50, seeded_generator(31))
    new, info = kernel(state, seeded_generator(32))
    assert len(potential.batches) == 2
    assert 400 < sum(potential.batches) == info.n_evaluations <= 600
    (_, after, first), (before, _, second) = decisions
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)
    assert 10 < int(first.sum()) < 90
    moved = (first | second).reshape(50, 2)
    assert torch.equal(moved, (new.x != state.x).flatten(2).any(dim=2))
    assert int(info.accepted.sum()) == int(first.sum() + second.sum())
    exact.assert_energies_are_stored(case.potential, new)


def test_one_try_is_an_independence_proposal():
    """The probability of acceptance is the same, whatever the weights."""
    case, generator = exact.ModelCase("double-well"), seeded_generator(33)
    single = FlowMultipleTry(case.flow, case.potential, case.ladder, n_tries=1)
    current, tries = 3 * torch.randn(2, 40000, generator=generator, dtype=torch.float64)
    ours = single.select(current, tries[None], generator)[1]
    other = metropolis(current, tries, generator)[0]
    ups = tries > current
    assert bool(ours[ups].all())
    assert bool(other[ups].all())
    n = int((~ups).sum())
    difference = float(ours[~ups].double().mean() - other[~ups].double().mean())
    assert abs(difference) < 4 * math.sqrt(2 * 0.25 / n)


def test_tries_are_chosen_by_their_weights():
    case, generator = exact.ModelCase("double-well"), seeded_generator(34)
    kernel = FlowMultipleTry(case.flow, case.potential, case.ladder, n_tries=4)
    weights = torch.tensor([1.0, 2.0, 5.0, 0.0], dtype=torch.float64)
    n, walker = 40000, 3.0
    tries = weights.log()[:, None].expand(4, n)
    current = torch.full((n,), math.log(walker), dtype=torch.float64)
    chosen, accepted = kernel.select(current, tries, generator)
    for number, weight in enumerate(weights.tolist()):
        p = weight / max(8.0, 8.0 - weight + walker)
        share = float(((chosen == number) & accepted).double().mean())
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_tries_without_a_weight_are_not_taken():
    """NaN, infinite energies and whole sets of them."""
    case, generator = exact.ModelCase("double-well"), seeded_generator(35)
    kernel = FlowMultipleTry(case.flow, case.potential, case.ladder, n_tries=3)
    nan, inf = float("nan"), float("inf")
    tries = torch.tensor([[nan, -inf, nan], [-inf, 0.0, inf], [nan, -inf, -inf]]).double()
    chosen, accepted = kernel.select(torch.zeros(3).double(), tries, generator)
    assert accepted.tolist() == [False, True, False]
    assert int(chosen[1]) == 1


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_crank_nicolson_keeps_the_prior_and_as_much_of_v_as_it_says(share):
    case, generator = exact.ModelCase("gaussian", ladder=(0.7, 1.6)), seeded_generator(36)
    beta = torch.tensor([0.4, 0.9], dtype=torch.float64)
    kernel = FlowCrankNicolson(case.flow, case.potential, case.ladder, beta.tolist(), share)
    torch.testing.assert_close(kernel.beta, beta)
    n = 40000
    tau = kernel.tau.repeat(n)
    v = torch.randn(2 * n, 5, generator=generator, dtype=torch.float64) * tau.sqrt()[:, None]
    new = kernel.propose(v, tau, generator)
    moved = (new != v).double().mean(dim=1)
    assert abs(float(moved.mean()) - share) < 0.01
    for rung in range(2):
        before, after = v[rung::2], new[rung::2]
        width = math.sqrt(2 / before.numel())
        assert abs(float(after.square().mean() / kernel.tau[rung]) - 1) < 4 * width
        kept = float((before * after).mean() / kernel.tau[rung])
        expected = 1 - share * (1 - math.sqrt(1 - float(beta[rung]) ** 2))
        assert abs(kept - expected) < 4 * width


def test_crank_nicolson_of_a_perfect_flow_becomes_independent():
    """All is accepted: the step grows without bound, and stays a number that is recorded."""
    case = exact.ModelCase("gaussian")
    kernel = FlowCrankNicolson(case.flow, case.potential, case.ladder)
    tuner = StepSizeTuner(kernel, 0.3)
    info = type("Info", (), {})()
    info.proposed, info.acceptance = torch.full((3,), 10), torch.ones(3, dtype=torch.float64)
    for _ in range(200):
        tuner.update(info)
    sigma = tuner.freeze()
    assert bool(torch.isfinite(sigma).all())
    assert bool((kernel.beta > 0.999).all())
    again = FlowCrankNicolson(case.flow, case.potential, case.ladder)
    again.load_state_dict(kernel.state_dict())
    assert torch.equal(again.sigma, kernel.sigma)
    again.sigma = torch.full((3,), 1e200, dtype=torch.float64)  # the square of which is infinite
    assert torch.equal(again.beta, torch.ones(3).double())
