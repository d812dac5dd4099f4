"""RATTLE and the dynamics made of it: reversible, exact on stars whose angles are known.

Distributions of the angles are by quadrature: |z| < 4, and the other measure, or a kernel without
the check of reversibility, has |z| > 6 with the same walkers. Seeds were fixed beforehand.
"""

import math

import numpy as np
import pytest
import torch

from openmm_tsf.sampling.kernels import CartesianHMC, TorchLangevin
from openmm_tsf.sampling.kernels.dynamics import mass_per_coordinate
from openmm_tsf.sampling.kernels.langevin_torch import velocity_verlet
from openmm_tsf.sampling.kernels.rattle import Rattle
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_cases as exact
from tests.support.constrained_cases import KT, ConstrainedCase, Star
from tests.support.exact_tree import uniform_scores

slow = pytest.mark.slow
TRIMER, CH2, CH3 = (12.0, 12.0, 12.0), (12.0, 1.0, 1.0), (12.0, 1.0, 1.0, 1.0)
LIGHT_CENTRE, LIGHT_CH3 = (1.0, 12.0, 12.0), (2.0, 12.0, 12.0, 12.0)
SOFT = {"stiffness": 3.0, "cosine": -0.4}
PARTNER = {"n_free": 1, "stiffness": 4.0, "cosine": -0.3}


def sample(star, measure, n_walkers, times, seed, kind=CartesianHMC, start=None, **settings):
    """Return the state after kernels from random directions, or exact ones, and the counts."""
    generator = seeded_generator(seed)
    parts = {"constraints": star.constraints, "measure": measure, **settings}
    kernel = kind(star, (1.0,), star.masses, **parts)
    state = star.start(n_walkers, generator, start)
    state, totals = exact.apply([kernel], state, generator, times)
    return state, totals[kernel.name]


def scores(star, measure, state):
    """Return z values of the cosine of the angle between the first two bonds."""
    cosine = star.cosines(state.x[:, 0])[:, 0].numpy()
    return uniform_scores(star.marginal(measure).pit(cosine)[:, None])


