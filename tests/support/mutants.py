"""Kernels with one mistake, and the cases in which each is noticed: the test of the test.

Not here, since it is exact: a steered swap that leaves v as it is (a plain swap). Wrapping is
noticed in kernels that weigh a draw by the v it came from. In walks, which return equally often,
its bias is too small to be seen on this molecule; tests/coordinates/test_hydrogen_labels.py sees it
on a methyl group.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from openmm_tsf.metropolis import metropolis
from openmm_tsf.sampling.kernels.cartesian import CartesianHMC, CartesianMALA
from openmm_tsf.sampling.kernels.crank_nicolson import FlowCrankNicolson
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.internal_walk import InternalWalk
from openmm_tsf.sampling.kernels.langevin_openmm import OpenMMLangevin
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin
from openmm_tsf.sampling.kernels.latent import LatentHMC, LatentMALA
from openmm_tsf.sampling.kernels.mixtures import OneOf, OnRungs
from openmm_tsf.sampling.kernels.multiple_try import FlowMultipleTry
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap
from tests.support.exact_cases import (
    Changed,
    ModelCase,
    WithoutJacobian,
    WithoutPose,
    Wrapping,
    the_tree,
)
from tests.support.invariance import LANGEVIN, build, model, tree


class WithoutMomenta:
    """Without |p|^2 / 2 tau."""

    def log_weight(self, energy, kt, momenta, tau, log_det):
        return -energy / kt + log_det


class WithoutKineticEnergy:
    """Without the kinetic energy: |w|^2 / 2 of LatentHMC, that of the atoms in dynamics."""

    def kinetic_energy(self, velocity):
        return 0.0 * velocity.flatten(1).sum(dim=1)


class WrongTau:
    """tau = 1 in the momenta's term."""

    def log_weight(self, energy, kt, momenta, tau, log_det):
        return super().log_weight(energy, kt, momenta, torch.ones_like(tau), log_det)


class WrongPrior:
    """FlowIndependence that draws at tau, and weighs the draws at tau = 1."""

    def log_proposal_density(self, v, tau):
        return super().log_proposal_density(v, torch.ones_like(tau))


class WrongTemperature:
    """The upper rung's kT is 1.1 kT (1.5 kT in swaps)."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.kt[-1] *= 1.5 if isinstance(self, PlainSwap) else 1.1


class WrongNoise:
    """The noise of dynamics has 1.1 kT."""

    def velocity_width(self, kt):
        return super().velocity_width(1.1 * kt)


class OneTemperature:
    """Both of a steered swap's energies are weighed at the mean temperature."""

    def pair_log_weights(self, energy, momenta, log_det, rung):
        kt = self.kt[rung].mean().expand(len(rung))
        weights = self.log_weight(energy, kt, momenta, self.tau[rung], log_det)
        return weights.reshape(2, -1).sum(dim=0)


class OneWay:
    """v is scaled upwards only: the Jacobian of the scaling does not cancel."""

    def rescale(self, v, old, new):
        return torch.where((new > old)[:, None], super().rescale(v, old, new), v)


class WithoutDensities:
    """Without the densities of the proposal and its reverse."""

    def log_density_ratio(self, forward, back):
        return torch.zeros(len(forward), dtype=forward.dtype)

    def log_proposal_density(self, v, tau):
        return torch.zeros_like(tau)


class ForgetsTheLatent:
    """The walk continues from rejected proposals: v is not that of x."""

    def __call__(self, state, generator):
        self._last = None
        return super().__call__(state, generator)

    def propose(self, v, tau, generator):
        self._last = super().propose(v if self._last is None else self._last, tau, generator)
        return self._last


