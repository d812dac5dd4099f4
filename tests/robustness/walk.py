"""Stop a tiny stage at each of its file operations, and resume it.

    python -m tests.robustness.walk                              # all operations: half an hour
    python -m tests.robustness.walk --stages md --faults die --points 5

After a fault, the stage is resumed, stopped again, and run to the end. The directory must then be
identical to that of an uninterrupted run, bit by bit. Stages: md, train, sample (without its
analysis) and run (md, two trainings with a round of sampling between them, and production). Faults:
the process ends with half of a write written (``die``), the disk is full from then on (``full``:
the message must name a file), or a Ctrl-C is not deferred (``interrupt``).
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.cli.main import error_line
from openmm_tsf.sampling import recorder
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.training import FitSettings
from openmm_tsf.workflow import md_simulation
from openmm_tsf.workflow import sample as sample_module
from openmm_tsf.workflow.frames import FrameSource
from openmm_tsf.workflow.md import run_md
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.settings import FlowSettings, MDSettings, RunSettings, SamplingSettings
from openmm_tsf.workflow.train import train
from tests.robustness import inspection
from tests.robustness.faulty_disk import FAULTS, KILLED, FaultyDisk
from tests.robustness.sandbox import isolated

STAGES = ("md", "train", "sample", "run")
INTERRUPTED = 130
FIT = FitSettings(
    n_steps=4, batch_size=8, kl_batch_size=4, validate_interval=2, n_validation_draws=4,
    ramp=(0.0, 0.0),
)  # fmt: skip
LADDER = (400.0, 600.0)
SAMPLING = SamplingSettings(LADDER, n_walkers=3, n_iterations=4, n_tuning=2)
FLOW = FlowSettings(n_blocks=2, hidden=(4,))
OPTIONS = RunOptions(seed=3, platform="Reference", progress=False)
MD = MDSettings(n_frames=200, steps_per_frame=10, n_equilibration_steps=100, seed=5)


class Walk:
    """The faults of a stage, and the folder of its runs."""

    def __init__(self, stage: str, folder: Path) -> None:
        self.stage, self.folder = stage, folder
        folder.mkdir(parents=True)
        self.molecule = alanine_dipeptide()
        self.dataset = MDDataset.shipped(self.molecule, stride=400)
        self.flow = folder / "flow"
        self.reference = folder / "reference"
        if stage == "sample":
            self._child(self._train, self.flow)
        status, message, self.n_operations = self._child(self._job, self.reference)
        if status:
            raise RuntimeError(f"{stage}: the uninterrupted run ended with {status}: {message}")
        again, _, n = self._child(self._job, folder / "again")
        self.problems = inspection.differences(folder / "again", self.reference)
        if (again, n) != (0, self.n_operations):
            self.problems.append("another number of operations")

    def _job(self, output: Path) -> None:
        # Checkpoints in quick succession; their number does not change the results.
        md_simulation.BLOCK_STEPS["Reference"], md_simulation.BUFFERED_FRAMES = 700, 40
        recorder.CHECKPOINT_SHARE = 1e9
        sample_module.analyze = lambda folder, **options: {}
        options = replace(OPTIONS, resume=True, checkpoint_seconds=0.0)
        if self.stage == "md":
            if run_md(self.molecule, output, MD, options=replace(options, seed=None)).interrupted:
                raise KeyboardInterrupt
        elif self.stage == "train":
            self._train(output, options)
        elif self.stage == "sample":
            sample_module.sample(self.flow, output, SAMPLING, options=options)
        else:
            settings = RunSettings(
                md=MD, flow=FLOW, fit=FIT, n_rounds=1, round_iterations=2, round_stride=1,
                refit=FIT, sampling=SAMPLING,
            )  # fmt: skip
            run(output, settings, frames=FrameSource(simulate=True), options=options)

    def _train(self, output: Path, options: RunOptions = OPTIONS) -> None:
        train(self.dataset, output, FLOW, FIT, options=options)

    def _child(
        self, job: Callable[[Path], None], output: Path, fault: str = "die", at: int | None = None
    ) -> tuple[int, str, int]:
        """Return the exit status, the error in a line, and the number of file operations."""

        def call() -> tuple[int, str, int]:
            disk = FaultyDisk(output, fault, at)
            disk.install()
            try:
                job(output)
            except KeyboardInterrupt:
                return INTERRUPTED, "", disk.count
            except Exception as error:
                trace = "" if fault == "full" else "\n" + traceback.format_exc()
                return 2, error_line(error) + trace, disk.count
            return 0, "", disk.count

        outcome = isolated(call, seconds=600.0)
        if outcome.error is not None:
            return 1, f"{outcome.error}: {outcome.message}\n{outcome.trace}", 0
        if outcome.killed is not None:
            return outcome.status, outcome.killed, 0
        result: tuple[int, str, int] = outcome.status
        return result

    def die(self, fault: str, at: int) -> list[str]:
        """Return the problems after a fault at operation `at`; the directory is then kept."""
        output = self.folder / f"{fault}_{at}"
        status, message, _ = self._child(self._job, output, fault, at)
        problems = self._status(fault, status, message)
        problems += self._inspect(output)
        # The resumed process is stopped too, mostly before it continues the computation.
        self._child(self._job, output, "die", 1 + (7 * at) % max(10, self.n_operations // 3))
        problems += self._inspect(output)
        status, message, _ = self._child(self._job, output)
        if status:
            problems.append(f"resuming ended with {status}: {message}")
        else:
            problems += inspection.differences(output, self.reference)
        if not problems:
            shutil.rmtree(output)
        return problems

    def _status(self, fault: str, status: int, message: str) -> list[str]:
        expected = {"die": (KILLED,), "full": (0, 2), "interrupt": (INTERRUPTED,)}[fault]
        if status not in expected:
            return [f"ended with {status}, expected {expected}: {message}"]
        if status == 2 and not ("No space left" in message and str(self.folder) in message):
            return [f"the message does not name a file on a full disk: {message}"]
        return []

    def _inspect(self, output: Path) -> list[str]:
        if not output.is_dir():
            return []
        problems = inspection.damaged(output) + inspection.check_trajectories(
            output, self.reference
        )
        if self.stage in ("sample", "run"):
            problems += inspection.check_run(output, self.reference)[1]
        return problems


def points(n: int, n_points: int | None, stride: int) -> list[int]:
    """Return the operations of n that fail: one in `stride`, or `n_points` spread evenly."""
    if n_points is None:
        return list(range(1, n + 1, stride))
    return sorted({1 + round((k + 0.5) * (n - 1) / n_points) for k in range(n_points)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--points", type=int, help="number of operations, spread evenly")
    parser.add_argument("--every", type=int, default=1, help="stride of operations (default: all)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("openmm_tsf").setLevel(logging.ERROR)
    inspection.quiet_stdout()
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="walk-"))).resolve()
    report: dict[str, Any] = {}
    wrong = 0
    for stage in args.stages:
        start = time.monotonic()
        walk = Walk(stage, folder / stage)
        problems_of = {"": walk.problems} if walk.problems else {}
        count, n = 0, walk.n_operations
        for fault, at in product(args.faults, points(n, args.points, args.every)):
            count += 1
            if problems := walk.die(fault, at):
                problems_of[f"{fault} {at}"] = problems
                print(f"{stage}: {fault} at {at}:", *problems, sep="\n  ", file=sys.stderr)
        report[stage] = {
            "operations": n, "deaths": count, "problems": problems_of,
            "seconds": round(time.monotonic() - start, 1),
        }  # fmt: skip
        wrong += len(problems_of)
        print(f"{stage}: {n} file operations, {count} faults, {len(problems_of)} wrong")
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if wrong:
        print(f"the directories are kept in {folder}")
    elif args.folder is None:
        shutil.rmtree(folder)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
