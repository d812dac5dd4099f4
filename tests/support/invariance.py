"""The invariance test: one check for any kernel or mixture, and the table of all of them.

Walkers start from exact samples of every rung, the sampler applies the kernels, and the walkers
must still be exact samples: |z| < 4 for every mean, variance, histogram and correlation of
coordinates, poses, velocities and rungs. A kernel with one mistake must exceed |z| = 6.

A check computes up to 1218 scores, and one of them exceeds 4 by chance occasionally. That score is
then computed again, with another fixed seed and four times as many walkers: a bias has twice the
|z| there, a chance deviation has not.

"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.sampling.kernels.cartesian import CartesianHMC, CartesianMALA
from openmm_tsf.sampling.kernels.crank_nicolson import FlowCrankNicolson
from openmm_tsf.sampling.kernels.dynamics import DynamicsKernel
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowProposalKernel, FlowWalk
from openmm_tsf.sampling.kernels.internal_walk import InternalWalk
from openmm_tsf.sampling.kernels.langevin_openmm import OpenMMLangevin
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin
from openmm_tsf.sampling.kernels.latent import LatentHMC, LatentMALA
from openmm_tsf.sampling.kernels.mixtures import OneOf, OnRungs
from openmm_tsf.sampling.kernels.multiple_try import FlowMultipleTry
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.sampling.tempering import ParallelTempering
from tests.support import exact_cases as exact


@functools.cache
def tree(flow: str = "tsf-volume", n_rungs: int = 2, pose_kept: bool = True) -> exact.TreeCase:
    """Return the exactly solvable molecule; `pose_kept` False with dynamics."""
    return exact.TreeCase(flow, n_rungs, pose_kept)


@functools.cache
def model(which: str = "gaussian", kind: str = "tsf", velocities: bool = True) -> exact.ModelCase:
    """Return ``"gaussian"`` or ``"double-well"`` on R^3, with a ``"tsf"`` or ``"realnvp"``."""
    return (exact.ModelWithVelocities if velocities else exact.ModelCase)(which, kind)


@functools.cache
def openmm_potential() -> OpenMMPotential:
    """Return the tree's energy by OpenMM, for the kernels whose steps OpenMM takes."""
    return OpenMMPotential(exact.the_tree().system(), platform="Reference", n_contexts=1)


@functools.cache
def layers(case: Any, mode: str = "conditional") -> Any:
    """Return whitened coordinates, fitted once a case, with the metric of the case's flow."""
    metric = exact.FLOWS[case.flow_name][1] if isinstance(case, exact.TreeCase) else "volume"
    frames, settings = case.dataset(), {"mode": mode, "metric": metric}
    return InternalWalk.from_dataset(frames, case.potential, case.ladder, **settings).layers


@dataclass(frozen=True)
class Outcome:
    """The largest |z| and its name, all z; the walkers before and after; counts by kernel."""

    z: float
    where: str
    scores: dict[str, Any]
    start: WalkerState
    end: WalkerState
    totals: dict[str, KernelInfo]


def run(
    factory: Callable[[Any], Any], case: Any, n_walkers: int, seed: int, times: int
) -> tuple[Outcome, ParallelTempering, int]:
    """Apply kernels to exact walkers; return outcome, sampler and the evaluations of potentials."""
    made = factory(case)
    schedule = list(made) if isinstance(made, list | tuple) else [made]
    start = case.start(n_walkers, torch.Generator().manual_seed(seed))
    parts = (case.flow, case.ladder, n_walkers, schedule, case.potential, seed + 1000)
    with ParallelTempering(None, *parts) as sampler:
        sampler.set_positions(start.x, start.velocities)
        start, before = sampler.state, _evaluations(case)
        sampler.run(times, progress=False)
        counted = _evaluations(case) - before
    scores = case.scores(sampler.state)
    outcome = Outcome(*exact.worst(scores), scores, start, sampler.state, sampler.totals)
    return outcome, sampler, counted


def check(
    factory: Callable[[Any], Any],
    case: Any,
    n_walkers: int = 1000,
    seed: int = 71,
    times: int = 4,
    acceptance: tuple[float, float] = (0.02, 0.98),
) -> Outcome:
    """Assert that kernels leave a case's distribution invariant, and count correctly.

    `factory` makes from the case a kernel, or those of one iteration (or their ``Scheduled``). The
    case is :func:`tree`, :func:`model` or anything with the same methods. Every kernel's acceptance
    must be in a range: one that never or always accepts tests nothing.
    """
    outcome, sampler, counted = run(factory, case, n_walkers, seed, times)
    start, end = outcome.start, outcome.end
    print(f"|z| = {outcome.z:.2f}: {outcome.where}")
    for name, kernel in sampler.kernels.items():
        info = outcome.totals[name]
        assert kernel.exact, name
        assert info.accepted.shape == info.proposed.shape == kernel.counts_shape
        rate = info.acceptance[info.proposed > 0]
        assert len(rate), f"{name} proposed nothing"
        assert bool(((rate > acceptance[0]) & (rate < acceptance[1])).all()), (name, rate)
    assert counted == sum(info.n_evaluations for info in outcome.totals.values())
    exact.assert_energies_are_stored(case.potential, end)
    assert torch.equal(end.replica.sort(dim=1).values, start.replica)
    moved = (end.x != start.x).flatten(2).any(dim=2)
    assert float(moved.double().mean()) > 0.05
    if outcome.z >= exact.LIMIT:
        again, _, _ = run(factory, case, 4 * n_walkers, seed + 2000, times)
        z = float(np.abs(again.scores[outcome.where]).max())
        print(f"once more: |z| = {z:.2f}")
        assert z < exact.LIMIT, (
            f"{outcome.where}: |z| = {outcome.z:.1f}, and {z:.1f} with more walkers"
        )
    return outcome


