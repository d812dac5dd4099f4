"""Clocks, the plain OpenMM loop, and sides that take turns."""

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
class Side:
    """One way to evaluate a batch.

    Attributes
    ----------
    work
        Evaluates ``rows`` conformations.
    rows
        How many.
    threads
        How many of torch's it may use.
    """

    work: Callable[[], object]
    rows: int
    threads: int = 1


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def both_clocks(side: Side, calls: int) -> NDArray[np.float64]:
    """Microseconds per conformation, [wall time, CPU time of all threads of this process]."""
    torch.set_num_threads(side.threads)
    start = np.array([time.perf_counter(), time.process_time()])
    for _ in range(calls):
        side.work()
    stop = np.array([time.perf_counter(), time.process_time()])
    return 1e6 * (stop - start) / (calls * side.rows)


def plain_loop(context: openmm.Context, x: NDArray[np.float64], forces: bool) -> None:
    """What a user would write, at its quickest: numpy in, no conversions between equal units."""
    for row in x:
        context.setPositions(row)
        state = context.getState(energy=True, forces=forces)
        _ = state.getPotentialEnergy()._value
        if forces:
            _ = state.getForces(asNumpy=True)._value


def take_turns(
    sides: dict[str, Side], against: str, repeats: int, budget: float
) -> dict[str, dict[str, float]]:
    """Measure all sides in turns, `repeats` times or for `budget` seconds (but twice at least).

    Returns
    -------
    dict
        For each side the median wall and CPU time in microseconds per conformation, and the
        medians over repeats of how many times faster than `against` it was in the same repeat.
    """
    calls = {}
    for name, side in sides.items():
        torch.set_num_threads(side.threads)
        side.work()
        calls[name] = max(1, int(np.ceil(SHORTEST / max(1e-6, seconds(side.work)))))
    times: dict[str, list[NDArray[np.float64]]] = {name: [] for name in sides}
    start = time.perf_counter()
    for repeat in range(repeats):
        for name, side in sides.items():
            times[name].append(both_clocks(side, calls[name]))
        if repeat >= 1 and time.perf_counter() - start > budget:
            break
    loop = np.array(times[against])
    figures = {}
    for name, values in times.items():
        typical = np.median(values, axis=0)
        faster = np.median(loop / np.maximum(values, 1e-9), axis=0)
        figures[name] = {
            "repeats": len(values),
            "us": round(float(typical[0]), 3),
            "cpu_us": round(float(typical[1]), 3),
            "times_faster": round(float(faster[0]), 2),
            "times_faster_by_cpu_time": round(float(faster[1]), 2),
        }
    return figures
