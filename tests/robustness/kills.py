"""Kill the stages at random moments, by every means, and resume them: nothing may be lost or wrong.

    python -m tests.robustness.kills --output kills.json               # 120 kills: half an hour
    python -m tests.robustness.kills --kills 20 --stages md sample

One uninterrupted run of each stage (md, train, sample, run, analyze) is the reference. Then the
same commands, with ``--resume``, are killed again and again: by SIGKILL, SIGTERM, one and two
SIGINTs, a limit on the size of files, a limit on memory, SIGKILL at a size in memory (as a system
does that runs out of it), and a full disk (a small tmpfs, where this process may mount one). After
each kill what lies there is read: every file, ``load_run``, the trajectories by mdtraj; what they
show must be the first part of the reference. At the end the directory must be the reference's, bit
by bit.

Most processes are forked from this one, which has imported everything and has no threads: starting
Python takes longer than the stages. The reference and some of the kills are real processes. Exit
status 1: something was wrong, and the folder is kept.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads must not be forked
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import torch

from openmm_tsf.cli import main as cli
from openmm_tsf.utils.versions import package_versions
from tests.robustness.wreckage import (
    check_run,
    check_trajectory,
    content,
    damaged,
    differences,
    quiet_stdout,
    temporaries,
)

#: Weights of the means. The full disk has kills of its own, on a tmpfs.
MEANS = {
    "SIGKILL": 6, "SIGTERM": 3, "SIGINT": 3, "SIGINT twice": 3, "file size limit": 4,
    "memory limit": 2, "SIGKILL at a size in memory": 2,
}  # fmt: skip
DISK = "full disk"
SIGNALS = {"SIGKILL": (9,), "SIGTERM": (15,), "SIGINT": (2,), "SIGINT twice": (2, 2)}
#: Exit statuses that each means may lead to, beside 0 of a stage that ended first. -2 and -15: the
#: program had not begun.
STATUSES = {
    "SIGKILL": (-9,), "SIGKILL at a size in memory": (-9,), "SIGTERM": (130, -15),
    "SIGINT": (130, -2), "SIGINT twice": (130, -2), "file size limit": (2,), DISK: (2,),
}  # fmt: skip
SHARES = {"md": 0.2, "train": 0.2, "sample": 0.25, "run": 0.2, "analyze": 0.15}
REAL_SHARE = 0.1
#: What the stages import, so that a forked process has it.
IMPORTED = (
    "matplotlib.backends.backend_agg", "openmm_tsf.analysis.plots.ramachandran",
    "openmm_tsf.doctor.report",
    "openmm_tsf.workflow.run", "tqdm.contrib.logging",
)  # fmt: skip
SMALL_DISK = 64 * 2**20
PATIENCE = 300.0
MIB = 2**20


class Job:
    """A process of the program, forked or real, in a session of its own."""

    def __init__(self, arguments: Sequence[str], real: bool, limits: dict[int, int] | None = None):
        self.started = time.time()
        self.status: int | None = None
        read, write = os.pipe()
        if real:
            self.pid = self._spawn(arguments, write, limits or {})
        else:
            assert len(os.listdir("/proc/self/task")) == 1, "this process has threads"
            # A signal that comes before the child is in its own code would run this script's end.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            self.pid = os.fork()
            if self.pid == 0:
                self._main(arguments, read, write, limits or {})
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        os.close(write)
        self._pipe = open(read, "rb")  # noqa: SIM115
        os.set_blocking(read, False)
        self.words = ""

    def _spawn(self, arguments: Sequence[str], write: int, limits: dict[int, int]) -> int:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "openmm_tsf", *arguments],
            stdout=subprocess.DEVNULL, stderr=write, start_new_session=True,
            preexec_fn=lambda: [resource.setrlimit(k, (v, v)) for k, v in limits.items()],
        )  # fmt: skip
        self._process.returncode = 0  # it is waited for here
        return self._process.pid

    def _main(
        self, arguments: Sequence[str], read: int, write: int, limits: dict[int, int]
    ) -> None:
        status = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            os.setsid()
            os.close(read)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", 1, closefd=False)  # noqa: SIM115
            for which, limit in limits.items():
                resource.setrlimit(which, (limit, limit))
            status = cli.main(arguments)
        except KeyboardInterrupt:
            status = cli.INTERRUPTED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        with contextlib.suppress(BlockingIOError, TypeError):
            self.words += (self._pipe.read() or b"").decode(errors="replace")
        if self.status is None:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(code)
                self.ended = time.time()
                with contextlib.suppress(BlockingIOError, TypeError):
                    self.words += (self._pipe.read() or b"").decode(errors="replace")
                self._pipe.close()
                self.poll = lambda: self.status  # type: ignore[method-assign]
        return self.status

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Exit status, None if it still runs after so long."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        return self.status

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def resident(self) -> int:
        """Bytes in memory."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0
        return pages * resource.getpagesize()