def test_density_of_the_rigid_trimer_is_the_known_one():
    theta = np.linspace(0, math.pi, 2001)
    density = np.sin(theta) * np.sqrt(4 - np.cos(theta) ** 2)
    cdf = np.concatenate([[0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    by_quadrature = 1 - Star(TRIMER).marginal("rigid").pit(np.cos(theta))
    np.testing.assert_allclose(by_quadrature, cdf / cdf[-1], atol=1e-6)


def stars():
    """Masses, potential, measure, walkers, iterations, time step, whether the other is noticed."""
    partner = (1.0, 12.0, 12.0, 15.0)
    rows = {
        "trimer": (TRIMER, {}, "rigid", 20000, 2, 0.07, True),
        "trimer, stiff": (TRIMER, {}, "stiff", 40000, 4, 0.07, True),
        "bent trimer": (TRIMER, SOFT, "rigid", 6000, 12, 0.05, False),
        "light centre": (LIGHT_CENTRE, {}, "rigid", 2000, 12, 0.03, True),
        "light and bent": (LIGHT_CENTRE, SOFT, "stiff", 3000, 24, 0.02, True),
        "light CH3": (LIGHT_CH3, {}, "rigid", 4000, 20, 0.03, True),
        "light CH3, bent": (LIGHT_CH3, SOFT, "stiff", 9000, 60, 0.015, True),
        "light CH2": (partner, PARTNER, "rigid", 5000, 24, 0.01, True),
        "light CH2, stiff": (partner, PARTNER, "stiff", 5000, 24, 0.01, True),
        "CH2": ((*CH2, 15.0), PARTNER, "rigid", 3000, 20, 0.01, False),
        "CH3": (CH3, SOFT, "rigid", 3000, 20, 0.02, False),
    }
    for name, row in rows.items():
        quick = name == "trimer"
        yield pytest.param(*row, id=name, marks=() if quick else slow)


@pytest.mark.parametrize(
    ("masses", "energy", "measure", "n", "times", "timestep", "is_noticed"), list(stars())
)
def test_angles_of_stars(masses, energy, measure, n, times, timestep, is_noticed):
    star, other = Star(masses, **energy), {"rigid": "stiff", "stiff": "rigid"}[measure]
    state, info = sample(star, measure, n, times, 61, timestep=timestep, n_steps=8)
    assert 0.2 < float(info.acceptance) < 1.0
    exact.assert_exact(scores(star, measure, state))
    if is_noticed:
        exact.assert_noticed(scores(star, other, state))


class Unchecked(Rattle):
    """Steps that need not be reversible."""

    def is_reversible(self, back, vectors, solved):
        return torch.ones_like(solved)


class UncheckedHMC(CartesianHMC):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.rattle = Unchecked(self.constraints)


@pytest.mark.parametrize("timestep", [0.04, pytest.param(0.1, marks=slow)])
@pytest.mark.parametrize("measure", ["rigid", pytest.param("stiff", marks=slow)])
def test_steps_too_large_to_be_reversible(timestep, measure):
    """Many are rejected and counted, and the others are exact because they were."""
    star = Star(LIGHT_CENTRE)
    parts = {"timestep": timestep, "n_steps": 1, "start": measure}
    state, info = sample(star, measure, 2000, 30, 62, **parts)
    n = int(info.proposed.sum())
    assert 0.2 * n < info.not_reversible == info.rejected_non_finite < 0.95 * n
    exact.assert_exact(scores(star, measure, state))
    assert float(star.constraints.deviations(state.x[:, 0]).abs().max()) < 1e-11
    state, info = sample(star, measure, 2000, 30, 62, UncheckedHMC, **parts)
    assert info.not_reversible > 0  # equations that were not solved
    exact.assert_noticed(scores(star, measure, state))


def test_steps_are_reversible_and_conserve_the_energy_to_second_order():
    case = ConstrainedCase(pose_kept=False, constrained="all")
    state = case.start(60, seeded_generator(63))
    x, v = state.x[:, 1], state.velocities[:, 1]
    mass, rattle = mass_per_coordinate(case.masses, (7, 3)), Rattle(case.tree.constraints)
    v = rattle.project(v, rattle.locate(x))

    def total(energy, v):
        return energy + 0.5 * (mass * v.square()).flatten(1).sum(dim=1)

    errors = []
    for n_steps in (15, 30, 60):
        parts = (mass, 0.02 / n_steps, n_steps)
        x_end, v_end, energy = velocity_verlet(case.potential, x, v, *parts, rattle=rattle)
        error = total(energy, v_end) - total(state.energy[:, 1], v)
        errors.append(float(error.square().mean().sqrt()))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(orders - 2).max() < 0.15, orders
    assert float((x_end - x).abs().max()) > 0.02
    assert float(case.tree.constraints.deviations(x_end).abs().max()) < 1e-11
    back = velocity_verlet(case.potential, x_end, -v_end, *parts, rattle=rattle)
    assert float(torch.stack([back[0] - x, back[1] + v]).abs().max()) < 1e-8
    torch.testing.assert_close(back[2], state.energy[:, 1], rtol=0, atol=1e-8)


def test_projected_velocities_are_tangent_and_the_nearest():
    star = Star(LIGHT_CH3)
    generator = seeded_generator(64)
    state = star.start(50, generator)
    x, v, rattle = state.x[:, 0], state.velocities[:, 0], Rattle(star.constraints)
    at = rattle.locate(x)
    tangent = rattle.project(v, at)
    bonds, rates = (y[:, 1:] - y[:, :1] for y in (x, tangent))
    assert float((bonds * rates).sum(dim=2).abs().max()) < 1e-13
    torch.testing.assert_close(rattle.project(tangent, at), tangent, rtol=0, atol=1e-12)
    inner = (star.masses[:, None] * tangent * (v - tangent)).sum(dim=(1, 2))
    assert float(inner.abs().max()) < 1e-11


def test_a_row_does_not_depend_on_the_others():
    star = Star(LIGHT_CENTRE)
    state, rattle = star.start(40, seeded_generator(65)), Rattle(star.constraints)
    x, v = state.x[:, 0], state.velocities[:, 0]
    v = rattle.project(v, rattle.locate(x))
    *ends, solved = rattle.step(x, v, rattle.locate(x), 0.05)
    assert 0 < int(solved.sum()) < 40
    assert torch.equal(ends[0][~solved], x[~solved])
    for row in range(40):
        part = slice(row, row + 1)
        *alone, ok = rattle.step(x[part], v[part], rattle.locate(x[part]), 0.05)
        assert bool(ok) == bool(solved[row])
        torch.testing.assert_close(alone[0], ends[0][part], rtol=0, atol=1e-13)
        torch.testing.assert_close(alone[1], ends[1][part], rtol=0, atol=1e-11)


@slow
def test_constraints_hold_after_thousands_of_steps():
    star = Star(CH3, **SOFT)
    settings = {"timestep": 0.01, "n_steps": 500, "friction": 0.5, "metropolized": False}
    state, info = sample(star, "rigid", 4, 2, 66, TorchLangevin, integrator="baoab", **settings)
    assert int(info.accepted.sum()) == 8
    assert float(star.constraints.deviations(state.x[:, 0]).abs().max()) < 1e-11


def test_velocities_are_of_all_directions():
    """Walkers' velocities stay Maxwell-Boltzmann distributed along the constraints, too."""
    star = Star(CH3, **SOFT)
    settings = {"timestep": 0.02, "n_steps": 4, "friction": 3.0}
    state, _ = sample(star, "rigid", 4000, 3, 67, TorchLangevin, **settings)
    unit_v = state.velocities[:, 0] * (star.masses / KT).sqrt()[:, None]
    bonds = state.x[:, 0, 1:] - state.x[:, 0, :1]
    relative = torch.nn.functional.normalize(bonds, dim=2)
    along = (relative * unit_v[:, 1:]).sum(dim=2)
    pit = torch.special.ndtr(torch.cat([unit_v.flatten(1), along], dim=1)).numpy()
    parts = uniform_scores(pit)
    del parts["correlation"]  # `along` depends on the components
    exact.assert_exact(parts)
