"""The lecture's systems: gradients, non-finite rows, energies by hand, exact answers, refusals."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate

from openmm_tsf.potentials import (
    GaussianMixture,
    GaussianWell,
    MullerBrown,
    PhiFourChain,
    PhiFourTorus,
    RadialVelocity,
)
from openmm_tsf.potentials.radial_velocity import Priors
from tests.support.non_finite import check_non_finite_rows

DOUBLE = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture() -> GaussianMixture:
    """Three modes in the plane, with their own weights and covariances."""
    means = torch.tensor([[-3.0, 0.5], [2.0, 2.0], [1.0, -2.5]], dtype=DOUBLE)
    rows = torch.tensor([[[1.0, 0.6], [0.6, 0.8]], [[0.3, 0.0], [0.0, 1.5]], [[0.5, -0.2],
                         [-0.2, 0.4]]], dtype=DOUBLE)  # fmt: skip
    return GaussianMixture(means, rows, torch.tensor([0.5, 0.3, 0.2]))


def orbit() -> RadialVelocity:
    return RadialVelocity.synthetic(seed=1)


#: Potentials with typical configurations [4, d].
MODELS = {
    "muller_brown": lambda: (MullerBrown(), torch.rand(4, 2, generator=generator(1)).double()),
    "mixture": lambda: (mixture(), 2.0 * torch.randn(4, 2, generator=generator(1)).double()),
    "chain": lambda: (
        PhiFourChain(6, 0.1, 0.3, 2.0, 0.7), torch.randn(4, 6, generator=generator(1)).double(),
    ),
    "torus": lambda: (
        PhiFourTorus(3, 0.4, 0.5), torch.randn(4, 9, generator=generator(1)).double(),
    ),
    "radial_velocity": lambda: (orbit(), 1.0 + torch.rand(4, 4, generator=generator(1)).double()),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    potential, x = MODELS[name]()
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(potential.energy, (leaf,))
    assert torch.autograd.gradgradcheck(potential.energy, (leaf,), atol=1e-4)
    energies, forces = potential.energy_and_forces(x)
    (gradient,) = torch.autograd.grad(potential.energy(leaf).sum(), leaf)
    torch.testing.assert_close(forces, -gradient)
    torch.testing.assert_close(energies, potential.energy(x))
    for row, energy in zip(x, energies, strict=True):  # rows do not know of each other
        torch.testing.assert_close(potential.energy(row[None])[0], energy)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_non_finite_rows(name, dtype):
    potential, x = MODELS[name]()
    assert potential.boltzmann_constant == 1.0
    check_non_finite_rows(potential, x.to(dtype))


def z_scores(values, exact, log_weights=None):
    """Deviations of (weighted) means of values [n, ...] from `exact`, in standard errors."""
    n = len(values)
    w = torch.full((n,), 1.0 / n) if log_weights is None else log_weights.softmax(0)
    flat = values.reshape(n, -1).double()
    mean = w.double() @ flat
    error = (w.double()[:, None] ** 2 * (flat - mean) ** 2).sum(0).sqrt()
    return (mean - torch.as_tensor(exact, dtype=DOUBLE).flatten()) / error


# Müller-Brown


def test_muller_brown_has_the_published_stationary_points():
    published = {
        (-0.5582, 1.4417): -146.70, (0.6235, 0.0280): -108.17, (-0.0500, 0.4667): -80.77,
        (-0.8220, 0.6243): -40.66, (0.2125, 0.2930): -72.25,
    }  # fmt: skip
    x = torch.tensor(list(published), dtype=DOUBLE)
    energies, forces = MullerBrown().energy_and_forces(x)
    np.testing.assert_allclose(energies, list(published.values()), atol=0.01)
    assert forces.abs().max() < 0.5  # of curvatures up to some 3000 per 1e-4


def test_muller_brown_agrees_with_another_quadrature():
    potential, temperature = MullerBrown(), 20.0
    nodes, weights = np.polynomial.legendre.leggauss(200)
    x, y = np.meshgrid(3.2 * nodes - 0.7, 3.2 * nodes + 0.9)
    points = torch.from_numpy(np.stack((x.ravel(), y.ravel()), axis=1))
    log_terms = torch.from_numpy(np.log(3.2**2 * np.outer(weights, weights)).ravel())
    log_z = (log_terms - potential.formula(points) / temperature).logsumexp(0)
    assert potential.log_partition_function(temperature) == pytest.approx(log_z.item(), abs=1e-6)


def test_muller_brown_samples_and_importance_weights():
    potential, temperature = MullerBrown(), 15.0
    mean = potential.expectation(lambda x: x, temperature)
    energy = potential.mean_energy(temperature)
    x = potential.sample(20_000, temperature, generator(5))
    assert z_scores(x, mean).abs().max() < 4
    assert abs(z_scores(potential.energy(x), energy)) < 4
    # An independent way to the same numbers: weights of a wide Gaussian mixture.
    proposal = GaussianMixture(torch.tensor([[-0.5, 1.4], [0.4, 0.2]]), 0.15)
    x = proposal.sample(40_000, 1.0, generator(6))
    log_weights = -potential.energy(x) / temperature - proposal.log_prob(x, 1.0)
    assert z_scores(x, mean, log_weights).abs().max() < 4
    w = log_weights.exp()
    z = w.mean() - math.exp(potential.log_partition_function(temperature))
    assert abs(z / (w.std() / math.sqrt(len(w)))) < 4
    # A wrong temperature is noticed.
    wrong = potential.expectation(lambda x: x, 1.2 * temperature)
    assert z_scores(x, wrong, log_weights).abs().max() > 6


def test_muller_brown_refuses_what_the_grid_does_not_resolve():
    with pytest.raises(ValueError, match="temperature: expected one whose wells"):
        MullerBrown().log_partition_function(0.02)


# Mixtures


def test_mixture_is_the_sum_of_normals():
    potential = mixture()
    x = 3.0 * torch.randn(5, 2, dtype=DOUBLE, generator=generator(2))
    total = torch.zeros(5, dtype=DOUBLE)
    for mean, covariance, weight in zip(
        potential.means, potential.covariances, (0.5, 0.3, 0.2), strict=True
    ):
        normal = torch.distributions.MultivariateNormal(mean, covariance)
        total += weight * normal.log_prob(x).exp()
    torch.testing.assert_close(potential.energy(x), -total.log(), rtol=1e-6, atol=1e-6)
    assert torch.equal(potential.log_prob(x, 1.0), -potential.formula(x))
    torch.testing.assert_close(potential.responsibilities(x).sum(1), torch.ones(5, dtype=DOUBLE))
    warm = GaussianMixture(potential.means, potential.covariances, potential.weights, 3.0)
    torch.testing.assert_close(warm.energy(x), 3.0 * potential.energy(x))
    torch.testing.assert_close(warm.log_prob(x, 3.0), potential.log_prob(x, 1.0))
    assert torch.equal(*(p.sample(9, t, generator(0)) for p, t in ((warm, 3.0), (potential, 1.0))))
    alone = GaussianMixture(torch.zeros(1, 64), 2.0)
    well = GaussianWell(torch.eye(64) / 2.0)
    x = torch.randn(3, 64, dtype=DOUBLE, generator=generator(3))
    torch.testing.assert_close(alone.energy(x), -well.log_prob(x, 1.0))


def test_mixture_samples():
    potential = mixture()
    x = potential.sample(40_000, 1.0, generator(3))
    assert z_scores(x, potential.mean()).abs().max() < 4
    centred = x - potential.mean()
    products = centred[:, :, None] * centred[:, None, :]
    assert z_scores(products, potential.covariance()).abs().max() < 4
    visits = torch.nn.functional.one_hot(potential.modes(potential.means), 3)
    assert torch.equal(visits, torch.eye(3, dtype=torch.int64))
    # Responsibilities average to the weights.
    assert z_scores(potential.responsibilities(x), [0.5, 0.3, 0.2]).abs().max() < 4
    assert z_scores(potential.responsibilities(x), [0.45, 0.35, 0.2]).abs().max() > 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMixture(torch.zeros(2), 1.0), "means: expected finite numbers"),
        (lambda: GaussianMixture(torch.zeros(2, 2), -1.0), "covariances: expected a positive"),
        (lambda: GaussianMixture(torch.zeros(2, 2), torch.eye(2)), "covariances: expected shape"),
        (lambda: GaussianMixture(torch.zeros(1, 2), torch.ones(1, 2, 2)), "covariances: expected"),
        (lambda: GaussianMixture(torch.zeros(2, 2), 1.0, torch.ones(3)), "weights: expected 2"),
        (lambda: mixture().sample(3, 2.0, generator(0)), "temperature: expected 1"),
        (lambda: PhiFourChain(restraint=-1.0), "restraint: expected"),
        (lambda: PhiFourChain().mean_field(0.01, 51), "n_points: expected at least 145"),
        (lambda: PhiFourTorus(1, 0.1, 0.1), "size: expected"),
        (lambda: PhiFourTorus(4, 0.5, 0.0), "coupling, quartic: expected"),
        (lambda: RadialVelocity([1.0], [1.0, 2.0], 0.1), "times, velocities: expected one"),
        (lambda: RadialVelocity([1.0], [1.0], 0.0), "noise: expected"),
        (lambda: RadialVelocity([0.0, 9.0], [1.0, 2.0], 1e-3).mean(), "noise, temperature: expec"),
        (lambda: RadialVelocity([1.0], [1.0], 1.0, Priors(longest=1.0)), "longest: expected more"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# φ⁴ on a line


def test_chain_energy_by_hand():
    x = torch.tensor([[0.5, -1.0]], dtype=DOUBLE)
    h, a, b, restraint, m = 1 / 3, 0.1, 0.3, 2.0, 0.7
    gradients = (0.5**2 + 1.5**2 + 1.0**2) / h**2
    local = 0.5 * (0.25 - 1.0) ** 2 + 0.0 + b * (0.5 - 1.0)
    by_hand = h * (a / 2 * gradients + local) + restraint * (h * (0.5 - 1.0) - m) ** 2
    chain = PhiFourChain(2, a, b, restraint, m)
    assert chain.energy(x).item() == pytest.approx(by_hand, rel=1e-12)
    assert chain.integral(x).item() == pytest.approx(-0.5 / 3)


@pytest.mark.parametrize("restraint", [0.0, 3.0])
def test_transfer_matrix_against_a_double_integral(restraint):
    chain, temperature = PhiFourChain(2, 0.1, 0.3, restraint, 0.4), 0.2
    line = torch.linspace(-4.0, 4.0, 801, dtype=DOUBLE)
    points = torch.cartesian_prod(line, line)
    weights = torch.exp(-chain.formula(points) / temperature)
    z = weights.sum() * 0.01**2
    assert chain.log_partition_function(temperature) == pytest.approx(math.log(z), abs=1e-9)
    mean = (weights @ points) / weights.sum()
    torch.testing.assert_close(chain.moment(1, temperature), mean, rtol=0.0, atol=1e-9)
    square = (weights @ points**2) / weights.sum()
    torch.testing.assert_close(chain.moment(2, temperature), square, rtol=0.0, atol=1e-9)


def test_transfer_matrix_has_converged():
    """N = 100: ln Z, ⟨∫φ⟩ and the states' free-energy difference do not depend on the grid."""
    chain = PhiFourChain(field=0.02)
    values = []
    for n_points in (145, 201, 301):
        p = chain.probability_positive(0.01, n_points)[50].item()
        log_z, mean = (f(0.01, n_points) for f in (chain.log_partition_function, chain.mean_field))
        values.append((log_z, mean, math.log(p / (1 - p))))
    np.testing.assert_allclose(values[0], values[2], atol=1e-7)  # P(φ > 0) cuts at a grid point
    np.testing.assert_allclose(values[1], values[2], atol=1e-7)
    # The derivative of -T ln Z with respect to the field is ⟨∫φ⟩.
    up, down = (PhiFourChain(field=0.02 + d).log_partition_function(0.01) for d in (1e-4, -1e-4))
    assert -0.01 * (up - down) / 2e-4 == pytest.approx(values[1][1], abs=1e-4)
    # The states have opposite signs: a field turned round turns them round.
    assert PhiFourChain(field=-0.02).mean_field(0.01) == pytest.approx(-values[1][1], abs=1e-9)


