"""Exactly solvable cases for kernels: exact starts, and z values of the walkers afterwards.

A case is a potential, a ladder, a flow with weights of order one, walkers drawn exactly at every
rung, and scores that are standard normal as long as the walkers are exact samples.
"""

import copy
import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from openmm_tsf.coordinates.geometry import wrap
from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
from openmm_tsf.potentials.toy import DoubleWell, GaussianWell
from openmm_tsf.sampling.initial import maxwell_boltzmann
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_tree

LIMIT = 4.0
NOTICED = 6.0
#: Kind of flow, metric of its coordinates, size of the noise on its weights.
FLOWS = {
    "tsf-volume": ("tsf", "volume", 0.3),
    "tsf-polar": ("tsf", "polar", 0.3),
    "realnvp-volume": ("realnvp", "volume", 0.4),
    "realnvp-polar": ("realnvp", "polar", 0.4),
    "tsf-volume-rough": ("tsf", "volume", 0.8),
}
LADDERS = {
    2: (300.0, 450.0),
    3: (300.0, 400.0, 520.0),
    7: (300.0, 337.0, 378.0, 424.0, 476.0, 535.0, 600.0),
}


@functools.cache
def the_tree():
    return exact_tree.ExactTree()


@functools.cache
def tree_flow(name):
    """Return the flow of this name; ``"...-mixed"``: with conditioners in float32."""
    if not name.endswith("-mixed"):
        return the_tree().flow(*FLOWS[name])
    flow = copy.deepcopy(tree_flow(name.removesuffix("-mixed")))
    flow.conditioner_dtype = torch.float32
    return flow


def pose_scores(tree, x, kept):
    """Return z values of the poses [n]: uniform rotations, and translations N(0, 1).

    Where the molecule moved as a whole (not `kept`), translations are uniform in a box of 1 nm:
    N(0, 1) wrapped into it is uniform to 1e-8, and motion leaves it so.
    """
    rotation, translation = tree.polar.pose(x)
    shift = torch.special.ndtr(translation) if kept else torch.remainder(translation, 1.0)
    components = 0.5 * (rotation.flatten(1) + 1)  # each component of a uniform direction is uniform
    scores = {f"translation {k}": z for k, z in exact_tree.uniform_scores(shift.numpy()).items()}
    parts = exact_tree.uniform_scores(components.numpy())
    del parts["correlation"]  # the components are uncorrelated, but not independent
    return scores | {f"rotation {k}": z for k, z in parts.items()}


def rung_scores(pits):
    """Return z values of the correlations between the rungs of a walker, from PITs [n, d]."""
    scores = {}
    for (low, a), (high, b) in itertools.combinations(enumerate(pits), 2):
        cross = 12 * (a - 0.5).T @ (b - 0.5) / np.sqrt(len(a))
        scores[f"rungs {low} and {high}"] = exact_tree.chi2_z(np.square(cross).sum(), cross.size)
    return scores


@dataclass(eq=False)
class TreeCase:
    """The exactly solvable molecule: internal coordinates, poses and velocities."""

    flow_name: str = "tsf-volume"
    n_rungs: int = 2
    pose_kept: bool = True  # False where dynamics move the molecule as a whole

    def __post_init__(self):
        self.tree, self.ladder = the_tree(), LADDERS[self.n_rungs]
        self.potential, self.flow = exact_tree.TreePotential(self.tree), tree_flow(self.flow_name)
        self.masses = self.tree.masses

    def start(self, n_walkers, generator):
        x = [self.tree.sample(n_walkers, t, generator) for t in self.ladder]
        v = [self.tree.velocities(n_walkers, t, generator) for t in self.ladder]
        return fresh_state(self.potential, torch.stack(x, dim=1), torch.stack(v, dim=1))

    def dataset(self):
        """Return frames to fit coordinates on, between the ladder's temperatures."""
        frames = self.tree.sample(2000, 400.0, seeded_generator(22))
        molecule = MolecularSystem(self.tree.system(), self.tree.topology, exact_tree.POSITIONS)
        return MDDataset(frames, 400.0, molecule)

    def scores(self, state):
        scores, pits = {}, []
        for rung, temperature in enumerate(self.ladder):
            x, v = state.x[:, rung], state.velocities[:, rung]
            pits.append(self.tree.pit(x, temperature))
            parts = exact_tree.uniform_scores(pits[-1]) | exact_tree.velocity_scores(
                self.tree, x, v, temperature
            )
            parts |= pose_scores(self.tree, x, self.pose_kept)
            scores |= {f"{temperature:g} K {name}": z for name, z in parts.items()}
        return scores | rung_scores(pits)


