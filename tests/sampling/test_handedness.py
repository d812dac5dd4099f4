"""A floppy centre that is mirrored in a tenth of all draws: its domain is sampled exactly.

Bond, angle and offset terms are independent in internal coordinates, so exact samples are drawn
from quadratures, and those with a mirrored centre are left out.
"""

import math

import numpy as np
import pytest
import torch

from openmm_tsf.coordinates import InternalCoordinates, Whitening
from openmm_tsf.coordinates.chirality import Chirality
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels import (
    FlowIndependence,
    FlowWalk,
    InternalWalk,
    TorchLangevin,
    WhitenedCoordinates,
)
from openmm_tsf.units import KB
from openmm_tsf.utils.random import seeded_generator
from tests.support.exact_cases import LIMIT, NOTICED, apply, fresh_state
from tests.support.exact_tree import Marginal
from tests.support.molecules import graph_molecule

KELVIN, N = 500.0, 6000
POSITIONS = 0.06 * np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
STIFFNESS = torch.tensor([2e4, 25.0, 0.0, 8.0], dtype=torch.float64)  # by kind, kJ/mol


class FloppyCentre(Potential):
    """Sums of k (r - r0)^2 / 2, k (theta - theta0)^2 / 2 and k (1 - cos(offset - offset0))."""

    event_shape, boltzmann_constant = (5, 3), KB

    def __init__(self):
        bonds = [(0, 1), (0, 2), (0, 3), (0, 4)]
        self.molecule = graph_molecule(bonds, POSITIONS, "CFNOH")
        self.polar = InternalCoordinates.from_topology(*self.molecule, "polar")
        self.centre = self.polar.inverse_and_log_det(torch.tensor(POSITIONS)[None])[0]
        self.k = STIFFNESS[self.polar.kinds]

    def terms(self, u):
        away = u - self.centre
        return self.k * torch.where(self.polar.kinds < 2, 0.5 * away.square(), 1 - away.cos())

    def energy(self, x):
        self.n_evaluations += len(x)
        return self.terms(torch.cat(self.polar.bonds_angles_torsions(x), dim=1)).sum(dim=1)

    def energy_and_forces(self, x):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.energy(leaf)
            (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return energy.detach(), -gradient

    def sample(self, n, generator):
        """Return n exact samples, and the share of draws that are mirrored."""
        columns = []
        for index, kind in enumerate(self.polar.kinds.tolist()):

            def log_density(values, index=index, kind=kind):
                u = self.centre.repeat(len(values), 1)
                u[:, index] = torch.from_numpy(values)
                log_p = -self.terms(u)[:, index].numpy() / (KB * KELVIN)
                if kind == 0:
                    return log_p + 2 * np.log(values)
                return log_p + np.log(np.sin(values)) if kind == 1 else log_p

            middle = float(self.centre[0, index])
            circle = (middle - math.pi, middle + math.pi)
            low, high = {0: (0.04, 0.18), 1: (1e-9, math.pi - 1e-9)}.get(kind, circle)
            uniform = torch.rand(2 * n, generator=generator, dtype=torch.float64).numpy()
            columns.append(Marginal(log_density, low, high).quantile(uniform))
        u = torch.from_numpy(np.stack(columns, axis=1))
        inside = self.polar.in_domain(u)
        return self.polar.forward_and_log_det(u[inside][:n])[0], float((~inside).double().mean())

    def flow(self, x):
        layer = InternalCoordinates.from_topology(*self.molecule)
        whitening = Whitening.fit(layer.inverse_and_log_det(x)[0], layer.kinds, "full")
        flow = TemperatureSteerableFlow(9, 4, 2, (8,), KELVIN, layer, whitening, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in flow.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.2 * noise / max(parameter.shape[-1:] or (1,)) ** 0.5
        return flow


def functions(potential, x):
    """Values [n, k] whose means are compared."""
    _, theta, offsets = potential.polar.bonds_angles_torsions(x)
    similarity = potential.polar.chirality.similarity(x)[0]
    near = (similarity[:, None] < torch.tensor([0.1, 0.3, 0.6])).double()
    waves = (offsets.cos(), offsets.sin(), (offsets[:, :1] - offsets[:, 1:]).cos())
    return torch.cat((theta, theta.cos() ** 2, *waves, similarity[:, None], near), dim=1)


@pytest.fixture(scope="module")
def floppy():
    potential = FloppyCentre()
    expected, mirrored = potential.sample(200_000, seeded_generator(1))
    assert 0.05 < mirrored < 0.5
    start, _ = potential.sample(N, seeded_generator(2))
    return potential, functions(potential, expected), start


def kernel_of(name, potential, flow, start):
    masses = torch.full((5,), 12.0, dtype=torch.float64)
    if name == "walk":
        return FlowWalk(flow, potential, (KELVIN,), 0.5, n_steps=2)
    if name == "independence":
        return FlowIndependence(flow, potential, (KELVIN,))
    if name == "internal walk":
        layers = WhitenedCoordinates(flow.whitening, flow.coordinates, KELVIN)
        return InternalWalk(layers, potential, (KELVIN,), sigma=0.4)
    settings = {"timestep": 0.002, "friction": 5.0, "n_steps": 10}
    return TorchLangevin(potential, (KELVIN,), masses, flow, **settings)


def run(name, floppy):
    potential, expected, start = floppy
    kernel = kernel_of(name, potential, potential.flow(start), start)
    generator = seeded_generator(3)
    velocities = None
    if name == "langevin":
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        velocities = (noise * (KB * KELVIN / 12.0) ** 0.5)[:, None]
    state = fresh_state(potential, start[:, None], velocities)
    state, totals = apply([kernel], state, generator, times=8)
    values = functions(potential, state.x[:, 0])
    variance = values.var(0) / len(values) + expected.var(0) / len(expected)
    z = float(((values.mean(0) - expected.mean(0)) / variance.sqrt()).abs().max())
    return z, totals[kernel.name], potential.polar.is_mirror_image(state.x[:, 0])


@pytest.mark.parametrize("name", ["walk", "independence", "internal walk", "langevin"])
def test_the_domain_of_a_floppy_centre_is_sampled_exactly(name, floppy):
    z, info, mirrored = run(name, floppy)
    assert info.mirror_images > 50
    assert int(info.accepted.sum()) > N
    assert not mirrored.any()
    assert z < LIMIT


@pytest.mark.parametrize("name", ["walk", "independence", "internal walk", "langevin"])
def test_a_domain_without_handedness_is_noticed(name, floppy, monkeypatch):
    monkeypatch.setattr(Chirality, "is_mirrored", lambda self, x: torch.zeros(len(x)).bool())
    z, _, _ = run(name, floppy)
    assert z > NOTICED