def test_chain_by_importance_sampling_from_the_coupled_base():
    chain, temperature = PhiFourChain(8, 0.1, 0.2, 1.0, 0.5), 0.4
    base = chain.coupled_gaussian(0.5)
    x = base.sample(40_000, temperature, generator(4))
    log_weights = -chain.energy(x) / temperature - base.log_prob(x, temperature)
    w = log_weights.exp()
    exact = chain.log_partition_function(temperature)
    z = (w.mean() - math.exp(exact)) / (w.std() / math.sqrt(len(w)))
    assert abs(z) < 4
    assert z_scores(x, chain.moment(1, temperature), log_weights).abs().max() < 4
    positive = chain.probability_positive(temperature)
    assert z_scores((x > 0).double(), positive, log_weights).abs().max() < 4
    no_field = PhiFourChain(8, 0.1, 0.0, 1.0, 0.5)
    assert z_scores(x, no_field.moment(1, temperature), log_weights).abs().max() > 6


def test_base_measures():
    """U_B = ∫ a/2 |∇φ|² + φ²/(2σ²), with and without the first term, on line and torus."""
    chain, torus = PhiFourChain(5, 0.1), PhiFourTorus(3, 0.4, 0.5)
    x = torch.randn(4, 5, dtype=DOUBLE, generator=generator(1))
    mass = chain.spacing * 0.5 * x.square().sum(1) / 0.7
    gradient = torch.nn.functional.pad(x, (1, 1)).diff(dim=1) / chain.spacing
    coupling = chain.spacing * 0.05 * gradient.square().sum(1)
    torch.testing.assert_close(chain.uncoupled_gaussian(0.7).energy(x), mass)
    torch.testing.assert_close(chain.coupled_gaussian(0.7).energy(x), mass + coupling)
    x = torch.randn(4, 9, dtype=DOUBLE, generator=generator(1))
    lattice = torus.lattice(x)
    steps = sum((lattice.roll(-1, d) - lattice).square().sum((1, 2)) for d in (1, 2))
    mass = 0.5 * x.square().sum(1) / 0.7
    torch.testing.assert_close(torus.uncoupled_gaussian(0.7).energy(x), mass)
    torch.testing.assert_close(torus.coupled_gaussian(0.7).energy(x), mass + 0.2 * steps)


