"""The kernels under one name (``tsf.kernels.FlowWalk``), and the default sequence.

Through the flow: :class:`FlowWalk`, :class:`FlowIndependence`, :class:`LatentMALA`,
:class:`LatentHMC`. Between temperatures: :class:`PlainSwap`, :class:`SteeredSwap`. Dynamics with
real masses: :class:`LangevinLeg` (OpenMM's steps), :class:`BatchedLangevinLeg` (any potential),
:class:`CartesianHMC`, :class:`CartesianMALA`. Without a flow: :class:`InternalWalk` on
:class:`WhitenedCoordinates`. Made of others: :class:`OneOf` (drawn at random), :class:`OnRungs`
(some rungs only). All are Metropolised by the one rule and exact, except Langevin legs
that say so. A sampler takes any sequence of them; :class:`Every` gives one a schedule.
"""

from openmm_tsf.sampling.kernels.base import Kernel
from openmm_tsf.sampling.kernels.cartesian import CartesianHMC, CartesianMALA
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.internal_walk import InternalWalk, WhitenedCoordinates
from openmm_tsf.sampling.kernels.langevin_openmm import LangevinLeg
from openmm_tsf.sampling.kernels.langevin_torch import BatchedLangevinLeg
from openmm_tsf.sampling.kernels.latent import LatentHMC, LatentMALA
from openmm_tsf.sampling.kernels.mixtures import OneOf, OnRungs
from openmm_tsf.sampling.kernels.schedule import Every, default_kernels, kernels_by_name
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.sampling.state import KernelInfo, WalkerState

__all__ = [
    "BatchedLangevinLeg",
    "CartesianHMC",
    "CartesianMALA",
    "Every",
    "FlowIndependence",
    "FlowWalk",
    "InternalWalk",
    "Kernel",
    "KernelInfo",
    "LangevinLeg",
    "LatentHMC",
    "LatentMALA",
    "OnRungs",
    "OneOf",
    "PlainSwap",
    "SteeredSwap",
    "WalkerState",
    "WhitenedCoordinates",
    "default_kernels",
    "kernels_by_name",
]
