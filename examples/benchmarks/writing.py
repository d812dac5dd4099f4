"""The share of writing in the time of a run of many walkers, with and without the writer's thread.

    python examples/benchmarks/writing.py --output examples/results/writing.json   # 3 minutes

Alanine dipeptide, 4096 walkers at three temperatures, every frame saved, with the segments and
checkpoints of a run. In one process, in turn, the sampling thread writes itself ("sync"), or the
thread of a run does ("async"):

- a producer that hands over arrays and does nothing else: the frames a second of the writer;
- one that hands them over at a rate (`--rates`, frames a second) and sleeps in between, as a thread
  does that waits for a GPU: the share of its time in which it writes or waits for the writer, while
  it samples and with the last segment, which nothing hides;
- replica exchange with an untrained flow of the default size on this CPU, which is slow.

Thinned frames (`--save-interval`) take a part of this only. Rates: 185 000 is what was estimated of
one H100 with an eager flow (see `gpu.json` for what was measured).
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import openmm_tsf as tsf
from openmm_tsf.sampling.kernels import default_kernels
from openmm_tsf.sampling.recorder import Recorder, SaveIntervals
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.sampling.writer_thread import WriterThread
from openmm_tsf.units import KB
from openmm_tsf.utils.versions import package_versions

LADDER = (300.0, 424.26, 600.0)
MODES = ("sync", "async")


def make_states(molecule: tsf.MolecularSystem, n_walkers: int, n: int = 4) -> list[WalkerState]:
    """Return some states with frames near the reference conformation."""
    generator = torch.Generator().manual_seed(1)
    shape = (n_walkers, len(LADDER), molecule.n_atoms, 3)
    centre = torch.tensor(molecule.positions, dtype=torch.float64)
    energy = torch.zeros(shape[:2], dtype=torch.float64)
    replica = torch.arange(len(LADDER)).repeat(n_walkers, 1)
    states = []
    for _ in range(n):
        x = centre + 0.003 * torch.randn(shape, dtype=torch.float64, generator=generator)
        states.append(WalkerState(x, torch.zeros_like(x), energy, replica))
    return states


def produce(
    folder: Path,
    states: list[WalkerState],
    n_iterations: int,
    mode: str,
    rate: float | None,
    intervals: SaveIntervals,
) -> dict[str, float]:
    """Write iterations that are handed over at a rate (frames/s; None: at once)."""
    molecule, n_walkers = tsf.systems.alanine_dipeptide(), states[0].n_walkers
    writer = RunWriter(folder, molecule, LADDER, n_walkers)
    writer.create(1, KB, {})
    state = states[0]
    zero = {"walk": KernelInfo.zero((len(LADDER),))}
    recorder = Recorder(
        writer, lambda: dict(zero), lambda: {"state": state.state_dict()}, None, 30.0, intervals
    )
    frames = n_iterations * n_walkers * len(LADDER)
    each = 0.0 if rate is None else n_walkers * len(LADDER) / rate
    waited, start, cpu = 0.0, time.perf_counter(), time.process_time()
    with recorder if mode == "async" else nullcontext():
        for iteration in range(1, n_iterations + 1):
            if each:
                time.sleep(each)  # what the device computes
            state = states[iteration % len(states)].evolve(iteration=iteration)
            begun = time.perf_counter()
            recorder.add({}, each, state, iteration % intervals.numbers == 0)
            recorder.write_if_due(state)
            waited += time.perf_counter() - begun
        sampled = time.perf_counter() - start
        recorder.finish(state)
    total, cpu = time.perf_counter() - start, time.process_time() - cpu
    shutil.rmtree(folder)
    result = {
        "seconds": round(total, 2),
        "frames_per_second": round(frames / total),
        "cpu_microseconds_per_frame": round(1e6 * cpu / frames, 2),
    }
    if each:
        result["share_while_sampling"] = round(waited / sampled, 4)
        result["share_in_all"] = round((waited + total - sampled) / total, 4)
    return result


@contextmanager
def written_by(mode: str) -> Iterator[None]:
    """Let the sampling thread write itself, or leave it to the writer's thread."""

    def in_this_thread(self: WriterThread, job: Any) -> bool:
        job()
        return True

    with (
        mock.patch.object(WriterThread, "submit", in_this_thread)
        if (mode == "sync")
        else nullcontext()
    ):
        yield


def sample(folder: Path, n_walkers: int, n_iterations: int, mode: str) -> dict[str, float]:
    """Return the share of writing in replica exchange with an untrained flow."""
    molecule = tsf.systems.alanine_dipeptide()
    dataset = tsf.MDDataset.shipped(molecule, stride=40)
    flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, seed=1)
    with molecule.potential(platform="Reference", n_contexts=1) as potential:
        kernels = default_kernels(potential, flow, LADDER, molecule.masses)
        parts = (molecule, flow, LADDER, n_walkers, kernels, potential, 1)
        with tsf.ParallelTempering(*parts) as sampler, written_by(mode):
            n = n_walkers * len(LADDER)
            chosen = torch.arange(n) % len(dataset)
            shape = (n_walkers, len(LADDER), molecule.n_atoms, 3)
            sampler.set_positions(dataset.positions[chosen].reshape(shape))
            start = time.perf_counter()
            sampler.run(n_iterations, folder, checkpoint_interval=1, progress=False)
            total = time.perf_counter() - start
    inside = tsf.load_run(folder, start=0).segments.wall_seconds
    shutil.rmtree(folder)
    return {
        "seconds": round(total, 2),
        "seconds_per_iteration": round(inside / n_iterations, 2),
        "share_in_all": round(1 - inside / total, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--walkers", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=123, help="of the producer")
    parser.add_argument("--rates", type=float, nargs="+", default=[46_000.0, 185_000.0])
    parser.add_argument("--sampled", type=int, default=3, help="iterations of replica exchange")
    parser.add_argument("--save-interval", type=int, default=10, help="of the thinned producer")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    states = make_states(tsf.systems.alanine_dipeptide(), args.walkers)
    result: dict[str, Any] = {"walkers": args.walkers, "rungs": len(LADDER)}
    thinned = SaveIntervals(args.save_interval, 1)
    cases = {"at_once": (None, SaveIntervals())}
    cases |= {f"{rate:.0f} frames/s": (rate, SaveIntervals()) for rate in args.rates}
    cases[f"{args.rates[-1]:.0f} frames/s, frames of every {args.save_interval}th iteration"] = (
        args.rates[-1], thinned,
    )  # fmt: skip
    try:
        produce(folder / "run", states, 3, "sync", None, SaveIntervals())  # imports, caches
        for name, (rate, intervals) in cases.items():
            result[name] = {
                mode: produce(folder / "run", states, args.iterations, mode, rate, intervals)
                for mode in MODES
            }
            print(name, json.dumps(result[name]), flush=True)
        if args.sampled:
            result["replica exchange on this CPU"] = {
                mode: sample(folder / "run", args.walkers, args.sampled, mode) for mode in MODES
            }
            print(json.dumps(result["replica exchange on this CPU"]), flush=True)
    finally:
        shutil.rmtree(folder)
    paced = result[f"{args.rates[-1]:.0f} frames/s"]
    ratio = paced["async"]["seconds"] / paced["sync"]["seconds"]
    result["async_over_sync_seconds"] = round(ratio, 3)
    print(f"at {args.rates[-1]:.0f} frames/s: async takes {ratio:.3f} of the time of sync")
    result |= {
        "command": "python examples/benchmarks/writing.py",
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": package_versions(),
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
