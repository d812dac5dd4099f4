"""The hybrid driver: MD, training, tempering, retraining, freeze, production, analysis.

Every stage is a function of its own that works on the user's files; :func:`run` does them all.
Only production, with the flow frozen, is written as samples and enters estimates: a flow that
changes with the walkers' history breaks detailed balance.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from openmm_tsf.analysis.analyze import analyze
from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.directory import DirectoryLock, open_output_directory
from openmm_tsf.io.files import PathLike
from openmm_tsf.io.serialization import from_plain_data
from openmm_tsf.potentials.platforms import check_platform
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import holds_molecule, read_molecule, write_molecule
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.random import Seeds
from openmm_tsf.utils.validation import check_seconds, check_seed
from openmm_tsf.workflow import sample as production
from openmm_tsf.workflow.costs import Costs
from openmm_tsf.workflow.frames import hash_of_frames, load_trajectory
from openmm_tsf.workflow.md import run_md
from openmm_tsf.workflow.potential_choice import (
    batch_of,
    planned_sampling,
    planned_training,
    reopen_potential,
)
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.record import (
    SETTINGS,
    check_same_record,
    new_record,
    note_potential,
    read_record,
    write_record,
)
from openmm_tsf.workflow.rounds import Rounds
from openmm_tsf.workflow.sample import sample
from openmm_tsf.workflow.settings import RunSettings
from openmm_tsf.workflow.train import CHECKPOINT_SECONDS, build_flow, train

__all__ = ["analyze", "run", "run_md", "sample", "train"]

logger = logging.getLogger(__name__)


def run(
    output: PathLike,
    settings: RunSettings | None = None,
    *,
    molecule: MolecularSystem | None = None,
    trajectory: PathLike | None = None,
    temperature: float | None = None,
    own_md: bool = False,
    seed: int | None = None,
    platform: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: bool = True,
) -> dict[str, Any]:
    """From frames, or from nothing, to samples at every temperature.

    Parameters
    ----------
    output
        Run directory, new or empty (or the one to resume).
    settings
        What to do; the preset ``"default"`` when left out, or that of the run that is resumed.
        The iterations of production may grow then.
    molecule
        The molecule; alanine dipeptide by default.
    trajectory
        Frames to train on: a file that mdtraj reads, or a directory of the md stage. By default the
        shipped frames for alanine dipeptide, and our own MD for other molecules.
    temperature
        Temperature of a trajectory file in K.
    own_md
        Run MD also where there are shipped frames.
    seed
        Seed of everything (default 1).
    platform
        OpenMM platform for energies and MD. By default energies of a long run are compiled by
        torch where it covers the System; see
        :func:`openmm_tsf.workflow.potential_choice.open_potential`.
    threads
        Threads of MD on OpenMM's CPU platform (default 1); see
        :func:`openmm_tsf.workflow.md.run_md`.
    resume
        Continue what is in `output` where it stopped, in whichever stage; the results are the same
        as if it had not. Where nothing was begun yet, begin.
    checkpoint_seconds
        Time between checkpoints.
    progress
        Show progress bars.

    Returns
    -------
    summary
        The content of ``summary.json``.

    Raises
    ------
    FileExistsError
        If `output` is not empty and `resume` is false.
    DirectoryInUse
        If another process writes to `output`.
    ValueError
        If arguments contradict each other or the frames do not fit the molecule, or the run that is
        resumed was another one.
    KeyboardInterrupt
        After Ctrl-C, with everything written: in production the samples so far are analysed first.
    """
    if trajectory is not None and own_md:
        raise ValueError("trajectory: expected none where MD is to be run, got both")
    if trajectory is None and temperature is not None:
        raise ValueError("temperature: expected none without a trajectory, got one")
    if platform is not None:
        check_platform(platform)
    check_seconds(checkpoint_seconds)
    record = read_record(Path(output), ["run"]) if resume else None
    if record is not None:
        where = str(Path(output) / SETTINGS)
        settings = settings or from_plain_data(RunSettings, record["settings"], where)
        seed = record["seed"] if seed is None else seed
        source = record.get("source")
        if not isinstance(source, dict):
            raise ValueError(f"{where}: damaged, source is missing")
        trajectory = trajectory or source.get("trajectory")
        temperature = source.get("temperature") if temperature is None else temperature
        own_md = own_md or bool(source.get("own_md"))
        if molecule is None and holds_molecule(output):
            molecule = read_molecule(output)
    settings = settings or preset("default")
    molecule = molecule or alanine_dipeptide()
    seed = 1 if seed is None else check_seed(seed)
    seeds = Seeds(seed)
    own_md = own_md or (
        trajectory is None and molecule.fingerprint != alanine_dipeptide().fingerprint
    )
    dataset: MDDataset | None = None
    # What production goes on from needs no frames any more; they may be gone.
    begun = record is not None and production.has_begun(Path(output))
    if begun:
        pass
    elif own_md:  # before MD: the molecule may have no internal coordinates
        InternalCoordinates.from_topology(molecule.topology, molecule.positions)
    else:  # before anything is written: the frames may not fit
        dataset = (
            MDDataset.shipped(molecule, stride=settings.stride)
            if trajectory is None
            else load_trajectory(trajectory, molecule, temperature, settings.stride)
        )
        dataset.split()  # raises if the frames are too few
    asked = new_record(
        "run",
        molecule,
        settings=settings,
        seed=seed,
        source=record["source"]
        if begun and record is not None
        else {
            "own_md": own_md,
            "trajectory": None if trajectory is None else str(Path(trajectory).resolve()),
            "temperature": temperature,
            "frames_sha256": None if dataset is None else hash_of_frames(dataset),
        },
        platform_asked_for=platform if record is None else record.get("platform_asked_for"),
    )
    with open_output_directory(output, resume=resume) as lock:
        if resume:  # again: it may have grown until the lock was free
            record = read_record(lock.directory, ["run"])
        if record is None:
            record = asked
            write_record(lock.directory, record)
        # A trajectory may have moved: its frames are what is compared.
        may_differ = ["sampling.n_iterations", "source.trajectory"]
        check_same_record(lock.directory, record, asked, growing=may_differ)
        write_molecule(molecule, lock.directory)
        if resume and production.has_begun(lock.directory):
            Rounds.tidy(lock.directory)
            flow = load_flow(lock.directory / "flow.pt", molecule)
            return production.take_up(
                flow, lock, settings.sampling.n_iterations, molecule, platform,
                checkpoint_seconds, progress,
            )  # fmt: skip
        if begun:
            raise ValueError(f"output: {lock.directory} changed while it was taken up; try again")
        return _run(
            lock, record, settings, molecule, dataset, trajectory, seeds, platform, threads,
            checkpoint_seconds, progress,
        )  # fmt: skip


def _run(
    lock: DirectoryLock,
    record: dict[str, Any],
    settings: RunSettings,
    molecule: MolecularSystem,
    dataset: MDDataset | None,
    trajectory: PathLike | None,
    seeds: Seeds,
    platform: str | None,
    threads: int | None,
    checkpoint_seconds: float,
    progress: bool,
) -> dict[str, Any]:
    """All stages up to production's first checkpoint, skipping what is done; then production."""
    folder = lock.directory
    costs = Costs()
    source = "shipped" if trajectory is None else str(trajectory)
    if dataset is None:
        source = "own MD"
        dataset = _own_frames(
            molecule, settings, folder, seeds.next() % 2**31, platform, threads, costs,
            checkpoint_seconds, progress,
        )  # fmt: skip
    costs.evaluations["md"] = dataset.n_evaluations or None
    choices = {
        "settings": record["settings"],
        "seed": record["seed"],
        "platform_asked_for": record["platform_asked_for"],
        "frames": {
            "source": source,
            "n_frames": len(dataset),
            "temperature_K": dataset.temperature,
        },
    }
    record["frames"] = choices["frames"]
    write_record(folder, record)
    batch, sampling = batch_of(settings.sampling), settings.sampling
    with reopen_potential(
        molecule, record.get("potential"), platform, _planned(settings), batch
    ) as potential:
        note_potential(folder, record, potential)
        with costs.counting("training", potential):
            flow = build_flow(dataset, settings.flow, seeds.next())
        logger.info("flow with %d parameters, %d frames", flow.n_parameters, len(dataset))
        rounds = Rounds(
            flow, dataset, potential, settings, lock, record, costs, checkpoint_seconds, progress
        )
        walkers = rounds.run(seeds)
        logger.info("the flow is frozen: production")
        with production.sampling_threads():
            with costs.counting("sampling", potential):
                sampler = production.make_sampler(
                    molecule,
                    flow,
                    sampling,
                    potential,
                    production.sampler_seeds(seeds, walkers is None),
                    dataset,
                    walkers,
                )
                sampler.tune(sampling.n_tuning, progress=progress)
            with sampler:
                production.begin(sampler, lock, sampling, costs, choices, molecule)
                Rounds.tidy(folder)
                return production.produce(
                    sampler, lock, sampling.n_iterations, checkpoint_seconds, progress
                )


def _planned(settings: RunSettings) -> int:
    """Energy evaluations of the whole run, roughly."""
    rounds = settings.n_rounds
    return (
        planned_sampling(settings.sampling)
        + rounds * planned_sampling(settings.sampling, settings.round_iterations)
        + planned_training(settings.fit)
        + rounds * planned_training(settings.refit)
    )


def _own_frames(
    molecule: MolecularSystem,
    settings: RunSettings,
    folder: Path,
    seed: int,
    platform: str | None,
    threads: int | None,
    costs: Costs,
    checkpoint_seconds: float,
    progress: bool,
) -> MDDataset:
    """Our own MD, in a directory of its own, as far as it is not there yet."""
    result = run_md(
        molecule,
        folder / "md",
        replace(settings.md, seed=seed),
        platform=platform,
        threads=threads,
        resume=(folder / "md").is_dir(),
        checkpoint_seconds=checkpoint_seconds,
        progress=progress,
    )
    if result.interrupted:
        raise KeyboardInterrupt
    costs.seconds["md"] = round(result.wall_seconds, 3)
    return load_trajectory(folder / "md", molecule, stride=settings.stride)
