"""What an energy costs: OpenMMPotential beside a plain loop over one Context.

    python examples/benchmarks/energy.py                   # batches 1 to 16384
    python examples/benchmarks/energy.py --max-batch 256   # a minute

Times are microseconds per conformation of alanine dipeptide, medians over repeats. Potential and
plain loop take turns in one process on one core, so that their ratio does not feel the machine's
other work. The second core is measured with threads (one Context each) and with processes that
share memory. Everything goes to a JSON file.
"""

import argparse
import json
import multiprocessing
import os
import platform as host
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from numpy.typing import NDArray

from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.potentials.platforms import available_cores, available_platforms
from openmm_tsf.systems import MolecularSystem, alanine_dipeptide

ONE_CORE = {"CPU": {"Threads": "1"}}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def both_clocks(work: Callable[[], object]) -> NDArray[np.float64]:
    """Seconds of wall time and of this process's CPU time."""
    start = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - start


def plain_loop(context: openmm.Context, x: NDArray[np.float64], forces: bool) -> None:
    """What a user would write, at its quickest: numpy in, no conversions between equal units."""
    for row in x:
        context.setPositions(row)
        state = context.getState(energy=True, forces=forces)
        _ = state.getPotentialEnergy()._value
        if forces:
            _ = state.getForces(asNumpy=True)._value


def measure_batch(
    potential: OpenMMPotential, context: openmm.Context, x: torch.Tensor, forces: bool, repeats: int
) -> dict[str, float]:
    """Microseconds per conformation of both, and the median of their ratios.

    The ratio of CPU times is the one to read when the machine has other work.
    """
    evaluate = potential.energy_and_forces if forces else potential.energy
    rows = x.numpy()
    calls = max(1, 512 // len(x))  # short batches are repeated: the clock and the scheduler

    def many_batches() -> None:
        for _ in range(calls):
            evaluate(x)

    def many_loops() -> None:
        for _ in range(calls):
            plain_loop(context, rows, forces)

    evaluate(x)
    plain_loop(context, rows[:1], forces)
    scale = 1e6 / (calls * len(x))
    ours, plain = [], []
    for _ in range(repeats):
        ours.append(scale * both_clocks(many_batches))
        plain.append(scale * both_clocks(many_loops))
    ratio = np.median(np.array(ours) / np.array(plain), axis=0)
    return {
        "potential_us": round(float(np.median(ours, axis=0)[0]), 2),
        "plain_loop_us": round(float(np.median(plain, axis=0)[0]), 2),
        "ratio": round(float(ratio[0]), 3),
        "ratio_of_cpu_time": round(float(ratio[1]), 3),
    }


def measure_steps(context: openmm.Context, x: torch.Tensor, repeats: int) -> float:
    """Microseconds per step of the Verlet integrator, 200 steps a call."""
    context.setPositions(x[0].numpy())
    integrator = context.getIntegrator()
    integrator.step(10)
    times = [1e6 * seconds(lambda: integrator.step(200)) / 200 for _ in range(repeats)]
    return round(statistics.median(times), 2)


def measure_interpreter(context: openmm.Context, x: torch.Tensor, repeats: int) -> dict[str, float]:
    """How a plain loop's time splits: ``getState`` releases the interpreter lock, the rest holds
    it."""
    rows = x.numpy()[:256]
    compute, total = [], []
    for _ in range(repeats):
        total.append(1e6 * seconds(lambda: plain_loop(context, rows, True)) / len(rows))
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
    """One process of :func:`measure_processes`: evaluates the rows that it is told to."""
    torch.set_num_threads(1)
    with potential:
        while (job := pipe.recv()) is not None:
            start, stop = job
            energies[start:stop], forces[start:stop] = potential.energy_and_forces(x[start:stop])
            pipe.send(None)


def measure_processes(
    potential: OpenMMPotential, x: torch.Tensor, n_processes: int, repeats: int
) -> float:
    """Microseconds per energy with forces, shared between spawned processes."""
    spawn = multiprocessing.get_context("spawn")
    shared = [x.clone(), torch.zeros(len(x), dtype=x.dtype), torch.zeros_like(x)]
    for tensor in shared:
        tensor.share_memory_()
    pipes, processes = [], []
    for _ in range(n_processes):
        mine, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(potential, *shared, theirs)))
        processes[-1].start()
        pipes.append(mine)
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
    """Energies with forces on all cores: threads with a Context each, and processes."""
    cores = available_cores()
    properties = ONE_CORE.get(name, {})
    figures: dict[str, Any] = {"cores": cores, "batches": {}}
    with (
        OpenMMPotential(molecule.system, name, properties, n_contexts=1) as one,
        OpenMMPotential(molecule.system, name, properties, n_contexts=cores) as many,
    ):
        for size in batches:
            batch = x[:size]
            one.energy_and_forces(batch)
            many.energy_and_forces(batch)
            alone, threads = [], []
            for _ in range(repeats):
                alone.append(1e6 * seconds(partial(one.energy_and_forces, batch)) / size)
                threads.append(1e6 * seconds(partial(many.energy_and_forces, batch)) / size)
            single, threaded = statistics.median(alone), statistics.median(threads)
            processes = measure_processes(one, batch, cores, repeats)
            figures["batches"][size] = {
                "one_context_us": round(single, 2),
                "threads_us": round(threaded, 2),
                "processes_us": processes,
                "threads_gain": round(single / threaded, 2),
                "processes_gain": round(single / processes, 2),
            }
    return figures


