"""The target of training with constrained bonds: their metric is a part of it."""

import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.target import Target
from openmm_tsf.units import KB
from tests.support.rigid_trimer import LADDER, LIGHT, MEASURES, exact_frames, trimer


@pytest.mark.parametrize("metric", ["volume", "polar"])
@pytest.mark.parametrize("measure", MEASURES)
def test_target_is_the_density_of_the_measure(measure, metric):
    """U/kT less ln of the volume element of the layers, up to a constant, at every temperature."""
    molecule = trimer(measure, LIGHT)
    dataset = tsf.MDDataset(exact_frames(measure, 300.0, 400, ratio=LIGHT), 300.0, molecule)
    flow = tsf.TemperatureSteerableFlow.from_dataset(
        dataset, n_blocks=1, hidden=(4,), metric=metric, fold_methyls=False
    )
    zero = torch.zeros(len(dataset), dtype=torch.float64)
    y, log_det = flow.undo_layers(dataset.positions, zero)
    with molecule.potential() as potential:
        energy = potential.energy(dataset.positions)
        target = Target(flow, potential, BasinPartition.find([dataset]), 1e9)
        for kelvin in LADDER:
            tau = torch.full_like(zero, kelvin / 300.0)
            reduced, x = target.reduced_energy(y, tau)
            assert float((molecule.constraints.deviations(x)).abs().max()) < 1e-15
            offset = reduced - (energy / (KB * kelvin) + log_det)
            assert float(offset.std()) < 1e-9
        tau = torch.full((2,), 1.5, dtype=torch.float64)
        leaf = y[:2].clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda point: target.reduced_energy(point, tau)[0], leaf, atol=1e-4, rtol=1e-4
        )


def test_training_by_path_gradients():
    """Both losses, and chains, with the metric: the flow gains effective samples."""
    molecule = trimer("rigid", LIGHT)
    dataset = tsf.MDDataset(exact_frames("rigid", 450.0, 3000, ratio=LIGHT), 450.0, molecule)
    flow = tsf.TemperatureSteerableFlow.from_dataset(
        dataset, n_blocks=2, hidden=(16,), fold_methyls=False, seed=1
    )
    settings = tsf.FitSettings(
        n_steps=60, batch_size=128, kl_batch_size=64, validate_interval=30, warmup_steps=5,
        temperatures=LADDER, estimator="path", n_chains=64, n_validation_draws=4000,
        ramp=(0.1, 0.3),
    )  # fmt: skip
    with molecule.potential() as potential:
        result = tsf.fit(flow, dataset, potential=potential, settings=settings, progress=False)
    first, last = result.history[0], result.best
    assert last.step > 0
    assert last.score < first.score
    assert last.ess["300K"] > first.ess["300K"] + 0.05
    assert last.ess["450K"] > first.ess["450K"]
