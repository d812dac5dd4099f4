"""The share of writing in the time of a run of many walkers, with and without the writer's thread.

    python examples/benchmarks/writing.py --output examples/results/writing.json   # 3 minutes
    python examples/benchmarks/writing.py --real quick/ --output examples/results/writing.json

Alanine dipeptide, 4096 walkers at three temperatures, every frame saved, with the segments and
checkpoints of a run. In one process, in turn, the sampling thread writes itself ("sync"), or the
thread of a run does ("async"):

- a producer that hands over arrays and does nothing else: the frames a second of the writer;
- one that hands them over at a rate (`--rates`, frames a second) and sleeps in between, as a thread
  does that waits for a GPU: the share of its time in which it writes or waits for the writer, while
  it samples and with the last segment, which nothing hides.

With `--real` and a trained flow only the entry ``real`` of the file is written: a stage of sampling
on this CPU, as the program does it, and the share of its time in which the sampling thread copied
what is saved, handed it over or waited for the writer.

Thinned frames (`--save-interval`) take a part of this only. 185 000 frames a second were estimated
of one H100 with an eager flow; no GPU has been measured. Of `--repeats`, in which the two take
turns, the fastest is kept: other programs of the machine only add to it.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch

import openmm_tsf as tsf
from openmm_tsf.sampling.recorder import Recorder, SaveIntervals
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.sampling.writer_thread import WriterThread
from openmm_tsf.units import KB
from openmm_tsf.utils.versions import package_versions
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.sample import sample
from openmm_tsf.workflow.settings import SamplingSettings

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


class TimedRecorder(Recorder):
    """The recorder of one run: how long the sampling thread is in it, and CPU time meanwhile."""

    waited, finishing, cpu = 0.0, 0.0, 0.0

    def __enter__(self) -> Self:
        TimedRecorder.waited = TimedRecorder.finishing = 0.0
        TimedRecorder.cpu = -time.process_time()
        return super().__enter__()

    def add(self, *given: Any) -> None:
        start = time.perf_counter()
        super().add(*given)
        TimedRecorder.waited += time.perf_counter() - start

    def write_if_due(self, state: WalkerState) -> None:
        start = time.perf_counter()
        super().write_if_due(state)
        TimedRecorder.waited += time.perf_counter() - start

    def finish(self, state: WalkerState) -> None:
        start = time.perf_counter()
        super().finish(state)
        TimedRecorder.finishing += time.perf_counter() - start
        TimedRecorder.cpu += time.process_time()


def sample_for_real(
    flow: Path, folder: Path, settings: SamplingSettings, options: RunOptions
) -> dict[str, float]:
    """Sample as the program does, without the analysis; return how long sampling waited."""
    with (
        mock.patch("openmm_tsf.sampling.tempering.Recorder", TimedRecorder),
        mock.patch("openmm_tsf.workflow.sample.analyze", return_value={}),
    ):
        sample(flow, folder, settings, options=options)
    iterating = tsf.load_run(folder, start=0).segments.wall_seconds
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    waited, finishing, cpu = TimedRecorder.waited, TimedRecorder.finishing, TimedRecorder.cpu
    return {
        "seconds_of_production": round(iterating + waited + finishing, 2),
        "seconds_per_iteration": round(iterating / settings.n_iterations, 3),
        "MB_on_disk": round(size / 1e6),
        "waited_while_sampling_seconds": round(waited, 3),
        "waited_at_the_end_seconds": round(finishing, 3),
        "share_while_sampling": round(waited / (iterating + waited), 5),
        "share_in_all": round((waited + finishing) / (iterating + waited + finishing), 5),
        # On a free core the iterations would take this time; waits are counted as they were here.
        "cpu_seconds": round(cpu, 1),
        "waited_over_cpu_seconds": round((waited + finishing) / cpu, 4),
    }


def measure_real(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the entry ``real``: every frame saved, and frames of some iterations."""
    base = replace(
        preset("default").sampling, n_walkers=args.walkers, n_iterations=args.sampled, n_tuning=1
    )
    cases = {
        "every frame": base,
        f"numbers of all, frames of every {args.save_interval}th iteration": replace(
            base, save_interval=args.save_interval, numbers_interval=1
        ),
    }
    options = RunOptions(seed=1, progress=False)
    entry: dict[str, Any] = {
        "walkers": args.walkers,
        "rungs": len(base.temperatures),
        "iterations": args.sampled,
        "load_of_the_machine_before": round(os.getloadavg()[0], 1),
    }
    for name, settings in cases.items():
        entry[name] = sample_for_real(args.real, folder / "run", settings, options)
        print(name, json.dumps(entry[name]), flush=True)
    return entry | provenance()


def provenance() -> dict[str, Any]:
    """Return the command, the machine and the versions of packages."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": package_versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--walkers", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=123, help="of the producer")
    parser.add_argument("--rates", type=float, nargs="+", default=[185_000.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--real", type=Path, metavar="FLOW", help="measure a run with it, only")
    parser.add_argument("--sampled", type=int, default=20, help="iterations of --real")
    parser.add_argument("--save-interval", type=int, default=10, help="where frames are thinned")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    if args.real is not None:
        before = {}
        if args.output is not None and args.output.is_file():
            before = json.loads(args.output.read_text())
        try:
            result = before | {"real": measure_real(args, folder)}
        finally:
            shutil.rmtree(folder)
        if args.output is not None:
            args.output.write_text(json.dumps(result, indent=2) + "\n")
        return
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
        for name, (rate, how) in cases.items():
            trials = [
                {m: produce(folder / "run", states, args.iterations, m, rate, how) for m in MODES}
                for _ in range(args.repeats)
            ]
            result[name] = {
                mode: min((trial[mode] for trial in trials), key=lambda each: each["seconds"])
                for mode in MODES
            }
            print(name, json.dumps(result[name]), flush=True)
    finally:
        shutil.rmtree(folder)
    paced = result[f"{args.rates[-1]:.0f} frames/s"]
    ratio = paced["async"]["seconds"] / paced["sync"]["seconds"]
    result["async_over_sync_seconds"] = round(ratio, 3)
    print(f"at {args.rates[-1]:.0f} frames/s: async takes {ratio:.3f} of the time of sync")
    result |= provenance()
    if args.output is not None:
        if args.output.is_file():  # the entry of --real is kept
            result |= {k: v for k, v in json.loads(args.output.read_text()).items() if k == "real"}
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
