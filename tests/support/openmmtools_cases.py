"""The exactly solvable molecule in openmmtools' samplers."""

import functools
from pathlib import Path

import numpy as np
import openmm
import openmm.unit as unit
import torch
from openmmtools import multistate
from openmmtools.cache import ContextCache
from openmmtools.states import SamplerState, ThermodynamicState

from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.random import seeded_generator
from tests.support import exact_tree
from tests.support.exact_cases import the_tree

LADDER = (300.0, 400.0, 520.0)


@functools.cache
def tree_molecule():
    return MolecularSystem(the_tree().system(), the_tree().topology, exact_tree.POSITIONS)


def save_flow(path: Path, kind: str = "tsf", metric: str = "volume") -> Path:
    """Write a flow of the molecule, from which a third to a half of draws are accepted."""
    flow = the_tree().flow(kind, metric, 0.1)
    flow.fingerprint = tree_molecule().fingerprint
    flow.save(path)
    return path


def reference_cache() -> ContextCache:
    """Return a cache of Contexts on the platform that is fast for few atoms."""
    return ContextCache(openmm.Platform.getPlatform("Reference"))


def state_at(kelvin: float, system: openmm.System | None = None) -> ThermodynamicState:
    """Return the state of the molecule, or of another System, at a temperature."""
    return ThermodynamicState(system or tree_molecule().system, temperature=kelvin * unit.kelvin)


def sampler_state(x: np.ndarray | torch.Tensor, velocities: np.ndarray | None = None):
    """Return the SamplerState of positions [N, 3] in nm and velocities [N, 3] in nm/ps."""
    if velocities is not None:
        velocities = velocities * unit.nanometer / unit.picosecond
    x = x.numpy() if isinstance(x, torch.Tensor) else x
    return SamplerState(x.copy() * unit.nanometer, velocities)


def exact_states(n: int, kelvin: float, seed: int) -> list[SamplerState]:
    """Return independent samples of the Boltzmann distribution."""
    return [sampler_state(x) for x in the_tree().sample(n, kelvin, seeded_generator(seed))]


def mean_energy(kelvin: float) -> tuple[float, float]:
    """Return the mean and the standard deviation of the energy in kJ/mol, by quadrature."""
    tree, mean, variance = the_tree(), 0.0, 0.0
    for index, marginal in enumerate(tree.marginals(kelvin)):
        u = tree.centre.repeat(len(marginal.grid), 1)
        u[:, index] = torch.from_numpy(marginal.grid)
        energy = tree.term_energies(u)[:, index].numpy()
        weight, middle = np.diff(marginal.cdf), 0.5 * (energy[1:] + energy[:-1])
        mean += weight @ middle
        variance += weight @ middle**2 - (weight @ middle) ** 2
    return mean, variance**0.5


def positions_of(states) -> torch.Tensor:
    """Return the positions [n, N, 3] of SamplerStates in nm."""
    rows = [state.positions.value_in_unit(unit.nanometer) for state in states]
    return torch.tensor(np.array(rows))


def apply_to_all(move, states, kelvin: float, times: int = 1) -> None:
    """Apply a move `times` times to each SamplerState."""
    cache, thermodynamic = reference_cache(), state_at(kelvin)
    for state in states:
        for _ in range(times):
            move.apply(thermodynamic, state, context_cache=cache)


def create_sampler(kind: str, moves, path: Path, n_iterations: int, **options):
    """Return a sampler of openmmtools on the ladder, and the reporter that it was created with."""
    sampler = getattr(multistate, kind)(
        mcmc_moves=moves,
        number_of_iterations=n_iterations,
        online_analysis_interval=None,
        **options,
    )
    reporter = multistate.MultiStateReporter(path, checkpoint_interval=1)
    starts = [exact_states(1, t, seed)[0] for seed, t in enumerate(LADDER)]
    if kind == "ParallelTemperingSampler":
        ladder = [kelvin * unit.kelvin for kelvin in LADDER]
        number = {"n_temperatures": len(LADDER)}  # openmmtools needs it also where they are given
        sampler.create(state_at(LADDER[0]), starts, reporter, temperatures=ladder, **number)
    else:
        sampler.create([state_at(t) for t in LADDER], starts, reporter)
    return _on_reference(sampler), reporter


def resume_sampler(kind: str, path: Path):
    """Return the sampler that a file holds, and its reporter."""
    reporter = multistate.MultiStateReporter(path)
    return _on_reference(getattr(multistate, kind).from_storage(reporter)), reporter


def _on_reference(sampler):
    sampler.energy_context_cache = reference_cache()
    sampler.sampler_context_cache = reference_cache()
    return sampler
