"""Wall and CPU time of methods that are measured alternately, and the loop over one Context."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import openmm
import torch
from numpy.typing import NDArray

#: Seconds that one measurement takes at least: short batches are repeated.
SHORTEST = 0.03


@dataclass(frozen=True)
class Method:
    """One way to evaluate a batch."""

    work: Callable[[], object]  # evaluates ``rows`` conformations
    rows: int
    threads: int = 1  # of torch


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def time_clocks(method: Method, calls: int) -> NDArray[np.float64]:
    """Return microseconds per conformation, [wall time, CPU time of all threads]."""
    torch.set_num_threads(method.threads)
    start = np.array([time.perf_counter(), time.process_time()])
    for _ in range(calls):
        method.work()
    stop = np.array([time.perf_counter(), time.process_time()])
    return 1e6 * (stop - start) / (calls * method.rows)


def openmm_loop(context: openmm.Context, x: NDArray[np.float64], forces: bool) -> None:
    """Evaluate conformations one by one in a Context: numpy arrays, no conversion of units."""
    for row in x:
        context.setPositions(row)
        state = context.getState(energy=True, forces=forces)
        _ = state.getPotentialEnergy()._value
        if forces:
            _ = state.getForces(asNumpy=True)._value


def time_alternately(
    methods: dict[str, Method], reference: str, repeats: int, budget: float
) -> dict[str, dict[str, float]]:
    """Measure all methods alternately, `repeats` times or for `budget` seconds (at least twice).

    For each the median wall and CPU time in microseconds per conformation, and the median over
    repeats of its speed relative to `reference` in the same repeat.
    """
    calls = {}
    for name, method in methods.items():
        torch.set_num_threads(method.threads)
        method.work()
        calls[name] = max(1, int(np.ceil(SHORTEST / max(1e-6, seconds(method.work)))))
    times: dict[str, list[NDArray[np.float64]]] = {name: [] for name in methods}
    start = time.perf_counter()
    for repeat in range(repeats):
        for name, method in methods.items():
            times[name].append(time_clocks(method, calls[name]))
        if repeat >= 1 and time.perf_counter() - start > budget:
            break
    loop = np.array(times[reference])
    measured = {}
    for name, values in times.items():
        medians = np.median(values, axis=0)
        faster = np.median(loop / np.maximum(values, 1e-9), axis=0)
        measured[name] = {
            "repeats": len(values),
            "us": round(float(medians[0]), 3),
            "cpu_us": round(float(medians[1]), 3),
            "times_faster": round(float(faster[0]), 2),
            "times_faster_by_cpu_time": round(float(faster[1]), 2),
        }
    return measured
