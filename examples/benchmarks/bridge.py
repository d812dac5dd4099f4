"""Times of OpenMM: of a loop over one Context, and of OpenMMPotential on several cores."""

import multiprocessing
import statistics
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import openmm
import torch
from timing import openmm_loop, seconds

from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.potentials.platforms import available_cores
from openmm_tsf.systems.molecule import MolecularSystem

ONE_CORE = {"CPU": {"Threads": "1"}}


def measure_steps(context: openmm.Context, x: torch.Tensor, repeats: int) -> float:
    """Return microseconds per step of the Verlet integrator, 200 steps a call."""
    context.setPositions(x[0].numpy())
    integrator = context.getIntegrator()
    integrator.step(10)
    times = [1e6 * seconds(lambda: integrator.step(200)) / 200 for _ in range(repeats)]
    return round(statistics.median(times), 2)


def measure_interpreter(context: openmm.Context, x: torch.Tensor, repeats: int) -> dict[str, float]:
    """Return the parts of a loop's time: ``getState`` releases the interpreter lock, the rest holds
    it."""
    rows = x.numpy()[:256]
    compute, total = [], []
    for _ in range(repeats):
        total.append(1e6 * seconds(lambda: openmm_loop(context, rows, True)) / len(rows))
        spent = 0.0
        for row in rows:
            context.setPositions(row)
            spent += seconds(lambda: context.getState(energy=True, forces=True))
        compute.append(1e6 * spent / len(rows))
    lock_free, loop = statistics.median(compute), statistics.median(total)
    held = max(0.0, loop - lock_free)
    return {
        "getState_us": round(lock_free, 2),
        "holding_the_lock_us": round(held, 2),
        "bound_on_two_threads": round(min(2.0, loop / held if held else 2.0), 2),
    }


def serve(
    potential: OpenMMPotential,
    x: torch.Tensor,
    energies: torch.Tensor,
    forces: torch.Tensor,
    pipe: Connection,
) -> None:
    """Evaluate the rows that the pipe names: one process of :func:`measure_processes`."""
    torch.set_num_threads(1)
    with potential:
        while (job := pipe.recv()) is not None:
            start, stop = job
            energies[start:stop], forces[start:stop] = potential.energy_and_forces(x[start:stop])
            pipe.send(None)


def measure_processes(
    potential: OpenMMPotential, x: torch.Tensor, n_processes: int, repeats: int
) -> float:
    """Return microseconds per energy with forces, with rows shared by spawned processes."""
    spawn = multiprocessing.get_context("spawn")
    shared = [x.clone(), torch.zeros(len(x), dtype=x.dtype), torch.zeros_like(x)]
    for tensor in shared:
        tensor.share_memory_()
    pipes, processes = [], []
    for _ in range(n_processes):
        pipe, other_end = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(potential, *shared, other_end)))
        processes[-1].start()
        pipes.append(pipe)
    edges = np.linspace(0, len(x), n_processes + 1).astype(int).tolist()

    def evaluate() -> None:
        for pipe, start, stop in zip(pipes, edges, edges[1:], strict=False):
            pipe.send((start, stop))
        for pipe in pipes:
            pipe.recv()

    evaluate()
    times = [1e6 * seconds(evaluate) / len(x) for _ in range(repeats)]
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    return round(statistics.median(times), 2)


def measure_cores(
    molecule: MolecularSystem, name: str, x: torch.Tensor, batches: list[int], repeats: int
) -> dict[str, Any]:
    """Measure energies with forces on all cores: threads with a Context each, and processes."""
    cores = available_cores()
    properties = ONE_CORE.get(name, {})
    measured: dict[str, Any] = {"cores": cores, "batches": {}}
    with (
        OpenMMPotential(molecule.system, name, properties, n_contexts=1) as one,
        OpenMMPotential(molecule.system, name, properties, n_contexts=cores) as many,
    ):
        for size in batches:
            batch = x[:size]
            one.energy_and_forces(batch)
            many.energy_and_forces(batch)
            single_times, thread_times = [], []
            for _ in range(repeats):
                single_times.append(1e6 * seconds(partial(one.energy_and_forces, batch)) / size)
                thread_times.append(1e6 * seconds(partial(many.energy_and_forces, batch)) / size)
            single, threaded = map(statistics.median, (single_times, thread_times))
            processes = measure_processes(one, batch, cores, repeats)
            measured["batches"][size] = {
                "one_context_us": round(single, 2),
                "threads_us": round(threaded, 2),
                "processes_us": processes,
                "threads_gain": round(single / threaded, 2),
                "processes_gain": round(single / processes, 2),
            }
    return measured
