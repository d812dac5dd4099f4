"""Toy flows, data and settings for the tests of training by path gradients."""

import math

import numpy as np
import torch

from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
from openmm_tsf.potentials import MixedDoubleWell
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitSettings
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.path_objective import PathObjective
from openmm_tsf.training.step_numbers import StepNumbers
from openmm_tsf.training.target import Target

D, FAR = 3, 1e9
KINDS = {"tsf": (TemperatureSteerableFlow, D), "realnvp": (RealNVPFlow, 0)}
SHORT = FitSettings(
    n_steps=30,
    batch_size=64,
    kl_batch_size=32,
    validate_interval=10,
    n_validation_draws=100,
    ramp=(0.1, 0.5),
    lambda_max=0.3,
    temperatures=(0.5, 1.0),
    estimator="path",
    n_chains=40,
    optimizer="muon",
    learning_rate=1e-2,
)


def rough_flow(kind, seed=2):
    """Return a flow with random weights: not the identity, and fitted to nothing."""
    flow_class, n_momenta = KINDS[kind]
    flow = flow_class(D, n_momenta, 2, (8,), seed=seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.15 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return flow


def toy():
    potential = MixedDoubleWell.random(D, 1)
    data = MDDataset(potential.sample(2000, 1.0, torch.Generator().manual_seed(1)), 1.0)
    return potential, data


def make_objective(flow, potential, data, settings=SHORT):
    """Return a path objective on the training part of the data."""
    return PathObjective(
        flow,
        [data.split().train],
        Target(flow, potential, BasinPartition.find([data]), FAR),
        settings,
        torch.Generator().manual_seed(1),
        StepNumbers(),
    )


def weights(flow):
    return torch.cat([parameter.detach().flatten() for parameter in flow.parameters()])


class SignBasins(BasinPartition):
    """The sign of the first coordinate is the basin."""

    def __init__(self):
        super().__init__({}, np.zeros((0, 0), dtype=np.int64))
        self.n_basins = 2

    def labels(self, x):
        return (x[:, 0] > 0).long()


def two_basins(monkeypatch):
    """Make the sign of the first coordinate the basin where there is no molecule."""
    monkeypatch.setattr(BasinPartition, "find", lambda datasets: SignBasins())


def sampled(potential, flow, temperature, n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = potential.sample(n, temperature, generator)
    p = torch.randn(n, flow.n_momenta, generator=generator, dtype=torch.float64)
    return x, p * math.sqrt(temperature), torch.full((n,), temperature, dtype=torch.float64)
