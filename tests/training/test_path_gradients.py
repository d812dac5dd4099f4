"""Path gradients: the same mean as the direct ones, and zero for an exact flow."""

import math

import pytest
import torch

from openmm_tsf.potentials import GaussianWell, MixedDoubleWell
from openmm_tsf.training import path_gradients
from openmm_tsf.training.control_variates import ControlVariates
from openmm_tsf.training.losses import negative_log_likelihood, variational_free_energy
from openmm_tsf.training.path_gradients import (
    COTANGENT_LIMIT,
    data_cotangent,
    draw_cotangent,
    draw_score,
    is_uncut,
    limit_norm,
    log_density_at_draws,
)
from openmm_tsf.training.target import Target
from tests.support.path_training import FAR, KINDS, D, SignBasins, rough_flow, sampled


def gradients(losses, parameters, chunks=40):
    """Mean gradient [P] over chunks of a sum of per-sample losses, and its standard error."""
    means = []
    for part in losses.chunk(chunks):
        grads = torch.autograd.grad(part.mean(), parameters, retain_graph=True)
        means.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(means).mean(0), torch.stack(means).std(0) / len(means) ** 0.5


def assert_same(direct, path):
    """Two estimates of one gradient, of independent samples."""
    z = (direct[0] - path[0]) / (direct[1].square() + path[1].square()).sqrt().clamp(min=1e-12)
    assert float(z.abs().max()) < 4.5, z.abs().max()
    assert float((direct[0] / direct[1].clamp(min=1e-12)).abs().max()) > 8  # they are not zero


