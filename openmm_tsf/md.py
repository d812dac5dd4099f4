"""Plain molecular dynamics with OpenMM: where the training frames come from.

The noise is drawn block by block, each block of steps with a seed of its own that follows from the
user's: so a run that goes on from a block's beginning is the same, bit by bit, as one that never
stopped, and does not depend on how it was cut into pieces.
"""

import logging
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openmm
from tqdm.auto import tqdm

from openmm_tsf.array_files import read_arrays
from openmm_tsf.dcd import DCDWriter
from openmm_tsf.directories import claimed, contents
from openmm_tsf.doors import (
    check_fields,
    positive_number,
    seconds_between,
    seed_number,
    thread_count,
    whole_number,
)
from openmm_tsf.files import PathLike, write_arrays, write_json
from openmm_tsf.inputs import (
    MD_FORMAT,
    check_platform,
    package_versions,
    read_md_config,
    write_molecule,
)
from openmm_tsf.interrupts import DeferredInterrupt
from openmm_tsf.plain import from_plain
from openmm_tsf.systems import MolecularSystem
from openmm_tsf.units import PICOSECOND, as_temperature, in_unit

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0
_CHECKPOINT = "checkpoint.npz"
#: Frames that wait to be written, at most.
_BUFFERED_FRAMES = 100
#: Steps that share a seed. A Context is made anew for each block, which takes a millisecond where
#: nothing is compiled for it, and up to seconds elsewhere.
_BLOCK_STEPS = {"Reference": 10_000, "CPU": 10_000}
_BLOCK_STEPS_GPU = 1_000_000


#: Steps between frames, and before the first.
_MOST_STEPS = 10**9
#: In ps: a thousand times what molecules stand.
_LONGEST_STEP = 1.0


def _time_step(value: Any, name: str) -> float:
    step = positive_number(in_unit(value, PICOSECOND, name), name)
    if step > _LONGEST_STEP:
        raise ValueError(f"{name}: expected at most {_LONGEST_STEP:g} ps, got {value!r}")
    return step


@dataclass(frozen=True)
class MDSettings:
    """Langevin dynamics at one temperature.

    Parameters
    ----------
    temperature
        In K.
    n_frames
        Frames to write in all.
    steps_per_frame
        Time steps between frames.
    timestep
        In ps.
    friction
        In 1/ps.
    n_equilibration_steps
        Time steps before the first frame, after a minimization.
    seed
        Seed of velocities and noise.

    Raises
    ------
    TypeError, ValueError
        If a number is none, or out of its range.
    """

    temperature: float = 600.0
    n_frames: int = 40_000
    steps_per_frame: int = 250
    timestep: float = 0.001
    friction: float = 1.0
    n_equilibration_steps: int = 20_000
    seed: int = field(default=1)

    def __post_init__(self) -> None:
        check_fields(
            self,
            temperature=as_temperature,
            # The header of a DCD file counts in 32 bits.
            n_frames=partial(whole_number, most=2**31 - 1),
            steps_per_frame=partial(whole_number, most=_MOST_STEPS),
            timestep=_time_step,
            friction=lambda value, name: positive_number(
                in_unit(value, 1 / PICOSECOND, name), name
            ),
            n_equilibration_steps=partial(whole_number, least=0, most=_MOST_STEPS),
            seed=seed_number,
        )


class MDResult(NamedTuple):
    """What :func:`run_md` did."""

    trajectory: Path
    n_frames: int
    n_evaluations: int
    wall_seconds: float
    interrupted: bool


