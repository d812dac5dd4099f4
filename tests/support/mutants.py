"""Kernels with one thing wrong, and where each is found out: the suite's own test.

Every mutation of ``invariance.py``'s kernels that means something for them: a Jacobian's term
removed, the pose reset, a torsion wrapped instead of rejected, the momenta's term forgotten, a
temperature wrong in one place, and some that belong to one kernel alone.

Not here, since it is exact: a steered swap that leaves v as it is (a plain swap). Wrapping shows
where a draw is weighed by the v that it came from. In walks, which come back just as often, its
bias is too small to be seen on this molecule; test_symmetry.py sees it on a methyl group.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from openmm_tsf.sampling.kernels.cartesian import CartesianHMC, CartesianMALA
from openmm_tsf.sampling.kernels.dynamics import DynamicsKernel
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.internal_walk import InternalWalk
from openmm_tsf.sampling.kernels.langevin_openmm import OpenMMLangevin
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin
from openmm_tsf.sampling.kernels.latent import LatentHMC, LatentMALA
from openmm_tsf.sampling.kernels.mixtures import OneOf, OnRungs
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap
from tests.support.exact_cases import ModelCase, WithoutJacobian, WithoutPose, Wrapping, the_tree
from tests.support.invariance import LANGEVIN, build, model, tree

# -- flows with one thing wrong ----------------------------------------------------------------


def through(mutant: Callable[[Any], Any], kind: type, case: Any, **settings: Any) -> Any:
    """A kernel whose flow (or whitened coordinates) is a mutant; it may miss the round trip."""
    kernel = build(kind, case, round_trip_tolerance=1e9, **settings)
    kernel.flow = mutant(kernel.flow)
    return kernel


# -- kernels with one thing wrong --------------------------------------------------------------


def without_momenta(kind: type) -> type:
    """|p|^2 / 2 tau is left out; of a leg's or a trajectory's energy, the kinetic part."""

    class Mutant(kind):
        def log_weight(self, energy, kt, momenta, tau, log_det):
            return -energy / kt + log_det

    class MutantDynamics(kind):
        def kinetic_energy(self, v):
            return v.new_zeros(len(v))

    return MutantDynamics if issubclass(kind, DynamicsKernel) else Mutant


def without_kinetic_energy(kind: type) -> type:
    """LatentHMC without |w|^2 / 2."""

    class Mutant(kind):
        def kinetic_energy(self, velocity):
            return 0.0 * velocity.sum(dim=1)

    return Mutant


def wrong_tau(kind: type) -> type:
    """tau = 1 in the momenta's term."""

    class Mutant(kind):
        def log_weight(self, energy, kt, momenta, tau, log_det):
            return super().log_weight(energy, kt, momenta, torch.ones_like(tau), log_det)

    return Mutant


def wrong_prior(kind: type) -> type:
    """FlowIndependence draws at tau, and weighs the draws at tau = 1."""

    class Mutant(kind):
        def log_proposal_density(self, v, tau):
            return super().log_proposal_density(v, torch.ones_like(tau))

    return Mutant


def wrong_temperature(kind: type) -> type:
    """The upper rung's kT is 1.1 kT (a swap's: 1.5 kT), or a leg's noise is of 1.1 kT."""

    class Mutant(kind):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.kt[-1] *= 1.5 if kind is PlainSwap else 1.1

    class MutantDynamics(kind):
        def velocity_width(self, kt):
            return super().velocity_width(1.1 * kt)

    return MutantDynamics if issubclass(kind, DynamicsKernel) else Mutant


def one_temperature(kind: type) -> type:
    """Both of a steered swap's energies are weighed at the mean temperature."""

    class Mutant(kind):
        def pair_log_weights(self, energy, momenta, log_det, rung):
            kt = self.kt[rung].mean().expand(len(rung))
            weights = self.log_weight(energy, kt, momenta, self.tau[rung], log_det)
            return weights.reshape(2, -1).sum(dim=0)

    return Mutant


