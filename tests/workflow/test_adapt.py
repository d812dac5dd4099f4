"""Adaptive MCMC: the flow finds what the walkers know, and the frozen flow's chains are exact."""

import math
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.analysis.statistics import group_means, log_mean_weight, reverse_ess
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.potentials import GaussianMixture, GaussianWell
from openmm_tsf.sampling.kernels import CartesianMALA, FlowIndependence, PlainSwap, Scheduled
from tests.support.simulated_cuda import simulated_cuda

DOUBLE = torch.float64


def mixture():
    means = torch.tensor([[-3.0, 0.0], [3.0, 1.0]], dtype=DOUBLE)
    return GaussianMixture(means, 0.5, torch.tensor([0.3, 0.7]))


def make_sampler(potential, x, ladder=(1.0,), seed=1, local=3, flow=None):
    """A sampler of local and global moves with walkers at x [W, d] on every rung."""
    if flow is None:
        flow = tsf.RealNVPFlow(2, 0, n_blocks=3, hidden=(24,), seed=seed)
    moves = [FlowIndependence(flow, potential, ladder)]
    if local:
        mala = CartesianMALA(potential, ladder, masses=1.0, timestep=0.7)
        moves.insert(0, Scheduled(mala, repeats=local))
    sampler = tsf.ParallelTempering(None, flow, ladder, len(x), moves, potential, seed=seed)
    sampler.set_positions(x[:, None].expand(-1, len(ladder), -1))
    return sampler


def score(series, exact):
    """z of the mean of a series [n, W], by groups that are taken as independent."""
    means = group_means(series)
    stderr = means.std(ddof=1) / math.sqrt(len(means))
    return (means.mean() - exact) / stderr


def settings(n_iterations, **choices):
    return tsf.AdaptSettings(**{"n_iterations": n_iterations, "n_ess_draws": 0, **choices})


def test_frozen_flow_samples_a_mixture():
    """Started with equal numbers in modes of unequal weights, which local moves cannot change."""
    target = mixture()
    sampler = make_sampler(target, target.means.repeat(24, 1))
    result = tsf.adapt(
        sampler, settings(150, learning_rate=5e-3, ess_interval=100, n_ess_draws=500),
        progress=False,
    )  # fmt: skip
    assert result.flow is sampler.flow
    assert torch.equal(result.states, sampler.state.x)
    assert result.ess_iterations == [0, 100, 150]
    assert result.ess[0][0] < 0.1 < 0.5 < result.ess[-1][0]
    rates = result.acceptance["flow_independent"]
    assert rates.shape == (150, 1)
    assert rates[:10].mean() < 0.2 < 0.5 < rates[-50:].mean()
    assert len(result.loss) == 150
    entropy = -float(target.log_prob(target.sample(5000, 1.0, seeded(4)), 1.0).mean())
    assert np.mean(result.loss[-20:]) == pytest.approx(entropy, abs=0.4)
    # In every iteration three steps of two energies and a draw of 48 walkers.
    assert result.n_evaluations == 150 * 48 * 7 + 3 * 500

    weights = [p.clone() for p in sampler.flow.parameters()]
    x = sampler.run(200, collect=True, progress=False)[40:, :, 0]
    assert all(map(torch.equal, weights, sampler.flow.parameters()))
    assert abs(score((x[:, :, 0] > 0).double().numpy(), 0.7)) < 4
    for axis in (0, 1):
        assert abs(score(x[..., axis].numpy(), float(target.mean()[axis]))) < 4
        second = float(target.covariance()[axis, axis] + target.mean()[axis] ** 2)
        assert abs(score(x[..., axis].square().numpy(), second)) < 4


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_one_walker_misses_a_mode_and_only_ln_z_tells():
    """The second mode is where neither local moves nor the untrained flow, N(0, 1), come."""
    means = torch.tensor([[0.0, 0.0], [8.0, 0.0]], dtype=DOUBLE)
    target = GaussianMixture(means, 0.5, torch.tensor([0.3, 0.7]))
    sampler = make_sampler(target, means[:1])
    with pytest.warns(UserWarning, match="all walkers start from one configuration"):
        result = tsf.adapt(sampler, settings(100, memory=100), progress=False)
    # Nothing looks wrong:
    assert float(result.acceptance["flow_independent"].mean()) > 0.5
    draws = draw_weighted(result.flow, target, 1.0, 2000, seeded(2))
    assert reverse_ess(draws.log_weights).fraction > 0.4
    log_z, stderr = log_mean_weight(draws.log_weights)
    assert abs(log_z - math.log(0.3)) < 4 * stderr
    assert log_z < -10 * stderr


