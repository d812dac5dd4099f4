"""Every kernel leaves exact distributions with constraints invariant; mutants do not.

On the molecule of ``exact_tree`` with constrained bonds, in both measures: see
``tests/support/constrained_cases.py``. Seeds were fixed beforehand.
"""

import functools

import pytest

from openmm_tsf.sampling.kernels import (
    CartesianHMC,
    CartesianMALA,
    FlowIndependence,
    FlowWalk,
    LatentHMC,
    LatentMALA,
    OpenMMLangevin,
    TorchLangevin,
)
from tests.support.constrained_cases import ConstrainedCase, constrained_potential
from tests.support.invariance import KERNELS, build, check, notice
from tests.support.mixtures import MIXTURES
from tests.support.mutants import NeverRejecting, WithoutKineticEnergy, WrongNoise

slow = pytest.mark.slow
QUICK = ("latent mala", "batched langevin")
#: At these steps a third to a half of the proposals are accepted: the angles are soft.
ON_STAR = {
    OpenMMLangevin: {"timestep": 0.014, "friction": 20.0, "n_steps": 10},
    TorchLangevin: {"timestep": 0.014, "friction": 20.0, "n_steps": 10},
    CartesianHMC: {"timestep": 0.012, "n_steps": 8},
    CartesianMALA: {"timestep": 0.016},
}


@functools.cache
def constrained(name="star", measure="rigid", pose_kept=False, n_rungs=2):
    return ConstrainedCase("tsf-volume", n_rungs, pose_kept, name, measure)


@pytest.fixture(scope="module", autouse=True)
def contexts():
    """OpenMM's Contexts are closed in the end."""
    yield
    for name in ("star", "all"):
        constrained_potential(name, "rigid").close()
    constrained_potential.cache_clear()


def on_constrained():
    """(kernel, constrained bonds, measure), the quick ones on the star with the rigid measure."""
    for kernel in KERNELS:
        for bonds, measure in (("star", "rigid"), ("star", "stiff"), ("all", "rigid")):
            if KERNELS[kernel].kind is OpenMMLangevin and measure == "stiff":
                continue
            quick = kernel in QUICK and (bonds, measure) == ("star", "rigid")
            if max(KERNELS[kernel].rungs) == min(KERNELS[kernel].rungs) == 7:
                continue
            yield pytest.param(kernel, bonds, measure, marks=() if quick else slow)


@pytest.mark.parametrize(("kernel", "bonds", "measure"), list(on_constrained()))
def test_kernels_with_constraints(kernel, bonds, measure):
    entry = KERNELS[kernel]
    case = constrained(bonds, measure, not entry.is_dynamics, entry.rungs[0])
    more = ON_STAR.get(entry.kind, {})
    n_walkers = 400 if kernel in (*QUICK, "langevin") else 1500
    outcome = check(lambda case: entry(case, **more), case, n_walkers, 172, entry.times)
    x = outcome.end.x.flatten(0, 1)
    assert float(case.tree.constraints.deviations(x).abs().max()) < 1e-11
    if entry.is_dynamics:
        (info,) = outcome.totals.values()
        assert info.rejected_non_finite >= info.not_reversible
        assert info.not_reversible > 0


@slow
@pytest.mark.parametrize("measure", ["rigid", "stiff"])
@pytest.mark.parametrize("name", ["default", "through flow"])
def test_mixtures_with_constraints(name, measure):
    make, _, n_walkers = MIXTURES[name]
    case = constrained("star", measure, name == "through flow", 3)
    check(make, case, 2 * n_walkers, 174, 2, acceptance=(0.0, 1.0))


class TangentOnly:
    """Walkers keep tangent velocities: the other components are not drawn anew."""

    def __call__(self, state, generator):
        end, info = super().__call__(state, generator)
        x, v = end.x.flatten(0, 1), end.velocities.flatten(0, 1)
        tangent = self.rattle.project(v, self.rattle.locate(x))
        return end.evolve(velocities=tangent.reshape(end.x.shape)), info


def forgetful(kind):
    """Return a factory of kernels whose flow has the other measure."""
    return lambda case, **settings: build(kind, case.forgetful(), **settings)


def changed(change, kind):
    """Return a factory of kernels of a class with one mistake."""
    return lambda case, **settings: build(type("Mutant", (change, kind), {}), case, **settings)


HMC = {"timestep": 0.012, "n_steps": 8}
#: By mistake: factory, measure, walkers, iterations, settings.
MUTANTS = {
    "metric, langevin": (forgetful(TorchLangevin), "stiff", 4000, 8, ON_STAR[TorchLangevin]),
    "metric, hmc": (forgetful(CartesianHMC), "stiff", 4000, 8, HMC),
    "metric, mala": (forgetful(CartesianMALA), "stiff", 9000, 30, {"timestep": 0.016}),
    "metric, walk": (forgetful(FlowWalk), "stiff", 3000, 1, {"sigma": 0.2, "n_steps": 30}),
    "metric, independence": (forgetful(FlowIndependence), "stiff", 6000, 2, {"n_steps": 20}),
    "metric, latent mala": (forgetful(LatentMALA), "stiff", 3000, 20, {"sigma": 0.3}),
    "metric, latent hmc": (forgetful(LatentHMC), "stiff", 3000, 8, {"sigma": 0.3}),
    "tangent velocities": (changed(TangentOnly, CartesianHMC), "stiff", 300, 1, HMC),
    "time step": (changed(NeverRejecting, TorchLangevin), "stiff", 2500, 6, ON_STAR[TorchLangevin]),
    "momenta": (changed(WithoutKineticEnergy, CartesianHMC), "stiff", 1500, 4, HMC),
    "temperature": (changed(WrongNoise, CartesianMALA), "stiff", 1500, 6, {"timestep": 0.016}),
}


@slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_with_constraints_are_noticed(mutant):
    factory, measure, n_walkers, times, settings = MUTANTS[mutant]
    case = constrained("star", measure, "walk" in mutant or "latent" in mutant)
    notice(lambda case: factory(case, **settings), case, n_walkers, 179, times)
