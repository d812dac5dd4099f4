"""Long runs: memory, bytes on disk, time to open, and the cost of checkpoints.

    python -m tests.robustness.long_run --output examples/results/long_run.json

Four measurements in separate processes: (1) resident memory over 10^5 iterations of a sampler on a
toy potential and on alanine dipeptide; (2) bytes on disk for a million samples; (3) the time and
memory with which a new process opens a run directory of 10^7 frames; (4) the share of the time that
checkpoints take. About 25 minutes on two cores and 3 GB of disk; `--iterations` and `--frames` make
it shorter.
"""

import argparse
import json
import multiprocessing
import platform
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import openmm_tsf as tsf
from openmm_tsf.analysis import load_run
from openmm_tsf.potentials.toy import DoubleWell
from openmm_tsf.sampling.kernels import FlowWalk, PlainSwap, default_kernels
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.units import KB
from openmm_tsf.utils.versions import package_versions

LADDER = (300.0, 424.26, 600.0)


def resident_mib():
    """Return the resident memory of this process in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class Watch:
    """A reporter that records the resident memory."""

    def __init__(self, interval):
        self.interval, self.rows = interval, []

    def __call__(self, sampler, state):
        self.rows.append((state.iteration, resident_mib()))


def toy_sampler(n_walkers):
    potential = DoubleWell(0.1, -1.0, 0.3)
    flow = tsf.TemperatureSteerableFlow(1, 1, 1, (8,))
    ladder = (1.0, 2.0)
    kernels = [FlowWalk(flow, potential, ladder, 0.7), PlainSwap(ladder, 1.0)]
    sampler = tsf.ParallelTempering(None, flow, ladder, n_walkers, kernels, potential, seed=1)
    sampler.set_positions(torch.zeros(n_walkers, 2, 1))
    return sampler


def peptide_sampler(n_walkers, ladder=LADDER[-2:], make_kernels=None, **sizes):
    """Return a sampler of alanine dipeptide, of a small flow unless `sizes` are given."""
    molecule = tsf.systems.alanine_dipeptide()
    dataset = tsf.MDDataset.shipped(molecule, stride=40)
    sizes = sizes or {"n_blocks": 1, "hidden": (8,)}
    flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, **sizes, seed=1)
    potential = molecule.potential(platform="Reference", n_contexts=1)
    if make_kernels is None:
        kernels = [FlowWalk(flow, potential, ladder, 0.05), PlainSwap(ladder, KB)]
    else:
        flow.conditioner_dtype = torch.float32
        kernels = make_kernels(potential, flow, ladder, molecule.masses)
    sampler = tsf.ParallelTempering(molecule, flow, ladder, n_walkers, kernels, potential, seed=1)
    n = n_walkers * len(ladder)
    sampler.set_positions(dataset.positions[:n].reshape(n_walkers, len(ladder), -1, 3))
    return sampler


def memory(make_sampler, n_iterations, folder):
    """Return the memory over a run, its bytes on disk, and its duration."""
    torch.set_num_threads(1)
    sampler, n_walkers = make_sampler(2), 2
    watch = Watch(max(1, n_iterations // 200))
    sampler.reporters.append(watch)
    start = time.monotonic()
    sampler.run(n_iterations, folder, progress=False)
    seconds = time.monotonic() - start
    rows = np.array(watch.rows)
    rest = rows[len(rows) // 10 :]  # the allocators have reached a steady state
    growth = np.polyfit(rest[:, 0], rest[:, 1], 1)[0] * 1e5
    n_samples = n_iterations * n_walkers * 2
    segments = list((Path(folder) / "segments").iterdir())
    numbers = sum(p.stat().st_size for p in segments)
    frames = sum(p.stat().st_size for p in Path(folder).glob("*.dcd"))
    return {
        "iterations": n_iterations,
        "seconds": round(seconds, 1),
        "resident_MiB_at_a_tenth": round(float(rest[0, 1]), 2),
        "resident_MiB_at_the_end": round(float(rest[-1, 1]), 2),
        "growth_MiB_in_1e5_iterations": round(float(growth), 3),
        "segments": len(segments),
        "MB_for_1e6_samples": {
            "numbers": round(numbers / n_samples, 2), "frames": round(frames / n_samples, 2),
        },
    }  # fmt: skip


def write_large(folder, n_frames):
    """Write a run directory of alanine dipeptide: `n_frames` in total, 64 walkers, 3 rungs."""
    molecule, n_walkers = tsf.systems.alanine_dipeptide(), 64
    writer = RunWriter(folder, molecule, LADDER, n_walkers)
    writer.create(1, KB, {"kernels": []})
    rng = np.random.default_rng(1)
    per_segment = 150  # fewer than in the 30 seconds of a default run: more files
    n_iterations = n_frames // (n_walkers * len(LADDER))
    noise = rng.normal(scale=0.003, size=(per_segment, n_walkers, 3, molecule.n_atoms, 3))
    x = molecule.positions + noise
    start = time.monotonic()
    for first in range(0, n_iterations, per_segment):
        n = min(per_segment, n_iterations - first)
        numbers = {
            "energy": rng.normal(size=(n, n_walkers, 3)), "wall_seconds": np.array(30.0),
            "replica": np.tile(np.arange(3, dtype=np.int16), (n, n_walkers, 1)),
            "iteration": np.arange(first + 1, first + n + 1),
        }  # fmt: skip
        for kernel in ("flow_walk", "flow_independent", "local"):
            numbers[f"accepted_{kernel}"] = numbers[f"proposed_{kernel}"] = np.ones(3, dtype=int)
        for name in ("rejected_non_finite", "mirror_images", "n_evaluations", "outside_domain"):
            numbers[name] = np.array(1)
        writer.write(numbers, x[:n], {"seed": 1})
    return {"frames": n_iterations * 192, "write_seconds": round(time.monotonic() - start, 1)}


def open_large(folder):
    """Return the time and memory for opening and reading a run."""
    load_run(folder)  # imports and caches of the file system are not measured
    before, start = resident_mib(), time.monotonic()
    run = load_run(folder)
    opened = time.monotonic() - start
    result = {
        "frames": run.n_iterations * run.n_walkers * run.n_rungs,
        "segments": len(list((Path(folder) / "segments").iterdir())),
        "open_seconds": round(opened, 3),
        "open_MiB": round(resident_mib() - before, 1),
    }
    for name, read in (
        ("energies", lambda: run.energies(300)),
        ("ramachandran", lambda: run.ramachandran(300)),
        ("trajectory_stride_1000", lambda: run.trajectory(300, stride=1000)),
        ("acceptance", lambda: run.acceptance()),
    ):
        before, start = resident_mib(), time.monotonic()
        kept = read()
        result[f"{name}_seconds"] = round(time.monotonic() - start, 3)
        result[f"{name}_MiB"] = round(resident_mib() - before, 1)
        del kept
    return result


def checkpoints(n_iterations, folder):
    """Return the share of writing in the duration of a run of the default size."""
    torch.set_num_threads(1)
    sampler = peptide_sampler(64, LADDER, default_kernels, n_blocks=6)
    spent, write = [], RunWriter.write

    def timed(self, *args):
        start = time.monotonic()
        write(self, *args)
        spent.append(time.monotonic() - start)

    RunWriter.write = timed
    start = time.monotonic()
    sampler.run(n_iterations, folder, progress=False)
    seconds = time.monotonic() - start
    sampler.potential.close()
    return {
        "iterations": n_iterations, "walkers_times_rungs": 192, "seconds": round(seconds, 1),
        "checkpoints": len(spent), "seconds_each": round(float(np.median(spent)), 4),
        "share": round(sum(spent) / seconds, 5),
    }  # fmt: skip


def alone(function, *arguments):
    """Return the result of a function in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="JSON file")
    parser.add_argument("--iterations", type=int, default=100_000)
    parser.add_argument("--frames", type=int, default=10_000_000)
    parser.add_argument("--checkpoint-iterations", type=int, default=400)
    parser.add_argument("--work", help="folder for the runs (default: a temporary one)")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.work))
    try:
        result = {
            "memory_toy": alone(memory, toy_sampler, args.iterations, work / "toy"),
            "memory_alanine_dipeptide": alone(memory, peptide_sampler, args.iterations, work / "a"),
            "large": alone(write_large, work / "large", args.frames),
        }
        result["large"] |= alone(open_large, work / "large")
        result["checkpoints"] = alone(checkpoints, args.checkpoint_iterations, work / "default")
    finally:
        shutil.rmtree(work)
    result |= {
        "command": "python -m tests.robustness.long_run",
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": package_versions(),
    }
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
