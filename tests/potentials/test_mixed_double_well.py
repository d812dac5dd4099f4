"""Double wells in mixed coordinates: forces, exact answers, samples; the walk on R^d."""

import math

import numpy as np
import pytest
import torch

from openmm_tsf.potentials import DoubleWell, GaussianWell, MixedDoubleWell
from openmm_tsf.sampling.kernels.internal_walk import InternalWalk, WhitenedCoordinates
from openmm_tsf.sampling.state import WalkerState

MIXING = torch.tensor([[1.0, 0.4, 0.0], [-0.3, 2.0, 0.5], [0.2, 0.0, -0.7]], dtype=torch.float64)


def mixed() -> MixedDoubleWell:
    """Two double wells and a harmonic one, and volumes that change."""
    rows = ([0.3, 0.1, -0.2], [-2.0, -1.0, 1.5], [0.5, 1.0, 0.0])
    return MixedDoubleWell(
        DoubleWell(*(torch.tensor(r, dtype=torch.float64) for r in rows)), MIXING
    )


def test_energy_is_that_of_the_unmixed_coordinates() -> None:
    potential = mixed()
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(potential.energy(x), potential.wells.energy(x @ MIXING.T))
    torch.testing.assert_close(potential.unmixed(x) @ potential.inverse.T, x)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(potential.energy, (leaf,))
    assert torch.autograd.gradgradcheck(potential.energy, (leaf,))
    _, forces = potential.energy_and_forces(x)
    (gradient,) = torch.autograd.grad(potential.energy(leaf).sum(), leaf)
    torch.testing.assert_close(forces, -gradient)