def run_md(
    molecule: MolecularSystem,
    output: PathLike,
    settings: MDSettings | None = None,
    *,
    platform: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: bool = True,
) -> MDResult:
    """Langevin dynamics with frames in ``md.dcd``; Ctrl-C ends it with everything written.

    Parameters
    ----------
    molecule
        The molecule; its positions are minimized first.
    output
        Directory for ``md.dcd``, ``topology.pdb``, ``system.xml``, ``config.json`` and
        ``checkpoint.npz``.
    settings
        Length, temperature, time step; when resuming, those of the run by default.
    platform
        OpenMM platform; by default the fastest, by a short measurement that ``config.json`` keeps.
    threads
        Threads of the CPU platform (default 1). With more of them OpenMM's sums depend on which
        thread is first: frames are then not the same bit by bit from run to run.
    resume
        Continue what is in `output`, also to more frames than were asked for at first; the same as
        if it had not stopped. Where nothing was begun yet, begin.
    checkpoint_seconds
        Time between checkpoints, which lie between blocks of 10 000 steps (a million on GPUs).
    progress
        Show a progress bar.

    Raises
    ------
    FileExistsError
        If `output` is not empty and `resume` is false.
    DirectoryInUse
        If another process writes to `output`.
    ValueError
        If `output` is not of an MD run, or it was another molecule, temperature or time step, or
        there is no such platform.
    RuntimeError
        If the dynamics blow up.
    """
    check_platform(platform)
    seconds_between(checkpoint_seconds)
    if threads is not None:
        threads = thread_count(threads)
    with claimed(output, resume=resume) as lock:
        folder = lock.directory
        before = read_md_config(folder) if resume and contents(folder) else None
        if before is not None:
            settings = _same_settings(before, settings, molecule, folder)
            platform, threads = _same_choices(before["choices"], platform, threads)
        settings = settings or MDSettings()
        threads = threads or 1
        if before is None:
            platform = platform or fastest_platform(molecule, threads)
        assert platform is not None
        run = _Dynamics(molecule, folder, settings, platform, threads, checkpoint_seconds)
        with DeferredInterrupt() as interrupt:
            if not run.take_up(before):
                run.begin()
            try:
                run.advance(interrupt, progress)
            except RuntimeError:  # what came before the dynamics blew up is good
                run.finish()
                raise
            run.finish()
        if interrupt.requested:
            logger.warning(
                "interrupted: %d of %d frames are written", run.n_frames, settings.n_frames
            )
        return MDResult(
            run.dcd.path, run.n_frames, run.n_evaluations, run.wall_seconds, interrupt.requested
        )


def recorded_settings(folder: PathLike) -> MDSettings | None:
    """Settings of the MD run in a directory; None where nothing was begun.

    Raises
    ------
    ValueError
        If the directory is of something else, or damaged.
    """
    if not Path(folder).is_dir() or not contents(folder):
        return None
    written = read_md_config(folder)["settings"]
    settings: MDSettings = from_plain(MDSettings, written, str(Path(folder) / "config.json"))
    return settings


def _same_settings(
    before: dict[str, Any], settings: MDSettings | None, molecule: MolecularSystem, folder: Path
) -> MDSettings:
    if before["fingerprint"] != molecule.fingerprint:
        raise ValueError(f"output: the MD run in {folder} is of another molecule")
    written = recorded_settings(folder)
    assert written is not None
    if settings is None:
        return written
    for name, value in asdict(replace(written, n_frames=settings.n_frames)).items():
        if getattr(settings, name) != value:
            raise ValueError(
                f"{name}: the run in {folder} has {value}, got {getattr(settings, name)}"
            )
    return settings


def _same_choices(
    written: dict[str, Any], platform: str | None, threads: int | None
) -> tuple[str, int]:
    """Platform and threads of the run; others are the user's to choose, and said."""
    for name, now in (("platform", platform), ("threads", threads)):
        if now is not None and now != written.get(name):
            logger.warning(
                "%s: the run was started with %s, it goes on with %s: valid, but not the same bit "
                "by bit", name, written.get(name), now,
            )  # fmt: skip
    found = platform or written.get("platform")
    check_platform(found)
    return str(found), thread_count(threads or written.get("threads") or 1)


def fastest_platform(molecule: MolecularSystem, threads: int = 1, n_steps: int = 50) -> str:
    """Name of the platform that makes the quickest dynamics steps here, by measurement.

    Raises
    ------
    RuntimeError
        If no platform can run the System.
    """
    seconds: dict[str, float] = {}
    for index in range(openmm.Platform.getNumPlatforms()):
        name = openmm.Platform.getPlatform(index).getName()
        integrator = openmm.VerletIntegrator(1e-9)  # in ps: nothing moves, everything is computed
        try:
            context = _context(molecule, integrator, name, threads)
            context.setPositions(molecule.positions)
            integrator.step(2)
            start = time.perf_counter()
            integrator.step(n_steps)
            context.getState(getEnergy=True)
        except openmm.OpenMMException as error:
            logger.info("platform %s cannot run this System: %s", name, error)
            continue
        seconds[name] = (time.perf_counter() - start) / n_steps
        del context, integrator
    if not seconds:
        raise RuntimeError("no OpenMM platform can run this System")
    best = min(seconds, key=seconds.__getitem__)
    timings = ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in seconds.items())
    logger.info("platform %s for dynamics (per step: %s)", best, timings)
    return best


