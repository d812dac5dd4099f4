"""Kill processes that sample shards of one run side by side, and resume them: nothing may change.

    python -m tests.robustness.shard_kills --output examples/results/shard_kills.json

A run of four shards is prepared once, and sampled by one process: the reference. Then, in copies of
the prepared run, two processes at a time sample a shard each. One of them is killed at a random
moment: by SIGKILL, SIGTERM, SIGINT or a limit on the size of files (a full disk); or a second job
is started on its shard, which must be refused. The other one must end as if nothing had happened.
After each kill the reader of all shards must show the first part of the reference; at the end every
shard must be identical to it, bit by bit. Exit status 1: something was wrong.

One process in ten is the whole program (``run --shard K --resume``). The others are forked from
this one, which has the molecule and the frames, and do what the program does with them: reading
these takes longer than a shard.
"""

import argparse
import importlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.cli.main import INTERRUPTED
from openmm_tsf.io.shards import shard_directory
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.utils.versions import package_versions
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.record import recorded_settings
from openmm_tsf.workflow.settings import RunSettings
from openmm_tsf.workflow.shards import ShardSampling, sample_shards
from tests.robustness import inspection
from tests.robustness.jobs import PATIENCE, Job
from tests.robustness.killed_stage import SIGNALS, STATUSES

N_SHARDS, N_ITERATIONS, STRIDE = 4, 40, 40
WHOLE_PROGRAM = 0.1  # of the processes
LIMIT, SECOND = "file size limit", "second job"
MEANS = {"SIGKILL": 5, "SIGTERM": 2, "SIGINT": 1, LIMIT: 2, SECOND: 1}
PREPARED = (
    f"--preset quick --stride {STRIDE} --steps 20 --rounds 0 --walkers {2 * N_SHARDS} --tuning 3 "
    f"--iterations {N_ITERATIONS} --shards {N_SHARDS} --seed 3 --prepare"
)


class ShardJob(Job):
    """A forked process that samples one shard with what its parent has read."""

    def __init__(self, sampling: ShardSampling, number: int, limits: dict[int, int]) -> None:
        self._sampling, self._number = sampling, number
        super().__init__([], False, limits)

    def _run_forked(self, arguments: Sequence[str], write: int, limits: dict[int, int]) -> None:
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            os.setsid()
            os.dup2(write, 2)
            sys.stderr = open(2, "w", 1, closefd=False)  # noqa: SIM115
            for which, limit in limits.items():
                resource.setrlimit(which, (limit, limit))
            sample_shards(self._sampling, [self._number])
            status = 0
        except KeyboardInterrupt:
            status = INTERRUPTED
        except BaseException as error:
            print(f"openmm-tsf: error: {error}", file=sys.stderr)
            status = 2
        finally:
            os._exit(status)


