"""Walkers start over-dispersed: half from frames, half from weighted draws of the flow."""

import logging

import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.potentials.toy import DoubleWell
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.utils.random import seeded_generator
from openmm_tsf.workflow.start import start_positions

LADDER = (1.0, 2.0)


class Blocked(DoubleWell):
    """A double well whose energy is infinite at the flow's draws: nothing but frames is finite."""

    def __init__(self, allowed):
        super().__init__(0.0, -1.0, 0.25)
        self.allowed = allowed

    def energy(self, x):
        known = (x[:, None] == self.allowed).all(dim=2).any(dim=1)
        return torch.where(known, super().energy(x), torch.inf)


@pytest.fixture(scope="module")
def case():
    generator = seeded_generator(1)
    frames = 1.5 + 0.3 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    flow = tsf.TemperatureSteerableFlow(1, 2, 1, (4,))
    return MDDataset(frames, 2.0), flow, DoubleWell(0.0, -1.0, 0.25)


def are_frames(x, dataset):
    same = (x[..., None, :] == dataset.positions).all(dim=-1)
    return same.any(dim=-1)


def test_half_of_the_walkers_start_from_frames(case):
    dataset, flow, potential = case
    x = start_positions(dataset, flow, potential, LADDER, 9, seeded_generator(3))
    assert x.shape == (9, 2, 1)
    inside = are_frames(x, dataset)
    assert inside[:5].all()
    assert not inside[5:].any()
    drawn = x[5:].flatten(0, 1)
    assert len(drawn.unique(dim=0)) == len(drawn)  # no two walkers from the same draw
    assert potential.energy(drawn).max() <= potential.energy(dataset.positions).max()
    again = start_positions(dataset, flow, potential, LADDER, 9, seeded_generator(3))
    other = start_positions(dataset, flow, potential, LADDER, 9, seeded_generator(4))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


def test_draws_are_weighted(case):
    """Resampled at each rung, draws have the mean energy of its Boltzmann distribution."""
    _, flow, potential = case
    far = MDDataset(torch.tensor([[8.0], [8.1]], dtype=torch.float64), 2.0)
    n = 2000
    x = start_positions(far, flow, potential, LADDER, n, seeded_generator(5))[n // 2 :]
    exact = potential.energy(torch.linspace(-9, 9, 100_001, dtype=torch.float64)[:, None])
    for rung, kelvin in enumerate(LADDER):
        weight = torch.softmax(-exact / kelvin, dim=0)
        energy = potential.energy(x[:, rung]).numpy()
        z = (energy.mean() - float(weight @ exact)) / (energy.std() / np.sqrt(len(energy)))
        plain = potential.energy(flow.sample(n, kelvin, seeded_generator(6)).x.double()).mean()
        assert abs(z) < 4 < (float(plain) - energy.mean()) / (energy.std() / np.sqrt(len(energy)))


def test_frames_replace_draws_that_cannot_be_used(case, caplog):
    dataset, flow, _ = case
    with caplog.at_level(logging.INFO, logger="openmm_tsf"):
        x = start_positions(
            dataset, flow, Blocked(dataset.positions), LADDER, 6, seeded_generator(3)
        )
    assert are_frames(x, dataset).all()
    assert "0 of 6 walkers start from draws of the flow, the others from frames" in caplog.text


def test_one_walker_starts_from_a_frame(case):
    dataset, flow, potential = case
    x = start_positions(dataset, flow, potential, LADDER, 1, seeded_generator(3))
    assert are_frames(x, dataset).all()
