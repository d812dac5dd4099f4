"""Which OpenMM Platform, and how many Contexts: checked, or found by a short measurement."""

import logging
import math
import os
import statistics
import time
from collections.abc import Mapping

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_tsf.potentials.context_pool import ContextPool, PlatformChoice

logger = logging.getLogger(__name__)

#: Seconds of one round of one candidate, and of all rounds together.
_ROUND_SECONDS = 0.025
_TOTAL_SECONDS = 1.0
_N_ROUNDS = 3

#: A candidate that keeps several cores busy must be this much faster than one that does not.
_WORTH_MORE_CORES = 1.1


def available_platforms() -> list[str]:
    """Names of the Platforms that this OpenMM has loaded."""
    count = openmm.Platform.getNumPlatforms()
    return [openmm.Platform.getPlatform(index).getName() for index in range(count)]


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_platform(platform: str | openmm.Platform) -> str:
    """The name of a Platform that exists here.

    Raises
    ------
    TypeError
        If `platform` is neither a name nor an ``openmm.Platform``.
    ValueError
        If no such Platform is loaded.
    """
    name = platform.getName() if isinstance(platform, openmm.Platform) else platform
    if not isinstance(name, str):
        raise TypeError(
            f"platform: expected a name or an openmm.Platform, got {type(platform).__name__}"
        )
    if name not in available_platforms():
        known = ", ".join(available_platforms())
        raise ValueError(f"platform: expected one of {known}, got {name!r}")
    return name


def check_properties(name: str, properties: Mapping[str, object]) -> dict[str, str]:
    """Properties of the Platform called `name`, as strings.

    Raises
    ------
    TypeError
        If `properties` is no mapping of names to str, int or bool.
    ValueError
        If the Platform has no such property.
    """
    if not isinstance(properties, Mapping):
        raise TypeError(f"platform_properties: expected a mapping, got {type(properties).__name__}")
    known = list(openmm.Platform.getPlatform(name).getPropertyNames())
    checked = {}
    for key, value in properties.items():
        if key not in known:
            raise ValueError(
                f"platform_properties: expected names among {known} for the {name} platform, "
                f"got {key!r}"
            )
        if not isinstance(value, (str, int)):
            raise TypeError(
                f"platform_properties: expected str, int or bool for {key}, "
                f"got {type(value).__name__}"
            )
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
    """Check what was asked for, and measure what was left open.

    Parameters
    ----------
    system
        The System that will be evaluated.
    platform
        A name or a Platform; None to measure all that are loaded.
    properties
        Platform properties; only together with `platform`.
    n_contexts
        Contexts that share a batch; None to measure.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; the message lists what is available.
    openmm.OpenMMException
        If no candidate can compute this System.
    """
    if n_contexts is not None and (
        isinstance(n_contexts, bool) or not isinstance(n_contexts, int) or n_contexts < 1
    ):
        raise ValueError(f"n_contexts: expected a positive int or None, got {n_contexts!r}")
    if platform is None:
        if properties:
            raise ValueError("platform_properties: expected a platform to go with them, got none")
        candidates = [
            choice
            for name in reversed(available_platforms())  # OpenMM lists the slowest first
            for choice in _candidates(name, {}, n_contexts)
        ]
    else:
        name = check_platform(platform)
        checked = check_properties(name, properties or {})
        if n_contexts is not None:
            return PlatformChoice(name, checked, n_contexts)
        candidates = _candidates(name, checked, n_contexts)
    if len(candidates) == 1:
        return candidates[0]
    return _measure(system, candidates)


def _candidates(
    name: str, properties: dict[str, str], n_contexts: int | None
) -> list[PlatformChoice]:
    cores = available_cores()
    if name not in ("Reference", "CPU"):
        return [PlatformChoice(name, properties, n_contexts or 1)]
    # One core a Context: OpenMM's own threads cost more than they give on small molecules.
    alone = {"Threads": "1", **properties} if name == "CPU" else dict(properties)
    counts = sorted({1, min(4, cores), cores}) if n_contexts is None else [n_contexts]
    candidates = [PlatformChoice(name, alone, count) for count in counts]
    if name == "CPU" and "Threads" not in properties and cores > 1:
        together = {**properties, "Threads": str(cores)}
        candidates.append(PlatformChoice(name, together, n_contexts or 1))
    return candidates


def _measure(system: openmm.System, candidates: list[PlatformChoice]) -> PlatformChoice:
    """The candidate with the least time per energy with forces.

    Candidates take turns, so that a busy moment of the machine hits all of them. Each counts with
    its median: threads that wait for each other on a busy machine look good only at their best.
    """
    start = time.perf_counter()
    conformation = _spread_out(system.getNumParticles())
    first: dict[str, float] = {}
    pools: dict[str, ContextPool] = {}
    choices = {str(choice): choice for choice in candidates}
    try:
        for key, choice in choices.items():
            try:
                pool = ContextPool(system, choice)
            except openmm.OpenMMException as error:
                logger.info("%s cannot run this System: %s", choice, error)
                continue
            pools[key] = pool
            _seconds(pool, conformation, 1)  # kernels are compiled at the first call
            first[key] = _seconds(pool, conformation, 1) / choice.n_contexts
        if not pools:
            raise openmm.OpenMMException(f"no platform can run this System, tried {list(choices)}")
        lead = min(first.values())
        samples: dict[str, list[float]] = {key: [] for key in pools if first[key] < 4 * lead}
        for number in range(_N_ROUNDS):
            for key, times in samples.items():
                times += _round(pools[key], conformation, choices[key])
            if number and time.perf_counter() - start > _TOTAL_SECONDS:
                break
    finally:
        for pool in pools.values():
            pool.close()

    typical = {key: statistics.median(times) for key, times in samples.items()}

    def cost(key: str) -> float:
        return typical[key] * (_WORTH_MORE_CORES if choices[key].n_threads > 1 else 1.0)

    winner = min(typical, key=cost)
    for key in pools:
        seconds = typical.get(key, first[key])
        logger.info("%s: %.1f us per energy with forces", key, 1e6 * seconds)
    logger.info(
        "chose %s (measured in %.2f s on %d cores)",
        winner,
        time.perf_counter() - start,
        available_cores(),
    )
    return choices[winner]


def _round(
    pool: ContextPool, conformation: NDArray[np.float64], choice: PlatformChoice
) -> list[float]:
    """Seconds per row of several short batches."""
    rows, spent = 2 * choice.n_contexts, 0.0
    times = []
    while spent < _ROUND_SECONDS:
        seconds = _seconds(pool, conformation, rows)
        times.append(seconds / rows)
        spent += seconds
        if seconds < _ROUND_SECONDS / 8:
            rows *= 2
    return times


def _seconds(pool: ContextPool, conformation: NDArray[np.float64], rows: int) -> float:
    batch = np.broadcast_to(conformation, (rows, *conformation.shape)).copy()
    start = time.perf_counter()
    pool.evaluate(batch, with_forces=True)
    return time.perf_counter() - start


def _spread_out(n_atoms: int) -> NDArray[np.float64]:
    """Positions [N, 3] with the density of matter and no overlaps: only their time counts."""
    side = math.ceil(n_atoms ** (1 / 3))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    jitter = np.random.default_rng(0).uniform(-0.02, 0.02, size=(n_atoms, 3))
    return np.ascontiguousarray(0.2 * grid[:n_atoms] + jitter)