class KilledShards:
    """Passes over the shards of a run with kills, and their counts."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.prepared, self.reference = folder / "prepared", folder / "reference"
        self.molecule = alanine_dipeptide()
        self.frames = MDDataset.shipped(self.molecule, stride=STRIDE)
        self.kills: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.reached: Counter[int] = Counter()
        self.passes = self.starts = self.whole_programs = self.undisturbed = 0
        self.wrong: list[str] = []

    def make_reference(self) -> None:
        """Prepare the run, and sample its shards one after the other."""
        job = Job(self.arguments(self.prepared, *PREPARED.split()), real=False)
        if job.wait(10 * PATIENCE):
            raise RuntimeError(f"preparing ended with {job.status}: {job.stderr}")
        shutil.copytree(self.prepared, self.reference)
        start = time.monotonic()
        for number in range(N_SHARDS):
            job = self._start(self.reference, number, None, whole_program=number == 0)
            if job.wait(10 * PATIENCE):
                raise RuntimeError(f"shard {number} ended with {job.status}: {job.stderr}")
            if number == 0:
                start = time.monotonic()
        self.duration = (time.monotonic() - start) / (N_SHARDS - 1)
        self.whole = load_run(self.reference, start=0)

    def arguments(self, output: Path, *more: str) -> list[str]:
        every = ["--quiet", "--checkpoint-seconds", "0.1", "--platform", "Reference", "--resume"]
        return ["run", "--output", str(output), *every, *more]

    def one_pass(self, quota: int) -> None:
        """Sample all shards with kills up to `quota` in total."""
        self.passes += 1
        output = shutil.copytree(self.prepared, self.folder / f"pass{self.passes}")
        left = list(range(N_SHARDS))
        problems: list[str] = []
        while left and not problems:
            numbers = self.rng.sample(left, min(2, len(left)))
            means = None
            if self.kills.total() < quota:
                means = self.rng.choices(list(MEANS), list(MEANS.values()))[0]
            jobs = [self._start(output, k, means if not i else None) for i, k in enumerate(numbers)]
            problems += self._kill(output, numbers[0], jobs[0], means)
            for number, job in zip(numbers, jobs, strict=True):
                if job.wait() is None:
                    problems.append(f"shard {number} did not end")
                    job.send(signal.SIGKILL)
                elif job.status == 0:
                    left.remove(number)
            if len(jobs) > 1:
                self.undisturbed += jobs[1].status == 0
                if jobs[1].status:
                    problems.append(f"the other one ended with {jobs[1].status}: {jobs[1].stderr}")
            problems += self._inspect(output)
        for number in range(N_SHARDS) if not problems else ():
            whole = shard_directory(self.reference, number)
            found = inspection.differences(shard_directory(output, number), whole)
            problems += [f"shard {number}: {line}" for line in found]
        self.wrong += [f"pass {self.passes}: {line}" for line in problems]
        if not problems:
            shutil.rmtree(output)

    def _start(
        self, output: Path, number: int, means: str | None, *, whole_program: bool | None = None
    ) -> Job:
        self.starts += 1
        limits: dict[int, int] = {}
        if means == LIMIT:
            limits = {resource.RLIMIT_FSIZE: int(10 ** self.rng.uniform(2.5, 5.5))}
        if whole_program is None:
            whole_program = self.rng.random() < WHOLE_PROGRAM
        self.whole_programs += whole_program
        if whole_program:
            return Job(self.arguments(output, "--shard", str(number)), real=False, limits=limits)
        settings = recorded_settings(output, "run", RunSettings).sampling
        options = RunOptions(
            resume=True, progress=False, checkpoint_seconds=0.1, platform="Reference"
        )
        sampling = ShardSampling(output, self.molecule, settings, options, self.frames)
        return ShardJob(sampling, number, limits)

    def _kill(self, output: Path, number: int, job: Job, means: str | None) -> list[str]:
        """Kill a job, or start a second one beside it; return the problems."""
        if means is None:
            return []
        if means == SECOND:
            return self._second(output, number, job)
        if means in SIGNALS:
            job.wait(self.rng.uniform(0.1, 1.1) * self.duration)
            job.send(SIGNALS[means][0])
        if job.wait() == 0:
            return []  # it had ended
        self.kills[means] += 1
        self.statuses[f"{means}: {job.status}"] += 1
        problems = []
        if job.status not in STATUSES[means]:
            problems.append(f"{means}: ended with {job.status}: {job.stderr}")
        if means == LIMIT and not (
            "File too large" in job.stderr and f"{number:04d}" in job.stderr
        ):
            problems.append(f"{means}: no clear message: {job.stderr}")
        return problems

    def _second(self, output: Path, number: int, job: Job) -> list[str]:
        note = shard_directory(output, number) / ".lock-owner.json"
        while job.poll() is None and not (
            note.is_file() and f'"pid": {job.pid},' in note.read_text()
        ):
            time.sleep(0.005)
        second = self._start(output, number, None)
        second.wait()
        if job.poll() is not None:
            return []  # the first had ended before the second began
        self.kills[SECOND] += 1
        self.statuses[f"{SECOND}: {second.status}"] += 1
        refused = second.status == 2 and f"in use by process {job.pid}" in second.stderr
        return [] if refused else [f"{SECOND}: {second.status}: {second.stderr}"]

    def _inspect(self, output: Path) -> list[str]:
        """Compare what can be read of all shards with the first part of the reference."""
        run = load_run(output, start=0)
        self.reached[run.n_iterations] += 1
        bad = {
            k: v for k, v in run.shards.left_out.items() if v[:4] not in ("only", "not ", "no s")
        }
        problems = [f"shard {name}: {reason}" for name, reason in bad.items()]
        n, numbers = run.n_iterations, [shard.number for shard in run.shards.used]
        walkers = [w for k in numbers for w in range(2 * k, 2 * k + 2)]
        for name in ("energy", "dihedrals", "replica"):
            whole = getattr(self.whole.segments, name)[:n, walkers]
            if not np.array_equal(getattr(run.segments, name), whole):
                problems.append(f"{name} differs in the first {n} iterations of {numbers}")
        if n:
            frames = run.trajectory(run.temperatures[0]).xyz
            whole = self.whole.trajectory(run.temperatures[0]).xyz
            shape = (N_ITERATIONS, 2 * N_SHARDS, *whole.shape[1:])
            expected = whole.reshape(shape)[:n, walkers].reshape(frames.shape)
            if not np.array_equal(frames, expected):
                problems.append(f"the frames differ in the first {n} iterations of {numbers}")
        return problems

    def report(self) -> dict[str, Any]:
        return {
            "kills": self.kills.total(),
            "mismatches": len(self.wrong),
            "by_means": dict(self.kills),
            "exit_statuses": dict(self.statuses),
            "starts": self.starts,
            "of_the_whole_program": self.whole_programs,
            "passes_of_4_shards": self.passes,
            "processes_beside_a_kill_that_ended_well": self.undisturbed,
            "iterations_read_after_a_kill": {str(n): c for n, c in sorted(self.reached.items())},
            "uninterrupted_seconds_of_a_shard": round(self.duration, 2),
            "wrong": self.wrong,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of moments and means")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    torch.set_num_threads(1)
    for name in ("openmm_tsf.workflow.run", "openmm_tsf.workflow.presets", "tqdm.contrib.logging"):
        importlib.import_module(name)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="shard-kills-")).resolve()
    folder.mkdir(exist_ok=True)
    shards, start = KilledShards(folder, random.Random(args.seed)), time.monotonic()
    shards.make_reference()
    print(f"a shard takes {shards.duration:.1f} s", flush=True)
    while shards.kills.total() < args.kills and not shards.wrong:
        shards.one_pass(args.kills)
        print(f"pass {shards.passes}: {shards.kills.total()} kills in all", flush=True)
    result = {
        "command": f"python -m tests.robustness.shard_kills --kills {args.kills} "
        f"--seed {args.seed}",
        "versions": package_versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, shared",
        **shards.report(),
        "wall_seconds": round(time.monotonic() - start),
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['kills']} kills, {result['mismatches']} mismatches", *shards.wrong, sep="\n")
    if not shards.wrong and args.folder is None:
        shutil.rmtree(folder)
    return int(bool(shards.wrong))


if __name__ == "__main__":
    sys.exit(main())
