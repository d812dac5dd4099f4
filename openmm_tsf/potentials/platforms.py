"""The choice of an OpenMM Platform and a number of Contexts: given, or by a short measurement."""

import logging
import math
import os
import statistics
import time
from collections.abc import Mapping

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_tsf.potentials.context_pool import ContextPool, PlatformChoice, open_pool
from openmm_tsf.utils.validation import check_int, unwrap_scalar

logger = logging.getLogger(__name__)

#: Seconds of one round of one candidate, and of all rounds together.
_ROUND_SECONDS = 0.025
_TOTAL_SECONDS = 1.0
_N_ROUNDS = 3

#: How much faster a candidate that uses several cores must be to be chosen over one that does not.
_MIN_SPEEDUP_OF_CORES = 1.1


def available_platforms() -> list[str]:
    """Return the names of the Platforms that OpenMM has loaded, the slowest first."""
    count = openmm.Platform.getNumPlatforms()
    return [openmm.Platform.getPlatform(index).getName() for index in range(count)]


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_platform(platform: str | openmm.Platform) -> str:
    """Return the name of a Platform that OpenMM has loaded."""
    name = platform.getName() if isinstance(platform, openmm.Platform) else platform
    if not isinstance(name, str):
        given = type(platform).__name__
        raise TypeError(f"platform: expected a name or an openmm.Platform, got {given}")
    if name not in available_platforms():
        known = ", ".join(available_platforms())
        raise ValueError(f"platform: expected one of {known}, got {name!r}")
    return name


def check_properties(name: str, properties: Mapping[str, object]) -> dict[str, str]:
    """Return properties of the Platform `name`, as strings."""
    if not isinstance(properties, Mapping):
        raise TypeError(f"platform_properties: expected a mapping, got {type(properties).__name__}")
    known = list(openmm.Platform.getPlatform(name).getPropertyNames())
    checked = {}
    for key, value in properties.items():
        if key not in known:
            among = f"names among {known} for the {name} platform"
            raise ValueError(f"platform_properties: expected {among}, got {key!r}")
        value = unwrap_scalar(value)
        if not isinstance(value, (str, int)):
            given = f"for {key}, got {type(value).__name__}"
            raise TypeError(f"platform_properties: expected str, int or bool {given}")
        checked[key] = str(value).lower() if isinstance(value, bool) else str(value)
    if not checked.get("Threads", "1").isdecimal() or checked.get("Threads") == "0":
        raise ValueError(
            f"platform_properties: expected a positive number of Threads, got {checked['Threads']}"
        )
    return checked


def choose_platform(
    system: openmm.System,
    platform: str | openmm.Platform | None = None,
    properties: Mapping[str, object] | None = None,
    n_contexts: int | None = None,
) -> PlatformChoice:
    """Return the Platform that is given, or the fastest one for `system` by measurement.

    Without `n_contexts` the number of Contexts is measured, too; `properties` need a `platform`.
    """
    if n_contexts is not None:
        n_contexts = check_int(n_contexts, "n_contexts")
    if platform is None:
        if properties:
            raise ValueError("platform_properties: expected a platform to go with them, got none")
        candidates = [
            choice
            for name in reversed(available_platforms())
            for choice in _candidates(name, {}, n_contexts)
        ]
    else:
        name = check_platform(platform)
        checked = check_properties(name, properties or {})
        if n_contexts is not None:
            return PlatformChoice(name, checked, n_contexts)
        candidates = _candidates(name, checked, n_contexts)
    return candidates[0] if len(candidates) == 1 else _measure(system, candidates)


def _candidates(
    name: str, properties: dict[str, str], n_contexts: int | None
) -> list[PlatformChoice]:
    cores = available_cores()
    if name not in ("Reference", "CPU"):
        return [PlatformChoice(name, properties, n_contexts or 1)]
    # One core a Context: OpenMM's own threads cost more than they give on small molecules.
    single = {"Threads": "1", **properties} if name == "CPU" else dict(properties)
    counts = sorted({1, min(4, cores), cores}) if n_contexts is None else [n_contexts]
    candidates = [PlatformChoice(name, single, count) for count in counts]
    if name == "CPU" and "Threads" not in properties and cores > 1:
        all_cores = {**properties, "Threads": str(cores)}
        candidates.append(PlatformChoice(name, all_cores, n_contexts or 1))
    return candidates


def _measure(system: openmm.System, candidates: list[PlatformChoice]) -> PlatformChoice:
    """Return the candidate with the least time per energy with forces.

    Candidates are measured alternately, so that a busy moment of the machine affects all of them,
    and compared by their medians: on a busy machine the best time of several threads is misleading.
    """
    start = time.perf_counter()
    conformation = _lattice_positions(system.getNumParticles())
    first: dict[str, float] = {}
    pools: dict[str, ContextPool] = {}
    choices = {str(choice): choice for choice in candidates}
    try:
        for key, choice in choices.items():
            try:
                pool = open_pool(system, choice)
            except openmm.OpenMMException as error:
                logger.info("%s cannot run this System: %s", choice, error)
                continue
            pools[key] = pool
            _time_batch(pool, conformation, 1)  # kernels are compiled at the first call
            first[key] = _time_batch(pool, conformation, 1) / choice.n_contexts
        if not pools:
            raise openmm.OpenMMException(f"no platform can run this System, tried {list(choices)}")
        fastest = min(first.values())
        samples: dict[str, list[float]] = {key: [] for key in pools if first[key] < 4 * fastest}
        for number in range(_N_ROUNDS):
            for key, times in samples.items():
                times += _time_round(pools[key], conformation, choices[key])
            if number and time.perf_counter() - start > _TOTAL_SECONDS:
                break
    finally:
        for pool in pools.values():
            pool.close()

    medians = {key: statistics.median(times) for key, times in samples.items()}

    def cost(key: str) -> float:
        return medians[key] * (_MIN_SPEEDUP_OF_CORES if choices[key].n_threads > 1 else 1.0)

    best = min(medians, key=cost)
    for key in pools:
        logger.info("%s: %.1f us per energy with forces", key, 1e6 * medians.get(key, first[key]))
    spent = time.perf_counter() - start
    logger.info("chose %s (measured in %.2f s on %d cores)", best, spent, available_cores())
    return choices[best]


def _time_round(
    pool: ContextPool, conformation: NDArray[np.float64], choice: PlatformChoice
) -> list[float]:
    """Return seconds per row of several short batches."""
    rows, spent = 2 * choice.n_contexts, 0.0
    times = []
    while spent < _ROUND_SECONDS:
        seconds = _time_batch(pool, conformation, rows)
        times.append(seconds / rows)
        spent += seconds
        if seconds < _ROUND_SECONDS / 8:
            rows *= 2
    return times


def _time_batch(pool: ContextPool, conformation: NDArray[np.float64], rows: int) -> float:
    batch = np.broadcast_to(conformation, (rows, *conformation.shape)).copy()
    start = time.perf_counter()
    pool.evaluate(batch, with_forces=True)
    return time.perf_counter() - start


def _lattice_positions(n_atoms: int) -> NDArray[np.float64]:
    """Return positions [N, 3] with the density of matter and without overlaps."""
    side = math.ceil(n_atoms ** (1 / 3))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    jitter = np.random.default_rng(0).uniform(-0.02, 0.02, size=(n_atoms, 3))
    return np.ascontiguousarray(0.2 * grid[:n_atoms] + jitter)