def one_way(kind: type) -> type:
    """v is scaled upwards only: the Jacobian of the scaling does not cancel."""

    class Mutant(kind):
        def rescale(self, v, old, new):
            return torch.where((new > old)[:, None], super().rescale(v, old, new), v)

    return Mutant


def without_densities(kind: type) -> type:
    """The densities of proposing there and back are left out."""

    class Mutant(kind):
        def log_density_ratio(self, forward, back):
            return torch.zeros(len(forward), dtype=forward.dtype)

        def log_proposal_density(self, v, tau):
            return torch.zeros_like(tau)

    return Mutant


def forgets_the_latent(kind: type) -> type:
    """Walks on from proposals that were rejected: v and x no longer belong together."""

    class Mutant(kind):
        def __call__(self, state, generator):
            self._last = None
            return super().__call__(state, generator)

        def propose(self, v, tau, generator):
            self._last = super().propose(v if self._last is None else self._last, tau, generator)
            return self._last

    return Mutant


def unscaled_velocities(kind: type) -> type:
    """Velocities travel with their configurations and stay as hot as they were."""

    class Mutant(kind):
        def __call__(self, state, generator):
            end, info = super().__call__(state, generator)
            rows = torch.arange(state.n_walkers)[:, None]
            source = (end.replica[:, :, None] == state.replica[:, None, :]).int().argmax(dim=2)
            return end.evolve(velocities=state.velocities[rows, source]), info

    return Mutant


def never_rejecting(kind: type) -> type:
    """A leg of a large time step that is not metropolised."""

    class Mutant(kind):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.metropolized = False

    return Mutant


def without_reversal(kind: type) -> type:
    """Rejected walkers go on with the velocities that the trajectory began with."""

    class Mutant(kind):
        def refresh_before(self, v, kt, generator):
            self._began = super().refresh_before(v, kt, generator)
            return self._began

        def refresh_after(self, v, kt, generator):
            rejected = self.as_column((v == -self._began).flatten(1).all(dim=1))
            return super().refresh_after(torch.where(rejected, -v, v), kt, generator)

    return Mutant


def leapfrog(last_kick: float, wide: bool = False) -> Callable[[type], type]:
    """LatentHMC whose last kick is not a half, or whose velocities are drawn at sqrt(tau)."""

    def change(kind: type) -> type:
        class Mutant(kind):
            def propose_point(self, start, rows, generator):
                noise = torch.randn(start.v.shape, generator=generator, dtype=start.v.dtype)
                if wide:
                    noise = noise * rows.tau.sqrt().unsqueeze(1)
                velocity, end, total = noise + 0.5 * rows.step * start.gradient, start, 0
                for number in range(self.n_leapfrog):
                    end, n_evaluations = self.evaluate_at(end.v + rows.step * velocity, rows)
                    total += n_evaluations
                    kick = last_kick if number == self.n_leapfrog - 1 else 1.0
                    velocity = velocity + kick * rows.step * end.gradient
                return end, self.kinetic_energy(noise) - self.kinetic_energy(velocity), total

        return Mutant

    return change


def chosen_by_energy(kind: type) -> type:
    """A mixture that applies its members to the walkers of the higher energies only."""

    class Mutant(kind):
        def __call__(self, state, generator):
            end, info = super().__call__(state, generator)
            high = state.energy > state.energy.median(dim=0).values
            wide = high.reshape(*high.shape, *(1,) * (state.x.ndim - 2))
            x = torch.where(wide, end.x, state.x)
            return end.evolve(x=x, energy=torch.where(high, end.energy, state.energy)), info

    return Mutant


def on_the_next_rung(kind: type) -> type:
    """A kernel that is applied one rung above its temperature."""

    class Mutant(kind):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.rungs = tuple((rung + 1) % len(self.temperatures) for rung in self.rungs)

    return Mutant


