"""One measurement of scaling.py, in a process of its own; the last line printed is JSON."""

import argparse
import json
import math
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.compilation import compile_for_sampling
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.workflow.potential_choice import COMPILE_FROM, open_potential
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.sample import flow_block, make_sampler
from openmm_tsf.workflow.settings import SamplingSettings
from openmm_tsf.workflow.train import build_flow

HOT_K, COLD_K = 600.0, 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=list(STEPS))
    parser.add_argument("--walkers", type=int, required=True)
    parser.add_argument("--rungs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget", type=float, required=True, help="seconds of CPU time")
    parser.add_argument("--ordinary", action="store_true", help="one iteration, no dynamics")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    limit = math.ceil(used() + 4 * arguments.budget)  # measurements end by themselves long before
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    print(json.dumps(STEPS[arguments.what](arguments)))


def used() -> float:
    """Return the CPU time of this process so far, in s."""
    return time.process_time()


def peak_mib() -> float:
    """Return the most memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Setting:
    """Molecule, flow, energies and settings of a measurement."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.molecule: MolecularSystem = alanine_dipeptide()
        self.frames = MDDataset.shipped(self.molecule, stride=80)
        settings = preset("default")
        flow = replace(settings.flow, n_blocks=1, hidden=(8,)) if arguments.smoke else settings.flow
        self.flow: AugmentedFlow = build_flow(self.frames, flow, arguments.seed)
        self.sampling: SamplingSettings = replace(
            settings.sampling, n_walkers=arguments.walkers, temperatures=ladder(arguments.rungs)
        )
        self.seed = arguments.seed
        batch = arguments.walkers * arguments.rungs
        planned = 0 if arguments.smoke else COMPILE_FROM
        self.potential: Potential = open_potential(self.molecule, None, planned, max(batch, 96))

    def sampler(self, flow: AugmentedFlow | None = None) -> ParallelTempering:
        """Return a sampler whose walkers start from frames."""
        walkers, rungs = self.sampling.n_walkers, len(self.sampling.temperatures)
        index = torch.arange(walkers * rungs) % len(self.frames)
        x = self.frames.positions[index].unflatten(0, (walkers, rungs))
        parts = self.molecule, flow or self.flow, self.sampling, self.potential
        return make_sampler(*parts, (self.seed, None), x)


def ladder(n: int) -> tuple[float, ...]:
    """Return n temperatures from 300 to 600 K in equal ratios; one is 300 K."""
    return tuple(COLD_K * (HOT_K / COLD_K) ** (i / max(1, n - 1)) for i in range(n))


