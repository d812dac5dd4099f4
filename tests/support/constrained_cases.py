"""Rigid bodies with exact distributions of their angles: constraints without a flow."""

import copy
import functools
from dataclasses import dataclass

import numpy as np
import torch

from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.initial import maxwell_boltzmann
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_cases as exact
from tests.support import exact_tree
from tests.support.exact_cases import fresh_state
from tests.support.exact_tree import Marginal

LENGTH, KT, FREE_CONSTANT = 0.1, 1.0, 1e4


class Star(Potential):
    """Atom 0 with constrained bonds to the others, and sum_i<j k (cos angle_ij - cosine)^2 / 2.

    The last `n_free` bonds are not constrained but harmonic. Energies in kT at T = 1.
    """

    boltzmann_constant = KT

    def __init__(self, masses, stiffness=0.0, cosine=0.0, n_free=0):
        self.masses = torch.tensor(masses, dtype=torch.float64)
        self.event_shape = (len(masses), 3)
        self.arms = list(range(1, len(masses)))
        pairs = [[0, arm] for arm in self.arms[: len(self.arms) - n_free]]
        self.n_fixed = len(pairs)
        self.constraints = Constraints(pairs, [LENGTH] * len(pairs), masses)
        self.stiffness, self.cosine = stiffness, cosine

    def cosines(self, x):
        """Return the cosines [B, n] of the angles between arms 1 2, 1 3, 2 3, ..."""
        units = torch.nn.functional.normalize(x[:, 1:] - x[:, :1], dim=2)
        products = units @ units.mT
        first, second = np.triu_indices(len(self.arms), 1)
        return products[:, first, second]

    def energy(self, x):
        self.check_positions(x)
        self.n_evaluations += len(x)
        stretch = (x[:, 1 + self.n_fixed :] - x[:, :1]).norm(dim=2) - LENGTH
        bonds = 0.5 * FREE_CONSTANT * stretch.square().sum(dim=1)
        return bonds + 0.5 * self.stiffness * (self.cosines(x) - self.cosine).square().sum(dim=1)

    def energy_and_forces(self, x):
        leaf = x.detach().requires_grad_()
        energy = self.energy(leaf)
        (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return energy.detach(), -gradient

    def start(self, n, generator, measure=None):
        """Return n walkers at one rung with bonds in random directions, and velocities.

        With a measure, two bonds have the exact distribution of their angle.
        """
        x = torch.randn(n, *self.event_shape, generator=generator, dtype=torch.float64)
        arms = torch.nn.functional.normalize(x[:, 1:], dim=2)
        if measure is not None:
            uniform = torch.rand(n, generator=generator, dtype=torch.float64).numpy()
            cosine = torch.from_numpy(self.marginal(measure).quantile(uniform))[:, None]
            across = arms[:, 1] - (arms[:, 0] * arms[:, 1]).sum(1, keepdim=True) * arms[:, 0]
            across = (1 - cosine**2).sqrt() * torch.nn.functional.normalize(across, dim=1)
            arms[:, 1] = cosine * arms[:, 0] + across
        x = torch.cat([x[:, :1], x[:, :1] + LENGTH * arms], dim=1)[:, None]
        kt = torch.tensor([KT], dtype=torch.float64)
        v = maxwell_boltzmann(tuple(x.shape), kt, self.masses, generator)
        return fresh_state(self, x, v)

    def log_density(self, cosines, measure):
        """Return ln of the density of all cosines (a list, in order), without their volume."""
        n = self.n_fixed
        energy = sum(0.5 * self.stiffness * (c - self.cosine) ** 2 for c in cosines) / KT
        if measure == "stiff":
            return -energy
        inverse = 1 / self.masses.numpy()
        z = np.zeros((*np.broadcast(*cosines).shape, n, n))
        for arm in range(n):
            z[..., arm, arm] = inverse[0] + inverse[arm + 1]
        pairs = zip(*np.triu_indices(len(self.arms), 1), strict=True)
        for (i, j), c in zip(pairs, cosines, strict=True):
            if max(i, j) < n:
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
        phi = np.pi * (np.arange(40) + 0.5) / 40
        grid = np.linspace(-1.0, 1.0, 401)  # the density is smooth
        c12, c13 = grid[:, None, None], nodes[:, None]
        s = np.sqrt(1 - c12**2) * np.sqrt(1 - c13**2)
        cosines = np.broadcast_arrays(c12, c13, c12 * c13 + s * np.cos(phi))
        log_p = np.log(np.exp(self.log_density(cosines, measure)).mean(axis=2) @ weights)
        return Marginal(lambda c: np.interp(c, grid, log_p), -1.0, 1.0)


class ConstrainedTree(exact_tree.ExactTree):
    """The molecule of ``exact_tree`` with some of its bonds constrained, softer angles, own masses.

    With the lengths fixed, exp(-U/kT) delta(r - d) dx is the product of the same quadratures: what
    has the measure "stiff" is tested as the molecule is. Of walkers with the measure "rigid" a part
    is drawn with probabilities proportional to |Z|^(-1/2): these are distributed as "stiff".
    """

    def __init__(self, bonds, masses, measure):
        super().__init__()
        self.measure = measure
        self.masses = torch.tensor(masses, dtype=torch.float64)
        kinds = self.polar.kinds
        self.k = torch.where(kinds == 1, 0.12 * self.k, self.k)
        pairs = [tuple(sorted(row[:2])) for row in self.polar.zmatrix.rows[1:].tolist()]
        self.fixed = torch.zeros(self.n_coordinates, dtype=torch.bool)
        self.fixed[[pairs.index(bond) for bond in bonds]] = True
        self.constraints = Constraints(bonds, [self.length(bond, pairs) for bond in bonds], masses)
        self._marginals.clear()
        sample = self.sample_stiff(20000, 450.0, seeded_generator(23))
        metric = self.constraints.half_log_metric(sample)
        self.metric_range = float(metric.min()) - 0.05, float(metric.max()) + 0.02

    def length(self, bond, pairs):
        return float(self.centre[pairs.index(bond)])

    def layer(self, metric):
        parts = (self.topology, exact_tree.POSITIONS, metric)
        return InternalCoordinates.from_topology(
            *parts, constraints=self.constraints, measure=self.measure
        )

    def system(self):
        system = super().system()
        for pair, length in zip(
            self.constraints.pairs.tolist(), self.constraints.lengths.tolist(), strict=True
        ):
            system.addConstraint(*pair, length)
        return system

    def sample_internal(self, n, temperature, generator):
        u = super().sample_internal(n, temperature, generator)
        return torch.where(self.fixed, self.centre, u)

    def sample_stiff(self, n, temperature, generator):
        """Return exact samples of exp(-U/kT), [n, N, 3], in random poses."""
        return super().sample(n, temperature, generator)

    def thin(self, x, sign, generator):
        """Return which of x [n, N, 3] to take, with probability ~ |Z|^(sign / 2)."""
        low, high = self.metric_range
        metric = self.constraints.half_log_metric(x)
        log_p = metric - high if sign > 0 else low - metric
        uniform = torch.rand(len(x), generator=generator, dtype=torch.float64)
        return uniform.log() < log_p

    def pit(self, x, temperature):
        return super().pit(x, temperature)[:, ~self.fixed.numpy()]


@dataclass(eq=False)
class ConstrainedCase(exact.TreeCase):
    """The molecule with constraints: a star and a pair of bonds, or all bonds."""

    constrained: str = "star"
    measure: str = "rigid"

    def __post_init__(self):
        self.tree = constrained_tree(self.constrained, self.measure)
        self.ladder, self.masses = exact.LADDERS[self.n_rungs], self.tree.masses
        self.potential = exact_tree.TreePotential(self.tree)
        self.flow = constrained_flow(self.flow_name, self.constrained, self.measure)

    def openmm_potential(self):
        """Return the energy by OpenMM, for the kernels whose steps OpenMM takes."""
        return constrained_potential(self.constrained, self.measure)

    def forgetful(self):
        """Return the case with the flow of the other measure: kernels forget |Z|, or add it."""
        other = copy.copy(self)
        measure = "stiff" if self.measure == "rigid" else "rigid"
        other.flow = constrained_flow(self.flow_name, self.constrained, measure)
        return other

    def dataset(self):
        """Return frames to fit coordinates on, between the ladder's temperatures."""
        frames = self.tree.sample(2000, 400.0, seeded_generator(22))
        parts = self.tree.system(), self.tree.topology, exact_tree.POSITIONS
        return MDDataset(frames, 400.0, MolecularSystem(*parts, self.measure))

    def start(self, n_walkers, generator):
        x, v = [], []
        for temperature in self.ladder:
            drawn = self.tree.sample_stiff(4 * n_walkers, temperature, generator)
            if self.measure == "rigid":
                drawn = drawn[self.tree.thin(drawn, 1, generator)]
            assert len(drawn) >= n_walkers
            x.append(drawn[:n_walkers])
            v.append(self.tree.velocities(n_walkers, temperature, generator))
        return exact.fresh_state(self.potential, torch.stack(x, dim=1), torch.stack(v, dim=1))

    def scores(self, state):
        if self.measure == "stiff":
            return super().scores(state)
        scores, generator = {}, seeded_generator(24)
        for rung, temperature in enumerate(self.ladder):
            x, v = state.x[:, rung], state.velocities[:, rung]
            kept = self.tree.thin(x, -1, generator)
            part = exact.fresh_state(self.potential, x[kept][:, None], v[kept][:, None])
            one = copy.copy(self)
            one.measure, one.ladder = "stiff", (temperature,)
            scores |= one.scores(part)
        return scores


STAR = ((0, 1), (1, 4), (1, 5), (2, 3), (3, 6))
#: By name, constrained bonds; light atoms within make |Z| vary.
CONSTRAINED = {"star": STAR, "all": exact_tree.BONDS}
LIGHT = (12.0, 1.5, 12.0, 2.0, 9.0, 19.0, 16.0)


@functools.cache
def constrained_tree(name, measure):
    return ConstrainedTree(CONSTRAINED[name], LIGHT, measure)


@functools.cache
def constrained_flow(flow_name, name, measure):
    return constrained_tree(name, measure).flow(*exact.FLOWS[flow_name])


@functools.cache
def constrained_potential(name, measure):
    system = constrained_tree(name, measure).system()
    return OpenMMPotential(system, platform="Reference", n_contexts=1)