@pytest.mark.slow
def test_samples_of_the_adapting_chain_are_biased():
    """Two walkers and a flow that follows them: exact from the start, and yet |z| > 4."""
    target = GaussianWell(torch.eye(2, dtype=DOUBLE))
    flow = tsf.RealNVPFlow(2, 0, n_blocks=1, hidden=(16,), seed=1)  # the identity: exact
    sampler = make_sampler(target, target.sample(2, 1.0, seeded(1)), local=0, flow=flow)
    seen = []

    class Record:
        interval = 1

        def __call__(self, sampler, state):
            seen.append(state.energy[:, 0])

    sampler.reporters.append(Record())
    rates = {"learning_rate": 0.03, "final_learning_rate": 0.03, "memory": 1}
    tsf.adapt(sampler, settings(2000, warmup_steps=0, **rates), progress=False)
    assert score(torch.stack(seen).numpy(), 1.0) < -4
    # The same flow, frozen: others begin at exact samples.
    frozen = make_sampler(target, target.sample(64, 1.0, seeded(2)), flow=flow)
    x = frozen.run(150, collect=True, progress=False)[:, :, 0]
    assert abs(score(0.5 * x.square().sum(dim=2).numpy(), 1.0)) < 4


def test_same_seed_same_flow_at_any_interval_of_the_ess():
    target = mixture()
    runs = []
    for choices in ({}, {"n_ess_draws": 50, "ess_interval": 2}):
        sampler = make_sampler(target, target.means.repeat(4, 1))
        runs.append((sampler, tsf.adapt(sampler, settings(5, **choices), progress=False)))
    (one, first), (other, second) = runs
    assert first.loss == second.loss
    assert torch.equal(one.state.x, other.state.x)
    assert all(map(torch.equal, one.flow.parameters(), other.flow.parameters()))
    assert (first.ess, second.ess_iterations) == ([], [0, 2, 4, 5])


def test_ladder_with_momenta():
    """One steerable flow, two temperatures, with swaps; the memory holds all of them."""
    target, ladder = GaussianWell(torch.diag(torch.tensor([4.0, 1.0], dtype=DOUBLE))), (1.0, 2.0)
    flow = tsf.TemperatureSteerableFlow(2, 2, 2, (16,))
    moves = [FlowIndependence(flow, target, ladder), PlainSwap(ladder, 1.0)]
    sampler = tsf.ParallelTempering(None, flow, ladder, 32, moves, target, seed=2)
    sampler.set_positions(torch.stack([target.sample(32, t, seeded(3)) for t in ladder], dim=1))
    result = tsf.adapt(sampler, settings(150, learning_rate=5e-3), progress=False)
    assert result.acceptance["swap_plain"].shape == (150, 1)
    rates = result.acceptance["flow_independent"]
    assert bool((rates[-50:].mean(dim=0) > rates[:20].mean(dim=0) + 0.05).all())
    draws = draw_weighted(flow, target, 2.0, 1000, seeded(5))
    assert float(draws.energy.mean()) == pytest.approx(target.mean_energy(2.0), rel=0.2)


def test_no_gradient_steps_leave_the_flow():
    target = mixture()
    sampler = make_sampler(target, target.means.repeat(2, 1))
    before = [p.clone() for p in sampler.flow.parameters()]
    result = tsf.adapt(sampler, settings(3, n_gradient_steps=0), progress=False)
    assert all(map(math.isnan, result.loss))
    assert all(map(torch.equal, before, sampler.flow.parameters()))