def notice(
    factory: Callable[[Any], Any], case: Any, n_walkers: int, seed: int, times: int
) -> Outcome:
    """Assert that the same scores reject a mutant."""
    outcome, _, _ = run(factory, case, n_walkers, seed, times)
    print(f"|z| = {outcome.z:.1f}: {outcome.where}")
    assert outcome.z > exact.NOTICED, f"a mutant passes: |z| = {outcome.z:.1f}, {outcome.where}"
    return outcome


def _potential_of_openmm(case: Any) -> OpenMMPotential:
    """Return the case's energy by OpenMM: that of the tree but for cases with their own."""
    potential: OpenMMPotential = getattr(case, "openmm_potential", openmm_potential)()
    return potential


def _evaluations(case: Any) -> int:
    return case.potential.n_evaluations + _potential_of_openmm(case).n_evaluations


@dataclass(frozen=True)
class Entry:
    """A kernel of the table: its class, and settings on the molecule and on R^3.

    The others are walkers, iterations, lengths of the ladders and flows on the molecule; slow flows
    have the marker ``slow``.
    """

    kind: type
    on_tree: dict[str, Any] = field(default_factory=dict)
    on_model: dict[str, Any] | None = field(default_factory=dict)  # None: it does not apply
    n_walkers: int = 1200
    times: int = 4
    rungs: tuple[int, ...] = (2,)
    flows: tuple[str, ...] = ("tsf-volume",)
    slow_flows: tuple[str, ...] = ()

    @property
    def keeps_pose(self) -> bool:
        """Whether only internal coordinates change: pose and velocities stay."""
        return issubclass(self.kind, FlowProposalKernel)

    @property
    def is_swap(self) -> bool:
        """Whether replicas change rungs."""
        return issubclass(self.kind, PlainSwap | SteeredSwap)

    @property
    def is_dynamics(self) -> bool:
        """Whether the molecule moves as a whole."""
        return issubclass(self.kind, DynamicsKernel)

    def __call__(self, case: Any, **more: Any) -> Any:
        """Return the kernel for a case."""
        settings = self.on_tree if isinstance(case, exact.TreeCase) else self.on_model
        return build(self.kind, case, **(settings or {}) | more)


def build(kind: type, case: Any, **settings: Any) -> Any:
    """Return a kernel of this class, or of a class derived from it, for a case."""
    flow, potential, ladder = case.flow, case.potential, case.ladder
    if issubclass(kind, PlainSwap):
        return kind(ladder, potential.boltzmann_constant, **settings)
    if issubclass(kind, OneOf):
        return kind([KERNELS[name](case) for name in settings.pop("of")], **settings)
    if issubclass(kind, OnRungs):
        part = copy.copy(case)
        part.ladder = tuple(ladder[rung] for rung in settings.pop("rungs"))
        return kind(KERNELS[settings.pop("of")](part), ladder, **settings)
    if issubclass(kind, InternalWalk):
        whitened = layers(case, settings.pop("mode", "conditional"))
        return kind(whitened, potential, ladder, **settings)
    if not issubclass(kind, DynamicsKernel):
        return kind(settings.pop("flow", flow), potential, ladder, **settings)
    domain = flow if isinstance(case, exact.TreeCase) else None
    if issubclass(kind, OpenMMLangevin):
        potential = _potential_of_openmm(case)
    return kind(potential, ladder, case.masses, domain, **settings)


TSF = ("tsf-volume", "tsf-polar")
BOTH = ("tsf-volume", "realnvp-polar")
REST = ("realnvp-volume", "tsf-volume-rough")
TRIO = (*TSF, "realnvp-polar")
MIXED = ("tsf-volume-mixed", "realnvp-polar-mixed")
LANGEVIN = {"timestep": 0.02, "friction": 20.0, "n_steps": 10}
MODEL_LANGEVIN = {"timestep": 0.4, "friction": 0.5, "n_steps": 5}

