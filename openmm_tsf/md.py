"""Plain molecular dynamics with OpenMM: where the training frames come from."""

import logging
import os
import struct
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import openmm
import openmm.app as app
from tqdm.auto import tqdm

from openmm_tsf.doors import check_fields, positive_number, seed_number, whole_number
from openmm_tsf.inputs import (
    PathLike,
    check_platform,
    claim_directory,
    package_versions,
    read_json,
    write_json,
    write_molecule,
)
from openmm_tsf.systems import MolecularSystem
from openmm_tsf.units import PICOSECOND, as_temperature, in_unit

logger = logging.getLogger(__name__)

_CHECKPOINT_SECONDS = 30.0
_DCD_HEADER_BYTES = 276  # of OpenMM's writer


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
            n_frames=whole_number,
            steps_per_frame=whole_number,
            timestep=lambda value, name: positive_number(in_unit(value, PICOSECOND, name), name),
            friction=lambda value, name: positive_number(
                in_unit(value, 1 / PICOSECOND, name), name
            ),
            n_equilibration_steps=partial(whole_number, least=0),
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
    resume: bool = False,
    progress: bool = True,
) -> MDResult:
    """Langevin dynamics with frames in ``md.dcd``; Ctrl-C ends it with everything written.

    Parameters
    ----------
    molecule
        The molecule; its positions are minimized first.
    output
        Directory for ``md.dcd``, ``topology.pdb``, ``system.xml``, ``config.json`` and
        ``checkpoint.xml``.
    settings
        Length, temperature, time step.
    platform
        OpenMM platform; by default the fastest, by a short measurement.
    resume
        Continue what is in `output` (also to more frames than were asked for at first). The noise
        after the interruption has a new seed, derived from the old one.
    progress
        Show a progress bar.

    Raises
    ------
    FileExistsError
        If `output` is not empty and `resume` is false.
    ValueError
        If there is nothing to resume, it was another molecule, temperature or time step, or
        there is no such platform.
    RuntimeError
        If the dynamics blow up.
    """
    settings = settings or MDSettings()
    check_platform(platform)
    folder = Path(output)
    before: dict[str, Any] | None = None
    if resume:
        before = _read_config(folder, molecule, settings)
        platform = platform or before["choices"]["platform"]
    else:
        folder = claim_directory(output)
        write_molecule(molecule, folder)
    chosen = platform or fastest_platform(molecule)
    run = _Dynamics(molecule, folder, settings, chosen, before)
    try:
        run.start()
        run.advance(progress)
        interrupted = False
    except KeyboardInterrupt:
        logger.warning("interrupted: %d of %d frames are written", run.n_frames, settings.n_frames)
        interrupted = True
    finally:
        run.close()
    return MDResult(run.trajectory, run.n_frames, run.n_evaluations, run.wall_seconds, interrupted)


def fastest_platform(molecule: MolecularSystem, n_steps: int = 50) -> str:
    """Name of the platform that makes the quickest dynamics steps here, by measurement.

    Raises
    ------
    RuntimeError
        If no platform can run the System.
    """
    seconds: dict[str, float] = {}
    for index in range(openmm.Platform.getNumPlatforms()):
        platform = openmm.Platform.getPlatform(index)
        integrator = openmm.VerletIntegrator(1e-9)  # in ps: nothing moves, everything is computed
        try:
            context = openmm.Context(molecule.system, integrator, platform)
            context.setPositions(molecule.positions)
            integrator.step(2)
            start = time.perf_counter()
            integrator.step(n_steps)
            context.getState(getEnergy=True)
        except openmm.OpenMMException as error:
            logger.info("platform %s cannot run this System: %s", platform.getName(), error)
            continue
        seconds[platform.getName()] = (time.perf_counter() - start) / n_steps
        del context, integrator
    if not seconds:
        raise RuntimeError("no OpenMM platform can run this System")
    best = min(seconds, key=seconds.__getitem__)
    timings = ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in seconds.items())
    logger.info("platform %s for dynamics (per step: %s)", best, timings)
    return best


