"""Every kernel, and mixtures of them, leave exact distributions invariant; mutants do not.

The table and the check are in ``invariance.py``; seeds were fixed beforehand.
"""

import copy
import importlib
import inspect
import pkgutil

import pytest
import torch

import openmm_tsf.sampling
from openmm_tsf.metropolis import metropolis
from openmm_tsf.sampling.kernels import Kernel, PlainSwap, Scheduled
from openmm_tsf.sampling.kernels.base import RungKernel
from openmm_tsf.sampling.kernels.dynamics import DynamicsKernel, LangevinKernel
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowProposalKernel
from openmm_tsf.sampling.kernels.flow_base import FlowKernel
from openmm_tsf.sampling.kernels.internal_walk import InternalWalk
from openmm_tsf.sampling.kernels.latent import LatentGradientKernel
from openmm_tsf.sampling.kernels.mixtures import OneOf, OnRungs
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.state import KernelInfo, per_rung
from tests.support import invariance
from tests.support.exact_cases import LADDERS
from tests.support.invariance import KERNELS, check, model, notice, tree
from tests.support.mixtures import MIXTURES, everything
from tests.support.mutants import MUTANTS

slow = pytest.mark.slow
MODELS = ("gaussian", "double-well")
KINDS = {entry.kind for entry in KERNELS.values()}


@pytest.fixture(scope="module", autouse=True)
def contexts():
    """OpenMM's Contexts are closed in the end."""
    yield
    invariance.openmm_potential().close()
    invariance.openmm_potential.cache_clear()


def kernel_classes():
    """Return every public class of ``openmm_tsf.sampling`` that is a kernel."""
    members = {name for name in dir(Kernel) if not name.startswith("_")} | {"__call__"}
    members -= {"name", "temperatures"}  # set by the constructors
    modules = pkgutil.walk_packages(openmm_tsf.sampling.__path__, "openmm_tsf.sampling.")
    return {
        cls
        for module in modules
        for name, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        if not name.startswith("_")
        and cls.__module__.startswith("openmm_tsf.")
        and all(hasattr(cls, member) for member in members)
    }


def test_every_kernel_is_in_the_table():
    abstract = {FlowProposalKernel, LatentGradientKernel, DynamicsKernel, LangevinKernel}
    classes = kernel_classes() - abstract - {Kernel, FlowKernel}
    assert len(classes) >= 11
    assert classes == KINDS
    assert all(inspect.isabstract(cls) for cls in abstract)


def test_every_kernel_is_in_a_mixture():
    kernels = everything(tree("tsf-volume", 7, False))
    assert {type(kernel) for kernel in kernels} == KINDS
    for kernel in kernels:
        if hasattr(kernel, "close"):
            kernel.close()


def test_every_kernel_has_its_mutants():
    made = {(mutant.mutation, mutant.kind) for mutant in MUTANTS}
    for kind in KINDS:
        needed = {"temperature" if (("temperature", kind) in made) else "tau"}
        if issubclass(kind, OneOf | OnRungs):  # the other mutations are those of the members
            needed = {"choice"} if kind is OneOf else {"rung"}
        if issubclass(kind, FlowKernel):
            needed |= {"jacobian", "pose"}
        if issubclass(kind, DynamicsKernel | FlowKernel) and kind is not InternalWalk:
            needed |= {"momenta"}
        missing = needed - {mutation for mutation, of in made if of is kind}
        assert not missing, (kind.__name__, missing)
    assert {("wrap", FlowIndependence), ("wrap", SteeredSwap)} <= made


def on_tree():
    """(kernel, flow, rungs): all flows on the shortest ladder, all ladders with the first flow."""
    for name, entry in KERNELS.items():
        for flow in (*entry.flows, *entry.slow_flows):
            for n_rungs in entry.rungs:
                quick = n_rungs == entry.rungs[0] and flow in entry.flows
                quick |= flow == entry.flows[0]
                yield pytest.param(name, flow, n_rungs, marks=() if quick else slow)