class Stage:
    """One stage, its reference and its kills."""

    def __init__(self, name: str, folder: Path, disk: Path | None, rng: random.Random) -> None:
        self.name, self.folder, self.disk, self.rng = name, folder, disk, rng
        self.reference = folder / "reference" / name
        self.kills: Counter[str] = Counter()
        self.statuses: dict[str, Counter[str]] = {}
        self.real: Counter[str] = Counter()
        self.shown: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self.lost: list[float] = []
        self.passes = self.starts = self.backwards = 0
        self.wrong: list[dict[str, Any]] = []
        self.seconds = 0.0

    def arguments(self, output: Path) -> list[str]:
        made, every = self.folder / "reference", ["--quiet", "--checkpoint-seconds", "0.3"]
        if self.name == "analyze":
            return ["analyze", str(output), "--quiet"]
        every += ["--platform", "Reference", "--seed", "3", "--output", str(output), "--resume"]
        return [self.name, *every, *{
            "md": "--frames 500 --steps-per-frame 100 --equilibration-steps 2000",
            "train": f"--trajectory {made}/md --preset quick --stride 1 --steps 120",
            "sample": f"--flow {made}/train --walkers 6 --iterations 25 --tuning 5",
            "run": "--md --preset quick --frames 150 --stride 1 --steps 30 --walkers 4 "
            "--iterations 20 --tuning 3",
        }[self.name].split()]  # fmt: skip

    def make_reference(self) -> None:
        """The uninterrupted run; then its time by a forked process, which is to be the same."""
        if self.name == "analyze":
            shutil.copytree(self.folder / "reference" / "sample", self.reference)
        status = (job := Job(self.arguments(self.reference), real=True)).wait(10 * PATIENCE)
        if status:
            raise RuntimeError(f"{self.name}: the reference ended with {status}: {job.words}")
        output = self._fresh("again", None)
        job = Job(self.arguments(output), real=False)
        status = job.wait(10 * PATIENCE)
        self.duration = job.ended - job.started
        problems = [f"ended with {status}: {job.words}"] if status else []
        self._finish(output, "no kill", problems + self._compare(output))

    def _fresh(self, name: str, disk: Path | None) -> Path:
        output = (disk or self.folder) / f"{self.name}_{name}"
        if self.name == "analyze":
            shutil.copytree(self.folder / "reference" / "sample", output)
            for path in _analysis(output):
                path.unlink(missing_ok=True)
        return output

    # -- kills --------------------------------------------------------------------------------

    def one_pass(self, quota: int) -> None:
        """From nothing to the end, with kills until `quota` of them are done in all."""
        start = time.monotonic()
        self.passes += 1
        disk = self.disk if self.disk is not None and self.rng.random() < 0.35 else None
        output = self._fresh(f"pass{self.passes}", disk)
        history: list[str] = []
        problems: list[str] = []
        pids: set[int] = set()
        while not problems:
            before = progress(output)
            means = None
            # Where all is computed, few more: kills would hit nothing but the analysis.
            computed = self.name != "analyze" and before == progress(self.reference)
            if sum(self.kills.values()) < quota and not (computed and self.rng.random() < 0.7):
                kinds = list(MEANS)
                means = self.rng.choices(kinds, [MEANS[k] for k in kinds])[0]
                if disk is not None and self.rng.random() < 0.5:
                    means = DISK
            real = self.rng.random() < REAL_SHARE and means != "memory limit"
            job, said = self._killed(output, means, real, disk)
            pids.add(job.pid)
            self.starts += 1
            history.append(f"{means or 'none'}{' (real process)' * real}: {said}")
            status = job.status
            if status is None:
                problems.append(f"did not end after {means}")
                job.send(signal.SIGKILL)
                job.wait()
            elif status != 0:
                problems += self._expected(means, status, job.words)
            problems += self._look(output, pids)
            after = progress(output)
            if after < before:
                self.backwards += 1
                problems.append(f"checkpoint went back from {before} to {after}")
            if status == 0:
                break
            if means is not None:
                self.kills[means] += 1
                self.parts[self._part(after)] += 1
                self.real[means] += real
                self.statuses.setdefault(means, Counter())[str(status)] += 1
                saved = max(job.started, _saved(output))
                self.lost.append(max(0.0, job.ended - saved))
        if not problems:
            problems = self._compare(output)
        self._finish(output, " | ".join(history), problems)
        self.seconds += time.monotonic() - start

    def _part(self, reached: tuple[int, int]) -> str:
        if reached == (0, -1):
            return "no checkpoint yet"
        if reached == progress(self.reference):
            return "all computed"
        if self.name == "run":
            return "production" if reached[0] == 100 else "training" if reached[0] else "MD"
        return "between checkpoints"

    def _killed(
        self, output: Path, means: str | None, real: bool, disk: Path | None
    ) -> tuple[Job, str]:
        """A process that was killed, or ended, and what was done to it."""
        rng, arguments = self.rng, self.arguments(output)
        # Most kills come while it works: a quarter at any moment, start-up included.
        after = rng.uniform(0, 0.5) * self.duration + (2.0 if real and rng.random() < 0.75 else 0.0)
        size = max(path.stat().st_size for path in self.reference.rglob("*") if path.is_file())
        if means == "file size limit":
            limit = int(rng.choice((rng.uniform(0, 1.1) * size, 10 ** rng.uniform(2, 6))))
            job = Job(arguments, real, {resource.RLIMIT_FSIZE: limit})
            job.wait()
            return job, f"{limit} bytes"
        if means == "memory limit":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + int(rng.uniform(0, 250) * MIB)
            job = Job(arguments, real, {resource.RLIMIT_AS: limit})
            job.wait()
            return job, f"{limit // MIB} MiB"
        if means == DISK:
            assert disk is not None
            whole = sum(p.stat().st_size for p in self.reference.rglob("*") if p.is_file())
            free = int(rng.uniform(0, 1.1) * whole)
            with _filled(disk, free):
                job = Job(arguments, real)
                job.wait()
            return job, f"{free} bytes left"
        job = Job(arguments, real)
        if means == "SIGKILL at a size in memory":
            limit = job.resident() + int(rng.uniform(0, 150) * MIB)
            while job.poll() is None and job.resident() < limit:
                time.sleep(0.002)
            job.send(signal.SIGKILL)
            job.wait()
            return job, f"at {limit // MIB} MiB"
        if means is None:
            job.wait(10 * PATIENCE)
            return job, "to the end"
        job.wait(after)
        first, *more = SIGNALS[means]
        job.send(first)
        for number in more:
            job.wait(rng.choice((0.0, rng.uniform(0, 0.05), rng.uniform(0, 2.0))))
            job.send(number)
        job.wait()
        return job, f"after {after:.2f} s"

    def _expected(self, means: str | None, status: int, words: str) -> list[str]:
        if means is None:
            return [f"ended with {status} and was not killed: {words}"]
        if means == "memory limit":  # whatever the system makes of it
            return []
        if status not in STATUSES[means]:
            return [f"{means}: ended with {status}: {words}"]
        if means in ("file size limit", DISK):
            reason = "No space left on device" if means == DISK else "File too large"
            last = (words.strip().splitlines() or [""])[-1]  # after warnings, if any
            if not last.startswith("openmm-tsf: error:") or reason not in last or "/" not in last:
                return [f"{means}: no clear message: {words}"]
        return []

    # -- what lies there ----------------------------------------------------------------------

    def _look(self, output: Path, pids: set[int]) -> list[str]:
        if not output.is_dir():
            return []
        problems = damaged(output)
        for name in temporaries(output):
            parts = name.split(".")
            if not any(str(pid) in parts for pid in pids):
                problems.append(f"{name}: a temporary file of nobody who was killed")
        topology = next(self.reference.rglob("topology.pdb"))
        for path in output.rglob("*.dcd"):
            problems += check_trajectory(path, self.reference / path.relative_to(output), topology)
        log, whole = output / "training.csv", self.reference / "training.csv"
        if log.is_file() and not problems:
            rows, expected = content(log), content(whole)
            if rows != expected[: len(rows)] and self.name == "train":
                problems.append("training.csv: other rows than without a kill")
        if self.name in ("sample", "run", "analyze"):
            shown, found = check_run(output, self.reference)
            self.shown["samples" if "iterations" in shown else shown] += 1
            problems += found
        return problems

    def _compare(self, output: Path) -> list[str]:
        # Diagnostics of a run show effective samples per second.
        ignored = () if self.name == "analyze" else ("diagnostics.png",)
        return damaged(output) + differences(output, self.reference, ignored)

    def _finish(self, output: Path, history: str, problems: list[str]) -> None:
        if problems:
            kept = self.folder / "failed" / output.name
            if output.is_dir():
                shutil.copytree(output, kept)
            self.wrong.append({"kept": str(kept), "history": history, "problems": problems})
            print(f"{self.name}: {history}", *problems, f"kept in {kept}", sep="\n  ")
        shutil.rmtree(output, ignore_errors=True)

    def report(self) -> dict[str, Any]:
        return {
            "kills": sum(self.kills.values()),
            "by_means": dict(self.kills),
            "of_real_processes": sum(self.real.values()),
            "by_moment": dict(self.parts),
            "exit_statuses": {means: dict(found) for means, found in self.statuses.items()},
            "starts": self.starts,
            "passes": self.passes,
            "mismatches": len(self.wrong),
            "checkpoint_went_back": self.backwards,
            "load_run": dict(self.shown),
            "uninterrupted_seconds": round(self.duration, 2),
            "seconds_since_checkpoint": {
                "median": round(statistics.median(self.lost), 3),
                "max": round(max(self.lost), 3),
            }
            if self.lost
            else None,
            "wrong": self.wrong,
        }


