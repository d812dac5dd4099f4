"""Perceptrons: derivatives against autograd, and weights in another precision."""

import copy

import pytest
import torch

from openmm_tsf.flows.perceptron import Perceptron


def rough_perceptron(seed=0):
    net = Perceptron(5, [8, 6], 4).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net, torch.randn(5, 7, generator=generator, dtype=torch.float64)


def test_derivatives_are_those_of_autograd():
    net, x = rough_perceptron()
    x.requires_grad_()
    outputs = net(x)
    recorded, tape = net.record(x.detach())
    torch.testing.assert_close(recorded, outputs.detach())
    cotangent = torch.ones_like(outputs).cumsum(1)
    expected = torch.autograd.grad(outputs, [x, *net.parameters()], cotangent)
    of_first, gradients = tape.gradients(cotangent)
    torch.testing.assert_close(tape.pull_back(cotangent), expected[0])
    torch.testing.assert_close(tape.weights[0].T @ of_first, expected[0])
    for gradient, other in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("change", ["in place", "state_dict", "precision", "copy"])
def test_converted_weights_follow_the_parameters(change):
    net, x = rough_perceptron()
    other, _ = rough_perceptron(seed=1)
    with torch.no_grad():
        before = net(x.float())
        assert torch.equal(net(x.float()), before)
        if change == "in place":
            for parameter, value in zip(net.parameters(), other.parameters(), strict=True):
                parameter.copy_(value)
        elif change == "state_dict":
            net.load_state_dict(other.state_dict())
        elif change == "copy":
            net = copy.deepcopy(net)
            net.load_state_dict(other.state_dict())
        else:
            net, other = net.half().double(), rough_perceptron()[0].half().double()
        after = net(x.float())
        assert not torch.equal(after, before)
        assert torch.equal(after, copy.deepcopy(other).float()(x.float()))


@pytest.mark.parametrize("fused", [False, True])
def test_converted_weights_follow_optimizers(fused):
    net, x = rough_perceptron()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=fused)
    with torch.no_grad():
        before = net(x.float())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        after = net(x.float())
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(net).float()(x.float()))


def test_weights_converted_in_inference_mode_are_differentiable_later():
    net, x = rough_perceptron()
    net.requires_grad_(False)
    with torch.inference_mode():
        before = net(x.float())
    x = x.float().requires_grad_()
    outputs = net(x)
    assert torch.equal(outputs.detach(), before)
    (gradient,) = torch.autograd.grad(outputs.sum(), x)
    assert bool((gradient != 0).any())


def test_weights_made_in_inference_mode_are_used():
    with torch.inference_mode():
        net, x = rough_perceptron()
        assert torch.equal(net(x.float()), copy.deepcopy(net).float()(x.float()))