# -- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A mutation of a kernel, and the case, walkers and iterations that show it.

    `make` and `original` take the case and give the mutant, and the kernel as it should be.
    """

    mutation: str
    kind: type
    make: Callable[[Any], Any]
    original: Callable[[Any], Any]
    case: Callable[[], Any]
    n_walkers: int
    times: int

    def __str__(self) -> str:
        return f"{self.mutation}-{self.kind.__name__}"


def toy(which: str = "gaussian", kind: str = "tsf", noise: float = 0.2, upper: float = 1.6) -> Any:
    """Two rungs on R^3, without velocities."""
    return functools.partial(ModelCase, which, kind, (0.7, upper), noise)


def mutated(mutation: str, change: Callable[[type], type], kind: type, case: Any, n_walkers: int,
            times: int, **settings: Any) -> Mutant:  # fmt: skip
    """A kernel's class changed."""

    def make(case: Any, kind: type = kind) -> Any:
        return build(kind, case, **settings)

    return Mutant(mutation, kind, functools.partial(make, kind=change(kind)), make, case,
                  n_walkers, times)  # fmt: skip


def bent(mutation: str, change: Callable[[Any], Any], kind: type, case: Any, n_walkers: int,
         times: int, **settings: Any) -> Mutant:  # fmt: skip
    """A kernel's flow changed."""
    make, original = (
        functools.partial(through, what, kind, **settings) for what in (change, lambda flow: flow)
    )
    return Mutant(mutation, kind, make, original, case, n_walkers, times)


PAIR = {"scheme": [(0, 1)]}
HMC = {"timestep": 0.016, "n_steps": 8}
DYNAMICS = {
    OpenMMLangevin: (LANGEVIN, 800),
    TorchLangevin: (LANGEVIN, 1800),
    CartesianHMC: (HMC, 1200),
    CartesianMALA: ({"timestep": 0.02}, 2500),
}


@functools.cache
def cut_tree() -> Any:
    """The molecule with a flow whose torsions are cut near where they are most populated."""
    case = copy.copy(tree())
    case.flow = the_tree().flow("tsf", "volume", 0.3, cuts_from_centre=1.0)
    return case


def on_tree(flow: str = "tsf-volume", moving: bool = False) -> Any:
    """The molecule; `moving` as a whole."""
    return functools.partial(tree, flow, 2, not moving)