def test_rows_that_are_not_finite() -> None:
    potential = mixed()
    x = torch.zeros(4, 3)
    x[1, 2], x[2, 0], x[3] = torch.nan, torch.inf, 1e30
    energies, forces = potential.energy_and_forces(x)
    assert energies.dtype == forces.dtype == torch.float32
    assert (energies == torch.inf).tolist() == [False, True, True, True]
    assert not forces[1:].any()
    assert (potential.n_evaluations, potential.n_non_finite) == (4, 3)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_mixed_harmonic_wells_are_gaussian(temperature: float) -> None:
    b, zero = (
        torch.tensor([2.0, 1.0, 0.25], dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
    )
    potential = MixedDoubleWell(DoubleWell(zero, b, zero), MIXING)
    exact = GaussianWell(MIXING.T @ torch.diag(2.0 * b) @ MIXING)
    log_z = exact.log_partition_function(temperature)
    assert potential.log_partition_function(temperature) == pytest.approx(log_z, abs=1e-9)
    assert potential.mean_energy(temperature) == pytest.approx(1.5 * temperature)
    assert potential.entropy(temperature) == pytest.approx(1.5 + log_z, abs=1e-9)
    covariance = exact.covariance(temperature)
    torch.testing.assert_close(potential.covariance(temperature), covariance)
    torch.testing.assert_close(potential.moment(2, temperature), covariance.diagonal())
    fourth = 3.0 * covariance.diagonal() ** 2
    torch.testing.assert_close(potential.moment(4, temperature), fourth)
    for j, variance in enumerate(covariance.diagonal().tolist()):
        normal = torch.distributions.Normal(torch.zeros(1, dtype=torch.float64), variance**0.5)
        x = torch.linspace(-3.0, 3.0, 7, dtype=torch.float64) * variance**0.5
        density, cumulative = potential.marginal(j, x, temperature)
        torch.testing.assert_close(density, normal.log_prob(x).exp(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(cumulative, normal.cdf(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_unmixed_marginals_and_moments_are_the_wells(temperature: float) -> None:
    """x_1 = y_1 / 2 is one well alone, whose density is known in closed form."""
    wells = mixed().wells
    potential = MixedDoubleWell(wells, 2.0 * torch.eye(3, dtype=torch.float64))
    for order in (1, 2, 3, 4):
        torch.testing.assert_close(
            potential.moment(order, temperature), wells.moment(order, temperature) / 2.0**order
        )
    x = torch.linspace(-1.2, 1.2, 9, dtype=torch.float64)
    for j in range(3):
        density, cumulative = potential.marginal(j, x, temperature)
        single = DoubleWell(*(float(values[j]) for values in (wells.a, wells.b, wells.c)))
        log_z = single.log_partition_function(temperature)
        exact = 2.0 * (-single.energy(2.0 * x[:, None]) / temperature - log_z).exp()
        torch.testing.assert_close(density, exact, rtol=1e-8, atol=1e-10)
        positive = single.probability_positive(temperature)
        # The sum over points of one side has the square of their distance as its error.
        torch.testing.assert_close(1.0 - cumulative[4:5], positive, rtol=0.0, atol=1e-6)


def test_marginals_agree_with_their_moments_and_end() -> None:
    potential = MixedDoubleWell.random(5, 3)
    for temperature in (0.1, 10.0):
        x = torch.linspace(-30.0, 30.0, 12001, dtype=torch.float64)
        density, cumulative = potential.marginal(2, x, temperature)
        assert density.min() > -1e-10
        for order in (1, 2, 3, 4):
            moment = torch.trapezoid(x**order * density, x)
            assert moment.item() == pytest.approx(
                potential.moment(order, temperature)[2].item(), abs=1e-7
            )
        assert (cumulative[0], cumulative[-1]) == (0.0, 1.0)
        derivative = torch.gradient(cumulative, spacing=(x[1] - x[0]).item())[0]
        assert (derivative - density)[1:-1].abs().max() < 1e-3


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_samples_agree_with_the_exact_answers(temperature: float) -> None:
    potential, n = MixedDoubleWell.random(5, 0), 40_000
    x = potential.sample(n, temperature, torch.Generator().manual_seed(3))
    energies = potential.energy(x)
    z = (energies.mean() - potential.mean_energy(temperature)) / (energies.std() / math.sqrt(n))
    assert abs(z) < 4
    for order in (1, 2, 3, 4):
        values = x**order
        z = values.mean(dim=0) - potential.moment(order, temperature)
        assert ((z / (values.std(dim=0) / math.sqrt(n))).abs() < 4).all()
    centred = x - potential.moment(1, temperature)
    products = centred[:, :, None] * centred[:, None, :]
    z = products.mean(dim=0) - potential.covariance(temperature)
    assert ((z / (products.std(dim=0) / math.sqrt(n))).abs() < 4).all()
    for j in range(5):
        edges = x[:200, j].quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))
        expected = potential.marginal(j, edges, temperature)[1]
        fraction = (x[200:, j, None] < edges).double().mean(dim=0)
        assert ((fraction - expected) / (expected * (1 - expected) / n).sqrt()).abs().max() < 4


def test_random_potentials() -> None:
    first, again, other = (MixedDoubleWell.random(20, seed) for seed in (4, 4, 5))
    assert torch.equal(first.mixing, again.mixing)
    assert torch.equal(first.wells.a, again.wells.a)
    assert not torch.equal(first.mixing, other.mixing)
    scales = torch.linalg.svdvals(first.mixing)
    assert (scales[0] / scales[-1]).item() == pytest.approx(MixedDoubleWell.CONDITION)
    assert scales.log().sum().item() == pytest.approx(0.0, abs=1e-12)
    assert first.wells.a.abs().max() <= MixedDoubleWell.TILT
    # The rarer side of the steepest tilt, as the docstring has it.
    steepest = DoubleWell(-MixedDoubleWell.TILT, MixedDoubleWell.B, MixedDoubleWell.C)
    fractions = [1.0 - steepest.probability_positive(t).item() for t in (0.1, 1.0)]
    assert fractions == pytest.approx([0.0573, 0.439], rel=0.01)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MixedDoubleWell(GaussianWell(MIXING @ MIXING.T), MIXING), TypeError, "wells: exp"),  # type: ignore[arg-type]
        (lambda: MixedDoubleWell(mixed().wells, [[1.0]]), TypeError, "mixing: expected"),  # type: ignore[arg-type]
        (lambda: MixedDoubleWell(mixed().wells, MIXING[:2]), ValueError, "mixing: expected shape"),
        (lambda: MixedDoubleWell(mixed().wells, 0.0 * MIXING), ValueError, "invertible"),
        (lambda: mixed().moment(5, 1.0), ValueError, "order: expected"),
        (lambda: mixed().entropy(0.0), ValueError, "temperature: expected"),
        (lambda: mixed().energy(torch.zeros(1, 2)), ValueError, "x: expected shape"),
        (lambda: MixedDoubleWell.random(3, -1), ValueError, "seed: expected"),
        (lambda: MixedDoubleWell.random(0, 1), ValueError, "dimension: expected"),
        (lambda: WhitenedCoordinates.identity(0), ValueError, "n_coordinates: expected"),
    ],
)
def test_wrong_input(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


def test_the_walk_makes_gaussian_increments() -> None:
    """At a very high temperature everything is accepted: increments are N(0, sigma^2 T)."""
    potential, temperatures, n = MixedDoubleWell.random(3, 0), (1e8, 4e8), 20_000
    walk = InternalWalk(WhitenedCoordinates.identity(3), potential, temperatures, sigma=1e-4)
    x = torch.zeros(n, 2, 3, dtype=torch.float64)
    energy = torch.zeros(n, 2, dtype=torch.float64)
    state = WalkerState(x, None, energy, torch.arange(2).repeat(n, 1))
    moved, info = walk(state, torch.Generator().manual_seed(0))
    assert (info.accepted == n).all()
    for rung, scale in enumerate((1.0, 2.0)):
        steps = moved.x[:, rung].numpy() / scale
        assert np.abs(np.cov(steps.T) - np.eye(3)).max() < 4 * math.sqrt(2 / n)