# φ⁴ on a torus


def test_torus_energy_by_hand():
    x = torch.tensor([[1.0, 2.0, -1.0, 0.5]], dtype=DOUBLE)  # rows (1, 2), (-1, 0.5)
    pairs = 2 * (1 * 2 + -1 * 0.5) + 2 * (1 * -1 + 2 * 0.5)  # each neighbour on both sides
    local = sum(v**2 + 0.3 * (v**2 - 1) ** 2 for v in (1.0, 2.0, -1.0, 0.5))
    assert PhiFourTorus(2, 0.4, 0.3).energy(x).item() == pytest.approx(-0.4 * pairs + local)


def test_torus_without_quartic_term_is_gaussian():
    size, beta = 6, 0.3
    torus = PhiFourTorus(size, beta, 0.0)
    well = torus.coupled_gaussian(1.0 / (2.0 - 4.0 * beta))
    x = torch.randn(5, size**2, dtype=DOUBLE, generator=generator(1))
    torch.testing.assert_close(torus.energy(x), well.energy(x))
    k = 2.0 * math.pi * np.arange(size) / size
    modes = [2.0 - 2.0 * beta * (math.cos(p) + math.cos(q)) for p, q in itertools.product(k, k)]
    log_z = 0.5 * sum(math.log(2.0 * math.pi / mode) for mode in modes)
    assert well.log_partition_function(1.0) == pytest.approx(log_z, abs=1e-10)
    variance = sum(1.0 / mode for mode in modes) / size**2
    variances = well.covariance(1.0).diagonal()
    torch.testing.assert_close(variances, torch.full_like(variances, variance))
    # With 4000 draws of seed 2, z was -4.05; of 200 other seeds z had mean -0.05 and SD 0.99.
    drawn = well.sample(16_000, 1.0, generator(3))
    assert abs(z_scores(drawn.square().mean(1), variance)) < 4