def test_a_run_directory_is_not_continued_with_another_flow(tmp_path):
    target = mixture()
    sampler = make_sampler(target, target.means.repeat(2, 1))
    sampler.run(2, tmp_path / "run", progress=False)
    tsf.adapt(sampler, settings(3), progress=False)
    with pytest.raises(ValueError, match="flow"):
        sampler.run(2, tmp_path / "run", progress=False)
    sampler.run(2, tmp_path / "other", progress=False)
    assert tsf.load_run(tmp_path / "other").n_iterations == 2


def test_bad_input():
    target = mixture()
    sampler = make_sampler(target, target.means.repeat(2, 1))
    with pytest.raises(TypeError, match="sampler: expected a ParallelTempering, got RealNVPFlow"):
        tsf.adapt(sampler.flow)
    with pytest.raises(TypeError, match="settings: expected AdaptSettings, got FitSettings"):
        tsf.adapt(sampler, tsf.FitSettings())
    mala = CartesianMALA(target, (1.0,), masses=1.0, timestep=0.5)
    local = tsf.ParallelTempering(None, sampler.flow, [1.0], 2, [mala], target, seed=1)
    with pytest.raises(ValueError, match=r"sampler: expected a kernel that proposes .* got mala"):
        tsf.adapt(local)
    unset = tsf.ParallelTempering(None, sampler.flow, [1.0], 2, None, target, seed=1)
    with pytest.raises(RuntimeError, match="set_positions"):
        tsf.adapt(unset)
    for choices, words in (
        ({"n_iterations": 0}, "n_iterations: expected an integer of at least 1, got 0"),
        ({"memory": 1.5}, "memory: expected an integer"),
        ({"learning_rate": -1.0}, "learning_rate: expected a positive number"),
        ({"optimizer": "sgd"}, "optimizer: expected one of adam, muon"),
    ):
        with pytest.raises(ValueError, match=words):
            tsf.AdaptSettings(**choices)


def test_a_flow_that_cannot_change_is_refused():
    target = mixture()
    sampler = make_sampler(target, target.means.repeat(2, 1))
    sampler.flow.programs = SimpleNamespace()  # compiled
    with pytest.raises(ValueError, match="flow that is not compiled"):
        tsf.adapt(sampler)
    sampler.flow.programs = None
    next(sampler.flow.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="flow whose parameters all require gradients"):
        tsf.adapt(sampler)


def test_on_a_gpu_the_bits_of_the_cpu_and_a_wait_for_each_step():
    """On a simulated one, with momenta and two temperatures, and with the ESS measured."""
    target, ladder, results = mixture(), (1.0, 2.0), []
    for device in ("cpu", "cuda"):
        with simulated_cuda() if device == "cuda" else nullcontext() as counts:
            flow = tsf.TemperatureSteerableFlow(2, 2, 1, (8,), seed=1).to(device)
            x = target.means.repeat(4, 1).to(device)
            sampler = make_sampler(target, x, ladder, flow=flow)
            adapted = tsf.adapt(sampler, settings(2, n_ess_draws=9, memory=1), progress=False)
            results.append([adapted.loss, adapted.ess, [p.cpu() for p in flow.parameters()]])
            if counts is not None:
                counts.clear()
                tsf.adapt(sampler, settings(3, n_gradient_steps=2), progress=False)
                # Of three iterations and six steps; the check of the start, and the temperatures.
                assert counts.n_waits == 3 + 6 + 2, counts
    (loss, ess, weights), (other_loss, other_ess, other_weights) = results
    assert (loss, ess) == (other_loss, other_ess)
    assert all(map(torch.equal, weights, other_weights))


def test_gradients_that_are_not_finite(monkeypatch):
    """Such steps leave the weights as they are, and too many end the adaptation."""
    target = mixture()
    sampler = make_sampler(target, target.means.repeat(2, 1))
    norm = torch.nn.utils.clip_grad_norm_
    before = [p.clone() for p in sampler.flow.parameters()]

    def infinite(parameters, limit):
        return norm(parameters, limit) * math.inf

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = tsf.adapt(sampler, settings(4), progress=False)
        assert result.n_skipped == 4
        with pytest.raises(FloatingPointError, match="3 gradients in a row were not finite"):
            tsf.adapt(sampler, settings(4, max_skipped=2), progress=False)
    assert all(map(torch.equal, before, sampler.flow.parameters()))
    assert sampler.reporters == []
