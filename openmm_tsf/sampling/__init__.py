"""Markov chain Monte Carlo over walkers and temperatures."""

from openmm_tsf.sampling.kernels import schedule as kernels
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.sampling.tempering import ParallelTempering

__all__ = ["ParallelTempering", "RunWriter", "kernels"]
