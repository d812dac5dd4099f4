"""Exact, independent frames of the chain of five atoms."""

import numpy as np

from openmm_tsf.units import KB
from tests.support.chain import CONSTANT, N_ATOMS

#: As `chain_of` has them.
LENGTH, ANGLE, ANGLE_CONSTANT = 0.15, 1.9, 400.0
_GRID = np.linspace(-np.pi, np.pi, 2001)


def draw_frames(rng, shape, kelvin, barrier=2.0, without=None):
    """Return independent frames [*shape, 5, 3] in nm of the Boltzmann distribution.

    Bonds, angles and torsions are independent of each other, with the volume element r² sin(angle).
    The second torsion is nowhere in the interval `without` (rad).
    """
    n, beta = int(np.prod(shape)), 1.0 / (KB * kelvin)
    r = _by_density(rng, (n, 4), np.linspace(0.1, 0.2, 4001), lambda x: (
        2 * np.log(x) - 0.5 * beta * CONSTANT * (x - LENGTH) ** 2))  # fmt: skip
    theta = _by_density(rng, (n, 3), np.linspace(1.0, 2.8, 4001), lambda x: (
        np.log(np.sin(x)) - 0.5 * beta * ANGLE_CONSTANT * (x - ANGLE) ** 2))  # fmt: skip
    log_density = lambda x: -beta * barrier * (1 + np.cos(3 * x))  # noqa: E731
    phi = _by_density(rng, (n, 2), _GRID, log_density)
    if without is not None:
        low, high = without
        left = (phi[:, 1] > low) & (phi[:, 1] < high)
        while left.any():
            phi[left, 1] = _by_density(rng, left.sum(), _GRID, log_density)
            left = (phi[:, 1] > low) & (phi[:, 1] < high)
    return _place(r, theta, phi).reshape(*shape, N_ATOMS, 3)


def _by_density(rng, shape, grid, log_density):
    log_p = log_density(grid)
    cumulative = np.cumsum(np.exp(log_p - log_p.max()))
    return np.interp(rng.random(shape), cumulative / cumulative[-1], grid)


def _place(r, theta, phi):
    """Return positions [n, 5, 3] from bonds [n, 4], angles [n, 3] and torsions [n, 2]."""
    x = np.zeros((len(r), N_ATOMS, 3))
    x[:, 1, 0] = r[:, 0]
    x[:, 2, 0] = r[:, 0] - r[:, 1] * np.cos(theta[:, 0])
    x[:, 2, 1] = r[:, 1] * np.sin(theta[:, 0])
    for k in (3, 4):
        a, b, c = x[:, k - 3], x[:, k - 2], x[:, k - 1]
        axis = (c - b) / np.linalg.norm(c - b, axis=1, keepdims=True)
        normal = np.cross(b - a, axis)
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        across = np.cross(normal, axis)
        length, angle, torsion = r[:, k - 1 : k], theta[:, k - 2 : k - 1], phi[:, k - 3 : k - 2]
        x[:, k] = c + length * (
            -np.cos(angle) * axis
            + np.sin(angle) * (np.cos(torsion) * across + np.sin(torsion) * normal)
        )
    return x