@pytest.mark.parametrize(("name", "flow", "n_rungs"), list(on_tree()))
def test_kernels_on_the_molecule(name, flow, n_rungs):
    entry = KERNELS[name]
    case = tree(flow, n_rungs, not entry.is_dynamics)
    n_walkers = entry.n_walkers if n_rungs < 7 else min(entry.n_walkers, 1000)
    lowest = 0.005 if n_rungs == 7 else 0.02  # of 300 and 600 K few pairs agree
    outcome = check(entry, case, n_walkers, 72, entry.times, acceptance=(lowest, 0.98))
    start, end = outcome.start, outcome.end
    (info,) = outcome.totals.values()
    if entry.is_swap:
        assert_counts_of_swaps(info, entry(case), n_walkers, entry.times)
    else:
        steps = entry.on_tree.get("n_steps", 1) if entry.keeps_pose else 1
        rungs = entry.on_tree.get("rungs", range(n_rungs))
        proposed = entry.times * steps * n_walkers
        assert info.proposed.tolist() == [proposed * (rung in rungs) for rung in range(n_rungs)]
        assert torch.equal(end.replica, start.replica)
    if entry.keeps_pose:
        assert end.velocities is start.velocities
        poses = [case.tree.polar.pose(state.x.flatten(0, 1)) for state in (start, end)]
        for before, after in zip(*poses, strict=True):
            torch.testing.assert_close(before, after, rtol=0, atol=1e-9)
        if name.startswith(("latent", "internal")):
            far = (end.x - start.x).abs().amax(dim=(2, 3)) > 1e-4
            assert float(far.double().mean()) > 0.3
    if "steered" in name or entry.keeps_pose:
        assert info.rejected_non_finite > 0
        rejected = info.rejected_non_finite + info.mirror_images
        n_proposed = int(info.proposed.sum())
        if "steered" in name:  # both or neither
            assert info.n_evaluations == 2 * (n_proposed - rejected)
        elif "latent" not in name:
            assert n_proposed - info.n_evaluations <= rejected
    if entry.is_dynamics:
        assert info.n_evaluations == entry.times * n_walkers * n_rungs * (entry(case).n_steps + 1)
        assert bool((info.acceptance > 0.3).all())
    if name.startswith(("walk", "independence", "latent hmc")):
        assert info.mirror_images + info.outside_domain > 0


def assert_counts_of_swaps(info, kernel, n_walkers, times):
    """Assert the number of proposals for every pair of the scheme."""
    n_rungs, scheme = len(kernel.temperatures), kernel.settings()["scheme"]
    if scheme == "even_odd":
        even, odd = n_walkers * ((times + 1) // 2), n_walkers * (times // 2)
        assert info.proposed.tolist() == [odd if k % 2 else even for k in range(n_rungs - 1)]
        return
    assert torch.equal(info.proposed.triu(1), info.proposed)
    if scheme == "random_pairs":
        assert int(info.proposed.sum()) == times * n_walkers * (n_rungs // 2)
        return
    assert int(info.proposed.sum()) == times * n_walkers * len(scheme)
    for pair in scheme:
        assert int(info.proposed[tuple(pair)]) == times * n_walkers


def on_models():
    """(kernel, kind of flow); kernels without a flow once."""
    for name, entry in KERNELS.items():
        if entry.on_model is not None:
            yield name, "tsf"
            if not (entry.is_dynamics or issubclass(entry.kind, PlainSwap | InternalWalk)):
                yield name, "realnvp"


@pytest.mark.parametrize(("name", "kind"), list(on_models()))
@pytest.mark.parametrize("which", MODELS)
def test_kernels_on_models(name, kind, which):
    entry = KERNELS[name]
    check(entry, model(which, kind), 3000, 73, 8 if entry.is_dynamics else 3)


def mixtures():
    for name, (_, ladders, _) in MIXTURES.items():
        for flow in ("tsf-volume", "realnvp-polar", "tsf-polar", "realnvp-volume"):
            for n_rungs in LADDERS:
                wanted = flow in invariance.BOTH and n_rungs in ladders
                if wanted and (n_rungs < 7 or flow == "tsf-volume"):
                    yield pytest.param(name, flow, n_rungs)
                elif name != "everything" or n_rungs == 7:
                    yield pytest.param(name, flow, n_rungs, marks=slow)


@pytest.mark.parametrize(("name", "flow", "n_rungs"), list(mixtures()))
def test_mixtures_on_the_molecule(name, flow, n_rungs):
    make, _, n_walkers = MIXTURES[name]
    case = tree(flow, n_rungs, name == "through flow")
    outcome = check(make, case, n_walkers, 74, 2, acceptance=(0.0, 1.0))
    for name, info in outcome.totals.items():
        rate = int(info.accepted.sum()) / int(info.proposed.sum())
        assert 0.02 < rate < 0.98, (name, rate)
    assert float((outcome.end.replica != outcome.start.replica).double().mean()) > 0.15


@pytest.mark.parametrize("kind", ["tsf", "realnvp"])
@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "whole"])
def test_mixtures_on_models(name, which, kind):
    make, *_ = MIXTURES[name]
    check(make, model(which, kind), 3000, 75, 2, acceptance=(0.02, 0.99))


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("name", ["default", "through flow"])
def test_mixtures_without_velocities(name, which):
    make, case = MIXTURES[name][0], model(which, velocities=False)
    outcome = check(make, case, 3000, 80, 4, acceptance=(0.02, 0.99))
    assert outcome.end.velocities is None
    assert "local" not in outcome.totals


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(mutant):
    notice(mutant.make, mutant.case(), mutant.n_walkers, 79, mutant.times)


@slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_what_was_mutated_is_exact(mutant):
    check(mutant.original, mutant.case(), mutant.n_walkers, 79, mutant.times, (0.01, 0.99))


class CartesianWalk(RungKernel):
    """A user's kernel: a random step of every coordinate."""

    exact, name = True, "cartesian_walk"

    def __init__(self, potential, ladder, step, flow=None):
        super().__init__(ladder, potential.boltzmann_constant)
        self.potential, self.step, self.flow = potential, step, flow

    def __call__(self, state, generator):
        noise = torch.randn(state.x.shape, generator=generator, dtype=state.x.dtype)
        x = state.x + self.step * noise
        energy = self.potential.energy(x.flatten(0, 1))
        if self.flow is not None:  # mirror images are outside the domain
            energy[self.flow.is_mirror_image(x.flatten(0, 1))] = torch.inf
        kt, energy = self.kt.expand_as(state.energy), energy.reshape(state.energy.shape)
        log_weights = (-state.energy / kt).flatten(), (-energy / kt).flatten()
        accepted = metropolis(*log_weights, generator)[0].reshape(energy.shape)
        take = accepted.reshape(*energy.shape, *(1,) * (x.ndim - 2))
        energy = torch.where(accepted, energy, state.energy)
        counts = per_rung(accepted, state.n_walkers)
        info = KernelInfo(*counts, n_evaluations=accepted.numel())
        return state.evolve(x=torch.where(take, x, state.x), energy=energy), info

    def settings(self):
        return {"step": self.step}


class DriftingWalk(CartesianWalk):
    """The same with steps that are not symmetric, without the correction."""

    def __call__(self, state, generator):
        x = state.x + 0.3 * self.step
        energy = self.potential.energy(x.flatten(0, 1)).reshape(state.energy.shape)
        return super().__call__(state.evolve(x=x, energy=energy), generator)


def test_a_users_kernel_goes_through_the_same_check():
    on_r3, molecule = model("double-well"), tree("tsf-volume", 3, False)

    def walk(case, kind=CartesianWalk):
        step, flow = (0.006, case.flow) if case is molecule else (0.5, None)
        return kind(case.potential, case.ladder, step, flow)

    check(walk, on_r3, 2000, 76, 5)
    check(walk, molecule, 600, 77, 6)
    notice(lambda case: walk(case, DriftingWalk), on_r3, 2000, 76, 5)


@pytest.mark.parametrize("which", ["molecule", *MODELS])
def test_mixtures_by_chance_and_by_rung(which):
    """Members drawn at random, and other kernels at other rungs, beside swaps on all."""

    def mixture(case):
        part = {rungs: copy.copy(case) for rungs in ((0,), (1, 2))}
        for rungs, cut in part.items():
            cut.ladder = tuple(case.ladder[rung] for rung in rungs)
        moves = ("walk", "independence", "batched langevin")
        hmc: dict = {} if which == "molecule" else {"timestep": [0.5, 0.4]}
        swaps = [KERNELS[name](case) for name in ("steered swap, random", "plain swap, random")]
        return [
            OneOf([KERNELS[name](case) for name in moves], [2, 1, 1]),
            OnRungs(KERNELS["latent mala"](part[(0,)]), case.ladder),
            OnRungs(KERNELS["hmc"](part[(1, 2)], **hmc), case.ladder),
            Scheduled(OneOf(swaps, name="swaps"), repeats=2),
            OnRungs(KERNELS["plain swap"](part[(1, 2)]), case.ladder),
        ]

    case = tree("realnvp-polar", 3, False) if which == "molecule" else model(which, "realnvp")
    check(mixture, case, 600 if which == "molecule" else 3000, 78, 3)
