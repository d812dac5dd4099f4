"""Molecular dynamics with OpenMM, which makes frames to train on."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import openmm

from openmm_tsf.io.directory import open_output_directory
from openmm_tsf.io.files import PathLike
from openmm_tsf.potentials.platforms import check_platform
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.signals import DeferredInterrupt
from openmm_tsf.utils.validation import check_instance, check_threads
from openmm_tsf.workflow.duration import WORTH_MEASURING, in_words
from openmm_tsf.workflow.md_simulation import (
    NO_PROGRESS,
    MDSimulation,
    fastest_platform,
    seconds_per_step,
)
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.record import new_config, recorded_settings, resumed_choices
from openmm_tsf.workflow.settings import MDSettings
from openmm_tsf.workflow.stage import Stage

logger = logging.getLogger(__name__)


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
    options: RunOptions | None = None,
    is_told: bool = False,
) -> MDResult:
    """Run Langevin dynamics with frames in ``md.dcd``; Ctrl-C ends it with everything written.

    Parameters
    ----------
    molecule
        The molecule; its positions are minimized first.
    output
        Directory for ``md.dcd``, ``topology.pdb``, ``system.xml``, ``config.json`` and
        ``checkpoint.npz``.
    settings
        Length, temperature, time step; when resuming, those of the run by default. The number of
        frames may grow.
    options
        How it is run. A seed replaces that of `settings`.
    is_told
        Whether the caller has logged how long it will take: it is not measured again.

    Raises
    ------
    FileExistsError, DirectoryInUse
        If `output` is not empty and not to be resumed, or another process writes to it.
    ValueError
        If `output` is not of an MD run, or of one with another molecule, temperature or time step.
    RuntimeError
        If the dynamics blow up.
    """
    if not isinstance(molecule, MolecularSystem):
        raise TypeError(f"molecule: expected MolecularSystem, got {type(molecule).__name__}")
    check_instance(settings, "settings", MDSettings)
    check_instance(options, "options", RunOptions)
    options = options or RunOptions()
    with open_output_directory(output, resume=options.resume) as lock:
        recorded = resumed_choices(lock.directory, "md", options)
        settings = settings or recorded_settings(lock.directory, "md", MDSettings) or MDSettings()
        if options.seed is not None:
            settings = replace(settings, seed=options.seed)
        settings = settings.completed_for(molecule)
        choices = _platform_and_threads(recorded, molecule, options)
        request = new_config("md", molecule, settings=settings, **choices)
        request["progress"] = NO_PROGRESS
        _check_growing(lock.directory, recorded, settings)
        stage = Stage.open(lock, molecule, options, request, may_differ=["n_frames"])
        stage.choices.update(settings=asdict(settings), **choices)  # written with the progress
        simulation = MDSimulation(stage, settings)
        with DeferredInterrupt() as interrupt:
            if not simulation.resume():
                simulation.start()
                if options.progress and not is_told and simulation.n_steps >= WORTH_MEASURING:
                    with suppress(openmm.OpenMMException):  # the start was minimised, this is not
                        each = seconds_per_step(molecule, choices["platform"], choices["threads"])
                        time = in_words(each * simulation.n_steps)
                        logger.info("MD: %s steps, roughly %s", f"{simulation.n_steps:,}", time)
            try:
                simulation.advance(interrupt)
            except (RuntimeError, openmm.OpenMMException) as error:
                simulation.finish()  # the frames before are good
                if isinstance(error, RuntimeError):
                    raise
                raise RuntimeError(
                    f"the dynamics blew up after frame {simulation.n_frames}: {error}; try a time "
                    f"step below {settings.timestep} ps"
                ) from error
            simulation.finish()
        n_frames = simulation.n_frames
        if interrupt.requested:
            logger.warning("interrupted: %d of %d frames are written", n_frames, settings.n_frames)
        evaluations, seconds = simulation.n_evaluations, simulation.wall_seconds
        return MDResult(simulation.dcd.path, n_frames, evaluations, seconds, interrupt.requested)


def _check_growing(directory: Path, recorded: Mapping[str, Any], settings: MDSettings) -> None:
    before = recorded.get("settings", {}).get("n_frames", 0)
    if isinstance(before, int) and settings.n_frames < before:
        raise ValueError(
            f"n_frames: the run in {directory} has {before}, which can grow, "
            f"got {settings.n_frames}"
        )


def _platform_and_threads(
    recorded: Mapping[str, Any], molecule: MolecularSystem, options: RunOptions
) -> dict[str, Any]:
    """The platform and its threads: as given, else as recorded, else the fastest and one."""
    threads = check_threads(options.threads or recorded.get("threads") or 1)
    platform = options.platform or recorded.get("platform")
    if platform is None:
        platform = fastest_platform(molecule, threads)
    check_platform(platform)
    return {"platform": platform, "threads": threads}
