"""Let a tiny stage die at its k-th file operation, for every k, and resume it.

    python -m tests.robustness.walk                                  # every k: half an hour
    python -m tests.robustness.walk --stages md --faults die --points 5

Each death is followed by a second one during ``--resume``, then by a run to the end, whose
directory must be that of an uninterrupted one, bit by bit. Stages: md, train, sample (without its
analysis) and run (md, two trainings with a round of sampling between them, and production). Faults:
the process is gone with half of a write written (``die``), the disk is full from then on (``full``:
the process must end with one line that names a file), or a Ctrl-C is not deferred (``interrupt``).
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads must not be forked
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

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
from tests.robustness.faulty_disk import FAULTS, KILLED, FaultyDisk
from tests.robustness.wreckage import (
    check_run,
    check_trajectory,
    damaged,
    differences,
    quiet_stdout,
)

STAGES = ("md", "train", "sample", "run")
INTERRUPTED = 130
FIT = FitSettings(
    n_steps=4, batch_size=8, kl_batch_size=4, validate_interval=2, n_validation_draws=4,
    ramp=(0.0, 0.0),
)  # fmt: skip
LADDER = (400.0, 600.0)
SAMPLING = SamplingSettings(LADDER, n_walkers=3, n_iterations=4, n_tuning=2)
MD = MDSettings(n_frames=200, steps_per_frame=10, n_equilibration_steps=100, seed=5)


class Walk:
    """Deaths of one stage in a folder of its own."""

    def __init__(self, stage: str, folder: Path) -> None:
        self.stage, self.folder = stage, folder
        folder.mkdir(parents=True)
        self.molecule = alanine_dipeptide()
        self.dataset = MDDataset.shipped(self.molecule, stride=400)
        self.flow = folder / "flow"
        self.reference = folder / "reference"
        if stage == "sample":
            self._child(self._train, self.flow)
        status, words, self.n_operations = self._child(self._job, self.reference)
        if status:
            raise RuntimeError(f"{stage}: the uninterrupted run ended with {status}: {words}")
        again, _, n = self._child(self._job, folder / "again")
        self.repeatable = (
            [] if (again, n) == (0, self.n_operations) else ["another number of operations"]
        )
        self.repeatable += differences(folder / "again", self.reference)

    # -- the stage, in a process of its own ------------------------------------------------

    def _job(self, output: Path) -> None:
        # Many checkpoints in little time; where they lie does not change what is computed.
        md_simulation.BLOCK_STEPS["Reference"], md_simulation.BUFFERED_FRAMES = 700, 40
        recorder.CHECKPOINT_SHARE = 1e9
        sample_module.analyze = lambda folder: {}
        options = RunOptions(
            platform="Reference", resume=True, checkpoint_seconds=0.0, progress=False
        )
        if self.stage == "md":
            done = run_md(self.molecule, output, MD, options=options)
            if done.interrupted:
                raise KeyboardInterrupt
        elif self.stage == "train":
            self._train(output, replace(options, seed=3))
        elif self.stage == "sample":
            sample_module.sample(self.flow, output, SAMPLING, options=replace(options, seed=3))
        else:
            settings = RunSettings(
                md=MD, flow=FlowSettings(n_blocks=2, hidden=(4,)), fit=FIT, n_rounds=1,
                round_iterations=2, round_stride=1, refit=FIT, sampling=SAMPLING,
            )  # fmt: skip
            simulated = FrameSource(simulate=True)
            run(output, settings, frames=simulated, options=replace(options, seed=3))

    def _train(self, output: Path, options: RunOptions | None = None) -> None:
        options = options or RunOptions(seed=3, platform="Reference", progress=False)
        flow = FlowSettings(n_blocks=2, hidden=(4,))
        train(self.dataset, output, flow, FIT, options=options)

    def _child(
        self, job: Callable[[Path], None], output: Path, fault: str = "die", at: int | None = None
    ) -> tuple[int, str, int]:
        """Exit status, the error's line, and the file operations that were counted."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            status, words = 0, ""
            disk = FaultyDisk(output, fault, at)
            try:
                torch.set_num_threads(1)
                disk.install()
                job(output)
            except KeyboardInterrupt:
                status = INTERRUPTED
            except Exception as error:
                status, words = 2, error_line(error)
                if fault != "full":
                    words += "\n" + traceback.format_exc()
            os.write(write, json.dumps([words[:4000], disk.count]).encode())
            os._exit(status)
        os.close(write)
        with open(read, "rb") as pipe:
            said = pipe.read()
        _, code = os.waitpid(pid, 0)
        words, count = json.loads(said) if said else ("", 0)
        return os.waitstatus_to_exitcode(code), words, count

    # -- one death --------------------------------------------------------------------------

    def die(self, fault: str, at: int) -> list[str]:
        """What is wrong after a fault at operation `at`; the directory is kept if something is."""
        output = self.folder / f"{fault}_{at}"
        status, words, _ = self._child(self._job, output, fault, at)
        problems = self._status(fault, status, words)
        problems += self._look(output)
        # The resumed process dies, too, mostly early: in what it does before it goes on.
        second = 1 + (7 * at) % max(10, self.n_operations // 3)
        self._child(self._job, output, "die", second)
        problems += self._look(output)
        status, words, _ = self._child(self._job, output)
        if status:
            problems.append(f"resuming ended with {status}: {words}")
        else:
            problems += differences(output, self.reference)
        if not problems:
            shutil.rmtree(output)
        return problems

    def _status(self, fault: str, status: int, words: str) -> list[str]:
        expected = {"die": (KILLED,), "full": (0, 2), "interrupt": (INTERRUPTED,)}[fault]
        if status not in expected:
            return [f"ended with {status}, expected {expected}: {words}"]
        if status == 2 and not ("No space left" in words and str(self.folder) in words):
            return [f"the message does not name a file on a full disk: {words}"]
        return []

    def _look(self, output: Path) -> list[str]:
        if not output.is_dir():
            return []
        problems = damaged(output)
        topology = next(self.reference.rglob("topology.pdb"), None)
        for path in output.rglob("*.dcd"):
            whole = self.reference / path.relative_to(output)
            assert topology is not None
            problems += check_trajectory(path, whole, topology)
        if self.stage in ("sample", "run"):
            problems += check_run(output, self.reference)[1]
        return problems


def points(n: int, wanted: int | None, every: int) -> list[int]:
    """Operations at which to fail: all, every so many-th, or so many spread over them."""
    if wanted is None:
        return list(range(1, n + 1, every))
    return sorted({1 + round((k + 0.5) * (n - 1) / wanted) for k in range(wanted)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--points", type=int, help="so many operations, spread; all if left out")
    parser.add_argument("--every", type=int, default=1, help="every so many-th operation")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("openmm_tsf").setLevel(logging.ERROR)
    quiet_stdout()
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="walk-"))).resolve()
    report: dict[str, Any] = {}
    wrong = 0
    for stage in args.stages:
        start = time.monotonic()
        walk = Walk(stage, folder / stage)
        found = {"": walk.repeatable} if walk.repeatable else {}
        count = 0
        for fault in args.faults:
            for at in points(walk.n_operations, args.points, args.every):
                count += 1
                if problems := walk.die(fault, at):
                    found[f"{fault} {at}"] = problems
                    print(f"{stage}: {fault} at {at}:", *problems, sep="\n  ", file=sys.stderr)
        report[stage] = {
            "operations": walk.n_operations,
            "deaths": count,
            "problems": found,
            "seconds": round(time.monotonic() - start, 1),
        }
        wrong += len(found)
        print(f"{stage}: {walk.n_operations} file operations, {count} faults, {len(found)} wrong")
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if wrong:
        print(f"the directories are kept in {folder}")
        return 1
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
