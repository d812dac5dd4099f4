"""Kill the stages at random moments and resume them: no result may be lost or wrong.

    python -m tests.robustness.kills --output kills.json               # 120 kills: half an hour
    python -m tests.robustness.kills --kills 20 --stages md sample

One uninterrupted run of each stage (md, train, sample, run, analyze) is the reference. Then the
same commands, with ``--resume``, are killed again and again: by SIGKILL, SIGTERM, one and two
SIGINTs, limits on the size of files and on memory, SIGKILL at a size in memory (as systems do that
run out of it), and a full disk (a small tmpfs, if this process may mount one). After each kill
every file, ``load_run`` and the trajectories must show the first part of the reference; at the end
the directory must be identical to it, bit by bit. Exit status 1: something was wrong.

Most processes are forked from this one, which has imported everything and has no threads, because
starting Python takes longer than the stages; the reference and some others are real processes.
"""

import argparse
import importlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.utils.versions import package_versions
from tests.robustness.inspection import TIMED, differences, quiet_stdout
from tests.robustness.jobs import PATIENCE, Job
from tests.robustness.killed_stage import DISK, MEANS, KilledStage

#: The share of each stage in the kills.
SHARES = {"md": 0.2, "train": 0.2, "sample": 0.25, "run": 0.2, "analyze": 0.15}
#: Modules that the stages import, so that a forked process has them.
IMPORTED = (
    "matplotlib.backends.backend_agg", "openmm_tsf.analysis.plots.ramachandran",
    "openmm_tsf.doctor.report", "openmm_tsf.workflow.run", "tqdm.contrib.logging",
)  # fmt: skip


def mount_disk(folder: Path) -> bool:
    """Mount a small disk; return whether this process may."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def two_jobs(folder: Path, stage: KilledStage) -> dict[str, Any]:
    """Start a second job on a directory while the first runs, and a third one after its kill."""
    output, problems = folder / "two_jobs", []
    first = Job(stage.arguments(output), real=True)
    note = output / ".lock-owner.json"
    while first.poll() is None and not note.is_file():
        time.sleep(0.01)
    second = Job(stage.arguments(output), real=True)
    if second.wait() != 2 or f"process {first.pid} " not in second.stderr:
        problems.append(f"the second job ended with {second.status}: {second.stderr}")
    if first.poll() is not None:
        problems.append(f"the first job ended with {first.status}: {first.stderr}")
    first.send(signal.SIGKILL)
    first.wait()
    third, start = Job(stage.arguments(output), real=False), time.monotonic()
    while third.poll() is None and json.loads(note.read_text())["pid"] != third.pid:
        time.sleep(0.002)
    seconds = time.monotonic() - start
    if third.wait(10 * PATIENCE):
        problems.append(f"the third job ended with {third.status}: {third.stderr}")
    problems += differences(output, stage.reference, TIMED)
    if not problems:
        shutil.rmtree(output)
    return {
        "second": second.stderr.strip().replace(str(folder), "DIR"),
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
    has_disk, start = mount_disk(small), time.monotonic()
    disk = small if has_disk else None
    print("full disk: a tmpfs of 64 MiB" if has_disk else "full disk: no tmpfs can be mounted here")
    try:
        # Training needs frames, sampling a flow; the test of two jobs is one of sampling.
        needed = [name for name in SHARES if name in {"md", "train", "sample", *args.stages}]
        stages = {
            name: KilledStage(name, folder, disk, random.Random(f"{args.seed} {name}"))
            for name in needed
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
        **{key: sum(r[key] for r in reports.values()) for key in ("kills", "of_real_processes")},
        "mismatches": wrong,
        "full_disk": "tmpfs" if has_disk else "not tried: no tmpfs could be mounted",
        "wall_seconds": round(time.monotonic() - start),
        "stages": reports,
        "two_jobs": jobs,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print_table(reports)
    if wrong:
        print(f"{wrong} wrong; the folder is kept: {folder}")
    elif args.folder is None:
        shutil.rmtree(folder)
    return int(wrong > 0)


def print_table(reports: dict[str, Any]) -> None:
    """Print a table of kills by stage and means."""
    means = [*MEANS, DISK]
    width = max(map(len, means))
    print(" " * width, *(f"{name:>8}" for name in reports))
    for name in means:
        print(f"{name:{width}}", *(f"{r['by_means'].get(name, 0):8}" for r in reports.values()))
    for key in ("kills", "of_real_processes", "passes", "mismatches", "checkpoint_went_back"):
        title = key.replace("_", " ")
        print(f"{title:{width}}", *(f"{r[key]:8}" for r in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
