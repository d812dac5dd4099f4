"""Toy potentials: forces, exact answers, samples, non-finite rows; the walk on R^d."""

import math

import numpy as np
import pytest
import torch

from openmm_tsf.potentials import DoubleWell, GaussianWell, MixedDoubleWell
from openmm_tsf.sampling.kernels.internal_walk import InternalWalk, WhitenedCoordinates
from openmm_tsf.sampling.state import WalkerState
from tests.support.non_finite import check_non_finite_rows

MIXING = torch.tensor([[1.0, 0.4, 0.0], [-0.3, 2.0, 0.5], [0.2, 0.0, -0.7]], dtype=torch.float64)

PRECISION = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, 1.0]], dtype=torch.float64)


def z_scores(values, exact):
    """Deviations of the means of values [n, ...] from `exact`, in standard errors."""
    return (values.mean(dim=0) - exact) / (values.std(dim=0) / math.sqrt(len(values)))


def gaussian() -> GaussianWell:
    return GaussianWell(PRECISION)


def double_well() -> DoubleWell:
    return DoubleWell(
        torch.tensor([0.3, 0.0, 0.0]),
        torch.tensor([-4.0, 2.0, -1.0]),
        torch.tensor([1.0, 0.0, 2.0]),
    )


def mixed() -> MixedDoubleWell:
    """Two double wells and a harmonic one, and volumes that change."""
    rows = ([0.3, 0.1, -0.2], [-2.0, -1.0, 1.5], [0.5, 1.0, 0.0])
    return MixedDoubleWell(
        DoubleWell(*(torch.tensor(r, dtype=torch.float64) for r in rows)), MIXING
    )


MODELS = [gaussian, double_well, mixed]


@pytest.mark.parametrize("make", MODELS)
def test_gradients(make):
    potential = make()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(potential.energy, (leaf,))
    assert torch.autograd.gradgradcheck(potential.energy, (leaf,))
    with torch.no_grad():
        energies, forces = potential.energy_and_forces(x)
    (gradient,) = torch.autograd.grad(potential.energy(leaf).sum(), leaf)
    torch.testing.assert_close(forces, -gradient)
    torch.testing.assert_close(energies, potential.energy(x))
    assert not energies.requires_grad
    assert not forces.requires_grad


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_finite_rows(make, dtype):
    potential = make()
    assert potential.boltzmann_constant == 1.0
    assert potential.event_shape == (3,)
    check_non_finite_rows(potential, torch.full((4, 3), 0.7, dtype=dtype))


def test_energies_by_hand():
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(gaussian().energy(x), 0.5 * x @ PRECISION @ x[0])
    by_hand = (0.3 - 4.0 + 1.0) + 2.0 * 4.0 + (-0.25 + 2.0 * 0.0625)
    assert double_well().energy(x).item() == pytest.approx(by_hand, rel=1e-7)
    potential = mixed()
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(potential.energy(x), potential.wells.energy(x @ MIXING.T))
    torch.testing.assert_close(potential.unmixed(x) @ potential.inverse.T, x)


def test_pure_quartic_is_a_gamma_function():
    well = DoubleWell(0.0, 0.0, 2.0)
    exact = math.log(2.0) + math.lgamma(1.25) - 0.25 * math.log(2.0 / 3.0)
    assert well.log_partition_function(3.0) == pytest.approx(exact, abs=1e-10)
    assert well.mean_energy(3.0) == pytest.approx(0.75, abs=1e-10)  # virial: ⟨U⟩ = T / 4


def test_mean_energy_is_the_derivative_of_log_z():
    for potential in (gaussian(), double_well()):
        cold = potential.log_partition_function(0.999)
        hot = potential.log_partition_function(1.001)
        derivative = (hot - cold) / (1 / 1.001 - 1 / 0.999)  # d ln Z / d(1/T)
        assert derivative == pytest.approx(-potential.mean_energy(1.0), rel=1e-5)


@pytest.mark.parametrize("make", [gaussian, double_well])
def test_samples_agree_with_the_exact_answers(make):
    potential, temperature, n = make(), 1.5, 40000
    x = potential.sample(n, temperature, torch.Generator().manual_seed(3))
    assert x.shape == (n, 3)
    assert x.dtype == torch.float64
    assert abs(z_scores(potential.energy(x), potential.mean_energy(temperature))) < 4
    if isinstance(potential, DoubleWell):
        for values, exact in (
            (x, potential.moment(1, temperature)),
            (x**2, potential.moment(2, temperature)),
            ((x > 0).double(), potential.probability_positive(temperature)),
        ):
            assert (z_scores(values, exact).abs() < 4).all()
    else:
        products = x[:, :, None] * x[:, None, :]
        assert (z_scores(products, potential.covariance(temperature)).abs() < 4).all()


