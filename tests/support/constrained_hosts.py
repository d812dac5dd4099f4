"""Hosts of the exactly solvable molecule with constraints: exact starts, z values afterwards."""

import functools

import numpy as np
import torch

from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_tree
from tests.support.constrained_cases import ConstrainedCase


def tree_case():
    """Return the molecule with five constrained bonds at 300 and 450 K."""
    return ConstrainedCase("tsf-volume", 2, True, "star", "rigid")


def molecule_of(case, measure="rigid"):
    """Return the MolecularSystem of a case."""
    return MolecularSystem(case.tree.system(), case.tree.topology, exact_tree.POSITIONS, measure)


def tangent_basis(case, x):
    """Return orthonormal bases of the mass-weighted tangent spaces [n, 3N, 3N - K], by an SVD."""
    first, second = case.tree.constraints.pairs.T.numpy()
    difference, masses = (x[:, first] - x[:, second]).numpy(), case.masses.numpy()
    jacobian = np.zeros((len(x), len(first), len(masses), 3))
    rows = np.arange(len(first))
    jacobian[:, rows, first], jacobian[:, rows, second] = difference, -difference
    scaled = (jacobian / np.sqrt(masses)[:, None]).reshape(len(x), len(first), -1)
    return np.linalg.svd(scaled)[2][:, len(first) :].transpose(0, 2, 1)


def start(case, n, seed):
    """Return exact positions and tangent velocities [n, R, N, 3] at every rung."""
    state = case.start(n, seeded_generator(seed))
    width = np.sqrt(case.masses.numpy())[:, None]
    v = torch.empty_like(state.x)
    for rung in range(len(case.ladder)):
        basis = tangent_basis(case, state.x[:, rung])
        scaled = (state.velocities[:, rung].numpy() * width).reshape(n, -1)
        tangent = np.einsum("nij,nkj,nk->ni", basis, basis, scaled).reshape(n, -1, 3)
        v[:, rung] = torch.from_numpy(tangent / width)
    return state.x, v


@functools.cache
def exact_metric(kelvin):
    """Return mean and standard deviation of 1/2 ln|Z|, by weights |Z|^(1/2) of many samples."""
    tree = tree_case().tree
    metric = tree.constraints.half_log_metric(
        tree.sample_stiff(100_000, kelvin, seeded_generator(1))
    )
    weights = metric.exp() / metric.exp().sum()
    mean = float(weights @ metric)
    return mean, float(weights @ (metric - mean) ** 2) ** 0.5


def tangent_and_normal(case, x, v):
    """Return mass-weighted velocities in bases of the tangent spaces [n, d], and what is left."""
    basis = tangent_basis(case, x)
    scaled = (v.numpy() * np.sqrt(case.masses.numpy())[:, None]).reshape(len(x), -1)
    tangent = np.einsum("nij,ni->nj", basis, scaled)
    return tangent, float(np.abs(scaled - np.einsum("nij,nj->ni", basis, tangent)).max())


def scores(case, x, v, kelvin):
    """Return z values of positions and velocities [n, N, 3] at one rung, and how tangent v are."""
    n, generator = len(x), seeded_generator(24)
    kept = case.tree.thin(x, -1, generator)  # these are distributed as exp(-U/kT), by quadrature
    out = exact_tree.uniform_scores(case.tree.pit(x[kept], kelvin))
    mean, deviation = exact_metric(kelvin)
    metric = case.tree.constraints.half_log_metric(x)
    out["metric"] = (float(metric.mean()) - mean) / deviation * np.sqrt(n)
    tangent, normal = tangent_and_normal(case, x, v)
    units = tangent / np.sqrt(KB * kelvin)
    dof = units.shape[1]
    energy = np.square(units).sum(axis=1)
    out["velocity mean"] = units.mean(axis=0) * np.sqrt(n)
    out["velocity variance"] = (np.square(units).mean(axis=0) - 1) * np.sqrt(n / 2)
    out["kinetic energy"] = (energy.mean() - dof) * np.sqrt(n / (2 * dof))
    reduced = (energy - dof) / np.sqrt(2 * dof)
    position = np.sqrt(12) * (case.tree.pit(x, kelvin) - 0.5)
    cross = (position - position.mean(axis=0)).T @ reduced / np.sqrt(n)
    cross = cross / position.std(axis=0)
    out["position and kinetic energy"] = exact_tree.chi2_z(np.square(cross).sum(), len(cross))
    return {f"{kelvin:g} K {name}": z for name, z in out.items()}, normal