def measure_iterations(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time cycles of one iteration with dynamics and ordinary ones, the first to warm up.

    Where there is no time for a second cycle, the first's ordinary iterations count.
    """
    setting = Setting(arguments)
    before, rows = peak_mib(), arguments.walkers * arguments.rungs
    period = setting.sampling.local_interval
    cycles: list[list[tuple[float, float]]] = []
    with setting.sampler() as sampler:
        if arguments.ordinary:  # iteration 0 has dynamics, too
            del sampler.schedule[0]
            cycles.append([(0.0, 0.0), time_run(sampler, 1)])
        seconds = 0.0
        while not arguments.ordinary and len(cycles) < 12:
            began = used()
            cycles.append([time_run(sampler, 1), time_run(sampler, period - 1)])
            last = used() - began
            seconds += last
            # A second cycle may take longer: the first one's dynamics cannot be used.
            if seconds + last > arguments.budget / (1 if len(cycles) == 1 else 4):
                break
    n_ordinary = 1 if arguments.ordinary else period - 1
    result = {}
    for i, clock in enumerate(("cpu", "wall")):
        local, ordinary = (median([c[k][i] for c in cycles[1:] or cycles]) for k in (0, 1))
        result[f"{clock}_ms_ordinary"] = 1e3 * ordinary / n_ordinary
        if len(cycles) > 1:  # the first dynamics loads the programs of forces, for seconds
            result[f"{clock}_ms_with_dynamics"] = 1e3 * local
            result[f"{clock}_ms"] = 1e3 * (local + ordinary) / period
    shown = {name: round(value, 2) for name, value in result.items()}
    shown["cpu_us_of_a_row_ordinary"] = round(1e3 * result["cpu_ms_ordinary"] / rows, 1)
    shown |= {"peak_MiB": round(peak_mib()), "MiB_before_the_sampler": round(before)}
    return shown | {"cycles": len(cycles[1:] or cycles)}


def time_run(sampler: ParallelTempering, n: int) -> tuple[float, float]:
    """Return the CPU and wall seconds of n iterations together."""
    cpu, wall = used(), time.perf_counter()
    sampler.run(n, progress=False)
    return used() - cpu, time.perf_counter() - wall


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure_files(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes and CPU time to write a configuration, and the files of a run."""
    setting = Setting(arguments)
    n = setting.sampling.local_interval * (2 if arguments.smoke else 5)
    rows = arguments.walkers * arguments.rungs
    with setting.sampler() as sampler, tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        sampler.run(n, directory, progress=False)
        first, n_first = size_of(directory)
        pairs = []
        for _ in range(1 if arguments.smoke else 5):
            alone = time_run(sampler, n)[0]
            began = used()
            sampler.run(n, directory, progress=False)
            pairs.append((alone, used() - began))
        last, n_last = size_of(directory)
    frames = n * rows
    differences = [written - alone for alone, written in pairs]
    return {
        "configurations": frames * len(pairs),
        "bytes_per_configuration": round((last - first) / (frames * len(pairs)), 1),
        "cpu_us_to_write_a_configuration": round(1e6 * median(differences) / frames, 2),
        "cpu_us_to_sample_a_configuration": round(1e6 * median([a for a, _ in pairs]) / frames, 1),
        "files": n_last,
        "files_more_for_each_run_call": (n_last - n_first) / len(pairs),
    }


def size_of(directory: Path) -> tuple[int, int]:
    """Return the bytes of all files of a directory, and their number."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files), len(files)


def count_operations(work: Callable[[], object]) -> int:
    """Return the operations of torch in a call, as its profiler counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    return sum(1 for event in profiler.events() if event.name.startswith("aten::"))


def measure_compiled_flow(arguments: argparse.Namespace) -> dict[str, Any]:
    """Operations and time of an iteration with the flow as it is and compiled, in turn."""
    from torch._inductor.utils import fresh_inductor_cache

    setting = Setting(arguments)
    period = setting.sampling.local_interval
    rows = flow_block(arguments.walkers, arguments.rungs, setting.flow.device)
    began, wall = children_and_self(), time.perf_counter()
    with fresh_inductor_cache():  # as the first time on a machine
        compiled = compile_for_sampling(setting.flow, rows)
    seconds = children_and_self() - began, time.perf_counter() - wall
    if compiled is setting.flow:
        return {"ended": "no compiler works here"}
    samplers = {"eager": setting.sampler(), "compiled": setting.sampler(compiled)}
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for sampler in samplers.values():
        sampler.run(period, progress=False)
    for _ in range(2 if arguments.smoke else 12):
        for name, sampler in samplers.items():
            times[name].append(time_run(sampler, period)[0])
    ratios = sorted(a / b for a, b in zip(times["eager"], times["compiled"], strict=True))
    n = {
        name: count_operations(lambda s=sampler: s.run(period, progress=False)) / period
        for name, sampler in samplers.items()
    }
    return {
        "rows_of_a_block": rows,
        "compile_cpu_seconds": round(seconds[0], 1),
        "compile_wall_seconds": round(seconds[1], 1),
        "operations_per_iteration": n,
        "cpu_ms": {k: round(1e3 * median(t) / period, 2) for k, t in times.items()},
        "times_faster_by_cpu_time": round(median(ratios), 3),
        "quartiles": [round(ratios[len(ratios) * i // 4], 3) for i in (1, 3)],
    }


def children_and_self() -> float:
    """Return the CPU seconds of this process and of those it has waited for."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(each)[:2]) for each in who)


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "iterations": measure_iterations,
    "files": measure_files,
    "compiled-flow": measure_compiled_flow,
}


if __name__ == "__main__":
    main()