def test_torus_by_importance_sampling_against_a_quadrature():
    """L = 2: four sites, by a product of Gauss-Hermite rules and by weights of the coupled base."""
    torus = PhiFourTorus(2, 0.3, 0.4)
    nodes, weights = np.polynomial.hermite.hermgauss(30)
    line = torch.from_numpy(nodes)
    log_line = torch.from_numpy(np.log(weights) + nodes**2)
    points = torch.cartesian_prod(line, line, line, line)
    log_terms = torch.cartesian_prod(*[log_line] * 4).sum(1) - torus.formula(points)
    exact = log_terms.logsumexp(0)
    square = log_terms.softmax(0) @ points.square().mean(1)
    base = torus.coupled_gaussian(1.0)
    x = base.sample(40_000, 1.0, generator(7))
    log_weights = -torus.energy(x) - base.log_prob(x, 1.0)
    w = log_weights.exp()
    assert abs((w.mean() - exact.exp()) / (w.std() / math.sqrt(len(w)))) < 4
    assert abs(z_scores(x.square().mean(1), square, log_weights)) < 4


# Radial velocity


def test_radial_velocity_by_hand():
    priors = Priors(1.0, 5.0, 3.0, 2.0, 10.0)
    potential = RadialVelocity([0.0, 1.5], [4.0, -2.0], 0.5, priors)
    x = torch.tensor([[0.3, 4.0, 1.0, math.log(3.0)]], dtype=DOUBLE)
    log_p = 0.0
    for t, v in ((0.0, 4.0), (1.5, -2.0)):
        mean = 0.3 + 4.0 * math.cos(2 * math.pi * t / 3.0 + 1.0)
        log_p -= 0.5 * ((v - mean) / 0.5) ** 2 + math.log(0.5 * math.sqrt(2 * math.pi))
    log_p -= 0.5 * 0.3**2 + math.log(math.sqrt(2 * math.pi))
    log_p -= 0.5 * (1.0 / 3.0) ** 2 + math.log(3.0 * math.sqrt(2 * math.pi))
    log_p -= math.log(2 * math.pi) + math.log(math.log(5.0))
    assert potential.energy(x).item() == pytest.approx(-log_p)
    outside = x.repeat(4, 1)
    outside[0, 2], outside[1, 2], outside[2, 3], outside[3, 3] = -0.1, 6.3, 0.6, 2.4
    assert potential.energy(outside).isinf().all()


