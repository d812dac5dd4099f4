"""A stage of the program that is killed at random moments and resumed."""

import contextlib
import os
import random
import resource
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.robustness import inspection
from tests.robustness.jobs import PATIENCE, Job
from tests.robustness.sandbox import DONE

#: Weights of the means of killing. A full disk is used on a tmpfs only.
MEANS = {
    "SIGKILL": 6, "SIGTERM": 3, "SIGINT": 3, "SIGINT twice": 3, "file size limit": 4,
    "memory limit": 2, "SIGKILL at a size in memory": 2,
}  # fmt: skip
DISK = "full disk"
SIGNALS = {"SIGKILL": (9,), "SIGTERM": (15,), "SIGINT": (2,), "SIGINT twice": (2, 2)}
#: The accepted exit statuses, beside 0 of a stage that ended before the kill. With -2 and -15, the
#: signal came before the program had installed its handler.
STATUSES = {
    "SIGKILL": (-9,), "SIGKILL at a size in memory": (-9,), "SIGTERM": (130, -15),
    "SIGINT": (130, -2), "SIGINT twice": (130, -2), "file size limit": (2,), DISK: (2,),
}  # fmt: skip
REAL_SHARE = 0.1  # of the processes
MIB = 2**20


class KilledStage:
    """A stage, its uninterrupted run (the reference), and the counts of its kills."""

    def __init__(self, name: str, folder: Path, disk: Path | None, rng: random.Random) -> None:
        self.name, self.folder, self.disk, self.rng = name, folder, disk, rng
        self.reference = folder / "reference" / name
        self.kills: Counter[str] = Counter()
        self.statuses: dict[str, Counter[str]] = {}
        self.real: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
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
        """Run the stage without interruption, and time a forked process that must give the same."""
        if self.name == "analyze":
            shutil.copytree(self.folder / "reference" / "sample", self.reference)
        status = (job := Job(self.arguments(self.reference), real=True)).wait(10 * PATIENCE)
        if status:
            raise RuntimeError(f"{self.name}: the reference ended with {status}: {job.stderr}")
        output = self._fresh("again", None)
        job = Job(self.arguments(output), real=False)
        status = job.wait(10 * PATIENCE)
        self.duration = job.ended - job.started
        problems = [f"ended with {status}: {job.stderr}"] if status else []
        self._finish(output, "no kill", problems + self._compare(output))

    def _fresh(self, name: str, disk: Path | None) -> Path:
        output = (disk or self.folder) / f"{self.name}_{name}"
        if self.name == "analyze":
            shutil.copytree(self.folder / "reference" / "sample", output)
            for path in _analysis_files(output):
                path.unlink(missing_ok=True)
        return output

    def one_pass(self, quota: int) -> None:
        """Run the stage from an empty directory to the end, with kills up to `quota` in total."""
        start = time.monotonic()
        self.passes += 1
        disk = self.disk if self.disk is not None and self.rng.random() < 0.35 else None
        output = self._fresh(f"pass{self.passes}", disk)
        history: list[str] = []
        problems: list[str] = []
        pids: set[int] = set()
        while not problems:
            before, means = progress(output), None
            # Few kills once all is computed: they would hit only the analysis.
            computed = self.name != "analyze" and before == progress(self.reference)
            if sum(self.kills.values()) < quota and not (computed and self.rng.random() < 0.7):
                means = self.rng.choices(list(MEANS), list(MEANS.values()))[0]
                if disk is not None and self.rng.random() < 0.5:
                    means = DISK
            real = self.rng.random() < REAL_SHARE and means != "memory limit"
            job, description = self._kill(output, means, real, disk)
            pids.add(job.pid)
            self.starts += 1
            history.append(f"{means or 'none'}{' (real process)' * real}: {description}")
            status = job.status
            if status is None:
                problems.append(f"did not end after {means}")
                job.send(signal.SIGKILL)
                job.wait()
            elif status not in DONE:
                problems += self._expected(means, status, job.stderr)
            problems += self._inspect(output, pids)
            after = progress(output)
            if after < before:
                self.backwards += 1
                problems.append(f"checkpoint went back from {before} to {after}")
            if status in DONE:
                break
            if means is not None:
                self.kills[means] += 1
                self.moments[self._moment(after)] += 1
                self.real[means] += real
                self.statuses.setdefault(means, Counter())[str(status)] += 1
                saved = max(job.started, _saved(output))
                self.lost.append(max(0.0, job.ended - saved))
        if not problems:
            problems = self._compare(output)
        self._finish(output, " | ".join(history), problems)
        self.seconds += time.monotonic() - start

    def _moment(self, reached: tuple[int, int]) -> str:
        if reached == (0, -1):
            return "no checkpoint yet"
        if reached == progress(self.reference):
            return "all computed"
        if self.name == "run":
            return "production" if reached[0] == 100 else "training" if reached[0] else "MD"
        return "between checkpoints"

    def _kill(
        self, output: Path, means: str | None, real: bool, disk: Path | None
    ) -> tuple[Job, str]:
        """Return a process that was killed or has ended, and a description of the kill."""
        rng, arguments = self.rng, self.arguments(output)
        # Most kills come after the start-up of a real process, a quarter at any moment.
        after = rng.uniform(0, 0.5) * self.duration + (2.0 if real and rng.random() < 0.75 else 0.0)
        sizes = [path.stat().st_size for path in self.reference.rglob("*") if path.is_file()]
        limits, filler, patience = {}, contextlib.nullcontext(), PATIENCE
        if means == "file size limit":
            limit = int(rng.choice((rng.uniform(0, 1.1) * max(sizes), 10 ** rng.uniform(2, 6))))
            limits, description = {resource.RLIMIT_FSIZE: limit}, f"{limit} bytes"
        elif means == "memory limit":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + int(rng.uniform(0, 250) * MIB)
            limits, description = {resource.RLIMIT_AS: limit}, f"{limit // MIB} MiB"
        elif means == DISK:
            free = int(rng.uniform(0, 1.1) * sum(sizes))
            filler, description = _filled(disk, free), f"{free} bytes left"
        with filler:
            job = Job(arguments, real, limits)
            if means == "SIGKILL at a size in memory":
                limit = job.resident() + int(rng.uniform(0, 150) * MIB)
                description = f"at {limit // MIB} MiB"
                while job.poll() is None and job.resident() < limit:
                    time.sleep(0.002)
                job.send(signal.SIGKILL)
            elif means is None:
                patience, description = 10 * PATIENCE, "to the end"
            elif means in SIGNALS:
                description = f"after {after:.2f} s"
                job.wait(after)
                first, *more = SIGNALS[means]
                job.send(first)
                for number in more:
                    job.wait(rng.choice((0.0, rng.uniform(0, 0.05), rng.uniform(0, 2.0))))
                    job.send(number)
            job.wait(patience)
        return job, description

    def _expected(self, means: str | None, status: int, stderr: str) -> list[str]:
        if means is None:
            return [f"ended with {status} and was not killed: {stderr}"]
        if means == "memory limit":  # the system decides how it ends
            return []
        if status not in STATUSES[means]:
            return [f"{means}: ended with {status}: {stderr}"]
        if means in ("file size limit", DISK):
            reason = "No space left on device" if means == DISK else "File too large"
            last = (stderr.strip().splitlines() or [""])[-1]  # after warnings, if any
            if not last.startswith("openmm-tsf: error:") or reason not in last or "/" not in last:
                return [f"{means}: no clear message: {stderr}"]
        return []

    def _inspect(self, output: Path, pids: set[int]) -> list[str]:
        if not output.is_dir():
            return []
        problems = inspection.damaged(output)
        for name in inspection.temporaries(output):
            parts = name.split(".")
            if not any(str(pid) in parts for pid in pids):
                problems.append(f"{name}: a temporary file of a process that was not killed")
        problems += inspection.check_trajectories(output, self.reference)
        log, whole = output / "training.csv", self.reference / "training.csv"
        if log.is_file() and not problems:
            rows, expected = inspection.content(log), inspection.content(whole)
            if rows != expected[: len(rows)] and self.name == "train":
                problems.append("training.csv: other rows than without a kill")
        if self.name in ("sample", "run", "analyze"):
            state, more = inspection.check_run(output, self.reference)
            self.states["samples" if "iterations" in state else state] += 1
            problems += more
        return problems

    def _compare(self, output: Path) -> list[str]:
        # An analysis alone takes the times from the run; only its report names the directory.
        ignored = ("report.html",) if self.name == "analyze" else inspection.TIMED
        return inspection.damaged(output) + inspection.differences(output, self.reference, ignored)

    def _finish(self, output: Path, history: str, problems: list[str]) -> None:
        if problems:
            kept = self.folder / "failed" / output.name
            if output.is_dir():
                shutil.copytree(output, kept)
            self.wrong.append({"kept": str(kept), "history": history, "problems": problems})
            print(f"{self.name}: {history}", *problems, f"kept in {kept}", sep="\n  ")
        shutil.rmtree(output, ignore_errors=True)

    def report(self) -> dict[str, Any]:
        measures = {"median": statistics.median, "max": max}
        lost = {name: round(f(self.lost), 3) for name, f in measures.items()} if self.lost else None
        return {
            "kills": sum(self.kills.values()), "by_means": dict(self.kills),
            "of_real_processes": sum(self.real.values()), "by_moment": dict(self.moments),
            "exit_statuses": {means: dict(counts) for means, counts in self.statuses.items()},
            "starts": self.starts, "passes": self.passes, "mismatches": len(self.wrong),
            "checkpoint_went_back": self.backwards, "load_run": dict(self.states),
            "uninterrupted_seconds": round(self.duration, 2),
            "seconds_since_checkpoint": lost, "wrong": self.wrong,
        }  # fmt: skip