def gradient_of(potential, x, momenta, tau):
    _, forces = potential.energy_and_forces(x)
    return torch.cat([-forces, momenta], dim=1) / tau[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_gradients_have_the_same_mean(kind, temperature, monkeypatch):
    monkeypatch.setattr(path_gradients, "COTANGENT_LIMIT", FAR)
    potential, flow, n = MixedDoubleWell.random(D, 1), rough_flow(kind), 40_000
    network, zero = flow.network, torch.zeros(n, dtype=torch.float64)
    parameters = list(network.parameters())
    x, p, tau = sampled(potential, flow, temperature, n, 1)
    direct = gradients(negative_log_likelihood(network, x, zero, p, tau), parameters)
    x, p, tau = sampled(potential, flow, temperature, n, 2)
    v, log_det, pullback = network.inverse_and_pullback(torch.cat([x, p], dim=1))
    target = pullback(gradient_of(potential, x, p, tau))
    for beta in (1.0, 0.4):
        betas = torch.full_like(tau, beta)
        cotangent = data_cotangent(v, target, tau, betas)
        loss = (v * cotangent).sum(dim=1) - (1 - betas) * log_det
        assert_same(direct, gradients(loss, parameters))
    # The same of draws.
    v = flow.sample_prior(n, temperature, torch.Generator().manual_seed(3))
    target = Target(flow, potential, SignBasins(), FAR)
    direct = gradients(variational_free_energy(target, network, v, tau), parameters)
    v = flow.sample_prior(n, temperature, torch.Generator().manual_seed(4))
    y, _, pullback = network.forward_and_pullback(v)
    gradient = gradient_of(potential, y[:, :D].detach(), y[:, D:].detach(), tau)
    cotangent = draw_cotangent(draw_score(v, pullback, tau), gradient)
    path = gradients((y * cotangent).sum(dim=1), parameters)
    assert_same(direct, path)


@pytest.mark.parametrize("kind", KINDS)
def test_score_of_draws_is_the_gradient_at_fixed_points(kind):
    flow, tau = rough_flow(kind), torch.full((20,), 0.6, dtype=torch.float64)
    network, parameters = flow.network, list(flow.network.parameters())
    v = flow.sample_prior(20, 0.6, torch.Generator().manual_seed(5))
    y, log_det, pullback = network.forward_and_pullback(v)
    score = draw_score(v, pullback, tau)
    estimate, _ = gradients(log_density_at_draws(y, log_det, score), parameters)
    zero = torch.zeros(20, dtype=torch.float64)
    x, p = y[:, :D].detach(), y[:, D:].detach()
    expected, _ = gradients(-negative_log_likelihood(network, x, zero, p, tau), parameters)
    assert torch.allclose(estimate, expected, atol=1e-10)
    assert float(estimate.norm()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_pullback_is_the_derivative_of_the_other_direction(kind, way):
    """As differentiating the other direction at the image; the graph of the first is complete."""
    network, generator = rough_flow(kind).network, torch.Generator().manual_seed(8)
    other = {"forward": "inverse", "inverse": "forward"}[way]
    start, cotangent = torch.randn(2, 50, 2 * D, generator=generator, dtype=torch.float64)
    if kind == "realnvp":
        start, cotangent = start[:, :D], cotangent[:, :D]
    image, log_det, pullback = getattr(network, f"{way}_and_pullback")(start)
    leaf = image.detach().requires_grad_()
    back, log_det_back = getattr(network, f"{other}_and_log_det")(leaf)
    (expected,) = torch.autograd.grad((back * cotangent).sum() - log_det_back.sum(), leaf)
    torch.testing.assert_close(pullback(cotangent), expected, rtol=1e-9, atol=1e-9)
    parameters = list(network.parameters())
    again, again_log_det = getattr(network, f"{way}_and_log_det")(start)
    torch.testing.assert_close((image, log_det), (again, again_log_det))
    torch.testing.assert_close(
        torch.autograd.grad((image**2).sum() + log_det.sum(), parameters),
        torch.autograd.grad((again**2).sum() + again_log_det.sum(), parameters),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_an_exact_flow_are_zero_at_every_point(kind):
    """The direct gradients of single points are as large as ever."""
    flow_class, n_momenta = KINDS[kind]
    flow = flow_class(D, n_momenta, 2, (8,), seed=1)  # the identity
    potential = GaussianWell(torch.eye(D, dtype=torch.float64))
    for temperature in (0.5, 1.0):
        x, p, tau = sampled(potential, flow, temperature, 200, 6)
        v, _, pullback = flow.network.inverse_and_pullback(torch.cat([x, p], dim=1))
        gradient = gradient_of(potential, x, p, tau)
        cotangent = data_cotangent(v, pullback(gradient), tau, torch.ones_like(tau))
        assert float(cotangent.abs().max()) < 1e-12
        assert float(gradient.norm(dim=1).mean()) > 1
        _, _, pullback = flow.network.forward_and_pullback(v.detach())
        assert float(draw_cotangent(draw_score(v, pullback, tau), gradient).abs().max()) < 1e-12


def test_large_cotangents_are_cut_and_non_finite_ones_zero():
    cotangents = torch.tensor([[3.0, 4.0], [300.0, 400.0], [math.nan, 1.0], [math.inf, 1.0]])
    limited = limit_norm(cotangents)
    torch.testing.assert_close(limited[0], cotangents[0])
    torch.testing.assert_close(limited[1].norm(), torch.tensor(COTANGENT_LIMIT))
    assert not limited[2:].any()
    assert is_uncut(limited).tolist() == [True, False, False, False]


def test_control_variates_have_the_least_noise():
    """Beta is 1 where c and g are equal, small where g is mostly noise, by cell."""
    control, generator = ControlVariates(3, torch.device("cpu")), torch.Generator().manual_seed(1)
    tau, cell = torch.full((3000,), 0.5), torch.arange(3000) % 2
    for _ in range(50):
        v = torch.randn(3000, 6, generator=generator)
        noise = 2 * torch.randn(3000, 6, generator=generator) * cell[:, None]
        target, beta = control.update(v, v / tau[:, None] + noise, tau, cell)
    # E[c^2] = 1/tau^2 = 4 for each feature; the noise has 4 in cell 1.
    assert torch.allclose(beta, torch.where(cell == 1, 0.5, 1.0), atol=0.02)
    spread = [float((v / 0.5 - b * target)[cell == 1].norm()) for b in (0.0, 0.5, 1.0)]
    assert spread[1] < min(spread[0], spread[2])
    bad = torch.full((3000, 6), math.nan)
    assert torch.isfinite(control.update(bad, bad, tau, cell)[1]).all()
    again = ControlVariates(3, torch.device("cpu"))
    again.load_state_dict(control.state_dict())
    assert torch.equal(again.products, control.products)
    with pytest.raises(ValueError, match="products"):
        ControlVariates(2, torch.device("cpu")).load_state_dict(control.state_dict())