def test_radial_velocity_without_information_has_the_priors_evidence():
    """With huge noise the likelihood is constant, so that Z is its value."""
    potential = RadialVelocity([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], 1e6)
    flat = -3 * math.log(1e6 * math.sqrt(2 * math.pi))
    assert potential.log_partition_function(1.0) == pytest.approx(flat, abs=1e-6)
    middle = 0.5 * (math.log(2.0) + math.log(10.0))
    expected = torch.tensor([0.0, 5.0, math.pi, middle], dtype=DOUBLE)
    torch.testing.assert_close(potential.mean(1.0), expected, rtol=0.0, atol=1e-6)


def test_radial_velocity_samples_and_evidence():
    potential, temperature = orbit(), 1.0
    x = potential.sample(20_000, temperature, generator(8))
    assert z_scores(x, potential.mean(temperature)).abs().max() < 4
    # Samples of one temperature, weighted, are samples of another: all of the energy is tested.
    other = 1.5 * temperature
    log_weights = potential.energy(x) * (1 / temperature - 1 / other)
    w = log_weights.exp()
    ratio = potential.log_partition_function(other) - potential.log_partition_function(temperature)
    assert abs((w.mean() - math.exp(ratio)) / (w.std() / math.sqrt(len(w)))) < 4
    density = potential.log_period_density(temperature)
    assert integrate.trapezoid(density[1], density[0]) == pytest.approx(1.0, abs=1e-3)


def test_synthetic_data_are_reproducible():
    first, again, other = (RadialVelocity.synthetic(seed=s) for s in (3, 3, 4))
    assert torch.equal(first.velocities, again.velocities)
    assert not torch.equal(first.velocities, other.velocities)
