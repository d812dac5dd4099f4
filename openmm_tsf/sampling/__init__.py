"""Markov chain Monte Carlo over walkers and temperatures.

:class:`ParallelTempering` applies a sequence of kernels to walkers at every temperature of a ladder
and writes a run directory. The kernels, their exactness and the default sequence are described in
:mod:`openmm_tsf.sampling.kernels`.

:func:`importance_sampling`, :func:`annealed_importance_sampling` and :func:`sequential_monte_carlo`
draw from a base measure with known ln Z and return weights for another potential, whose mean
estimates its partition function; the kernels move the particles in between.
"""

from openmm_tsf.sampling import kernels
from openmm_tsf.sampling.annealing import (
    AnnealedSample,
    AnnealingSchedule,
    annealed_importance_sampling,
    importance_sampling,
    sequential_monte_carlo,
)
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.sampling.tempering import ParallelTempering

__all__ = [
    "AnnealedSample",
    "AnnealingSchedule",
    "ParallelTempering",
    "RunWriter",
    "annealed_importance_sampling",
    "importance_sampling",
    "kernels",
    "sequential_monte_carlo",
]