class _Dynamics:
    """One simulation with its files: the checkpoint is the truth, the DCD is cut to fit it."""

    def __init__(
        self,
        molecule: MolecularSystem,
        folder: Path,
        settings: MDSettings,
        platform: str,
        before: dict[str, Any] | None,
    ) -> None:
        self.molecule, self.folder = molecule, folder
        self.settings, self.platform = settings, platform
        self.trajectory = folder / "md.dcd"
        self.checkpoint = folder / "checkpoint.xml"
        self.n_frames = 0
        self.n_minimizer = 0
        self._seconds_before = 0.0
        if before is not None:
            self.n_frames = int(before["progress"]["n_frames"])
            self.n_minimizer = int(before["progress"]["n_minimizer_iterations"])
            self._seconds_before = float(before["progress"]["wall_seconds"])
        self._started = self._saved = time.monotonic()
        self._simulation: app.Simulation | None = None
        self._file: IO[bytes] | None = None
        self._resuming = before is not None

    @property
    def wall_seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    @property
    def n_evaluations(self) -> int:
        """Steps so far, and one for each iteration of the minimizer."""
        return self.n_minimizer + int(self._simulation.currentStep if self._simulation else 0)

    def start(self) -> None:
        """Equilibrate from the molecule's positions, or take up the checkpoint."""
        settings = self.settings
        velocity_seed, noise_seed = (
            int(seed) & 0x7FFFFFFF or 1
            for seed in np.random.SeedSequence([settings.seed, self.n_frames]).generate_state(2)
        )
        integrator = openmm.LangevinMiddleIntegrator(
            settings.temperature, settings.friction, settings.timestep
        )
        integrator.setRandomNumberSeed(noise_seed)
        simulation = app.Simulation(
            self.molecule.topology,
            self.molecule.system,
            integrator,
            openmm.Platform.getPlatformByName(self.platform),
        )
        if self._resuming:
            simulation.loadState(str(self.checkpoint))
            step = simulation.currentStep - settings.n_equilibration_steps
            # A run that was interrupted just before writing a frame still has to write it.
            self.n_frames = min(max(0, step // settings.steps_per_frame), self._frames_in_file())
        else:
            simulation.context.setPositions(self.molecule.positions)
            counter = _IterationCounter()
            simulation.minimizeEnergy(reporter=counter)
            self.n_minimizer = counter.count
            simulation.context.setVelocitiesToTemperature(settings.temperature, velocity_seed)
        self._simulation = simulation
        self._open_trajectory()
        if not self._resuming:
            self.save()

    def advance(self, progress: bool) -> None:
        """Steps and frames until n_frames are written."""
        settings, simulation = self.settings, self._simulation
        assert simulation is not None
        with tqdm(
            total=settings.n_frames,
            initial=self.n_frames,
            desc=f"MD at {settings.temperature:g} K",
            unit="frame",
            disable=not progress,
        ) as bar:
            while simulation.currentStep < settings.n_equilibration_steps:
                left = settings.n_equilibration_steps - simulation.currentStep
                simulation.step(min(1000, left))
            while self.n_frames < settings.n_frames:
                due = settings.n_equilibration_steps + (
                    (self.n_frames + 1) * settings.steps_per_frame
                )
                simulation.step(due - simulation.currentStep)
                state = simulation.context.getState(positions=True)
                positions = state.getPositions(asNumpy=True)._value
                if not np.isfinite(positions).all():
                    raise RuntimeError(
                        f"the dynamics blew up before frame {self.n_frames}: positions are not "
                        f"finite; try a time step below {settings.timestep} ps"
                    )
                self._dcd.writeModel(positions)
                self.n_frames += 1
                bar.update()
                if time.monotonic() - self._saved > _CHECKPOINT_SECONDS:
                    self.save()

    def save(self) -> None:
        """Checkpoint, then the figures of config.json."""
        assert self._simulation is not None
        partial = self.checkpoint.with_suffix(".tmp")
        self._simulation.saveState(str(partial))
        os.replace(partial, self.checkpoint)
        self._saved = time.monotonic()
        content = {
            "format": 1,
            "stage": "md",
            "settings": asdict(self.settings),
            "choices": {"platform": self.platform},
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

    def close(self) -> None:
        """Write the checkpoint and leave a trajectory of whole frames."""
        if self._file is not None:
            self.save()
            self._file.close()
            self._cut_trajectory()

    def _frame_bytes(self) -> int:
        cell = self.molecule.topology.getPeriodicBoxVectors() is not None
        return 3 * (4 * self.molecule.n_atoms + 8) + (56 if cell else 0)

    def _frames_in_file(self) -> int:
        if not self.trajectory.is_file():
            return 0
        return max(0, self.trajectory.stat().st_size - _DCD_HEADER_BYTES) // self._frame_bytes()

    def _open_trajectory(self) -> None:
        """Start the DCD, or cut frames that a killed run wrote after its last checkpoint."""
        settings = self.settings
        append = self.n_frames > 0
        if append:
            self._cut_trajectory()
        mode = "r+b" if append else "wb"
        self._file = open(self.trajectory, mode)  # noqa: SIM115 - closed by close()
        self._dcd = app.DCDFile(
            self._file,
            self.molecule.topology,
            settings.timestep,
            settings.n_equilibration_steps + settings.steps_per_frame,
            settings.steps_per_frame,
            append=append,
        )

    def _cut_trajectory(self) -> None:
        size = _DCD_HEADER_BYTES + self.n_frames * self._frame_bytes()
        if self.trajectory.stat().st_size > size:
            with open(self.trajectory, "r+b") as file:
                file.truncate(size)
                file.seek(8)
                file.write(struct.pack("<i", self.n_frames))


class _IterationCounter(openmm.MinimizationReporter):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def report(self, iteration: int, x: Any, grad: Any, args: Any) -> bool:
        self.count += 1
        return False


def _read_config(folder: Path, molecule: MolecularSystem, settings: MDSettings) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file() or not (folder / "checkpoint.xml").is_file():
        raise ValueError(f"output: there is no MD run to resume in {folder}")
    before = read_json(path)
    if before.get("stage") != "md":
        raise ValueError(f"output: {folder} holds no MD run")
    if before["fingerprint"] != molecule.fingerprint:
        raise ValueError(f"output: the MD run in {folder} is of another molecule")
    now = asdict(settings)
    for name, value in before["settings"].items():
        if name != "n_frames" and now[name] != value:
            raise ValueError(f"{name}: the run in {folder} has {value}, got {now[name]}")
    return before
