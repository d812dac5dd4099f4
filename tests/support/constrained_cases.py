"""Rigid bodies with exact distributions of their angles: constraints without a flow."""

import numpy as np
import torch

from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.initial import maxwell_boltzmann
from tests.support.exact_cases import fresh_state
from tests.support.exact_tree import Marginal

LENGTH, KT = 0.1, 1.0


class Star(Potential):
    """Atom 0 with constrained bonds to the others, and sum_i<j k (cos angle_ij - cosine)^2 / 2.

    Energies in kT at T = 1.
    """

    boltzmann_constant = KT

    def __init__(self, masses, stiffness=0.0, cosine=0.0):
        self.masses = torch.tensor(masses, dtype=torch.float64)
        self.event_shape = (len(masses), 3)
        self.arms = list(range(1, len(masses)))
        pairs = [[0, arm] for arm in self.arms]
        self.constraints = Constraints(pairs, [LENGTH] * len(pairs), masses)
        self.stiffness, self.cosine = stiffness, cosine

    def cosines(self, x):
        """Return the cosines [B, n] of the angles between arms 1 2, 1 3, 2 3, ..."""
        units = (x[:, 1:] - x[:, :1]) / LENGTH
        products = units @ units.mT
        first, second = np.triu_indices(len(self.arms), 1)
        return products[:, first, second]

    def energy(self, x):
        self.check_positions(x)
        self.n_evaluations += len(x)
        return 0.5 * self.stiffness * (self.cosines(x) - self.cosine).square().sum(dim=1)

    def energy_and_forces(self, x):
        leaf = x.detach().requires_grad_()
        energy = self.energy(leaf)
        (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return energy.detach(), -gradient

    def start(self, n, generator):
        """Return n walkers at one rung with bonds in random directions, and velocities."""
        x = torch.randn(n, *self.event_shape, generator=generator, dtype=torch.float64)
        arms = x[:, 1:] / x[:, 1:].norm(dim=2, keepdim=True)
        x = torch.cat([x[:, :1], x[:, :1] + LENGTH * arms], dim=1)[:, None]
        kt = torch.tensor([KT], dtype=torch.float64)
        v = maxwell_boltzmann(tuple(x.shape), kt, self.masses, generator)
        return fresh_state(self, x, v)

    def log_density(self, cosines, measure):
        """Return ln of the density of all cosines (a list, in order), without their volume."""
        n = len(self.arms)
        energy = sum(0.5 * self.stiffness * (c - self.cosine) ** 2 for c in cosines) / KT
        if measure == "stiff":
            return -energy
        inverse = 1 / self.masses.numpy()
        z = np.zeros((*np.broadcast(*cosines).shape, n, n))
        for arm in range(n):
            z[..., arm, arm] = inverse[0] + inverse[arm + 1]
        for (i, j), c in zip(zip(*np.triu_indices(n, 1), strict=True), cosines, strict=True):
            z[..., i, j] = z[..., j, i] = inverse[0] * c
        return -energy + 0.5 * np.linalg.slogdet(z)[1]

    def marginal(self, measure):
        """Return the exact distribution of the cosine of arms 1 and 2, by quadrature.

        Directions of arms are uniform on the sphere but for the density: d cos(12), and for a third
        arm d cos(13) d phi, with cos(23) from the spherical law of cosines.
        """
        if len(self.arms) == 2:
            return Marginal(lambda c: self.log_density([c], measure), -1.0, 1.0)
        nodes, weights = np.polynomial.legendre.leggauss(40)
        phi = np.pi * (np.arange(60) + 0.5) / 60

        def log_density(c):
            out = []
            for part in np.array_split(c, 40):
                c12, c13 = part[:, None, None], nodes[:, None]
                s = np.sqrt(np.maximum(1 - c12**2, 0)) * np.sqrt(1 - c13**2)
                cosines = np.broadcast_arrays(c12, c13, c12 * c13 + s * np.cos(phi))
                density = np.exp(self.log_density(cosines, measure)).mean(axis=2)
                out.append(np.log(density @ weights))
            return np.concatenate(out)

        return Marginal(log_density, -1.0, 1.0)