MUTANTS = [
    # a Jacobian's term removed: the network's, or the coordinate layer's
    bent("jacobian", WithoutJacobian, FlowWalk, toy("double-well", "realnvp"), 4000, 2, sigma=0.6,
         n_steps=6),
    bent("jacobian", WithoutJacobian, FlowWalk, on_tree("tsf-polar"), 4000, 1, sigma=0.2,
         n_steps=30),
    bent("jacobian", WithoutJacobian, FlowIndependence, toy("double-well", "realnvp"), 4000, 2,
         n_steps=3),
    bent("jacobian", WithoutJacobian, LatentMALA, toy("double-well", "realnvp"), 10000, 6,
         sigma=0.4),
    bent("jacobian", WithoutJacobian, LatentHMC, toy("double-well", "realnvp"), 4000, 4, sigma=0.4),
    bent("jacobian", WithoutJacobian, InternalWalk, on_tree("tsf-polar"), 3000, 1, sigma=0.3,
         n_steps=30),
    bent("jacobian", WithoutJacobian, SteeredSwap, toy("gaussian", "realnvp", 0.2, 3.0), 40000, 6,
         **PAIR),
    # the pose reset
    *(
        bent("pose", WithoutPose, kind, on_tree(), 300, 1, **settings)
        for kind, settings in (
            (FlowWalk, {"sigma": 0.17}),
            (FlowIndependence, {"n_steps": 4}),
            (LatentMALA, {}),
            (LatentHMC, {}),
            (InternalWalk, {"sigma": 0.25}),
            (SteeredSwap, {}),
        )
    ),
    # a torsion wrapped instead of rejected
    bent("wrap", Wrapping, SteeredSwap, on_tree(), 5000, 6, **PAIR),
    bent("wrap", Wrapping, FlowIndependence, cut_tree, 3000, 2, n_steps=10),
    # the momenta forgotten
    mutated("momenta", without_momenta, FlowWalk, on_tree("tsf-volume-rough"), 4000, 1, sigma=0.15,
            n_steps=40),
    mutated("momenta", without_momenta, FlowWalk, toy("double-well", noise=0.36), 10000, 1,
            sigma=0.6, n_steps=6),
    mutated("momenta", without_momenta, FlowIndependence, toy("double-well"), 6000, 2, n_steps=6),
    mutated("momenta", without_momenta, LatentMALA, toy("double-well"), 10000, 6, sigma=0.5),
    mutated("momenta", without_momenta, LatentHMC, toy("double-well"), 5000, 4, sigma=0.5),
    mutated("momenta", without_momenta, SteeredSwap, toy(noise=0.36), 10000, 6, **PAIR),
    *(
        mutated("momenta", without_momenta, kind, on_tree(moving=True), n_walkers, 4, **settings)
        for kind, (settings, n_walkers) in DYNAMICS.items()
    ),
    mutated("kinetic energy", without_kinetic_energy, LatentHMC, toy(), 5000, 2, sigma=0.5),
    # a temperature wrong in one place
    mutated("tau", wrong_tau, FlowWalk, toy("double-well", noise=0.36, upper=4.0), 10000, 2,
            sigma=0.6, n_steps=10),
    mutated("tau", wrong_tau, FlowIndependence, toy("double-well", upper=4.0), 10000, 2, n_steps=6),
    mutated("tau of the prior", wrong_prior, FlowIndependence, toy("double-well"), 4000, 2,
            n_steps=3),
    mutated("tau", wrong_tau, LatentMALA, toy("double-well"), 10000, 12, sigma=0.5),
    mutated("tau", wrong_tau, LatentHMC, toy("double-well"), 16000, 8, sigma=0.35, n_leapfrog=3),
    mutated("tau", wrong_tau, SteeredSwap, toy(noise=0.36), 10000, 6, **PAIR),
    mutated("one temperature", one_temperature, SteeredSwap, toy(), 5000, 6, **PAIR),
    mutated("temperature", wrong_temperature, InternalWalk, toy(), 20000, 2, sigma=0.7, n_steps=5),
    mutated("temperature", wrong_temperature, PlainSwap, toy(upper=1.0), 40000, 5),
    *(
        mutated("temperature", wrong_temperature, kind, on_tree(moving=True), n, 4, **settings)
        for kind, (settings, n) in DYNAMICS.items()
    ),
    # what belongs to one kernel
    mutated("one way", one_way, SteeredSwap, toy(), 5000, 4, **PAIR),
    mutated("densities", without_densities, LatentMALA, toy(), 4000, 6, sigma=0.5),
    mutated("densities", without_densities, FlowIndependence, on_tree(), 2000, 2, n_steps=4),
    mutated("latent", forgets_the_latent, FlowWalk, on_tree(), 4000, 8, sigma=0.17, n_steps=4),
    mutated("last kick", leapfrog(1.0), LatentHMC, toy("double-well"), 16000, 8, sigma=0.35,
            n_leapfrog=3),
    mutated("wide noise", leapfrog(0.5, wide=True), LatentHMC, toy("double-well"), 16000, 8,
            sigma=0.35, n_leapfrog=3),
    mutated("choice", chosen_by_energy, OneOf, toy(), 4000, 4, of=("walk", "independence")),
    mutated("rung", on_the_next_rung, OnRungs, toy(), 4000, 4, of="walk", rungs=(0,)),
    mutated("velocities", unscaled_velocities, SteeredSwap, on_tree(), 1500, 1),
    mutated("velocities", unscaled_velocities, PlainSwap, on_tree(), 3000, 2),
    *(
        mutated("reversal", without_reversal, kind, functools.partial(model, which), 4000, 20,
                n_steps=2, **settings)
        for kind, settings in (
            (CartesianHMC, {"timestep": [1.0, 0.8, 0.7], "persistence": 0.95}),
            (TorchLangevin, {"timestep": 0.8, "friction": 0.03}),
        )
        for which in ("gaussian", "double-well")
    ),
    mutated("time step", never_rejecting, OpenMMLangevin, on_tree(moving=True), 800, 4, **LANGEVIN),
    mutated("time step", never_rejecting, TorchLangevin, on_tree(moving=True), 800, 4, **LANGEVIN),
]  # fmt: skip