def _analysis(folder: Path) -> list[Path]:
    names = ("summary.json", "*.png", "thermodynamics.*")
    return [path for name in names for path in folder.glob(name)]


def progress(output: Path) -> tuple[int, int]:
    """How far the last checkpoint is: which part of a run, and how far in it."""

    def tensors(path: Path, key: str) -> int:
        return int(torch.load(path, weights_only=True)[key])

    def steps(path: Path) -> int:
        with np.load(path) as data:
            return int(data["step"])

    run, training = output / "checkpoint.pt", output / "training"
    if run.is_file():
        return 100, tensors(run, "n_frames_written")
    if (output / "training.pt").is_file():
        return 0, tensors(output / "training.pt", "step")
    if training.is_dir():
        done = [*training.glob("round_*_flow.pt"), *training.glob("round_*_samples.pt")]
        n_flows = len(list(training.glob("round_*_flow.pt")))
        now = training / f"round_{n_flows:02d}.pt"
        return 1 + len(done), tensors(now, "step") if now.is_file() else -1
    for path in (output / "checkpoint.npz", output / "md" / "checkpoint.npz"):
        if path.is_file():
            return 0, steps(path)
    return 0, -1


def _saved(output: Path) -> float:
    """When the last checkpoint was written."""
    names = ("checkpoint.*", "training.pt", "training/*.pt", "md/checkpoint.npz")
    return max((p.stat().st_mtime for name in names for p in output.glob(name)), default=0.0)