def test_tilted_wells_have_the_low_temperature_population():
    well = DoubleWell(0.3, -4.0, 1.0)
    # Wells near ±√2 differ by 0.6 √2 at first order; barrier 4: at T = 0.25 two harmonic wells.
    odds = well.probability_positive(0.25) / (1 - well.probability_positive(0.25))
    assert odds.log().item() == pytest.approx(-0.6 * math.sqrt(2.0) / 0.25, rel=0.05)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_mixed_harmonic_wells_are_gaussian(temperature):
    b = torch.tensor([2.0, 1.0, 0.25], dtype=torch.float64)
    zero = torch.zeros_like(b)
    wells, well = DoubleWell(zero, b, zero), GaussianWell(torch.diag(2.0 * b))
    log_z = well.log_partition_function(temperature)
    assert wells.log_partition_function(temperature) == pytest.approx(log_z, abs=1e-10)
    assert wells.mean_energy(temperature) == pytest.approx(well.mean_energy(temperature))
    variances = well.covariance(temperature).diagonal()
    torch.testing.assert_close(wells.moment(2, temperature), variances)
    torch.testing.assert_close(wells.probability_positive(temperature), zero + 0.5)
    potential = MixedDoubleWell(wells, MIXING)
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
def test_unmixed_marginals_and_moments_are_the_wells(temperature):
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


def test_marginals_agree_with_their_moments_and_end():
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
def test_mixed_samples_agree_with_the_exact_answers(temperature):
    potential, n = MixedDoubleWell.random(5, 0), 40_000
    x = potential.sample(n, temperature, torch.Generator().manual_seed(3))
    assert abs(z_scores(potential.energy(x), potential.mean_energy(temperature))) < 4
    for order in (1, 2, 3, 4):
        assert (z_scores(x**order, potential.moment(order, temperature)).abs() < 4).all()
    centred = x - potential.moment(1, temperature)
    products = centred[:, :, None] * centred[:, None, :]
    assert (z_scores(products, potential.covariance(temperature)).abs() < 4).all()
    for j in range(5):
        edges = x[:200, j].quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))
        expected = potential.marginal(j, edges, temperature)[1]
        fraction = (x[200:, j, None] < edges).double().mean(dim=0)
        assert ((fraction - expected) / (expected * (1 - expected) / n).sqrt()).abs().max() < 4


def test_random_potentials():
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
    shares = [1.0 - steepest.probability_positive(t).item() for t in (0.1, 1.0)]
    assert shares == pytest.approx([0.0573, 0.439], rel=0.01)


def test_the_walk_makes_gaussian_increments():
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


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GaussianWell(torch.eye(2, 3)), ValueError, r"precision: expected shape"),
        (lambda: GaussianWell(-torch.eye(2)), ValueError, "positive definite"),
        (lambda: GaussianWell(torch.tensor([[2.0, 1.0], [0.0, 2.0]])), ValueError, "symmetric"),
        (lambda: GaussianWell(torch.eye(2, dtype=torch.int64)), TypeError, "precision: expected"),
        (lambda: DoubleWell(0.0, -1.0, 0.0), ValueError, "confining"),
        (lambda: DoubleWell(0.0, 1.0, -1.0), ValueError, "confining"),
        (lambda: DoubleWell(math.nan, 1.0, 1.0), ValueError, "a: expected finite"),
        (lambda: DoubleWell("0", 1.0, 1.0), TypeError, "a: expected a number"),
        (lambda: DoubleWell(torch.zeros(2), 1.0, 1.0), ValueError, "expected one length"),
        (lambda: gaussian().energy(torch.zeros(2)), ValueError, "x: expected shape"),
        (lambda: gaussian().mean_energy(-1.0), ValueError, "temperature: expected"),
        (lambda: double_well().moment(1, math.inf), ValueError, "temperature: expected"),
        (lambda: MixedDoubleWell(GaussianWell(MIXING @ MIXING.T), MIXING), TypeError, "wells: exp"),
        (lambda: MixedDoubleWell(mixed().wells, [[1.0]]), TypeError, "mixing: expected"),
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
def test_wrong_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