KERNELS: dict[str, Entry] = {
    "walk": Entry(
        FlowWalk, {"sigma": 0.17}, {"sigma": 0.6}, 2500, 5, flows=TRIO, slow_flows=REST
    ),
    "walk of 4 steps": Entry(
        FlowWalk, {"sigma": 0.17, "n_steps": 4}, {"sigma": 0.6, "n_steps": 4}, 2500, 3,
        flows=(*TRIO, *MIXED), slow_flows=REST,
    ),
    "independence": Entry(
        FlowIndependence, n_walkers=2500, times=5, flows=TRIO, slow_flows=("realnvp-volume",)
    ),
    "independence of 4 steps": Entry(
        FlowIndependence, {"n_steps": 4}, {"n_steps": 4}, 2500, 3,
        flows=(*TRIO, *MIXED), slow_flows=("realnvp-volume",),
    ),
    "crank nicolson": Entry(
        FlowCrankNicolson, {"beta": 0.3, "n_steps": 2}, {"beta": [0.7, 0.6, 0.5]}, 2500, 4,
        flows=(*TRIO, *MIXED), slow_flows=REST,
    ),
    "crank nicolson of a share": Entry(
        FlowCrankNicolson, {"beta": 0.5, "share": 0.4, "n_steps": 2}, {"beta": 0.8, "share": 0.5},
        2500, 4, flows=BOTH, slow_flows=("tsf-polar", *REST),
    ),
    "multiple try": Entry(
        FlowMultipleTry, {"n_tries": 5, "n_steps": 2}, {"n_tries": 3}, 2000, 4,
        flows=(*TRIO, *MIXED), slow_flows=("realnvp-volume",),
    ),
    "latent mala": Entry(
        LatentMALA, {"sigma": 0.27, "n_steps": 2}, {"sigma": 0.3}, 1500, 2,
        flows=TRIO, slow_flows=("realnvp-volume",),
    ),
    "latent hmc": Entry(
        LatentHMC, {"sigma": 0.25, "n_leapfrog": 3}, {"sigma": 0.25, "n_leapfrog": 2}, 1200, 3,
        flows=BOTH, slow_flows=("tsf-polar", "realnvp-volume"),
    ),
    "internal walk": Entry(
        InternalWalk, {"sigma": 0.25}, {"sigma": 0.7}, 2500, 6, flows=TSF,
    ),
    "internal walk, full": Entry(
        InternalWalk, {"sigma": 0.25, "mode": "full"}, None, 2500, 6, flows=("tsf-polar",)
    ),
    "plain swap": Entry(PlainSwap, n_walkers=2000, times=6, rungs=(2, 3, 7)),
    "plain swap, random": Entry(
        PlainSwap, {"scheme": "random_pairs"}, {"scheme": "random_pairs"}, 2000, 6, (2, 3, 7)
    ),
    "plain swap, ends": Entry(
        PlainSwap, {"scheme": [(6, 0), (1, 4)]}, {"scheme": [(2, 0)]}, 2000, 6, (7,)
    ),
    "steered swap": Entry(
        SteeredSwap, n_walkers=2000, times=5, rungs=(2, 3, 7), flows=(*TRIO, *REST)
    ),
    "steered swap, random": Entry(
        SteeredSwap, {"scheme": "random_pairs"}, {"scheme": "random_pairs"}, 1000, 4, (2, 3, 7),
        slow_flows=("tsf-polar", "realnvp-polar", *REST),
    ),
    "steered swap, ends": Entry(
        SteeredSwap, {"scheme": [(6, 0), (1, 4)]}, {"scheme": [(2, 0)]}, 1000, 4, (7,),
        slow_flows=("tsf-polar", "realnvp-polar", *REST),
    ),
    "langevin": Entry(OpenMMLangevin, LANGEVIN, None, 800),
    "batched langevin": Entry(
        TorchLangevin, LANGEVIN, MODEL_LANGEVIN, slow_flows=("realnvp-polar",)
    ),
    "hmc": Entry(
        CartesianHMC, {"timestep": 0.019, "n_steps": 8}, {"timestep": [0.6, 0.5, 0.4], "n_steps": 4}
    ),
    "hmc, persistent": Entry(
        CartesianHMC, {"timestep": 0.018, "n_steps": 8, "persistence": 0.7},
        {"timestep": [0.6, 0.5, 0.4], "n_steps": 4, "persistence": 0.8},
    ),
    "one of": Entry(
        OneOf, {"of": ("walk", "independence"), "weights": (3, 1)},
        {"of": ("walk", "hmc"), "weights": (1, 2)}, 2500, 5,
    ),
    "on rungs": Entry(
        OnRungs, {"of": "walk", "rungs": (0, 2)}, {"of": "latent mala", "rungs": (0, 2)}, 2500, 5,
        rungs=(3,),
    ),
    "mala": Entry(CartesianMALA, {"timestep": 0.02}, {"timestep": [0.8, 0.6, 0.5]}),
}  # fmt: skip