@contextlib.contextmanager
def _filled(disk: Path, free: int) -> Iterator[None]:
    """So many bytes left on a disk."""
    filler = disk / "filler"
    usage = os.statvfs(disk)
    try:
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, usage.f_bavail * usage.f_frsize - free))
        yield
    finally:
        filler.unlink()


def mounted(folder: Path) -> bool:
    """A small disk, where this process may make one."""
    folder.mkdir()
    size = f"size={SMALL_DISK}"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def two_jobs(folder: Path, stage: Stage) -> dict[str, Any]:
    """Two jobs on one directory: the second is refused while the first lives, and not after."""
    output, problems = folder / "two_jobs", []
    first = Job(stage.arguments(output), real=True)
    note = output / ".lock-owner.json"
    while first.poll() is None and not note.is_file():
        time.sleep(0.01)
    second = Job(stage.arguments(output), real=True)
    if second.wait() != 2 or f"process {first.pid} " not in second.words:
        problems.append(f"the second job ended with {second.status}: {second.words}")
    if first.poll() is not None:
        problems.append(f"the first job ended with {first.status}: {first.words}")
    first.send(signal.SIGKILL)
    first.wait()
    third, start = Job(stage.arguments(output), real=False), time.monotonic()
    while third.poll() is None and json.loads(note.read_text())["pid"] != third.pid:
        time.sleep(0.002)
    seconds = time.monotonic() - start
    if third.wait(10 * PATIENCE):
        problems.append(f"the third job ended with {third.status}: {third.words}")
    problems += differences(output, stage.reference, ("diagnostics.png",))
    if not problems:
        shutil.rmtree(output)
    return {
        "second": second.words.strip().replace(str(folder), "DIR"),
        "third_has_the_lock_after_seconds": round(seconds, 3),
        "wrong": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=120, help="kills of all stages together")
    parser.add_argument("--stages", nargs="+", choices=tuple(SHARES), default=tuple(SHARES))
    parser.add_argument("--seed", type=int, default=1, help="of moments and means")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    quiet_stdout()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="kills-")).resolve()
    (folder / "reference").mkdir(parents=True)
    small = folder / "disk"
    has_disk, start = mounted(small), time.monotonic()
    disk = small if has_disk else None
    print("full disk: a tmpfs of 64 MiB" if has_disk else "full disk: no tmpfs can be mounted here")
    try:
        needed = [
            name
            for name in SHARES
            if name in args.stages
            or (name == "md" and {"train", "sample", "analyze"} & set(args.stages))
            or (name == "train" and {"sample", "analyze"} & set(args.stages))
            or name == "sample"
        ]
        stages = {
            name: Stage(name, folder, disk, random.Random(f"{args.seed} {name}")) for name in needed
        }
        total = sum(SHARES[name] for name in args.stages)
        for name, stage in stages.items():
            stage.make_reference()
            print(f"{name}: the uninterrupted run takes {stage.duration:.1f} s")
        jobs = two_jobs(folder, stages["sample"])
        print("two jobs on one directory:", *(jobs["wrong"] or ["the second is refused"]))
        for name in args.stages:
            stage, quota = stages[name], max(1, round(args.kills * SHARES[name] / total))
            while sum(stage.kills.values()) < quota:
                stage.one_pass(quota)
            print(f"{name}: {quota} kills in {stage.seconds:.0f} s, {len(stage.wrong)} wrong")
    finally:
        if has_disk:
            subprocess.run(["umount", str(small)], check=False)
    reports = {name: stage.report() for name, stage in stages.items() if name in args.stages}
    wrong = sum(len(stage.wrong) for stage in stages.values()) + len(jobs["wrong"])
    result = {
        "command": f"python -m tests.robustness.kills --kills {args.kills} --seed {args.seed} "
        f"--stages {' '.join(args.stages)}",
        "versions": package_versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, shared",
        "kills": sum(report["kills"] for report in reports.values()),
        "of_real_processes": sum(report["of_real_processes"] for report in reports.values()),
        "mismatches": wrong,
        "full_disk": "tmpfs" if has_disk else "not tried: no tmpfs could be mounted",
        "wall_seconds": round(time.monotonic() - start),
        "stages": reports,
        "two_jobs": jobs,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    show(reports)
    if wrong:
        print(f"{wrong} wrong; the folder is kept: {folder}")
        return 1
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


def show(reports: dict[str, Any]) -> None:
    """A table of kills by stage and means."""
    means = [name for name in (*MEANS, DISK)]
    width = max(map(len, means))
    print(" " * width, *(f"{name:>8}" for name in reports))
    for name in means:
        print(f"{name:{width}}", *(f"{r['by_means'].get(name, 0):8}" for r in reports.values()))
    for title, key in (("kills", "kills"), ("of real processes", "of_real_processes"),
                       ("runs to the end", "passes"), ("mismatches", "mismatches"),
                       ("checkpoint went back", "checkpoint_went_back")):  # fmt: skip
        print(f"{title:{width}}", *(f"{r[key]:8}" for r in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