@dataclass(eq=False)
class ModelCase:
    """A potential on R^3 with k_B = 1: ``"gaussian"`` (correlated) or ``"double-well"``."""

    which: str = "gaussian"
    kind: str = "tsf"
    ladder: tuple = (0.7, 1.0, 1.6)
    noise: float = 0.2  # on the flow's weights; 0.4 bends v strongly
    masses = None

    def __post_init__(self):
        generator, d = seeded_generator(21), 3
        if self.kind == "tsf":
            self.flow = TemperatureSteerableFlow(d, 2, 2, (12,), 1.0, seed=3)
        else:
            self.flow = RealNVPFlow(d, 0, 2, (12,), 1.0, seed=3)
        with torch.no_grad():
            for parameter in self.flow.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += self.noise * noise
        if self.which == "gaussian":
            mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
            precision = mixing @ mixing.T / d + torch.eye(d, dtype=torch.float64)
            self.potential = GaussianWell(precision)
            self._root = torch.linalg.cholesky(precision)
        else:
            rows = ([0.2, 0.5, -0.3], [-1.5, -1.0, 1.0], [0.5, 0.4, 0.0])
            self.potential = DoubleWell(*(torch.tensor(r, dtype=torch.float64) for r in rows))

    def start(self, n_walkers, generator):
        x = [self.potential.sample(n_walkers, t, generator) for t in self.ladder]
        return fresh_state(self.potential, torch.stack(x, dim=1), None)

    def dataset(self):
        """Return frames to fit coordinates on."""
        return MDDataset(self.potential.sample(2000, 1.0, seeded_generator(22)), 1.0)

    def pit(self, x, temperature):
        if self.which == "gaussian":
            return torch.special.ndtr(x @ self._root / temperature**0.5).numpy()
        wells = [_well(self.potential, i, temperature) for i in range(x.shape[1])]
        return np.stack([well.pit(x[:, i].numpy()) for i, well in enumerate(wells)], axis=1)

    def scores(self, state):
        scores, pits = {}, []
        for rung, temperature in enumerate(self.ladder):
            pits.append(self.pit(state.x[:, rung], temperature))
            parts = exact_tree.uniform_scores(pits[-1])
            scores |= {f"T = {temperature:g} {name}": z for name, z in parts.items()}
        return scores | rung_scores(pits)


class ModelWithVelocities(ModelCase):
    """A potential on R^3 whose walkers have velocities."""

    masses = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def start(self, n_walkers, generator):
        state = super().start(n_walkers, generator)
        kt = torch.tensor(self.ladder, dtype=torch.float64)
        v = maxwell_boltzmann(tuple(state.x.shape), kt, self.masses, generator)
        return state.evolve(velocities=v)

    def scores(self, state):
        """Return z values of positions and velocities together, with their squares."""
        scores, pits = {}, []
        for rung, temperature in enumerate(self.ladder):
            unit_v = state.velocities[:, rung] * (self.masses / temperature).sqrt()
            positions = self.pit(state.x[:, rung], temperature)
            pit = np.concatenate([positions, torch.special.ndtr(unit_v).numpy()], axis=1)
            pits.append(pit)
            parts = exact_tree.uniform_scores(pit)
            square = (12 * (pit - 0.5) ** 2 - 1) / math.sqrt(0.8)
            cross = (square.T @ square / math.sqrt(len(pit)))[np.triu_indices(pit.shape[1], 1)]
            parts["squares"] = exact_tree.chi2_z(np.square(cross).sum(), len(cross))
            scores |= {f"T = {temperature:g} {name}": z for name, z in parts.items()}
        return scores | rung_scores(pits)


def _well(potential, i, temperature):
    a, b, c = (float(values[i]) for values in (potential.a, potential.b, potential.c))
    return exact_tree.Marginal(lambda y: -(a * y + b * y**2 + c * y**4) / temperature, -7.0, 7.0)


def fresh_state(potential, x, velocities):
    """Return walkers at x [W, R, *event], each replica at its rung."""
    shape = tuple(x.shape[:2])
    energy = potential.energy(x.flatten(0, 1)).reshape(shape)
    return WalkerState(x, velocities, energy, torch.arange(shape[1]).repeat(shape[0], 1))


def apply(kernels, state, generator, times=1):
    """Return the state after `times` iterations of the kernels, and the counts by name."""
    totals = {}
    for iteration in range(times):
        for kernel in kernels:
            state, info = kernel(state, generator)
            totals[kernel.name] = totals[kernel.name] + info if kernel.name in totals else info
        state = state.evolve(iteration=iteration + 1)
    return state, totals


def worst(scores):
    """Return the largest |z| and its name."""
    name = max(scores, key=lambda key: np.abs(scores[key]).max())
    return float(np.abs(scores[name]).max()), name


def assert_exact(scores):
    z, name = worst(scores)
    assert z < LIMIT, f"{name}: |z| = {z:.1f}"


def assert_noticed(scores):
    z, name = worst(scores)
    assert z > NOTICED, f"a mutant passes, the worst is {name}: |z| = {z:.1f}"


def assert_energies_are_stored(potential, state, atol=1e-8):
    """Assert that every energy of the state is that of its configuration."""
    energy = potential.energy(state.x.flatten(0, 1)).reshape(state.energy.shape)
    torch.testing.assert_close(state.energy, energy, rtol=0, atol=atol)


class Changed:
    """A flow, or another object, with one thing changed."""

    def __init__(self, unchanged):
        self.unchanged = unchanged

    def __getattr__(self, name):
        return getattr(self.unchanged, name)


class WithoutJacobian(Changed):
    """log|J_D| is 0 in the domain."""

    def forward_and_log_det(self, v):
        image, log_det = self.unchanged.forward_and_log_det(v)
        return image, torch.where(torch.isfinite(log_det), 0.0 * v.sum(1), log_det.detach())

    def inverse_and_log_det(self, x, momenta, copies=None):
        v, log_det = self.unchanged.inverse_and_log_det(x, momenta, copies)
        return v, torch.where(torch.isfinite(log_det), 0.0, log_det)


class WithoutPose(Changed):
    """Proposals stay in the canonical pose."""

    def match_pose(self, x, like):
        return x


class Wrapping(Changed):
    """Dihedrals beyond their branch are wrapped back onto it instead of rejected."""

    def forward_and_log_det(self, v):
        flow, d = self.unchanged, self.unchanged.n_coordinates
        y, log_det = flow.network.forward_and_log_det(v)
        u, extra = flow.whitening.forward_and_log_det(y[:, :d])
        n_straight = d - len(flow.coordinates.branch_cuts)
        torsions = wrap(u[:, n_straight:], flow.coordinates.branch_cuts)
        u = torch.cat([u[:, :n_straight], torsions], dim=1)
        x, last = flow.coordinates.forward_and_log_det(u)
        return (x, y[:, d:]), log_det + extra + last
