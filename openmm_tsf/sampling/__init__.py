"""Markov chain Monte Carlo over walkers and temperatures.

:class:`ParallelTempering` applies a sequence of kernels to walkers at every temperature of a ladder
and writes a run directory. The kernels, their exactness and the default sequence are described in
:mod:`openmm_tsf.sampling.kernels`.
"""

from openmm_tsf.sampling import kernels
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.sampling.tempering import ParallelTempering

__all__ = ["ParallelTempering", "RunWriter", "kernels"]
