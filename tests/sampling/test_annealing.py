"""ln Z by importance sampling, annealing and sequential Monte Carlo against exact values."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from openmm_tsf.analysis.statistics import log_mean_weight, reverse_ess, weighted_mean
from openmm_tsf.coordinates import Whitening
from openmm_tsf.flows import RealNVPFlow
from openmm_tsf.potentials import (
    GaussianMixture,
    GaussianWell,
    MullerBrown,
    PhiFourChain,
    PhiFourTorus,
    RadialVelocity,
)
from openmm_tsf.sampling import (
    AnnealingSchedule,
    ParallelTempering,
    annealed_importance_sampling,
    annealing,
    importance_sampling,
    kernels,
    sequential_monte_carlo,
)
from openmm_tsf.sampling.annealing import Interpolation
from openmm_tsf.sampling.resampling import ess_fractions, log_means, resample_systematically

DOUBLE = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def score(estimates, exact):
    """z of ln of the mean of unbiased estimates [N] of Z, given by their ln."""
    value, stderr = log_mean_weight(estimates)
    return (value - exact) / stderr


def mixture():
    """Two modes, unequal, in three dimensions."""
    means = torch.tensor([[-1.5, 0.0, 0.5], [2.0, 1.0, 0.0]], dtype=DOUBLE)
    return GaussianMixture(means, 0.4, torch.tensor([0.7, 0.3]))


def gaussian():
    return GaussianWell(torch.tensor([[4.0, 1.0], [1.0, 2.0]]))


#: Base, target, temperature, time step: what the exact ln Z is compared for.
CASES = {
    "mixture": lambda: (GaussianWell(0.3 * torch.eye(3)), mixture(), 1.0, 0.35),
    "gaussian": lambda: (GaussianWell(0.5 * torch.eye(2)), gaussian(), 1.7, 0.4),
    "phi4": lambda: (
        PhiFourChain(10, 0.05).coupled_gaussian(1.0), PhiFourChain(10, 0.05, 0.05, 0.3, 0.4),
        0.1, 0.25,
    ),
}  # fmt: skip


def moves(timestep, n_steps=3):
    def make(bridge, temperatures):
        hmc = kernels.CartesianHMC(bridge, temperatures, 1.0, n_steps=n_steps, timestep=timestep)
        return [hmc]

    return make


@pytest.mark.parametrize("name", CASES)
def test_importance_sampling(name):
    base, target, temperature, _ = CASES[name]()
    draws = importance_sampling(base, target, temperature, 20_000, generator(1))
    exact = target.log_partition_function(temperature)
    assert abs(score(draws.log_weights.flatten(), exact)) < 4
    assert draws.n_evaluations == 20_000
    assert not draws.resampled.any()
    ess = reverse_ess(draws.log_weights.flatten()).fraction
    assert draws.ess.item() == pytest.approx(ess)
    log_q = -base.energy(draws.x[0]) / temperature - base.log_partition_function(temperature)
    by_hand = -target.energy(draws.x[0]) / temperature - log_q
    torch.testing.assert_close(draws.log_weights[0], by_hand)


@pytest.mark.parametrize("name", CASES)
def test_annealed_importance_sampling(name):
    base, target, temperature, timestep = CASES[name]()
    schedule = AnnealingSchedule.linear(8, make_kernels=moves(timestep))
    result = annealed_importance_sampling(base, target, temperature, 1500, schedule, generator(2))
    exact = target.log_partition_function(temperature)
    assert abs(score(result.log_weights.flatten(), exact)) < 4
    assert not result.resampled.any()
    assert all(0.3 < rate < 1.0 for rate in result.acceptance["hmc"])
    assert len(result.acceptance["hmc"]) == 8
    # Once at first and after each of the moves but the last, and 4 in each trajectory.
    assert result.n_evaluations == 1500 * (8 + 8 * 4)


@pytest.mark.parametrize("name", CASES)
def test_sequential_monte_carlo(name):
    base, target, temperature, timestep = CASES[name]()
    schedule = AnnealingSchedule.linear(6, make_kernels=moves(timestep), resample_below=0.9)
    shape = (40, 50)
    result = sequential_monte_carlo(base, target, temperature, shape, schedule, generator(3))
    exact = target.log_partition_function(temperature)
    assert result.resampled.any()
    assert abs(score(result.log_partition, exact)) < 4
    torch.testing.assert_close(result.log_partition, log_means(result.log_weights))
    evaluations = target.n_evaluations
    assert result.n_evaluations == evaluations


def test_weighted_particles_have_the_targets_moments():
    base, target, temperature, timestep = CASES["mixture"]()
    schedule = AnnealingSchedule.linear(8, make_kernels=moves(timestep))
    result = annealed_importance_sampling(base, target, temperature, 2000, schedule, generator(4))
    for k, exact in enumerate(target.mean().tolist()):
        mean, stderr = weighted_mean(result.x[0, :, k], result.log_weights[0])
        assert abs(mean - exact) < 4 * stderr


def scores_of(change, monkeypatch):
    """|z| of a sequential Monte Carlo estimate with one mistake."""
    base, target, temperature, timestep = CASES["mixture"]()
    schedule = AnnealingSchedule.linear(6, make_kernels=moves(timestep), resample_below=0.9)
    schedule = change(schedule, monkeypatch) or schedule
    parts = base, target, temperature, (40, 50), schedule, generator(3)
    exact = target.log_partition_function(temperature)
    return abs(score(sequential_monte_carlo(*parts).log_partition, exact))


def forget_mean_weight(schedule, monkeypatch):
    """Weights are 1 after resampling, instead of their mean."""
    survivors = annealing.select_survivors

    def mutant(log_weights, chosen, generator):
        rows, new = survivors(log_weights, chosen, generator)
        return rows, torch.where(chosen[:, None], 0.0, new)

    monkeypatch.setattr(annealing, "select_survivors", mutant)


def keep_weights(schedule, monkeypatch):
    """Particles are resampled by their weights and keep them."""
    survivors = annealing.select_survivors

    def mutant(log_weights, chosen, generator):
        rows, _ = survivors(log_weights, chosen, generator)
        return rows, log_weights.flatten()[rows].reshape(log_weights.shape)

    monkeypatch.setattr(annealing, "select_survivors", mutant)


def wrong_temperature(schedule, monkeypatch):
    """Kernels move at another temperature."""
    make = schedule.make_kernels
    return replace(schedule, make_kernels=lambda bridge, t: make(bridge, (2.0 * t[0],)))


@pytest.mark.parametrize("change", [forget_mean_weight, keep_weights, wrong_temperature])
def test_mutants_are_noticed(change, monkeypatch):
    assert scores_of(change, monkeypatch) > 6


class Linear:
    """y = scale x."""

    def __init__(self, scale, jacobian=True):
        self.scale, self.jacobian = scale, jacobian

    def forward_and_log_det(self, u):
        log_det = u.shape[1] * np.log(self.scale) * self.jacobian
        return self.scale * u, u.new_full((len(u),), log_det)


def test_exact_transports_make_equal_weights():
    """Between Gaussians of precision P_s = (1 - s) + 4 s the maps √(P_{s-1}/P_s) are exact."""
    base, target = GaussianWell(torch.eye(3)), GaussianWell(4.0 * torch.eye(3))
    precisions = [1.0, 2.5, 4.0]
    scales = [np.sqrt(a / b) for a, b in itertools.pairwise(precisions)]
    schedule = AnnealingSchedule.linear(2, transports=[Linear(scale) for scale in scales])
    result = sequential_monte_carlo(base, target, 0.7, (2, 20), schedule, generator(5))
    exact = target.log_partition_function(0.7)
    np.testing.assert_allclose(result.log_weights, exact, atol=1e-12)
    np.testing.assert_allclose(result.ess, 1.0)
    assert result.n_evaluations == 40 * 3  # at first, and after each of the maps
    # Without the Jacobian the estimate is wrong by its logarithm.
    wrong = replace(schedule, transports=[Linear(scale, jacobian=False) for scale in scales])
    other = sequential_monte_carlo(base, target, 0.7, (2, 20), wrong, generator(5))
    np.testing.assert_allclose(other.log_weights, exact + 3 * np.log(2.0), atol=1e-12)


def test_inexact_transports_are_corrected():
    base, target, temperature, timestep = CASES["mixture"]()
    transports = [Linear(0.9), None, Linear(1.1), None]
    schedule = AnnealingSchedule.linear(4, make_kernels=moves(timestep), transports=transports)
    shape = (40, 40)
    result = sequential_monte_carlo(base, target, temperature, shape, schedule, generator(6))
    assert abs(score(result.log_partition, 0.0)) < 4


def test_systematic_resampling():
    """Particle i has floor(n W_i) or one more copies, n W_i on average; zero weights have none."""
    log_weights = torch.tensor([0.0, 1.0, -2.0, -torch.inf, 0.5, -torch.inf], dtype=DOUBLE)
    expected = 6 * log_weights.softmax(0)
    rows = resample_systematically(log_weights.repeat(4000, 1), generator(0))
    counts = torch.nn.functional.one_hot(rows, 6).sum(1).double()
    assert (counts.sum(1) == 6).all()
    assert ((counts >= expected.floor()) & (counts <= expected.floor() + 1)).all()
    error = counts.std(0) / np.sqrt(4000)
    assert ((counts.mean(0) - expected).abs() <= 4 * error).all()
    fraction = ess_fractions(log_weights[None])
    assert fraction.item() == pytest.approx(reverse_ess(log_weights).fraction)


def test_particles_of_weight_zero_never_come_back():
    """The orbit's prior has edges: draws of the base beyond them have weight zero for good."""
    target = RadialVelocity.synthetic(seed=1)
    middle = torch.tensor([[0.0, 5.0, 3.1, 1.5]], dtype=DOUBLE)
    widths = torch.tensor([1.0, 9.0, 6.0, 0.4], dtype=DOUBLE)
    base = GaussianMixture(middle, torch.diag(widths)[None])
    schedule = AnnealingSchedule(
        (0.05, 0.3, 1.0), lambda b, t: [kernels.CartesianMALA(b, t, 1.0, timestep=0.02)]
    )
    result = annealed_importance_sampling(base, target, 1.0, 4000, schedule, generator(7))
    dead = result.log_weights.isneginf()
    assert 0.1 < dead.double().mean() < 0.9
    assert target.energy(result.x[0]).isfinite().all()
    assert abs(score(result.log_weights.flatten(), target.log_partition_function(1.0))) < 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AnnealingSchedule((0.5, 0.4, 1.0)), "fractions: expected numbers ascending"),
        (lambda: AnnealingSchedule((0.5,)), "fractions: expected numbers ascending"),
        (lambda: AnnealingSchedule(()), "fractions: expected numbers from"),
        (lambda: AnnealingSchedule((1.0,), resample_below=2.0), "resample_below: expected"),
        (lambda: AnnealingSchedule((1.0,), transports=()), "transports: expected 1"),
        (lambda: Interpolation(gaussian(), gaussian(), 0.0), "fraction: expected"),
        (lambda: Interpolation(gaussian(), mixture(), 0.5), "base: expected configurations"),
        (lambda: log_mean_weight([]), "log_weights: expected a non-empty"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_inexact_kernels_are_refused():
    def make(bridge, temperatures):
        return [kernels.TorchLangevin(bridge, temperatures, 1.0, metropolized=False)]

    base, target, temperature, _ = CASES["gaussian"]()
    schedule = AnnealingSchedule.linear(2, make_kernels=make)
    with pytest.raises(ValueError, match="make_kernels: expected exact kernels, got local"):
        annealed_importance_sampling(base, target, temperature, 4, schedule, generator(0))


#: The lecture's targets, with the temperature and the covariance of a Gaussian base.
TARGETS = {
    "muller_brown": (MullerBrown, 15.0, torch.diag(torch.tensor([0.4, 0.4]))),
    "mixture": (mixture, 1.0, 2.0 * torch.eye(3)),
    "chain": (lambda: PhiFourChain(10, 0.05), 0.1, None),
    "torus": (lambda: PhiFourTorus(3, 0.3, 0.4), 1.0, None),
}


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_run_on_the_lectures_targets(name):
    """Flow proposals on a coupled base, latent and local kernels, with exact bookkeeping."""
    make, temperature, covariance = TARGETS[name]
    target = make()
    if covariance is None:
        covariance = target.coupled_gaussian(1.0).covariance(temperature)
    (d,) = target.event_shape
    whitening = Whitening.from_covariance(covariance.to(DOUBLE))
    sizes = {"n_blocks": 2, "hidden": (8,), "reference_temperature": temperature}
    flow = RealNVPFlow(d, 0, whitening=whitening, **sizes)
    ladder = (temperature, 1.5 * temperature)
    schedule = [
        kernels.FlowIndependence(flow, target, ladder),
        kernels.FlowWalk(flow, target, ladder, sigma=0.2),
        kernels.LatentMALA(flow, target, ladder, sigma=0.3),
        kernels.LatentHMC(flow, target, ladder, sigma=0.1),
        kernels.CartesianMALA(target, ladder, 1.0, flow, timestep=0.02),
        kernels.PlainSwap(ladder, target.boltzmann_constant),
    ]
    start = flow.sample(2 * 8, temperature, generator(1)).x.reshape(8, 2, d)
    sampler = ParallelTempering(None, flow, ladder, 8, schedule, target, seed=2)
    sampler.set_positions(start)
    sampler.run(4, progress=False)
    energies = target.energy(sampler.state.x.flatten(0, 1)).reshape(8, 2)
    torch.testing.assert_close(sampler.state.energy, energies)
    for kernel, info in sampler.totals.items():
        assert info.accepted.sum() > 0, kernel


def test_a_flow_below_which_lies_a_coupled_base_starts_as_this_gaussian():
    chain, temperature = PhiFourChain(6, 0.05), 0.1
    base = chain.coupled_gaussian(1.0)
    whitening = Whitening.from_covariance(base.covariance(temperature))
    flow = RealNVPFlow(6, 0, 1, (4,), temperature, whitening=whitening)
    for kelvin in (temperature, 3.0 * temperature):
        draws = flow.sample(50, kelvin, generator(1))
        torch.testing.assert_close(draws.log_prob, base.log_prob(draws.x, kelvin))
    rebuilt = Whitening.from_config(whitening.to_config())
    y = torch.randn(3, 6, dtype=DOUBLE, generator=generator(2))
    assert torch.equal(rebuilt.forward_and_log_det(y)[0], whitening.forward_and_log_det(y)[0])
    with pytest.raises(ValueError, match="covariance: expected a symmetric"):
        Whitening.from_covariance(-torch.eye(2))
    with pytest.raises(ValueError, match="mean: expected shape"):
        Whitening.from_covariance(torch.eye(2), torch.zeros(3))
