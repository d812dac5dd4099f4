"""Flows of molecules with constrained bonds: the angle of a rigid trimer, in both measures."""

import functools

import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.sampling.kernels import FlowIndependence, SteeredSwap, TorchLangevin
from tests.support.rigid_trimer import (
    EQUAL,
    LADDER,
    LIGHT,
    MEASURES,
    angle_marginal,
    angles_of,
    exact_angle,
    exact_frames,
    trimer,
)


@functools.cache
def flow_of(measure: str, ratio: float = EQUAL) -> tsf.TemperatureSteerableFlow:
    """Return a flow with random weights, standardised on frames of the first temperature."""
    frames = exact_frames(measure, LADDER[0], 2000, seed=8, ratio=ratio)
    dataset = tsf.MDDataset(frames, LADDER[0], trimer(measure, ratio))
    flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,), seed=2)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in flow.network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.03 * noise)
    return flow


def uniform_score(pit: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the largest z of the first two moments of numbers that are uniform if exact."""
    scores = []
    for values in (pit - 0.5, (pit - 0.5) ** 2 - 1 / 12):
        if weights is None:
            scores.append(values.mean() / values.std() * np.sqrt(len(values)))
        else:
            scores.append((weights * values).sum() / np.sqrt((weights**2 * values**2).sum()))
    return float(np.abs(scores).max())


def weighted_scores(measure: str, ratio: float = EQUAL, n: int = 60_000) -> dict[float, float]:
    """Return z of the angles of weighted draws at each temperature."""
    scores = {}
    for kelvin in LADDER:
        generator = torch.Generator().manual_seed(3)
        with trimer(measure, ratio).potential() as potential:
            draws = draw_weighted(flow_of(measure, ratio), potential, kelvin, n, generator)
        weights = (draws.log_weights - draws.log_weights.max()).exp().numpy()
        assert weights.sum() ** 2 / (weights**2).sum() > 0.1 * n
        inside = weights > 0
        theta, other = angles_of(draws.x[torch.from_numpy(inside)])
        of_metric = exact_angle(measure, kelvin, ratio).pit(theta)
        of_other = angle_marginal(kelvin, None).pit(other)
        assert uniform_score(of_other, weights[inside]) < 4
        scores[kelvin] = uniform_score(of_metric, weights[inside])
    return scores


@pytest.mark.parametrize("ratio", [EQUAL, LIGHT])
@pytest.mark.parametrize("measure", MEASURES)
def test_weighted_draws_have_the_exact_angles(measure, ratio):
    flow = flow_of(measure, ratio)
    assert flow.n_coordinates == 4
    assert flow.is_constant_log_det == (measure == "stiff")
    assert max(weighted_scores(measure, ratio).values()) < 4


def test_draws_that_forget_the_metric_are_noticed(monkeypatch):
    monkeypatch.setattr(Constraints, "half_log_metric", lambda self, x: x.new_zeros(len(x)))
    assert min(weighted_scores("rigid", LIGHT).values()) > 8


def chain_scores(measure: str, ratio: float = EQUAL, n_walkers: int = 4000) -> list[float]:
    """Return z of the angle at each rung after moves from exact frames: all must stay exact."""
    molecule, flow = trimer(measure, ratio), flow_of(measure, ratio)
    with molecule.potential() as potential:
        independent = FlowIndependence(flow, potential, LADDER, n_steps=2)
        kernels = [independent, SteeredSwap(flow, potential, LADDER)]
        parts = molecule, flow, LADDER, n_walkers, kernels
        sampler = tsf.ParallelTempering(*parts, potential=potential, seed=7)
        frames = [exact_frames(measure, kelvin, n_walkers, ratio=ratio) for kelvin in LADDER]
        sampler.set_positions(torch.stack(frames, dim=1))
        sampler.run(4, progress=False)
    for kernel in sampler.totals.values():
        assert float((kernel.accepted / kernel.proposed).min()) > 0.2
    x = sampler.state.x
    deviations = molecule.constraints.deviations(x.flatten(0, 1))
    assert float(deviations.abs().max()) < 1e-14
    return [
        uniform_score(exact_angle(measure, kelvin, ratio).pit(angles_of(x[:, rung])[0]))
        for rung, kelvin in enumerate(LADDER)
    ]


@pytest.mark.parametrize("measure", MEASURES)
def test_chains_keep_the_exact_angles(measure):
    assert max(chain_scores(measure)) < 4


def test_chains_that_forget_the_metric_are_noticed(monkeypatch):
    monkeypatch.setattr(Constraints, "half_log_metric", lambda self, x: x.new_zeros(len(x)))
    assert max(chain_scores("rigid", LIGHT, 8000)) > 6


def test_dynamics_of_other_constraints_or_measures_are_refused():
    molecule, flow = trimer("rigid"), flow_of("rigid")
    parts = LADDER, molecule.masses
    with molecule.potential() as potential:
        cases = (
            ({}, "with the 2 constraints of the molecule, got 0 others"),
            ({**molecule.constraint_options, "measure": "stiff"}, "measure, 'rigid', got 'stiff'"),
        )
        for options, message in cases:
            kernels = [TorchLangevin(potential, *parts, **options)]
            with pytest.raises(ValueError, match=message):
                tsf.ParallelTempering(molecule, flow, LADDER, 2, kernels, potential=potential)
        kernels = [TorchLangevin(potential, *parts, flow)]
        tsf.ParallelTempering(molecule, flow, LADDER, 2, kernels, potential=potential)


def test_a_saved_flow_has_its_constraints_and_measure(tmp_path):
    for measure, other in (MEASURES, MEASURES[::-1]):
        flow = flow_of(measure)
        flow.save(tmp_path / "flow.pt")
        loaded = tsf.TemperatureSteerableFlow.load(tmp_path / "flow.pt", trimer(measure))
        assert loaded.coordinates.to_config() == flow.coordinates.to_config()
        draws = [
            f.sample(50, 350.0, torch.Generator().manual_seed(1)).log_prob for f in (flow, loaded)
        ]
        assert torch.equal(*draws)
        with pytest.raises(ValueError, match="this flow belongs to another molecule"):
            tsf.TemperatureSteerableFlow.load(tmp_path / "flow.pt", trimer(other))
