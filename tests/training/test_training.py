"""Losses, the training loop, its guards and its resumption."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch

from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.potentials import GaussianWell
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitSettings, fit, losses
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.target import Target, soften
from openmm_tsf.training.validation import Validator, effective_sample_fraction
from tests.support.path_training import weights

D = 3
PRECISION = torch.tensor([[2.0, 0.8, 0.0], [0.8, 1.0, 0.2], [0.0, 0.2, 0.5]], dtype=torch.float64)


def gaussian_data(n=2000, temperature=1.0, seed=0):
    """Exact samples of the correlated Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(torch.linalg.inv(PRECISION) * temperature)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) @ root.T
    return MDDataset(x, temperature)


def small_flow(seed=1):
    return TemperatureSteerableFlow(D, D, 2, (16,), seed=seed)


SIZES = {"n_steps": 40, "batch_size": 64, "kl_batch_size": 16, "validate_interval": 10}
SHORT = FitSettings(**SIZES, n_validation_draws=100, ramp=(0.0, 0.5), temperatures=(0.5, 1.0))
ONE_BASIN = BasinPartition({}, np.zeros((0, 0), dtype=np.int64))
VALIDATION = FitSettings(n_validation_draws=200, temperatures=(600.0,), dtype=torch.float64)


def test_likelihood_agrees_with_log_prob(molecule):
    frames = MDDataset.shipped(molecule, stride=200)
    molecular = TemperatureSteerableFlow.from_dataset(frames, n_blocks=1, hidden=(8,))
    for flow, data in ((small_flow(), gaussian_data(50)), (molecular, frames)):
        y, log_det = losses.whiten(flow, data.positions)
        tau = torch.full((len(y),), 0.7, dtype=torch.float64)
        momenta = losses.draw_normal(tau, flow.n_momenta, torch.Generator().manual_seed(4))
        nll = losses.negative_log_likelihood(flow.network, y, log_det, momenta, tau)
        expected = -flow.log_prob(data.positions, momenta, 0.7 * flow.reference_temperature)
        torch.testing.assert_close(nll, expected)


def test_free_energy_is_bounded_by_the_exact_one():
    """E[U/kT + p^2/2tau - log J] - (entropy of the prior) >= -ln Z, with equality when exact."""
    flow = small_flow()
    root = torch.linalg.cholesky(torch.linalg.inv(PRECISION))
    temperature = 0.6
    log_z = 0.5 * D * math.log(2 * math.pi * temperature) + root.diagonal().log().sum().item()
    generator = torch.Generator().manual_seed(1)
    v = flow.sample_prior(20_000, temperature, generator)
    tau = torch.full((len(v),), temperature, dtype=torch.float64)
    target = Target(flow, GaussianWell(PRECISION), ONE_BASIN, 1e9)

    def free_energy(network):
        value = losses.variational_free_energy(target, network, v, tau)
        log_z_momenta = 0.5 * D * math.log(2 * math.pi * temperature)
        entropy = 0.5 * 2 * D * (1 + math.log(2 * math.pi * temperature))
        return value.mean() - entropy + log_z_momenta, value.std() / len(v) ** 0.5

    class Exact(torch.nn.Module):
        def forward_and_log_det(self, u):
            x = u[:, :D] @ root.T
            log_det = root.diagonal().log().sum().expand(len(u))
            return torch.cat([x, u[:, D:]], dim=1), log_det

    value, error = free_energy(Exact())
    assert abs(value + log_z) < 4 * error
    with torch.no_grad():
        value, error = free_energy(flow.network)
    assert value > -log_z + 10 * error


def test_validated_free_energy_bounds_the_exact_one():
    """The logged free energy is a bound on -ln Z of x for any number of momenta."""
    temperature = 0.7
    exact = -0.5 * D * math.log(2 * math.pi * temperature)
    for n_momenta in (1, 8):
        flow = TemperatureSteerableFlow(D, n_momenta, 1, (8,), seed=1)
        target = Target(flow, GaussianWell(torch.eye(D, dtype=torch.float64)), ONE_BASIN, 1e9)
        changes = {"temperatures": (temperature,), "n_validation_draws": 20_000}
        settings = dataclasses.replace(VALIDATION, **changes)
        validator = Validator(flow, [gaussian_data(50)], target, ONE_BASIN, settings, seed=3)
        validation = validator.validate(flow.network, 0, 0.0, {})
        # Weights are zero: the flow is exact for this Gaussian, at every temperature.
        assert validation.free_energy["0.7K"] == pytest.approx(exact, abs=4 * (2 * D) ** 0.5 / 141)
        assert validation.ess["0.7K"] == pytest.approx(1)
        assert validation.inside["0.7K"] == 1


