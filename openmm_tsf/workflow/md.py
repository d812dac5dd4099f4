"""Plain molecular dynamics with OpenMM: where the training frames come from."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import openmm

from openmm_tsf.io.directory import list_contents, open_output_directory
from openmm_tsf.io.files import PathLike
from openmm_tsf.io.serialization import from_plain_data
from openmm_tsf.potentials.platforms import check_platform
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.signals import DeferredInterrupt
from openmm_tsf.utils.validation import check_seconds, check_threads
from openmm_tsf.workflow.md_simulation import MD_FORMAT, Dynamics, fastest_platform, read_md_config
from openmm_tsf.workflow.settings import MDSettings

logger = logging.getLogger(__name__)

__all__ = ["MDResult", "MDSettings", "fastest_platform", "recorded_settings", "run_md"]

CHECKPOINT_SECONDS = 30.0


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
    if platform is not None:
        check_platform(platform)
    check_seconds(checkpoint_seconds)
    if threads is not None:
        threads = check_threads(threads)
    with open_output_directory(output, resume=resume) as lock:
        folder = lock.directory
        before = read_md_config(folder) if resume and list_contents(folder) else None
        if before is not None:
            settings = _same_settings(before, settings, molecule, folder)
            platform, threads = _same_choices(before["choices"], platform, threads)
        settings = settings or MDSettings()
        threads = threads or 1
        if before is None:
            platform = platform or fastest_platform(molecule, threads)
        assert platform is not None
        run = Dynamics(molecule, folder, settings, platform, threads, checkpoint_seconds)
        with DeferredInterrupt() as interrupt:
            if not run.take_up(before):
                run.begin()
            try:
                run.advance(interrupt, progress)
            except (RuntimeError, openmm.OpenMMException) as error:
                run.finish()  # what came before the dynamics blew up is good
                if isinstance(error, RuntimeError):
                    raise
                raise RuntimeError(
                    f"the dynamics blew up after frame {run.n_frames}: {error}; try a time step "
                    f"below {settings.timestep} ps"
                ) from error
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
    if not Path(folder).is_dir() or not list_contents(folder):
        return None
    written = read_md_config(folder)["settings"]
    settings: MDSettings = from_plain_data(MDSettings, written, str(Path(folder) / "config.json"))
    return settings


def _same_settings(
    before: dict[str, Any], settings: MDSettings | None, molecule: MolecularSystem, folder: Path
) -> MDSettings:
    if before["fingerprint"] != molecule.fingerprint:
        raise ValueError(f"output: the MD run in {folder} is of another molecule")
    if before["format"] != MD_FORMAT:
        raise ValueError(
            f"output: the MD run in {folder} was made by an earlier version, which kept no "
            "checkpoint that this one reads; its frames can be used"
        )
    written = recorded_settings(folder)
    assert written is not None
    if settings is None:
        return written
    if settings.n_frames < written.n_frames:
        raise ValueError(
            f"n_frames: the run in {folder} has {written.n_frames}, which can grow, got "
            f"{settings.n_frames}"
        )
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
    chosen = platform or written.get("platform")
    if chosen is not None:
        check_platform(chosen)
    return str(chosen), check_threads(threads or written.get("threads") or 1)
