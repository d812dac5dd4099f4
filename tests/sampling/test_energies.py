"""Walkers are float64 on the CPU; potentials may have another dtype and device."""

import pytest
import torch

from openmm_tsf.potentials import TorchPotential
from openmm_tsf.potentials.base import Potential
from openmm_tsf.potentials.toy import GaussianWell
from openmm_tsf.sampling.energies import energy, energy_and_forces
from openmm_tsf.sampling.initial import starting_state
from openmm_tsf.sampling.kernels.cartesian import CartesianHMC, CartesianMALA
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin, velocity_verlet
from openmm_tsf.sampling.kernels.latent import LatentHMC, LatentMALA
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.utils.random import seeded_generator
from tests.support.invariance import tree

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


class Strict(Potential):
    """A potential that accepts and returns only its own dtype and device."""

    def __init__(self, inner, dtype, device="cpu"):
        self.inner, self.dtype, self.device = inner, dtype, torch.device(device)
        self.event_shape, self.boltzmann_constant = inner.event_shape, inner.boltzmann_constant

    def _check(self, x):
        assert (x.dtype, x.device.type) == (self.dtype, self.device.type)
        self.n_evaluations += len(x)

    def energy(self, x):
        self._check(x)
        return self.inner.energy(x.to("cpu", torch.float64)).to(x)

    def energy_and_forces(self, x):
        self._check(x)
        parts = self.inner.energy_and_forces(x.to("cpu", torch.float64))
        return tuple(part.to(x) for part in parts)


KERNELS = {
    "walk": lambda case, u: FlowWalk(case.flow, u, case.ladder, 0.1),
    "independence": lambda case, u: FlowIndependence(case.flow, u, case.ladder),
    "steered": lambda case, u: SteeredSwap(case.flow, u, case.ladder),
    "latent-mala": lambda case, u: LatentMALA(case.flow, u, case.ladder, 0.1),
    "latent-hmc": lambda case, u: LatentHMC(case.flow, u, case.ladder, 0.1, n_leapfrog=2),
    "langevin": lambda case, u: TorchLangevin(u, case.ladder, case.masses, case.flow, 3),
    "baoab": lambda case, u: TorchLangevin(
        u, case.ladder, case.masses, case.flow, 3, integrator="baoab"
    ),
    "hmc": lambda case, u: CartesianHMC(u, case.ladder, case.masses, case.flow, 3),
    "mala": lambda case, u: CartesianMALA(u, case.ladder, case.masses, case.flow),
}


def one_call(case, name, potential):
    kernel = KERNELS[name](case, potential)
    generator = seeded_generator(71)
    drawn = case.start(30, generator)
    parts = (drawn.x, drawn.velocities, 30, case.ladder, case.flow, potential)
    return kernel(starting_state(*parts), generator)


@pytest.mark.parametrize("name", KERNELS)
@devices
def test_kernels_work_with_potentials_of_another_dtype_and_device(name, device):
    case = tree()
    expected, expected_info = one_call(case, name, case.potential)
    for dtype in [torch.float32, torch.float64] if device == "cuda" else [torch.float32]:
        state, info = one_call(case, name, Strict(case.potential, dtype, device))
        assert torch.equal(info.accepted, expected_info.accepted)
        assert info.n_evaluations == expected_info.n_evaluations
        for part in ("x", "velocities", "energy"):
            value, other = getattr(state, part), getattr(expected, part)
            assert (value.dtype, value.device.type) == (torch.float64, "cpu")
            tolerance = 1e-3 if dtype == torch.float32 else 1e-9
            torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance)
    assert int(expected_info.accepted.sum()) > 0


@devices
def test_a_trajectory_is_not_rounded_with_its_potential(device):
    """Verlet with rounded forces is reversible to the last digits of float64."""
    potential = Strict(GaussianWell(torch.eye(3, dtype=torch.float64)), torch.float32, device)
    generator = seeded_generator(72)
    x, v = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    mass, step = torch.ones(3, dtype=torch.float64), torch.full((5, 1), 0.1, dtype=torch.float64)
    x_end, v_end, _ = velocity_verlet(potential, x, v, mass, step, 20)
    assert float((x_end - x).abs().min()) > 1e-3
    x_back, v_back, _ = velocity_verlet(potential, x_end, -v_end, mass, step, 20)
    # Forward and back may occasionally round a position to different neighbours in float32.
    torch.testing.assert_close(x_back, x, rtol=0, atol=1e-7)
    torch.testing.assert_close(v_back, -v, rtol=0, atol=1e-7)
    assert (x_end.dtype, x_end.device.type) == (torch.float64, "cpu")


def test_energies_have_the_dtype_of_the_configurations():
    case = tree()
    system, x = case.tree.system(), case.start(4, seeded_generator(73)).x[:, 0]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        potential = TorchPotential.from_system(system, dtype)
        y = x.to(torch.float32 if dtype == torch.float64 else torch.float64).requires_grad_()
        detached, forces = energy_and_forces(potential, y.detach())
        differentiable = energy(potential, y)
        assert {part.dtype for part in (detached, forces, differentiable)} == {y.dtype}
        (gradient,) = torch.autograd.grad(differentiable.sum(), y)
        torch.testing.assert_close(gradient, -forces)
        expected = case.potential.energy(y.detach().double())
        scale = 1e-3 if y.dtype == torch.float32 else tolerance
        torch.testing.assert_close(detached.double(), expected, rtol=scale, atol=scale)


def test_potentials_without_a_dtype_get_configurations_as_they_are():
    well = GaussianWell(torch.eye(2, dtype=torch.float64))
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(3, 2, dtype=dtype)
        assert energy(well, x).dtype == dtype
        assert torch.equal(energy(well, x), well.energy(x))