def test_basins_in_validation(molecule):
    """Lost basins count; few frames of a basin weigh little."""
    dataset = MDDataset.shipped(molecule, stride=10)
    flow = TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,))
    basins = BasinPartition.find([dataset])
    labels = basins.labels(dataset.positions)
    validator = Validator(flow, [dataset], None, basins, VALIDATION, seed=1)
    population = basins.populations(dataset.positions)

    def named(populations):
        return {f"600K basin {k}": p for k, p in enumerate(populations.tolist())}

    assert validator.population_error(named(population)) == pytest.approx(0)
    lost = population.clone()
    lost[2] /= 10
    n_present = int((population > 0).sum())
    assert validator.population_error(named(lost)) == pytest.approx(math.log(10) / n_present)
    assert math.isfinite(validator.population_error(named(0 * population)))
    twice = population.clone()
    twice[2] *= 2
    other = Validator(flow, [dataset], None, basins, VALIDATION, 1, [twice])
    assert other.population_error(named(twice)) == pytest.approx(0)

    some = torch.cat([torch.where(labels == 0)[0][:400], torch.where(labels == 1)[0][:10]])
    few = MDDataset(dataset.positions[some], 600.0, molecule)
    validator = Validator(flow, [few], None, basins, VALIDATION, seed=1)
    groups = validator.groups[600.0]
    nll = {groups[0][0]: 1.0, groups[1][0]: 12.0}
    assert validator.likelihood(groups, nll) == pytest.approx(2.0)  # 100 to 10


def test_softened_energies_join_smoothly():
    energy = torch.tensor([1.0, 9.999, 10.001, 1e8], dtype=torch.float64, requires_grad=True)
    kt = torch.tensor(2.0, dtype=torch.float64)
    soft = soften(energy, 10.0, kt)
    torch.testing.assert_close(soft[:3], energy[:3], rtol=0, atol=1e-6)
    assert soft[3] < 50
    soft.sum().backward()
    torch.testing.assert_close(energy.grad[:3], torch.ones(3).double(), atol=1e-3, rtol=0)


def test_marginal_bound_is_exact_when_x_and_p_factorise():
    flow, data = small_flow(), gaussian_data(4000)
    tau, zero = torch.ones(4000, dtype=torch.float64), torch.zeros(4000, dtype=torch.float64)
    momenta = losses.draw_normal(tau, D, torch.Generator().manual_seed(3))
    # Zero weights: D is the identity, so log p(x) = log N(x; 0, 1).
    joint = losses.negative_log_likelihood(flow.network, data.positions, zero, momenta, tau)
    exact = 0.5 * (data.positions.square().sum(1) + D * math.log(2 * math.pi))
    difference = losses.marginal_nll_bound(joint, D, tau) - exact
    assert abs(difference.mean()) < 4 * difference.std() / 4000**0.5


