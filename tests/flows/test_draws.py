"""Weighted draws of a flow: against a flow that is exact, and outside the coordinates' domain."""

import math

import pytest
import torch

from openmm_tsf.analysis.statistics import weighted_mean
from openmm_tsf.flows import FlowSample, TemperatureSteerableFlow
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.potentials import DoubleWell, GaussianWell


@pytest.fixture
def flow():
    """The identity, with three momenta: exact for U = x²/2."""
    return TemperatureSteerableFlow(2, 3, 1, (8,), 1.0, seed=1)


def draw(flow, potential, n=4000, **options):
    return draw_weighted(flow, potential, 1.7, n, torch.Generator().manual_seed(3), **options)


def test_an_exact_flow_has_equal_weights(flow):
    harmonic = DoubleWell(torch.zeros(2), 0.5 * torch.ones(2), torch.zeros(2))
    draws = draw(flow, harmonic, 12, batch_size=5)
    assert [len(part) for part in draws] == [12] * 4
    assert bool(draws.inside.all())
    expected = harmonic.log_partition_function(1.7) + 1.5 * math.log(2 * math.pi * 1.7)
    torch.testing.assert_close(draws.log_weights, torch.full((12,), expected).double())
    assert harmonic.n_evaluations == 12


def test_weights_give_the_mean_energy_of_another_target(flow):
    target = GaussianWell(torch.tensor([[1.5, 0.3], [0.3, 0.8]]).double())
    draws = draw(flow, target)
    value, stderr = weighted_mean(draws.energy.numpy(), draws.log_weights.numpy())
    assert abs(value - target.mean_energy(1.7)) < 4 * stderr


def test_draws_outside_the_domain_have_no_weight_and_cost_no_energy(flow, monkeypatch):
    sample = flow.sample

    def half_outside(n, temperature, generator):
        x, momenta, log_prob = sample(n, temperature, generator)
        return FlowSample(x, momenta, torch.where(torch.arange(n) % 2 == 0, log_prob, math.inf))

    monkeypatch.setattr(flow, "sample", half_outside)
    potential = GaussianWell(torch.eye(2).double())
    draws = draw(flow, potential, 10)
    assert potential.n_evaluations == 5
    assert draws.inside.tolist() == [True, False] * 5
    assert torch.equal(draws.log_weights == -math.inf, ~draws.inside)
    assert torch.equal(draws.energy == math.inf, ~draws.inside)


@pytest.mark.parametrize("name", ["n", "batch_size"])
def test_arguments(flow, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        draw(flow, GaussianWell(torch.eye(2).double()), **{name: 0})
