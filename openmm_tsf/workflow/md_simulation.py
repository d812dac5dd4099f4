"""One simulation of molecular dynamics with its files, block by block.

Each block of steps has noise of its own seed: so a run that goes on from a block's beginning is the
same, bit by bit, as one that never stopped, and does not depend on how it was cut into pieces.
"""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from tqdm.auto import tqdm

from openmm_tsf.io.dcd import DCDWriter
from openmm_tsf.io.files import PathLike, read_json, write_arrays, write_json
from openmm_tsf.io.npz import read_arrays
from openmm_tsf.systems.files import write_molecule
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.signals import DeferredInterrupt
from openmm_tsf.utils.versions import package_versions
from openmm_tsf.workflow.settings import MDSettings

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.npz"
#: Frames that wait to be written, at most.
_BUFFERED_FRAMES = 100
#: Steps that share a seed. A Context is made anew for each block, which takes a millisecond where
#: nothing is compiled for it, and up to seconds elsewhere.
_BLOCK_STEPS = {"Reference": 10_000, "CPU": 10_000}
_BLOCK_STEPS_GPU = 1_000_000


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


class Dynamics:
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
        path = self.folder / CHECKPOINT
        if before is None:
            return False
        if not path.exists():
            if before["progress"]["n_frames"] or self.dcd.n_frames:
                raise ValueError(
                    f"{path}: no such checkpoint, but there are frames; they stay as they are, and "
                    "cannot be continued"
                )
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
        self._check_counts(path, found)
        progress = before["progress"]
        if min(progress["n_frames"], self.dcd.n_frames) >= self.settings.n_frames:
            self.step, self.n_frames = self._n_steps, self.dcd.n_frames  # nothing is left to do
            self._seconds_before = float(progress["wall_seconds"])
            return True
        self.dcd.cut_back(self.n_frames)
        self._boundary = found
        self._new_block()
        return True

    def _check_counts(self, path: Path, found: dict[str, np.ndarray]) -> None:
        """Refuse counts that cannot be, or contradict each other."""
        settings = self.settings
        for name in ("step", "n_frames", "n_minimizer", "block_steps"):
            if found[name].dtype.kind != "i" or found[name] < (name == "block_steps"):
                raise ValueError(
                    f"{path}: not a readable checkpoint of an MD run ({name}: no count)"
                )
        frames = max(0, self.step - settings.n_equilibration_steps) // settings.steps_per_frame
        if frames != self.n_frames or self.step % self.block_steps or self._seconds_before < 0:
            raise ValueError(
                f"{path}: not a readable checkpoint of an MD run (after {self.step} steps: "
                f"expected {frames} frames, got {self.n_frames})"
            )

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
        write_arrays(self.folder / CHECKPOINT, self._boundary | seconds)
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


MD_FORMAT = 2


def read_md_config(folder: PathLike) -> dict[str, Any]:
    """``config.json`` of an MD directory.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is none, or it is of something else, or damaged.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"output: {folder} holds no MD run (no config.json in it)")
    found = read_json(path)
    if found.get("stage") != "md":
        raise ValueError(f"output: {folder} holds no MD run")
    if found.get("format") not in (1, MD_FORMAT):
        raise ValueError(
            f"{path}: expected format {MD_FORMAT}, got {found.get('format')!r}, of another version"
        )
    for key, kind in (
        ("settings", dict), ("choices", dict), ("progress", dict), ("fingerprint", str)
    ):  # fmt: skip
        if not isinstance(found.get(key), kind):
            raise ValueError(f"{path}: damaged, {key} is missing")
    for part, keys in (
        ("progress", ("n_frames", "n_evaluations", "wall_seconds")), ("settings", ("temperature",))
    ):  # fmt: skip
        for key in keys:
            if not isinstance(found[part].get(key), (int, float)):
                raise ValueError(f"{path}: damaged, {key} is missing in {part}")
    return found