def _context(
    molecule: MolecularSystem, integrator: openmm.Integrator, platform: str, threads: int
) -> openmm.Context:
    chosen = openmm.Platform.getPlatformByName(platform)
    properties = {}
    if "DeterministicForces" in chosen.getPropertyNames():
        properties["DeterministicForces"] = "true"
    if platform == "CPU":
        properties["Threads"] = str(threads)
    return openmm.Context(molecule.system, integrator, chosen, properties)


class _Dynamics:
    """One simulation with its files: the checkpoint is the truth, the DCD is cut to fit it."""

    def __init__(
        self,
        molecule: MolecularSystem,
        folder: Path,
        settings: MDSettings,
        platform: str,
        threads: int,
        checkpoint_seconds: float,
    ) -> None:
        self.molecule, self.folder, self.settings = molecule, folder, settings
        self.platform, self.threads = platform, threads
        self.checkpoint_seconds = checkpoint_seconds
        self.dcd = DCDWriter(folder / "md.dcd", molecule.n_atoms)
        self.block_steps = _BLOCK_STEPS.get(platform, _BLOCK_STEPS_GPU)
        self.step = self.n_frames = self.n_minimizer = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._saved = self._started
        self._boundary: dict[str, np.ndarray] = {}  # where the present block began
        self._waiting: list[np.ndarray] = []  # frames not yet in the file
        self._integrator: openmm.Integrator | None = None
        self._context: openmm.Context | None = None

    @property
    def wall_seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    @property
    def n_evaluations(self) -> int:
        """Steps so far, and one for each iteration of the minimizer."""
        return self.n_minimizer + self.step

    @property
    def _n_steps(self) -> int:
        settings = self.settings
        return settings.n_equilibration_steps + settings.n_frames * settings.steps_per_frame

    def take_up(self, before: dict[str, Any] | None) -> bool:
        """Go on from the checkpoint, if there is one."""
        path = self.folder / _CHECKPOINT
        if before is None:
            return False
        if not path.exists():
            self.dcd.path.unlink(missing_ok=True)  # killed before the first checkpoint
            logger.info("no checkpoint yet in %s: from the beginning", self.folder)
            return False
        shape = (self.molecule.n_atoms, 3)
        scalars = ("step", "n_frames", "n_minimizer", "wall_seconds", "block_steps")
        layout = {"positions": shape, "velocities": shape} | dict.fromkeys(scalars, ())
        found = read_arrays(path, "checkpoint of an MD run", layout)
        self.step, self.n_frames = int(found["step"]), int(found["n_frames"])
        self.n_minimizer = int(found["n_minimizer"])
        self.block_steps = int(found["block_steps"])
        self._seconds_before = float(found["wall_seconds"])
        if self.n_frames < 0 or self.step < 0 or self.block_steps < 1:
            raise ValueError(f"{path}: not a readable checkpoint of an MD run (negative counts)")
        progress = before["progress"]
        if min(progress["n_frames"], self.dcd.n_frames) >= self.settings.n_frames:
            self.step, self.n_frames = self._n_steps, self.dcd.n_frames  # nothing is left to do
            self._seconds_before = float(progress["wall_seconds"])
            return True
        self.dcd.cut_back(self.n_frames)
        self._boundary = found
        self._new_block()
        return True

    def begin(self) -> None:
        """Minimise, draw velocities, write everything that a continuation needs."""
        self._write_config()  # first: it says what this directory is
        write_molecule(self.molecule, self.folder)
        self.dcd.create(
            "frames of Langevin dynamics",
            self.settings.n_equilibration_steps + self.settings.steps_per_frame,
            self.settings.steps_per_frame,
            self.settings.timestep,
        )
        integrator = openmm.VerletIntegrator(self.settings.timestep)
        context = _context(self.molecule, integrator, self.platform, self.threads)
        context.setPositions(self.molecule.positions)
        counter = _IterationCounter()
        openmm.LocalEnergyMinimizer.minimize(context, reporter=counter)
        self.n_minimizer = counter.count
        context.setVelocitiesToTemperature(self.settings.temperature, self._seed("velocities", 0))
        self._context = context
        self._note_boundary()
        self.save()
        self._new_block()

    def advance(self, interrupt: DeferredInterrupt, progress: bool) -> None:
        """Steps and frames until n_frames are written, or an interrupt."""
        settings = self.settings
        with tqdm(
            total=settings.n_frames,
            initial=self.n_frames,
            desc=f"MD at {settings.temperature:g} K",
            unit="frame",
            disable=not progress,
        ) as bar:
            while self.step < self._n_steps and not interrupt.requested:
                done = self.n_frames + len(self._waiting)
                frame = settings.n_equilibration_steps + (done + 1) * settings.steps_per_frame
                boundary = (self.step // self.block_steps + 1) * self.block_steps
                target = min(frame, boundary, self.step + 1000)
                assert self._integrator is not None
                self._integrator.step(target - self.step)
                self.step = target
                if target == frame:
                    self._waiting.append(self._positions())
                    bar.update()
                if len(self._waiting) >= _BUFFERED_FRAMES:
                    self._write_frames()
                if target == boundary:
                    self._write_frames()
                    self._note_boundary()
                    self._new_block()
                    if time.monotonic() - self._saved >= self.checkpoint_seconds:
                        self.save()

    def finish(self) -> None:
        """Write what is not written yet."""
        if self._boundary:
            self._write_frames()
            self.save()
        self._write_config()

    def _positions(self) -> np.ndarray:
        assert self._context is not None
        state = self._context.getState(positions=True)
        positions = np.asarray(state.getPositions(asNumpy=True)._value)
        if not np.isfinite(positions).all():
            raise RuntimeError(
                f"the dynamics blew up before frame {self.n_frames + len(self._waiting)}: "
                f"positions are not finite; try a time step below {self.settings.timestep} ps"
            )
        return positions

    def _write_frames(self) -> None:
        if self._waiting:
            self.dcd.append(np.array(self._waiting), self.n_frames)
            self.n_frames += len(self._waiting)
            self._waiting = []

    def _note_boundary(self) -> None:
        assert self._context is not None
        state = self._context.getState(velocities=True)
        self._boundary = {
            "positions": self._positions(),
            "velocities": np.asarray(state.getVelocities(asNumpy=True)._value),
            "step": np.array(self.step),
            "n_frames": np.array(self.n_frames),
            "n_minimizer": np.array(self.n_minimizer),
            "block_steps": np.array(self.block_steps),
        }

    def _new_block(self) -> None:
        """A Context at the boundary, with the block's own noise."""
        settings = self.settings
        self._integrator = openmm.LangevinMiddleIntegrator(
            settings.temperature, settings.friction, settings.timestep
        )
        block = int(self._boundary["step"]) // self.block_steps
        self._integrator.setRandomNumberSeed(self._seed("noise", block))
        self._context = _context(self.molecule, self._integrator, self.platform, self.threads)
        self._context.setPositions(self._boundary["positions"])
        self._context.setVelocities(self._boundary["velocities"])
        self._context.setStepCount(self.step)
        self._context.setTime(self.step * settings.timestep)

    def _seed(self, purpose: str, block: int) -> int:
        """An OpenMM seed: 31 bits, and not 0, which would mean one of the clock."""
        words = [self.settings.seed, ("velocities", "noise").index(purpose), block]
        return int(np.random.SeedSequence(words).generate_state(1)[0]) & 0x7FFFFFFF or 1

    def save(self) -> None:
        """The checkpoint at the last block's beginning, then the figures of config.json."""
        seconds = {"wall_seconds": np.array(self.wall_seconds)}
        write_arrays(self.folder / _CHECKPOINT, self._boundary | seconds)
        self._write_config()
        self._saved = time.monotonic()

    def _write_config(self) -> None:
        content = {
            "format": MD_FORMAT,
            "stage": "md",
            "settings": asdict(self.settings),
            "choices": {"platform": self.platform, "threads": self.threads},
            "fingerprint": self.molecule.fingerprint,
            "progress": {
                "n_frames": self.n_frames,
                "n_evaluations": self.n_evaluations,
                "n_minimizer_iterations": self.n_minimizer,
                "wall_seconds": round(self.wall_seconds, 3),
            },
            "versions": package_versions(),
        }
        write_json(self.folder / "config.json", content)


class _IterationCounter(openmm.MinimizationReporter):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def report(self, iteration: int, x: Any, grad: Any, args: Any) -> bool:
        self.count += 1
        return False
