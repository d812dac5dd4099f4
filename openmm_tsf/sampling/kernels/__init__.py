"""The kernels under one name (``tsf.kernels.FlowWalk``), and the default sequence.

Through the flow: :class:`FlowWalk`, :class:`FlowIndependence`, :class:`LatentMALA`,
:class:`LatentHMC`. Between temperatures: :class:`PlainSwap`, :class:`SteeredSwap`. Dynamics with
real masses: :class:`OpenMMLangevin` (OpenMM's steps), :class:`TorchLangevin` (any potential),
:class:`CartesianHMC`, :class:`CartesianMALA`. Without a flow: :class:`InternalWalk` on
:class:`WhitenedCoordinates`. Made of others: :class:`OneOf` (drawn at random), :class:`OnRungs`
(some rungs only). All are Metropolised by the one rule and exact, except Langevin legs
that say so. A sampler takes any sequence of them; :class:`Scheduled` gives one a schedule.
"""

from openmm_tsf.sampling.kernels.base import Kernel
from openmm_tsf.sampling.kernels.cartesian import CartesianHMC, CartesianMALA
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.internal_walk import InternalWalk, WhitenedCoordinates
from openmm_tsf.sampling.kernels.langevin_openmm import OpenMMLangevin
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin
from openmm_tsf.sampling.kernels.latent import LatentHMC, LatentMALA
from openmm_tsf.sampling.kernels.mixtures import OneOf, OnRungs
from openmm_tsf.sampling.kernels.schedule import Scheduled, default_kernels, kernels_by_name
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.sampling.state import KernelInfo, WalkerState

__all__ = [
    "CartesianHMC",
    "CartesianMALA",
    "FlowIndependence",
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
    "SteeredSwap",
    "TorchLangevin",
    "WalkerState",
    "WhitenedCoordinates",
    "default_kernels",
    "kernels_by_name",
]
