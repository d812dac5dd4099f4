"""A rigid trimer whose angle has an exact distribution with constraints, in both measures.

For equal masses p(theta) ~ sin(theta) sqrt(4 - cos^2 theta) exp(-U(theta)/kT) of constrained
dynamics, and ~ sin(theta) exp(-U(theta)/kT) in the limit of stiff bonds. With a times the mass in
the middle 4 becomes (1 + a)^2: for a small a it is noticed at once if |Z| is forgotten.
"""

import functools

import numpy as np
import openmm
import torch

import openmm_tsf as tsf
from openmm_tsf.units import KB
from tests.support.exact_tree import Marginal
from tests.support.molecules import graph_molecule

LENGTH, FREE_LENGTH, STIFFNESS = 0.15, 0.16, 5e4
ANGLE, ANGLE_STIFFNESS = 1.9, 16.0
LADDER = (300.0, 450.0)
MEASURES = ("rigid", "stiff")
#: Equal masses, and a light atom in the middle.
EQUAL, LIGHT = 1.0, 0.1


@functools.cache
def trimer(measure: str, ratio: float = EQUAL) -> tsf.MolecularSystem:
    """Return three atoms with two constrained bonds, and a fourth on a vibrating bond."""
    positions = np.array([[0.15, 0, 0], [0, 0, 0], [-0.05, 0.141, 0], [0.3, 0.01, 0.05]])
    topology, positions = graph_molecule([(0, 1), (1, 2), (0, 3)], positions, "CCCC")
    system = openmm.System()
    for mass in (12.0, ratio * 12.0, 12.0, 12.0):
        system.addParticle(mass)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    bonds.addBond(0, 3, FREE_LENGTH, STIFFNESS)
    angles.addAngle(0, 1, 2, ANGLE, ANGLE_STIFFNESS)
    angles.addAngle(3, 0, 1, ANGLE, ANGLE_STIFFNESS)
    system.addForce(bonds)
    system.addForce(angles)
    system.addConstraint(0, 1, LENGTH)
    system.addConstraint(1, 2, LENGTH)
    return tsf.MolecularSystem(system, topology, positions, measure)


def angle_marginal(kelvin: float, ratio: float | None) -> Marginal:
    """Return the exact distribution of an angle, with the metric of a ratio of masses or none."""

    def log_density(theta):
        energy = 0.5 * ANGLE_STIFFNESS * (theta - ANGLE) ** 2 / (KB * kelvin)
        metric = 0.0 if ratio is None else 0.5 * np.log((1 + ratio) ** 2 - np.cos(theta) ** 2)
        return np.log(np.sin(theta)) + metric - energy

    return Marginal(log_density, 1e-9, np.pi - 1e-9)


def exact_angle(measure: str, kelvin: float, ratio: float) -> Marginal:
    """Return the exact distribution of the trimer's angle."""
    return angle_marginal(kelvin, ratio if measure == "rigid" else None)


def exact_frames(
    measure: str, kelvin: float, n: int, seed: int = 5, ratio: float = EQUAL
) -> torch.Tensor:
    """Return independent frames [n, 4, 3] in nm, in one pose."""
    rng = np.random.default_rng(seed)
    marginals = exact_angle(measure, kelvin, ratio), angle_marginal(kelvin, None)
    theta, other = (marginal.quantile(rng.random(n)) for marginal in marginals)
    width = np.sqrt(KB * kelvin / STIFFNESS)
    r = Marginal(
        lambda x: 2 * np.log(x) - 0.5 * ((x - FREE_LENGTH) / width) ** 2, 0.1, 0.22
    ).quantile(rng.random(n))
    phi = rng.uniform(-np.pi, np.pi, n)
    x = np.zeros((n, 4, 3))
    x[:, 0, 0] = LENGTH
    x[:, 2] = LENGTH * np.stack([np.cos(theta), np.sin(theta), 0 * theta], axis=1)
    # Atom 3 around the bond from atom 1 to atom 0.
    across = np.sin(other)
    direction = np.stack([-np.cos(other), across * np.cos(phi), across * np.sin(phi)], axis=1)
    x[:, 3] = x[:, 0] + r[:, None] * direction
    return torch.from_numpy(x)


def angles_of(x: torch.Tensor) -> np.ndarray:
    """Return the angle of the rigid trimer [n], and that of the vibrating bond [n]."""
    first, second, third = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1], x[:, 3] - x[:, 0]
    normal = torch.nn.functional.normalize
    trimer_cosine = (normal(first, dim=1) * normal(second, dim=1)).sum(1)
    other_cosine = -(normal(first, dim=1) * normal(third, dim=1)).sum(1)
    return torch.stack([trimer_cosine, other_cosine]).clamp(-1, 1).acos().numpy()