def test_effective_sample_fraction():
    assert effective_sample_fraction(torch.zeros(50)) == pytest.approx(1)
    assert effective_sample_fraction(torch.tensor([0.0, -math.inf])) == pytest.approx(0.5)
    assert effective_sample_fraction(torch.tensor([800.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert effective_sample_fraction(torch.full((3,), -math.inf)) == 0


def test_training_finds_a_gaussian():
    """A correlated Gaussian is within reach: the weights become nearly equal."""
    flow, data = small_flow(), gaussian_data()
    sizes = {"n_steps": 600, "batch_size": 256, "kl_batch_size": 64, "validate_interval": 100}
    schedule = {"ramp": (0.2, 0.5), "learning_rate": 1e-2, "lambda_max": 0.3}
    settings = FitSettings(temperatures=(0.5, 1.0), **sizes, **schedule)
    result = fit(flow, data, GaussianWell(PRECISION), settings=settings, seed=2, progress=False)
    assert result.best.ess["1K"] > 0.9
    assert result.history[0].ess["1K"] < 0.75
    assert result.best.score < result.history[0].score - 0.3
    assert flow.dtype == torch.float64


def test_training_realnvp_with_the_same_loop():
    flow, data = RealNVPFlow(D, 0, 2, (16,), seed=1), gaussian_data()
    result = fit(flow, data, GaussianWell(PRECISION), settings=SHORT, progress=False)
    assert result.best.score <= result.history[0].score


def test_seeds(tmp_path):
    flows = [small_flow() for _ in range(3)]
    for flow, seed in zip(flows, (5, 5, 6), strict=True):
        potential = GaussianWell(PRECISION)
        fit(flow, gaussian_data(), potential, settings=SHORT, seed=seed, progress=False)
    assert torch.equal(weights(flows[0]), weights(flows[1]))
    assert not torch.equal(weights(flows[0]), weights(flows[2]))


class Interrupted(GaussianWell):
    """A potential that raises after a number of calls."""

    calls_left = 10**9

    def energy(self, x):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise KeyboardInterrupt
        return super().energy(x)


def test_resume_is_exact(tmp_path):
    whole, parts = small_flow(), small_flow()
    path, log = tmp_path / "checkpoint.pt", tmp_path / "training.csv"
    options = {"settings": SHORT, "seed": 3, "progress": False}
    expected = fit(whole, gaussian_data(), GaussianWell(PRECISION), **options)
    options |= {"checkpoint_path": path, "log_path": log}
    potential = Interrupted(PRECISION)
    potential.calls_left = 29
    with pytest.raises(KeyboardInterrupt):
        fit(parts, gaussian_data(), potential, **options)
    parts = small_flow()
    result = fit(parts, gaussian_data(), GaussianWell(PRECISION), resume=True, **options)
    assert torch.equal(weights(whole), weights(parts))
    assert [v.score for v in result.history] == [v.score for v in expected.history]
    with open(log) as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [0, 10, 20, 30, 40]
    # The energies that set the ceiling are computed once more, and count once.
    assert result.n_evaluations == expected.n_evaluations


def test_interrupt_in_the_first_validation_leaves_the_flow_as_it_was():
    flow, potential = small_flow(), Interrupted(PRECISION)
    potential.calls_left = 1
    with pytest.raises(KeyboardInterrupt):
        fit(flow, gaussian_data(), potential, settings=SHORT, progress=False)
    assert torch.equal(weights(flow), weights(small_flow()))


def test_resume_refuses_checkpoints_of_other_trainings(tmp_path):
    path = tmp_path / "checkpoint.pt"
    run = dict(potential=GaussianWell(PRECISION), checkpoint_path=path, progress=False)
    fit(small_flow(), gaussian_data(), settings=SHORT, **run)

    def refused(message, data=None, settings=SHORT, **options):
        data = gaussian_data() if data is None else data
        with pytest.raises(ValueError, match=message):
            fit(small_flow(), data, settings=settings, resume=True, **run, **options)

    refused("made with other settings", settings=FitSettings(n_steps=50, batch_size=32))
    refused("other frames or with another seed", seed=9)
    refused("other frames or with another seed", gaussian_data(seed=5))
    content = read_tensors(path, "training checkpoint")
    for number, version in ((99, "a newer version"), (4, "an earlier version")):
        write_tensors(path, content | {"format": number})
        refused(f"written in format {number} by {version}")
    path.write_bytes(b"damaged")
    refused("not a readable training checkpoint")


def test_non_finite_gradients_are_counted_then_an_error():
    class Broken(Potential):
        event_shape, boltzmann_constant = (D,), 1.0

        def energy(self, x):
            return torch.full((len(x),), math.inf, dtype=x.dtype)

        def energy_and_forces(self, x):
            return self.energy(x), torch.zeros_like(x)

    settings = dataclasses.replace(SHORT, ramp=(0.0, 0.0), max_skipped=5)
    flow, before = small_flow(), weights(small_flow())
    with pytest.raises(FloatingPointError, match="6 steps in a row"):
        fit(flow, gaussian_data(), Broken(), settings=settings, progress=False)
    assert torch.equal(weights(flow), before)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("potential: expected one", lambda: fit(small_flow(), gaussian_data(100), progress=False)),
        ("dataset: expected at least one", lambda: fit(small_flow(), [], GaussianWell(PRECISION))),
        ("lambda_max", lambda: FitSettings(lambda_max=1.5)),
        ("final_lambda", lambda: FitSettings(final_lambda=-0.1)),
        ("final_lambda", lambda: FitSettings(lambda_max=0, final_lambda=0.1)),
        ("n_steps", lambda: FitSettings(n_steps=0)),
        ("ramp", lambda: FitSettings(ramp=(0.5, 0.2))),
    ],
)
def test_bad_arguments_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_frames_of_a_mirror_image_are_refused(molecule):
    dataset = MDDataset.shipped(molecule, stride=400)
    flow = TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,))
    mirrored = MDDataset(dataset.positions * torch.tensor([1.0, 1.0, -1.0]), 600, molecule)
    settings = FitSettings(n_steps=1, lambda_max=0.0)
    with pytest.raises(ValueError, match="outside the flow's domain"):
        fit(flow, mirrored, settings=settings, progress=False)
    with pytest.raises(ValueError, match="another handedness"):
        TemperatureSteerableFlow.from_dataset(mirrored)


def test_lambda_and_learning_rate_schedules():
    settings = FitSettings(n_steps=100, lambda_max=0.2, ramp=(0.2, 0.6), warmup_steps=10)
    assert [settings.mixing(s) for s in (0, 19, 40, 60, 99)] == pytest.approx([0, 0, 0.1, 0.2, 0.2])
    falls = dataclasses.replace(settings, final_lambda=0.1)
    assert [falls.mixing(s) for s in (0, 40, 60, 80, 100)] == pytest.approx(
        [0, 0.1, 0.2, 0.15, 0.1]
    )
    assert [falls.rise(s) for s in (0, 40, 60, 80, 100)] == [0, 0.5, 1, 1, 1]
    assert settings.learning_rate_at(9) == pytest.approx(settings.learning_rate)
    assert settings.learning_rate_at(100) == pytest.approx(settings.final_learning_rate)
