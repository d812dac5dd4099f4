"""Markov kernels for walkers on a temperature ladder, and the default sequence of them.

A sampler takes any sequence of kernels (``kernels=[...]`` of
:class:`openmm_tsf.ParallelTempering`), each of which leaves the Boltzmann distribution of every
temperature invariant; :class:`Scheduled` gives one a schedule.

========================  =========================================================================
Through the flow          :class:`FlowWalk` (TSF-MCMC), :class:`FlowIndependence`,
                          :class:`FlowCrankNicolson` between them, :class:`FlowMultipleTry`;
                          :class:`LatentMALA`, :class:`LatentHMC` with gradients in latent space
Between temperatures      :class:`PlainSwap` (replica exchange), :class:`SteeredSwap` (through the
                          flow, any pair of rungs with a single network)
Dynamics with masses      :class:`OpenMMLangevin` (OpenMM takes the steps), :class:`TorchLangevin`
                          (any potential, one batch), :class:`CartesianHMC`, :class:`CartesianMALA`
Without a flow            :class:`InternalWalk`, a random walk in :class:`WhitenedCoordinates`
Made of kernels           :class:`OneOf` (one drawn at random), :class:`OnRungs` (some rungs only)
========================  =========================================================================

**Exactness.** All proposals are accepted or rejected by :func:`openmm_tsf.metropolis.metropolis`.
Kernels through the flow, swaps and HMC are always exact, Langevin dynamics is by default: Verlet
steps between two halves of a thermostat, accepted by the energy error. With ``metropolized=False``
(``local_metropolized=False`` of the default sequence) it has a bias of order dt^2, and its
``settings()`` say so with the time step. The attribute ``exact`` tells which. Steering is exact for
the joint density of coordinates and auxiliary momenta; the flow's marginal at another temperature
is an approximation, the samples of the Markov chain are not. Round trips of the flow are checked
during sampling, every ``round_trip_interval`` iterations. Proposals keep the pose of a walker and
its labels of equivalent hydrogens. No kernel reaches basins that the flow's training frames lack
and that barriers separate (a cis peptide bond); mirror images are rejected.

**Constraints.** Kernels through a flow of constrained coordinates stay on their manifold, and its
log-determinant has the factor of the measure. Dynamics take the constraints and the measure from
the flow, too: steps of RATTLE, Metropolised, each of which is checked to be reversible
(:mod:`openmm_tsf.sampling.kernels.rattle`), with the System's own masses. Walkers carry velocities
of all directions, of which a trajectory takes the tangent part.

**Default sequence** (:func:`default_kernels` with :class:`SequenceSettings`) of an iteration: every
second iteration 25 steps of Langevin dynamics; one independence proposal; four walk steps; a
steered and a plain swap, of which one takes the even and the other the odd pairs of neighbours,
alternating. The command line's presets ``default`` and ``thorough`` use what moves farthest for its
evaluations on alanine dipeptide (``examples/benchmarks/moves.py``): two independence proposals,
both swaps, and dynamics every fourth iteration; ``quick`` has Crank-Nicolson steps, too, which move
farther than independence proposals where few of those are accepted.

**Step sizes** (the attribute ``sigma``, one for every rung) are tuned by
:meth:`ParallelTempering.tune`, then fixed and written to ``config.json``.

**A kernel of your own** is any class with the members of :class:`Kernel`, which has an example.
Draw all random numbers from the `generator`, and return a new state. Whether it is exact is tested
by ``tests/support/invariance.py``: walkers start as exact samples of solvable models, and must
still be exact samples after the kernel was applied. In a checkout of the repository::

    from tests.support.invariance import check, tree

    check(lambda case: MyKernel(case.potential, case.ladder), tree("tsf-polar", n_rungs=3))

All kernels here pass this test, alone and in mixtures, and copies of them with one mistake each
(a missing Jacobian, a forgotten pose, ...; ``tests/support/mutants.py``) fail it.
"""

from openmm_tsf.sampling.kernels.base import Kernel
from openmm_tsf.sampling.kernels.cartesian import CartesianHMC, CartesianMALA
from openmm_tsf.sampling.kernels.crank_nicolson import FlowCrankNicolson
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.internal_walk import InternalWalk, WhitenedCoordinates
from openmm_tsf.sampling.kernels.langevin_openmm import OpenMMLangevin
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin
from openmm_tsf.sampling.kernels.latent import LatentHMC, LatentMALA
from openmm_tsf.sampling.kernels.mixtures import OneOf, OnRungs
from openmm_tsf.sampling.kernels.multiple_try import FlowMultipleTry
from openmm_tsf.sampling.kernels.schedule import (
    Scheduled,
    SequenceSettings,
    default_kernels,
    kernels_by_name,
)
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.sampling.state import KernelInfo, WalkerState

__all__ = [
    "CartesianHMC",
    "CartesianMALA",
    "FlowCrankNicolson",
    "FlowIndependence",
    "FlowMultipleTry",
    "FlowWalk",
    "InternalWalk",
    "Kernel",
    "KernelInfo",
    "LatentHMC",
    "LatentMALA",
    "OnRungs",
    "OneOf",
    "OpenMMLangevin",
    "PlainSwap",
    "Scheduled",
    "SequenceSettings",
    "SteeredSwap",
    "TorchLangevin",
    "WalkerState",
    "WhitenedCoordinates",
    "default_kernels",
    "kernels_by_name",
]