class WithoutShrinking:
    """Crank-Nicolson steps to v + beta xi: the prior is not left invariant."""

    def propose(self, v, tau, generator):
        moved = super().propose(v, tau, generator)
        return moved + (1 - self.sigma.atan().cos()).repeat(len(v) // 2).unsqueeze(1) * v


class NarrowNoise:
    """Crank-Nicolson steps with noise of width 1 in place of sqrt(tau)."""

    def propose(self, v, tau, generator):
        return super().propose(v, torch.ones_like(tau), generator)


class ChosenByTheWalker:
    """Crank-Nicolson steps of the larger half of the components: a choice that depends on v."""

    def propose(self, v, tau, generator):
        large = v.abs() > v.abs().median(dim=1, keepdim=True).values
        return torch.where(large, super().propose(v, tau, generator), v)


class AlwaysTheBest:
    """Multiple tries of which the largest weight is chosen, not one by weight."""

    def select(self, current, tries, generator):
        chosen = tries.argmax(dim=0)
        back = tries.scatter(0, chosen.unsqueeze(0), current.unsqueeze(0))
        return chosen, metropolis(back.logsumexp(0), tries.logsumexp(0), generator)[0]


class WithoutReferenceSet:
    """Multiple tries accepted by the ratio of two weights."""

    def select(self, current, tries, generator):
        chosen, _ = super().select(current, tries, generator)
        return chosen, metropolis(current, tries.gather(0, chosen[None])[0], generator)[0]


class ForgetsTheWeight:
    """Multiple tries whose later steps compare with the first configuration."""

    def select(self, current, tries, generator):
        self._current = getattr(self, "_current", current)
        return super().select(self._current, tries, generator)

    def __call__(self, state, generator):
        self.__dict__.pop("_current", None)
        return super().__call__(state, generator)


class UnscaledVelocities:
    """Velocities stay with their configurations and are not scaled."""

    def __call__(self, state, generator):
        end, info = super().__call__(state, generator)
        rows = torch.arange(state.n_walkers)[:, None]
        source = (end.replica[:, :, None] == state.replica[:, None, :]).int().argmax(dim=2)
        return end.evolve(velocities=state.velocities[rows, source]), info


class NeverRejecting:
    """Dynamics of a large time step that is not metropolised."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.metropolized = False


class WithoutReversal:
    """Rejected walkers keep the velocities at the trajectory's beginning, not reversed."""

    def refresh_before(self, v, kt, generator):
        self._initial = super().refresh_before(v, kt, generator)
        return self._initial

    def refresh_after(self, v, kt, generator):
        rejected = self.as_column((v == -self._initial).flatten(1).all(dim=1))
        return super().refresh_after(torch.where(rejected, -v, v), kt, generator)


class WrongLastStep:
    """LatentHMC whose last half step is a whole one."""

    last_step, wide = 1.0, False

    def propose_point(self, start, rows, generator):
        noise = torch.randn(start.v.shape, generator=generator, dtype=start.v.dtype)
        if self.wide:
            noise = noise * rows.tau.sqrt().unsqueeze(1)
        velocity, end, total = noise + 0.5 * rows.step * start.gradient, start, 0
        for number in range(self.n_leapfrog):
            end, n_evaluations = self.evaluate_at(end.v + rows.step * velocity, rows)
            total += n_evaluations
            fraction = self.last_step if number == self.n_leapfrog - 1 else 1.0
            velocity = velocity + fraction * rows.step * end.gradient
        return end, self.kinetic_energy(noise) - self.kinetic_energy(velocity), total


class WideNoise(WrongLastStep):
    """LatentHMC whose velocities are of width sqrt(tau)."""

    last_step, wide = 0.5, True


class ChosenByEnergy:
    """A mixture that applies its members to the walkers of the higher energies only."""

    def __call__(self, state, generator):
        end, info = super().__call__(state, generator)
        high = state.energy > state.energy.median(dim=0).values
        wide = high.reshape(*high.shape, *(1,) * (state.x.ndim - 2))
        x = torch.where(wide, end.x, state.x)
        return end.evolve(x=x, energy=torch.where(high, end.energy, state.energy)), info


class OnTheNextRung:
    """A kernel applied one rung above its temperature."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.rungs = tuple((rung + 1) % len(self.temperatures) for rung in self.rungs)
        self.rung_index = (self.rung_index + 1) % len(self.temperatures)


@dataclass(frozen=True)
class Mutant:
    """A mutation of a kernel, and the case, walkers and iterations that show it.

    `change` is a flow with one mistake, or overrides methods of the kernel's class.
    """

    mutation: str
    change: type
    kind: type
    case: Callable[[], Any]
    n_walkers: int
    times: int
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.mutation}-{self.kind.__name__}"

    @property
    def changes_flow(self) -> bool:
        """Whether the mistake is in the flow."""
        return issubclass(self.change, Changed)

    def original(self, case: Any) -> Any:
        """Return the correct kernel for a case."""
        # The mutant of a flow may fail the round-trip check.
        tolerance = {"round_trip_tolerance": 1e9} if self.changes_flow else {}
        return build(self.kind, case, **tolerance, **self.settings)

    def make(self, case: Any) -> Any:
        """Return the mutant for a case."""
        if not self.changes_flow:
            mutant = type("Mutant", (self.change, self.kind), {})
            return build(mutant, case, **self.settings)
        kernel = self.original(case)
        kernel.flow = self.change(kernel.flow)
        return kernel


def toy(which: str = "gaussian", kind: str = "tsf", noise: float = 0.2, upper: float = 1.6) -> Any:
    """Return a case on R^3 with two rungs, without velocities."""
    return functools.partial(ModelCase, which, kind, (0.7, upper), noise)


PAIR = {"scheme": [(0, 1)]}
DYNAMICS = (  # kind, walkers on the molecule, settings
    (OpenMMLangevin, 800, LANGEVIN),
    (TorchLangevin, 1800, LANGEVIN),
    (CartesianHMC, 1200, {"timestep": 0.016, "n_steps": 8}),
    (CartesianMALA, 2500, {"timestep": 0.02}),
)


@functools.cache
def cut_tree() -> Any:
    """Return the molecule with a flow whose torsions are cut close to their maxima."""
    case = copy.copy(tree())
    case.flow = the_tree().flow("tsf", "volume", 0.3, cuts_from_centre=1.0)
    return case


def on_tree(flow: str = "tsf-volume", moving: bool = False) -> Any:
    """Return the molecule; `moving` as a whole with dynamics."""
    return functools.partial(tree, flow, 2, not moving)


WELL, BENT = toy("double-well"), toy("double-well", "realnvp")
HOT = toy("double-well", noise=0.36, upper=4.0)
MOVING = on_tree(moving=True)
REVERSAL = (
    (CartesianHMC, {"timestep": [1.0, 0.8, 0.7], "persistence": 0.95, "n_steps": 2}),
    (TorchLangevin, {"timestep": 0.8, "friction": 0.03, "n_steps": 2}),
)
WALK_OF_4 = {"sigma": 0.17, "n_steps": 4}
CRANK_NICOLSON = {"beta": 0.7, "n_steps": 4}
HMC_OF_3 = {"sigma": 0.35, "n_leapfrog": 3}
ON_DYNAMICS = [(kind, MOVING, walkers, 4, settings) for kind, walkers, settings in DYNAMICS]
#: By mutation and change, rows (kind, case, walkers, iterations, settings).
TABLE = {
    ("momenta", WithoutKineticEnergy): ON_DYNAMICS,
    ("temperature", WrongNoise): ON_DYNAMICS,
    ("jacobian", WithoutJacobian): [
        (FlowWalk, BENT, 4000, 2, {"sigma": 0.6, "n_steps": 6}),
        (FlowWalk, on_tree("tsf-polar"), 4000, 1, {"sigma": 0.2, "n_steps": 30}),
        (FlowIndependence, BENT, 4000, 2, {"n_steps": 3}),
        (FlowCrankNicolson, BENT, 4000, 2, {"beta": 0.7, "n_steps": 4}),
        (FlowMultipleTry, BENT, 4000, 2, {"n_tries": 3, "n_steps": 2}),
        (LatentMALA, BENT, 10000, 6, {"sigma": 0.4}),
        (LatentHMC, BENT, 4000, 4, {"sigma": 0.4}),
        (InternalWalk, on_tree("tsf-polar"), 3000, 1, {"sigma": 0.3, "n_steps": 30}),
        (SteeredSwap, toy("gaussian", "realnvp", 0.2, 3.0), 40000, 6, PAIR),
    ],
    ("pose", WithoutPose): [
        (FlowWalk, on_tree(), 300, 1, {"sigma": 0.17}),
        (FlowIndependence, on_tree(), 300, 1, {"n_steps": 4}),
        (FlowCrankNicolson, on_tree(), 300, 1, {"beta": 0.3}),
        (FlowMultipleTry, on_tree(), 300, 1, {}),
        (LatentMALA, on_tree(), 300, 1, {}),
        (LatentHMC, on_tree(), 300, 1, {}),
        (InternalWalk, on_tree(), 300, 1, {"sigma": 0.25}),
        (SteeredSwap, on_tree(), 300, 1, {}),
    ],
    ("wrap", Wrapping): [
        (SteeredSwap, on_tree(), 5000, 6, PAIR),
        (FlowIndependence, cut_tree, 3000, 2, {"n_steps": 10}),
    ],
    ("momenta", WithoutMomenta): [
        (FlowWalk, on_tree("tsf-volume-rough"), 4000, 1, {"sigma": 0.15, "n_steps": 40}),
        (FlowWalk, toy("double-well", noise=0.36), 10000, 1, {"sigma": 0.6, "n_steps": 6}),
        (FlowIndependence, WELL, 6000, 2, {"n_steps": 6}),
        (FlowCrankNicolson, WELL, 10000, 2, {"beta": 0.7, "n_steps": 6}),
        (FlowMultipleTry, WELL, 6000, 2, {"n_tries": 3, "n_steps": 3}),
        (LatentMALA, WELL, 10000, 6, {"sigma": 0.5}),
        (LatentHMC, WELL, 5000, 4, {"sigma": 0.5}),
        (SteeredSwap, toy(noise=0.36), 10000, 6, PAIR),
    ],
    ("tau", WrongTau): [
        (FlowWalk, HOT, 10000, 2, {"sigma": 0.6, "n_steps": 10}),
        (FlowIndependence, toy("double-well", upper=4.0), 10000, 2, {"n_steps": 6}),
        (FlowCrankNicolson, HOT, 10000, 2, {"beta": 0.7, "n_steps": 8}),
        (FlowMultipleTry, HOT, 10000, 2, {"n_tries": 3, "n_steps": 3}),
        (LatentMALA, WELL, 10000, 12, {"sigma": 0.5}),
        (LatentHMC, WELL, 16000, 8, HMC_OF_3),
        (SteeredSwap, toy(noise=0.36), 10000, 6, PAIR),
    ],
    ("temperature", WrongTemperature): [
        (InternalWalk, toy(), 20000, 2, {"sigma": 0.7, "n_steps": 5}),
        (PlainSwap, toy(upper=1.0), 40000, 5, {}),
    ],
    ("densities", WithoutDensities): [
        (LatentMALA, toy(), 4000, 6, {"sigma": 0.5}),
        (FlowIndependence, on_tree(), 2000, 2, {"n_steps": 4}),
        (FlowCrankNicolson, on_tree(), 4000, 2, {"beta": 0.3, "n_steps": 4}),
        (FlowMultipleTry, on_tree(), 2000, 2, {}),
    ],
    ("shrinking", WithoutShrinking): [(FlowCrankNicolson, WELL, 4000, 2, CRANK_NICOLSON)],
    ("noise", NarrowNoise): [(FlowCrankNicolson, WELL, 4000, 2, CRANK_NICOLSON)],
    ("components", ChosenByTheWalker): [(FlowCrankNicolson, WELL, 4000, 2, CRANK_NICOLSON)],
    ("best try", AlwaysTheBest): [(FlowMultipleTry, WELL, 4000, 2, {"n_tries": 4})],
    ("reference set", WithoutReferenceSet): [(FlowMultipleTry, WELL, 4000, 2, {"n_tries": 4})],
    ("weight", ForgetsTheWeight): [(FlowMultipleTry, WELL, 8000, 2, {"n_tries": 2, "n_steps": 8})],
    ("velocities", UnscaledVelocities): [
        (SteeredSwap, on_tree(), 1500, 1, {}),
        (PlainSwap, on_tree(), 3000, 2, {}),
    ],
    ("reversal", WithoutReversal): [
        (kind, functools.partial(model, which), 4000, 20, settings)
        for kind, settings in REVERSAL
        for which in ("gaussian", "double-well")
    ],
    ("time step", NeverRejecting): [
        (OpenMMLangevin, MOVING, 800, 4, LANGEVIN),
        (TorchLangevin, MOVING, 800, 4, LANGEVIN),
    ],
    ("kinetic energy", WithoutKineticEnergy): [(LatentHMC, toy(), 5000, 2, {"sigma": 0.5})],
    ("tau of the prior", WrongPrior): [(FlowIndependence, WELL, 4000, 2, {"n_steps": 3})],
    ("one temperature", OneTemperature): [(SteeredSwap, toy(), 5000, 6, PAIR)],
    ("one way", OneWay): [(SteeredSwap, toy(), 5000, 4, PAIR)],
    ("latent", ForgetsTheLatent): [(FlowWalk, on_tree(), 4000, 8, WALK_OF_4)],
    ("last step", WrongLastStep): [(LatentHMC, WELL, 16000, 8, HMC_OF_3)],
    ("wide noise", WideNoise): [(LatentHMC, WELL, 16000, 8, HMC_OF_3)],
    ("choice", ChosenByEnergy): [(OneOf, toy(), 4000, 4, {"of": ("walk", "independence")})],
    ("rung", OnTheNextRung): [(OnRungs, toy(), 4000, 4, {"of": "walk", "rungs": (0,)})],
}
MUTANTS = [Mutant(*change, *row) for change, rows in TABLE.items() for row in rows]