def _analysis_files(folder: Path) -> list[Path]:
    names = ("summary.json", "report.html", "*.png", "thermodynamics.*")
    return [path for name in names for path in folder.glob(name)]


def progress(output: Path) -> tuple[int, int]:
    """Return the progress of the last checkpoint: the part of a run, and the step within it."""

    def number(path: Path, key: str = "step") -> int:
        return int(inspection.content(path)[key])

    run, training = output / "checkpoint.pt", output / "training"
    if run.is_file():
        return 100, number(run, "n_frames_written")
    if (output / "training.pt").is_file():
        return 0, number(output / "training.pt")
    if training.is_dir():
        flows, samples = (list(training.glob(f"round_*_{s}.pt")) for s in ("flow", "samples"))
        now = training / f"round_{len(flows):02d}.pt"
        return 1 + len(flows) + len(samples), number(now) if now.is_file() else -1
    for path in (output / "checkpoint.npz", output / "md" / "checkpoint.npz"):
        if path.is_file():
            return 0, number(path)
    return 0, -1


def _saved(output: Path) -> float:
    """Return the time at which the last checkpoint was written."""
    names = ("checkpoint.*", "training.pt", "training/*.pt", "md/checkpoint.npz")
    return max((p.stat().st_mtime for name in names for p in output.glob(name)), default=0.0)


@contextlib.contextmanager
def _filled(disk: Path, free: int) -> Iterator[None]:
    """Fill a disk so that `free` bytes are left."""
    filler = disk / "filler"
    usage = os.statvfs(disk)
    try:
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, usage.f_bavail * usage.f_frsize - free))
        yield
    finally:
        filler.unlink()
