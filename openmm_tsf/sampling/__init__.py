"""Markov chain Monte Carlo over walkers and temperatures."""

from openmm_tsf.sampling import kernels
from openmm_tsf.sampling.output import RunWriter
from openmm_tsf.sampling.tempering import ParallelTempering

__all__ = ["ParallelTempering", "RunWriter", "kernels"]
