"""Toy potentials: forces, exact answers, samples, non-finite rows."""

import math

import pytest
import torch

from openmm_tsf.potentials import DoubleWell, GaussianWell, Potential

PRECISION = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, 1.0]], dtype=torch.float64)


def gaussian() -> GaussianWell:
    return GaussianWell(PRECISION)


def double_well() -> DoubleWell:
    return DoubleWell(
        torch.tensor([0.3, 0.0, 0.0]),
        torch.tensor([-4.0, 2.0, -1.0]),
        torch.tensor([1.0, 0.0, 2.0]),
    )


MODELS = [gaussian, double_well]


@pytest.mark.parametrize("make", MODELS)
def test_gradients(make: type[Potential]) -> None:
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
def test_non_finite_rows(make: type[Potential], dtype: torch.dtype) -> None:
    potential = make()
    assert potential.boltzmann_constant == 1.0
    assert potential.event_shape == (3,)
    x = torch.zeros(4, 3, dtype=dtype)
    x[0] = 0.7
    x[1, 2] = torch.nan
    x[2, 0] = torch.inf
    x[3] = 1e30 if dtype == torch.float32 else 1e200
    energies, forces = potential.energy_and_forces(x)
    assert energies.dtype == forces.dtype == dtype
    assert (energies == torch.inf).tolist() == [False, True, True, True]
    assert forces[0].any()
    assert not forces[1:].any()
    assert (potential.n_evaluations, potential.n_non_finite) == (4, 3)
    assert potential.energy(x[:0]).shape == (0,)
    assert potential.n_evaluations == 4


def test_energies_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(gaussian().energy(x), 0.5 * x @ PRECISION @ x[0])
    by_hand = (0.3 - 4.0 + 1.0) + 2.0 * 4.0 + (-0.25 + 2.0 * 0.0625)
    assert double_well().energy(x).item() == pytest.approx(by_hand, rel=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_double_well_of_a_harmonic_well_is_gaussian(temperature: float) -> None:
    quadratic = torch.tensor([2.0, 1.0, 0.25], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    quartic = DoubleWell(zero, quadratic, zero)
    exact = GaussianWell(torch.diag(2.0 * quadratic))
    assert quartic.log_partition_function(temperature) == pytest.approx(
        exact.log_partition_function(temperature), abs=1e-10
    )
    assert quartic.mean_energy(temperature) == pytest.approx(exact.mean_energy(temperature))
    torch.testing.assert_close(
        quartic.moment(2, temperature), exact.covariance(temperature).diagonal()
    )
    torch.testing.assert_close(quartic.probability_positive(temperature), zero + 0.5)


def test_pure_quartic_is_a_gamma_function() -> None:
    well = DoubleWell(0.0, 0.0, 2.0)
    exact = math.log(2.0) + math.lgamma(1.25) - 0.25 * math.log(2.0 / 3.0)
    assert well.log_partition_function(3.0) == pytest.approx(exact, abs=1e-10)
    assert well.mean_energy(3.0) == pytest.approx(0.75, abs=1e-10)  # virial: ⟨U⟩ = T / 4


def test_mean_energy_is_the_derivative_of_log_z() -> None:
    for potential in (gaussian(), double_well()):
        cold = potential.log_partition_function(0.999)
        hot = potential.log_partition_function(1.001)
        derivative = (hot - cold) / (1 / 1.001 - 1 / 0.999)  # d ln Z / d(1/T)
        assert derivative == pytest.approx(-potential.mean_energy(1.0), rel=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_samples_agree_with_the_exact_answers(make: type[GaussianWell]) -> None:
    potential, temperature, n = make(), 1.5, 40000
    x = potential.sample(n, temperature, torch.Generator().manual_seed(3))
    assert x.shape == (n, 3)
    assert x.dtype == torch.float64
    energies = potential.energy(x)
    z = (energies.mean() - potential.mean_energy(temperature)) / (energies.std() / math.sqrt(n))
    assert abs(z) < 4
    if isinstance(potential, DoubleWell):
        for values, exact in (
            (x, potential.moment(1, temperature)),
            (x**2, potential.moment(2, temperature)),
            ((x > 0).double(), potential.probability_positive(temperature)),
        ):
            z = (values.mean(dim=0) - exact) / (values.std(dim=0) / math.sqrt(n))
            assert (z.abs() < 4).all()
    else:
        products = x[:, :, None] * x[:, None, :]
        z = products.mean(dim=0) - potential.covariance(temperature)
        assert ((z / (products.std(dim=0) / math.sqrt(n))).abs() < 4).all()


def test_tilted_wells_have_the_low_temperature_population() -> None:
    well = DoubleWell(0.3, -4.0, 1.0)
    # Wells near ±√2 differ by 0.6 √2 at first order; barrier 4: at T = 0.25 two harmonic wells.
    odds = well.probability_positive(0.25) / (1 - well.probability_positive(0.25))
    assert odds.log().item() == pytest.approx(-0.6 * math.sqrt(2.0) / 0.25, rel=0.05)


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
        (lambda: DoubleWell("0", 1.0, 1.0), TypeError, "a: expected a number"),  # type: ignore[arg-type]
        (lambda: DoubleWell(torch.zeros(2), 1.0, 1.0), ValueError, "expected one length"),
        (lambda: gaussian().energy(torch.zeros(2)), ValueError, "x: expected shape"),
        (lambda: gaussian().mean_energy(-1.0), ValueError, "temperature: expected"),
        (lambda: double_well().moment(1, math.inf), ValueError, "temperature: expected"),
    ],
)
def test_wrong_input(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]
