"""One simulation of molecular dynamics with its files, block by block.

Every block of steps has a seed for its noise. A run that continues from the start of a block is
therefore the same, bit by bit, as one that never stopped.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import openmm

from openmm_tsf.io.dcd import DCDWriter
from openmm_tsf.io.files import write_arrays
from openmm_tsf.io.npz import read_arrays
from openmm_tsf.io.run_config import CONFIG
from openmm_tsf.systems.md_folder import TRAJECTORY
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.activity import log_while
from openmm_tsf.utils.progress import LINE_SECONDS, progress_bar
from openmm_tsf.utils.signals import DeferredInterrupt
from openmm_tsf.utils.validation import require_entry
from openmm_tsf.workflow.record import read_stage_config
from openmm_tsf.workflow.settings import MDSettings
from openmm_tsf.workflow.stage import Stage

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.npz"
#: The most frames that wait to be written.
BUFFERED_FRAMES = 100
#: Steps that share a seed. Every block has a new Context, which takes a millisecond on these
#: platforms, and up to seconds where it is compiled.
BLOCK_STEPS = {"Reference": 10_000, "CPU": 10_000}
BLOCK_STEPS_GPU = 1_000_000
_UNREADABLE = "not a readable checkpoint of an MD run"
#: Of distances, relative to them; a DCD file rounds to about as much.
CONSTRAINT_TOLERANCE = 1e-6
#: The counts in a checkpoint.
_COUNTS = ("step", "n_frames", "n_minimizer", "block_steps")


def fastest_platform(molecule: MolecularSystem, threads: int = 1, n_steps: int = 50) -> str:
    """Return the name of the platform with the fastest dynamics steps, by measurement."""
    seconds: dict[str, float] = {}
    for index in range(openmm.Platform.getNumPlatforms()):
        name = openmm.Platform.getPlatform(index).getName()
        try:
            seconds[name] = seconds_per_step(molecule, name, threads, n_steps, n_parts=5)
        except openmm.OpenMMException as error:
            logger.info("platform %s cannot run this System: %s", name, error)
    if not seconds:
        raise RuntimeError("no OpenMM platform can run this System")
    best = min(seconds, key=seconds.__getitem__)
    timings = ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in seconds.items())
    logger.info("platform %s for dynamics (per step: %s)", best, timings)
    return best


def seconds_per_step(
    molecule: MolecularSystem, platform: str, threads: int = 1, n_steps: int = 200, n_parts: int = 1
) -> float:
    """Measure the time of a step of dynamics on a platform: the best of several parts of the steps.

    In the best part the least was done by other programs; 50 steps may take less time than one of
    their turns.
    """
    integrator = openmm.VerletIntegrator(1e-9)  # ps: forces without motion
    context = _context(molecule, integrator, platform, threads)
    context.setPositions(molecule.positions)
    if molecule.constraints is not None:
        context.applyConstraints(CONSTRAINT_TOLERANCE)
    integrator.step(2)
    steps, best = max(1, n_steps // n_parts), math.inf
    for _ in range(n_parts):
        start = time.perf_counter()
        integrator.step(steps)
        context.getState(getEnergy=True)
        best = min(best, (time.perf_counter() - start) / steps)
    return best


def _context(
    molecule: MolecularSystem, integrator: openmm.Integrator, platform: str, threads: int
) -> openmm.Context:
    chosen = openmm.Platform.getPlatformByName(platform)
    properties = {"Threads": str(threads)} if platform == "CPU" else {}
    if "DeterministicForces" in chosen.getPropertyNames():
        properties["DeterministicForces"] = "true"
    if molecule.constraints is not None:
        integrator.setConstraintTolerance(CONSTRAINT_TOLERANCE)
    return openmm.Context(molecule.system, integrator, chosen, properties)


#: ``progress`` in ``config.json`` at the start.
NO_PROGRESS = {"n_frames": 0, "n_evaluations": 0, "n_minimizer_iterations": 0, "wall_seconds": 0.0}


class MDSimulation:
    """One simulation with its files: it continues from the checkpoint, to which the DCD is cut."""

    def __init__(self, stage: Stage, settings: MDSettings) -> None:
        assert settings.timestep is not None  # see MDSettings.completed_for
        self.stage, self.settings, self.timestep = stage, settings, settings.timestep
        self.molecule, self.directory = stage.molecule, stage.directory
        self.platform: str = stage.choices["platform"]
        self.threads: int = stage.choices["threads"]
        self.dcd = DCDWriter(self.directory / TRAJECTORY, self.molecule.n_atoms)
        self.block_steps = BLOCK_STEPS.get(self.platform, BLOCK_STEPS_GPU)
        self.step = self.n_frames = self.n_minimizer = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._saved = self._started
        self._boundary: dict[str, np.ndarray] = {}  # the state at the start of the block
        self._waiting: list[np.ndarray] = []  # frames that are not in the file yet
        self._integrator: openmm.Integrator | None = None
        self._context: openmm.Context | None = None

    @property
    def wall_seconds(self) -> float:
        """The time so far, with that of earlier processes."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def n_evaluations(self) -> int:
        """The number of steps so far, and of iterations of the minimizer."""
        return self.n_minimizer + self.step

    @property
    def n_steps(self) -> int:
        """The number of steps in all."""
        settings = self.settings
        return settings.n_equilibration_steps + settings.n_frames * settings.steps_per_frame

    def resume(self) -> bool:
        """Continue from the checkpoint; return whether there is one."""
        path = self.directory / CHECKPOINT
        progress = check_progress(self.stage.config, self.directory)
        if not path.exists():
            if progress["n_frames"] or self.dcd.n_frames:
                raise ValueError(
                    f"{path}: no such checkpoint, but there are frames; they stay as they are, and "
                    "cannot be continued"
                )
            self.dcd.path.unlink(missing_ok=True)  # killed before the first checkpoint
            return False
        shape = (self.molecule.n_atoms, 3)
        layout = {"positions": shape, "velocities": shape, "wall_seconds": ()}
        checkpoint = read_arrays(
            path, "checkpoint of an MD run", layout | dict.fromkeys(_COUNTS, ())
        )
        self.step, self.n_frames, self.n_minimizer, self.block_steps = (
            int(checkpoint[name]) for name in _COUNTS
        )
        self._seconds_before = float(checkpoint["wall_seconds"])
        self._check_counts(path, checkpoint)
        if min(progress["n_frames"], self.dcd.n_frames) >= self.settings.n_frames:
            self.step, self.n_frames = self.n_steps, self.dcd.n_frames  # it is complete
            self._seconds_before = float(progress["wall_seconds"])
            return True
        self.dcd.cut_back(self.n_frames)
        self._boundary = checkpoint
        self._new_block()
        return True

    def _check_counts(self, path: Path, checkpoint: dict[str, np.ndarray]) -> None:
        """Refuse counts that are not possible, or contradict each other."""
        settings = self.settings
        for name in _COUNTS:
            least = 1 if name == "block_steps" else 0
            if checkpoint[name].dtype.kind != "i" or checkpoint[name] < least:
                raise ValueError(f"{path}: {_UNREADABLE} ({name}: expected a count)")
        frames = max(0, self.step - settings.n_equilibration_steps) // settings.steps_per_frame
        if frames != self.n_frames or self.step % self.block_steps or self._seconds_before < 0:
            after = f"after {self.step} steps: expected {frames} frames, got {self.n_frames}"
            raise ValueError(f"{path}: {_UNREADABLE} ({after})")

    def start(self) -> None:
        """Minimise, draw velocities, and write the first checkpoint."""
        settings = self.settings
        interval, wait = settings.steps_per_frame, settings.n_equilibration_steps
        title = "frames of Langevin dynamics"
        self.dcd.create(title, wait + interval, interval, self.timestep)
        integrator = openmm.VerletIntegrator(self.timestep)
        context = _context(self.molecule, integrator, self.platform, self.threads)
        context.setPositions(self.molecule.positions)
        counter = _IterationCounter()
        with log_while(logger, "minimising the energy of the start"):
            openmm.LocalEnergyMinimizer.minimize(context, reporter=counter)
        self.n_minimizer = counter.count
        context.setVelocitiesToTemperature(settings.temperature, self._seed("velocities", 0))
        self._context = context
        self._keep_boundary()
        self.save()
        self._new_block()

    def advance(self, interrupt: DeferredInterrupt) -> None:
        """Simulate until n_frames are written, or an interrupt."""
        settings, options = self.settings, self.stage.options
        title, total = f"MD at {settings.temperature:g} K", settings.n_frames
        start, show = self.n_frames, options.progress
        with progress_bar(title, total, unit="frame", initial=start, show=show) as bar:
            shown = -math.inf
            while self.step < self.n_steps and not interrupt.requested:
                before = settings.n_equilibration_steps - self.step
                if before > 0 and time.monotonic() - shown >= LINE_SECONDS:
                    bar.set_postfix_str(f"{before} steps before the first")
                    shown = time.monotonic()
                done = self.n_frames + len(self._waiting)
                frame = settings.n_equilibration_steps + (done + 1) * settings.steps_per_frame
                boundary = (self.step // self.block_steps + 1) * self.block_steps
                target = min(frame, boundary, self.step + 1000)
                assert self._integrator is not None
                self._integrator.step(target - self.step)
                self.step = target
                if target == frame:
                    self._waiting.append(self._positions())
                    if done == start:  # the time of equilibration is not one of frames
                        bar.set_postfix_str("", refresh=False)
                        bar.unpause()
                    bar.update()
                if len(self._waiting) >= BUFFERED_FRAMES:
                    self.write_frames()
                if target == boundary:
                    self.write_frames()
                    self._keep_boundary()
                    self._new_block()
                    if time.monotonic() - self._saved >= options.checkpoint_seconds:
                        self.save()

    def finish(self) -> None:
        """Write what is not written yet."""
        if self._boundary:
            self.write_frames()
            self.save()
        self._record_progress()

    def _positions(self) -> np.ndarray:
        assert self._context is not None
        state = self._context.getState(positions=True)
        positions = np.asarray(state.getPositions(asNumpy=True)._value)
        if not np.isfinite(positions).all():
            raise RuntimeError(
                f"the dynamics blew up before frame {self.n_frames + len(self._waiting)}: "
                f"positions are not finite; try a time step below {self.timestep} ps"
            )
        return positions

    def write_frames(self) -> None:
        """Append the frames that wait to the trajectory."""
        if self._waiting:
            self.dcd.append(np.array(self._waiting), self.n_frames)
            self.n_frames += len(self._waiting)
            self._waiting = []

    def _keep_boundary(self) -> None:
        assert self._context is not None
        state = self._context.getState(velocities=True)
        self._boundary = {
            "positions": self._positions(),
            "velocities": np.asarray(state.getVelocities(asNumpy=True)._value),
            **{name: np.array(getattr(self, name)) for name in _COUNTS},
        }

    def _new_block(self) -> None:
        """Make a Context at the start of a block, with the seed of the block."""
        settings = self.settings
        self._integrator = openmm.LangevinMiddleIntegrator(
            settings.temperature, settings.friction, self.timestep
        )
        block = int(self._boundary["step"]) // self.block_steps
        self._integrator.setRandomNumberSeed(self._seed("noise", block))
        self._context = _context(self.molecule, self._integrator, self.platform, self.threads)
        self._context.setPositions(self._boundary["positions"])
        self._context.setVelocities(self._boundary["velocities"])
        self._context.setStepCount(self.step)
        self._context.setTime(self.step * self.timestep)

    def _seed(self, purpose: str, block: int) -> int:
        """A seed for OpenMM: 31 bits, and not 0, for which OpenMM takes one from the clock."""
        words = [self.settings.seed, ("velocities", "noise").index(purpose), block]
        return int(np.random.SeedSequence(words).generate_state(1)[0]) & 0x7FFFFFFF or 1

    def save(self) -> None:
        """Write the checkpoint at the start of the block, then the progress."""
        seconds = {"wall_seconds": np.array(self.wall_seconds)}
        write_arrays(self.directory / CHECKPOINT, self._boundary | seconds)
        self._record_progress()
        self._saved = time.monotonic()

    def _record_progress(self) -> None:
        self.stage.config["progress"] = {
            "n_frames": self.n_frames,
            "n_evaluations": self.n_evaluations,
            "n_minimizer_iterations": self.n_minimizer,
            "wall_seconds": round(self.wall_seconds, 3),
        }
        self.stage.save()


class _IterationCounter(openmm.MinimizationReporter):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def report(self, iteration: int, x: Any, grad: Any, args: Any) -> bool:
        self.count += 1
        return False


def read_md_config(directory: Path) -> dict[str, Any]:
    """Return ``config.json`` of a directory of the md stage."""
    config = read_stage_config(directory, "md")
    if config is None:
        raise ValueError(f"output: {directory} is not a directory of the md stage")
    check_progress(config, directory)
    try:
        require_entry(config["choices"]["settings"], "temperature", int | float)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: damaged, {error}") from error
    return config


def check_progress(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return ``progress`` of the ``config.json`` of a directory, complete."""
    try:
        progress: dict[str, Any] = require_entry(config, "progress", dict)
        for name in ("n_frames", "n_evaluations", "wall_seconds"):
            require_entry(progress, name, int | float)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: damaged, {error}") from error
    return progress
