"""Constrained distances: their metric against autograd, and projection onto their manifold."""

import numpy as np
import openmm
import pytest
import torch

from openmm_tsf.coordinates.constraints import Constraints

#: Pairs of stars, a chain, a ring, a branched tree, and separate groups.
PAIRS = {
    "one": [[0, 1]],
    "star of two": [[0, 1], [2, 1]],
    "star of three": [[0, 1], [0, 2], [3, 0]],
    "star of four": [[4, 0], [4, 1], [2, 4], [4, 3]],
    "chain": [[0, 1], [2, 1], [2, 3], [3, 4], [5, 4]],
    "ring": [[0, 1], [1, 2], [2, 3], [3, 0]],
    "tree": [[0, 1], [1, 2], [1, 3], [3, 4], [3, 5], [5, 6]],
    "groups": [[7, 8], [0, 1], [2, 1], [4, 3], [5, 4], [6, 4]],
}
MASSES = [12.011, 1.008, 14.007, 15.999, 12.011, 1.008, 1.008, 32.06, 1.008]


def random_case(name: str) -> tuple[Constraints, torch.Tensor]:
    """Return constraints with lengths near 0.1 nm and random conformations [8, 9, 3]."""
    generator = torch.Generator("cpu").manual_seed(len(name))
    options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    lengths = 0.1 + 0.02 * torch.rand(len(PAIRS[name]), **options)
    x = 0.15 * torch.randn(8, len(MASSES), 3, **options)
    return Constraints(PAIRS[name], lengths, MASSES), x


@pytest.mark.parametrize("name", PAIRS)
def test_metric_equals_that_of_autograd(name: str) -> None:
    """Z from autograd's Jacobian of the distances; gradients of the logarithm as well."""
    constraints, x = random_case(name)
    first, second = constraints.pairs.unbind(1)

    def half_log_metric(conformation: torch.Tensor) -> torch.Tensor:
        def distances(positions: torch.Tensor) -> torch.Tensor:
            return (positions[first] - positions[second]).norm(dim=-1)

        jacobian = torch.func.jacrev(distances)(conformation)
        z = torch.einsum("iad,jad,a->ij", jacobian, jacobian, constraints.inverse_masses)
        return 0.5 * torch.linalg.slogdet(z).logabsdet

    expected = torch.stack([half_log_metric(one) for one in x])
    torch.testing.assert_close(constraints.half_log_metric(x), expected)
    gradient = torch.stack([torch.func.jacrev(half_log_metric)(one) for one in x])
    x.requires_grad_()
    (got,) = torch.autograd.grad(constraints.half_log_metric(x).sum(), x)
    torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize("name", PAIRS)
def test_projection_reaches_the_manifold_along_mass_weighted_forces(name: str) -> None:
    constraints, start = random_case(name)
    first, second = constraints.pairs.unbind(1)
    lengths = (start[:, first] - start[:, second]).norm(dim=-1)
    noise = torch.Generator("cpu").manual_seed(1)
    for one, distances in zip(start, lengths, strict=True):
        # The constrained distances are those of a conformation; it is displaced a little.
        manifold = Constraints(constraints.pairs, distances, MASSES)
        kick = torch.randn(one.shape, generator=noise, dtype=one.dtype, device="cpu")
        x = (one + 1e-4 * kick)[None]
        projected = manifold.project(x)
        assert float(manifold.deviations(projected).abs().max()) < 1e-14
        # The displacement times masses is a combination of the gradients of the distances.
        unit = torch.nn.functional.normalize(x[0, first] - x[0, second], dim=-1)
        gradients = torch.zeros(len(first), len(MASSES), 3, dtype=x.dtype, device="cpu")
        rows = torch.arange(len(first), dtype=torch.int64, device="cpu")
        gradients[rows, first], gradients[rows, second] = unit, -unit
        forces = ((projected - x)[0] / manifold.inverse_masses[:, None]).reshape(-1, 1)
        basis = gradients.reshape(len(first), -1).T
        residual = basis @ torch.linalg.lstsq(basis, forces).solution - forces
        assert float(residual.abs().max()) < 1e-9 * float(forces.abs().max())


def test_constraints_of_a_system() -> None:
    system = openmm.System()
    for mass in (12.0, 1.0, 1.0):
        system.addParticle(mass)
    system.addConstraint(0, 1, 0.11)
    system.addConstraint(2, 0, 0.12)
    constraints = Constraints.from_system(system)
    assert constraints.pairs.tolist() == [[0, 1], [2, 0]]
    assert constraints.lengths.tolist() == [0.11, 0.12]
    np.testing.assert_allclose(constraints.inverse_masses, [1 / 12, 1, 1])
    again = Constraints.from_config(constraints.to_config(), 3)
    assert again.to_config() == constraints.to_config()


def test_projection_far_from_the_manifold_is_refused() -> None:
    constraints, x = random_case("star of three")
    x[0, 1] = x[0, 0]  # two atoms coincide: no direction
    with pytest.raises(ValueError, match="x: expected conformations near the constrained"):
        constraints.project(x)


@pytest.mark.parametrize(
    ("pairs", "lengths", "masses", "message"),
    [
        ([[0, 1]], [0.1, 0.2], [1.0, 1.0], "lengths: expected 1, one for each pair, got 2"),
        ([[0, 1]], [0.0], [1.0, 1.0], "lengths: expected numbers above zero"),
        ([[0, 2]], [0.1], [1.0, 1.0], "pairs: expected atoms from 0 to 1"),
        ([[1, 1]], [0.1], [1.0, 1.0], "pairs: expected two different atoms"),
        ([[0, 1], [1, 0]], [0.1, 0.1], [1.0, 1.0], "pairs: expected each pair once"),
        ([[0, 1]], [0.1], [1.0, 0.0], "masses: expected constrained atoms with a mass"),
    ],
)
def test_bad_arguments_are_named(
    pairs: list[list[int]], lengths: list[float], masses: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Constraints(pairs, lengths, masses)