def one_core_figures(
    molecule: MolecularSystem, x: torch.Tensor, batches: list[int], repeats: int
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in available_platforms():
        properties = ONE_CORE.get(name, {})
        with OpenMMPotential(molecule.system, name, properties, n_contexts=1) as potential:
            context = potential.make_context(openmm.VerletIntegrator(0.0005))
            entry: dict[str, Any] = {"properties": properties, "energy": {}, "forces": {}}
            for size in batches:
                for key, forces in (("energy", False), ("forces", True)):
                    entry[key][size] = measure_batch(potential, context, x[:size], forces, repeats)
                print(f"{name:>10} {size:>6} {entry['energy'][size]} {entry['forces'][size]}")
            entry["split_of_the_loop"] = measure_interpreter(context, x, repeats)
            entry["integrator_step_us"] = measure_steps(context, x, repeats)
        figures[name] = entry
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-batch", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--force-field", default="amber99sbildn-obc2")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    molecule = alanine_dipeptide(arguments.force_field)
    batches = [4**power for power in range(8) if 4**power <= arguments.max_batch]
    noise = np.random.default_rng(0).normal(0.0, 0.003, size=(batches[-1], molecule.n_atoms, 3))
    x = torch.from_numpy(molecule.positions + noise)

    start = time.perf_counter()
    with OpenMMPotential(molecule.system) as chosen:
        choice = repr(chosen)
    opening = round(time.perf_counter() - start, 2)

    everything = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if everything is not None:
        os.sched_setaffinity(0, {min(everything)})
    one_core = one_core_figures(molecule, x, batches, arguments.repeats)
    if everything is not None:
        os.sched_setaffinity(0, everything)

    fastest = {
        key: min(one_core, key=lambda name: one_core[name][key][batches[-1]]["plain_loop_us"])
        for key in ("energy", "forces")
    }
    for key, name in fastest.items():
        for clock in ("ratio", "ratio_of_cpu_time"):
            ratios = {size: row[clock] for size, row in one_core[name][key].items()}
            print(f"{key}: fastest plain loop on {name}; {clock} to it by batch: {ratios}")
    report: dict[str, Any] = {
        "force_field": arguments.force_field,
        "choice": choice,
        "seconds_to_choose": opening,
        "largest_batch": batches[-1],
        "fastest_plain_loop": fastest,
        "one_core": one_core,
        "all_cores": None,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {
            "python": host.python_version(),
            "openmm": openmm.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    if available_cores() > 1:
        shared = [size for size in batches if size in (16, 256, 4096)]
        report["all_cores"] = measure_cores(
            molecule, fastest["forces"], x, shared, arguments.repeats
        )
        print("all cores:", report["all_cores"])
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print("written to", arguments.output)


if __name__ == "__main__":
    main()
