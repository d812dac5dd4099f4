"""All stages in one: frames, training, rounds of sampling and retraining, production, analysis.

Only production, with the flow frozen, writes samples that enter estimates: a flow that changes with
the walkers' history breaks detailed balance.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from openmm_tsf.analysis.analyze import analyze
from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.flows.load import load_flow, place_for_sampling
from openmm_tsf.io.directory import DirectoryLock, open_output_directory
from openmm_tsf.io.files import PathLike
from openmm_tsf.io.run_config import CONFIG, read_config
from openmm_tsf.io.serialization import from_plain_data
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import holds_molecule, read_molecule
from openmm_tsf.systems.frame_numbers import (
    check_enough_frames,
    check_enough_md,
    warn_of_few_frames,
)
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.distributed import current_ranks
from openmm_tsf.utils.random import Seeds
from openmm_tsf.utils.validation import check_instance
from openmm_tsf.workflow.duration import WORTH_MEASURING, describe_plan
from openmm_tsf.workflow.estimate import is_run_worth_measuring, planned_evaluations, tell_duration
from openmm_tsf.workflow.frames import (
    FrameSource,
    describe_frames,
    hash_of_frames,
    load_trajectory,
    measure_basins,
)
from openmm_tsf.workflow.md import run_md
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.potential_choice import batch_of, tell_precision
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.record import (
    check_same_request,
    new_config,
    recorded_settings,
    resumed_choices,
)
from openmm_tsf.workflow.rounds import Rounds, remove_training_files
from openmm_tsf.workflow.sample import (
    flow_for_production,
    has_started,
    make_sampler,
    resume_sampling,
    sample_and_analyze,
    sampler_seeds,
    sampling_threads,
    start_sampling,
)
from openmm_tsf.workflow.settings import RunSettings
from openmm_tsf.workflow.shards import (
    ShardSampling,
    are_started,
    check_planned,
    check_prepared,
    has_samples,
    is_prepared,
    join_preparation,
    prepare_shards,
    sample_shards,
    settings_of_shard,
)
from openmm_tsf.workflow.stage import Stage
from openmm_tsf.workflow.train import build_flow
from openmm_tsf.workflow.until import check_targets, known_observables, record_observables

logger = logging.getLogger(__name__)

#: A trajectory may have moved: its frames are compared.
_MAY_DIFFER = ("sampling.n_iterations", "sampling.until", "source.trajectory")


def run(
    output: PathLike,
    settings: RunSettings | None = None,
    *,
    molecule: MolecularSystem | None = None,
    frames: FrameSource | None = None,
    options: RunOptions | None = None,
) -> dict[str, Any]:
    """Sample every temperature, from frames or nothing, and return the content of ``summary.json``.

    Parameters
    ----------
    output
        Run directory, new or empty, or the one to resume.
    settings
        What to do; the preset ``"default"``, or that of the run that is resumed. The iterations of
        production may grow then, and their target of precision be another one.
    molecule
        The molecule; alanine dipeptide by default.
    frames
        Frames to train on; by default those that are shipped for alanine dipeptide, and of MD for
        other molecules. Their stride is that of `settings`.
    options
        How it is run.

    With ``settings.sampling.n_shards`` above 1, MD, training and tuning come first, then each shard
    (:mod:`openmm_tsf.workflow.shards`). What is returned is empty after ``options.prepare`` and on
    ranks other than the first, and the iterations by shard with ``options.shard``.

    Raises
    ------
    FileExistsError, DirectoryInUse
        If `output` is not empty and not to be resumed, or another process writes to it.
    ValueError
        If the frames do not fit the molecule, its energy depends on position or orientation, or
        the run that is resumed was another one.
    ShardsFailedError
        If some shards could not be sampled, after the others.
    KeyboardInterrupt
        After Ctrl-C, with everything written: in production the samples so far are analysed first,
        if one process samples them all.
    """
    check_instance(settings, "settings", RunSettings)
    check_instance(molecule, "molecule", MolecularSystem)
    check_instance(frames, "frames", FrameSource)
    check_instance(options, "options", RunOptions)
    options, frames = options or RunOptions(), frames or FrameSource()
    directory, ranks = Path(output), current_ranks()
    if options.shard is not None:
        check_prepared(directory, options.shard)
    is_resumed = options.resume or options.shard is not None
    recorded = resumed_choices(directory, "run", replace(options, resume=is_resumed))
    if recorded:
        path = str(Path(output) / CONFIG)
        settings = settings or recorded_settings(output, "run", RunSettings)
        frames = frames.completed_from(from_plain_data(FrameSource, recorded.get("source"), path))
        if molecule is None and holds_molecule(output):
            molecule = read_molecule(output)
    settings = settings or preset("default")
    n_shards = settings.sampling.n_shards
    if n_shards == 1 and (options.prepare or options.shard is not None):
        name = "prepare" if options.prepare else "shard"
        raise ValueError(f"{name}: expected a run with n_shards of at least 2, got 1")
    if n_shards < ranks.size and options.shard is None:
        raise ValueError(
            f"shards: expected at least one for each of {ranks.size} ranks (--shards), got "
            f"{n_shards}"
        )
    mine = range(ranks.rank, n_shards, ranks.size) if options.shard is None else [options.shard]
    shipped = alanine_dipeptide()
    molecule = molecule or shipped
    settings = replace(settings, md=settings.md.completed_for(molecule))
    molecule.check_pose_independent()
    check_targets(
        settings.sampling.until,
        settings.sampling.temperatures,
        molecule,
        known_observables(recorded, options.observe),
    )
    no_frames = frames.trajectory is None and molecule.fingerprint != shipped.fingerprint
    frames = replace(frames, simulate=frames.simulate or no_frames, stride=settings.stride)
    # Production needs no frames; they may be gone when it is resumed.
    if n_shards == 1:
        started = bool(recorded) and has_started(directory)
    else:
        started = bool(recorded) and are_started(directory, mine)
    dataset: MDDataset | None = None
    if not started and frames.simulate:  # before MD: the molecule may have no internal coordinates
        parts = molecule.topology, molecule.positions
        InternalCoordinates.from_topology(*parts, **molecule.constraint_options)
        check_enough_md(settings.md.n_frames, settings.stride, molecule)
    elif not started:  # before anything is written: the frames may not fit
        dataset = frames.load(molecule)
        check_enough_frames(dataset, molecule)
        if ranks.is_first and not is_prepared(directory):
            warn_of_few_frames(dataset, molecule)
    request = new_config(
        "run",
        molecule,
        settings=settings,
        seed=options.choose_seed(recorded),
        device=options.choose_device(recorded),
        source=frames,
        frames_sha256=None if dataset is None else hash_of_frames(dataset),
        requested_platform=options.platform,
    )
    if started:
        request["choices"] |= {name: recorded.get(name) for name in ("source", "frames_sha256")}

    def sampling_of_shards() -> ShardSampling:
        starts = dataset
        if starts is None and not started:  # of MD, which is there now
            starts = load_trajectory(directory / "md", molecule, stride=settings.stride)
        return ShardSampling(directory, molecule, settings.sampling, options, starts)

    @contextmanager
    def trainings() -> Iterator[Rounds]:
        """Those of rank 0, from another rank: it only reads."""
        stage = Stage(DirectoryLock(directory), molecule, options, read_config(directory))
        seeds, frames = Seeds(stage.choices["seed"]), dataset
        if frames is None:
            seeds.next()  # of MD
            frames = load_trajectory(directory / "md", molecule, stride=settings.stride)
        of_shard = replace(settings, sampling=settings_of_shard(settings.sampling))
        planned = planned_evaluations(settings)
        with stage.open_potential(planned, batch_of(of_shard.sampling)) as potential:
            flow = build_flow(frames, settings.flow, seeds.next())
            flow = place_for_sampling(flow, stage.device)
            yield Rounds(stage, of_shard, frames, potential, flow)

    if options.shard is not None:
        check_same_request(directory, recorded, request["choices"], _MAY_DIFFER)
        check_planned(directory, settings.sampling)
        return sample_shards(sampling_of_shards(), mine)
    if not ranks.is_first and n_shards > 1:
        join_preparation(sampling_of_shards, trainings)
        return {} if options.prepare else sample_shards(sampling_of_shards(), mine)
    with open_output_directory(output, resume=options.resume) as lock:
        stage = Stage.open(lock, molecule, options, request, _MAY_DIFFER)
        record_observables(stage)
        stage.record_target(settings.sampling.n_iterations, settings.sampling.until)
        if n_shards > 1 and is_prepared(stage.directory):
            ranks.broadcast({"is_tuned": True})
        elif n_shards > 1:
            _run_stages(stage, settings, frames, dataset)
        elif options.resume and has_started(stage.directory):
            remove_training_files(stage.directory)
            flow = load_flow(stage.directory / "flow.pt", molecule)
            sampling = settings.sampling
            return resume_sampling(stage, flow, sampling.n_iterations, sampling.until)
        elif started:
            raise ValueError(f"output: {stage.directory} changed while it was opened; try again")
        else:
            return _run_stages(stage, settings, frames, dataset)
    if options.prepare:
        return {}
    try:
        sample_shards(sampling_of_shards(), mine)
    except KeyboardInterrupt:
        # Several ranks are the job of a batch system, which kills them after a time of grace.
        if ranks.size == 1 and has_samples(directory):
            analyze(directory, observe=options.observe)
        raise
    return analyze(directory, observe=options.observe)


def _run_stages(
    stage: Stage, settings: RunSettings, frames: FrameSource, dataset: MDDataset | None
) -> dict[str, Any]:
    """All stages, skipping what is complete."""
    seeds, sampling = Seeds(stage.choices["seed"]), settings_of_shard(settings.sampling)
    of_shard = replace(settings, sampling=sampling)  # the same settings where there is one
    if not has_started(stage.directory):
        logger.info("plan: %s", describe_plan(settings, dataset is None))
    if dataset is not None:
        _record_frames(stage, dataset, frames.name)
    is_told = stage.options.progress and stage.is_new
    is_told = is_told and is_run_worth_measuring(settings, WORTH_MEASURING)
    with stage.open_potential(planned_evaluations(settings), batch_of(sampling)) as potential:
        tell_precision(potential, settings.fit)
        if dataset is None:
            platform = tell_duration(stage, settings, potential) if is_told else None
            dataset = _simulate(stage, settings, seeds.next() % 2**31, platform)
            is_told = False
            _record_frames(stage, dataset, "MD")
        with stage.costs.counting("training", potential):
            flow = build_flow(dataset, settings.flow, seeds.next())
            flow = place_for_sampling(flow, stage.device)
        logger.info("flow with %d parameters, %d frames", flow.n_parameters, len(dataset))
        if is_told:
            tell_duration(stage, settings, potential, dataset, flow)
        walkers = Rounds(stage, of_shard, dataset, potential, flow).run(seeds)
        if settings.sampling.n_shards > 1:
            logger.info("the flow is frozen: tuning")
            prepare_shards(stage, settings.sampling, dataset, potential)
            remove_training_files(stage.directory)
            return {}
        logger.info("the flow is frozen: production")
        with sampling_threads():
            with stage.costs.counting("sampling", potential):
                sizes = sampling.n_walkers, len(sampling.temperatures)
                flow = flow_for_production(stage, flow, *sizes)
                sampler_seed = sampler_seeds(seeds, walkers is None)
                start = dataset if walkers is None else walkers
                sampler = make_sampler(
                    stage.molecule, flow, sampling, potential, sampler_seed, start
                )
                sampler.tune(sampling.n_tuning, progress=stage.options.progress)
            with sampler:
                start_sampling(stage, sampler)
                remove_training_files(stage.directory)
                return sample_and_analyze(stage, sampler, sampling.n_iterations, sampling.until)


def _record_frames(stage: Stage, dataset: MDDataset, source: str) -> None:
    """Record the frames and their basins; warn of what they hardly tell."""
    stage.costs.evaluations["md"] = dataset.n_evaluations or None
    stage.record(frames=describe_frames(dataset, source), basins=measure_basins(dataset))


def _simulate(stage: Stage, settings: RunSettings, seed: int, measured: str | None) -> MDDataset:
    """MD in a directory within the run's, as far as it is not complete.

    On the platform that was measured when its duration was told.
    """
    directory, options = stage.directory / "md", stage.options
    n_ranks = current_ranks().size
    if n_ranks > 1:
        logger.info("MD is done by rank 0 of %d alone, for which the others wait", n_ranks)
    platform = measured or options.platform
    result = run_md(
        stage.molecule,
        directory,
        settings.md,
        options=replace(options, seed=seed, resume=directory.is_dir(), platform=platform),
        is_told=measured is not None,
    )
    if result.interrupted:
        raise KeyboardInterrupt
    stage.costs.seconds["md"] = round(result.wall_seconds, 3)
    return load_trajectory(directory, stage.molecule, stride=settings.stride)
