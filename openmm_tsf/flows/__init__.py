"""Normalizing flows.

Couplings are applied in float64, while their networks may run in float32: a coupling is invertible
whatever its network returns.
"""

from openmm_tsf.flows.augmented_map import FlowSample
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.bijectors import Bijector, Chain
from openmm_tsf.flows.load import load_flow
from openmm_tsf.flows.realnvp import RealNVPFlow
from openmm_tsf.flows.tsf import TemperatureSteerableFlow

__all__ = [
    "AugmentedFlow",
    "Bijector",
    "Chain",
    "FlowSample",
    "RealNVPFlow",
    "TemperatureSteerableFlow",
    "load_flow",
]
