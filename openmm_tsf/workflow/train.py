"""Training a flow on frames."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.io.directory import open_output_directory
from openmm_tsf.io.files import PathLike
from openmm_tsf.io.serialization import from_plain_data, to_plain_data
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.frame_ensemble import check_energies, check_ensemble
from openmm_tsf.systems.frame_numbers import check_enough_frames, warn_of_few_frames
from openmm_tsf.training import FitSettings, fit
from openmm_tsf.training.checkpoint import load_best_weights
from openmm_tsf.utils.devices import check_device
from openmm_tsf.utils.distributed import current_ranks
from openmm_tsf.utils.random import Seeds
from openmm_tsf.utils.validation import check_instance
from openmm_tsf.workflow.duration import WORTH_MEASURING, is_worth_measuring, training_seconds
from openmm_tsf.workflow.frames import FrameSource, describe_frames, hash_of_frames, measure_basins
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.potential_choice import planned_training, reopen_potential, tell_precision
from openmm_tsf.workflow.record import new_config, recorded_settings, resumed_choices
from openmm_tsf.workflow.settings import FlowSettings
from openmm_tsf.workflow.stage import Stage

#: A trajectory may have moved: its frames are compared.
_MAY_DIFFER = ("source.trajectory", "source.temperature", "source.simulate")


def train(
    dataset: MDDataset,
    output: PathLike,
    flow_settings: FlowSettings | None = None,
    fit_settings: FitSettings | None = None,
    *,
    source: FrameSource | None = None,
    options: RunOptions | None = None,
) -> AugmentedFlow:
    """Train a flow on frames; Ctrl-C keeps the best weights so far.

    Where ranks are connected, all of them call this and train together; rank 0 writes.

    Parameters
    ----------
    dataset
        Frames of a molecule at one temperature.
    output
        Directory for ``flow.pt``, ``training.csv``, ``training.pt`` (to resume from), ...
    flow_settings, fit_settings
        What to train, and how; when resuming, by default as before.
    source
        Where the frames come from, to be recorded in ``config.json``.
    options
        How it is run. There is a checkpoint at every validation, too.

    Raises
    ------
    FileExistsError, DirectoryInUse
        If `output` is not empty and not to be resumed, or another process writes to it.
    ValueError
        If `output` was made with other settings, frames or molecule; if the energy of the molecule
        depends on its position or orientation; if the frames are too few, of another handedness or,
        by the System's forces, of another temperature, or their energies are not the System's.
    """
    check_instance(flow_settings, "flow_settings", FlowSettings)
    check_instance(fit_settings, "fit_settings", FitSettings)
    check_instance(source, "source", FrameSource)
    check_instance(options, "options", RunOptions)
    if not isinstance(dataset, MDDataset):
        raise TypeError(f"dataset: expected MDDataset, got {type(dataset).__name__}")
    options = options or RunOptions()
    molecule = dataset.molecule
    if molecule is None:
        raise ValueError("dataset: expected frames of a molecule, got none")
    molecule.check_pose_independent()
    check_enough_frames(dataset, molecule)
    warn_of_few_frames(dataset, molecule)
    if not dataset.name:  # those of a file were judged when it was read
        check_ensemble(molecule, dataset.positions, dataset.temperature)
    if dataset.energies is not None:
        check_energies(molecule, dataset.positions, dataset.energies)
    if not current_ranks().is_first:
        return _join(dataset, Path(output), options)
    with open_output_directory(output, resume=options.resume) as lock:
        recorded = resumed_choices(lock.directory, "train", options)
        recorded_part = partial(recorded_settings, lock.directory, "train")
        flow_settings = flow_settings or recorded_part(FlowSettings, "flow") or FlowSettings()
        fit_settings = fit_settings or recorded_part(FitSettings, "fit") or FitSettings()
        seed = options.choose_seed(recorded)
        request = new_config(
            "train",
            molecule,
            settings={"flow": flow_settings, "fit": fit_settings},
            seed=seed,
            device=options.choose_device(recorded),
            frames_sha256=hash_of_frames(dataset),
            frames=describe_frames(dataset, dataset.name),
            source=to_plain_data(source),
        )
        if source is None or recorded.get("source", source) is None:  # not known, now or then
            request["choices"]["source"] = recorded.get("source")
        stage = Stage.open(lock, molecule, options, request, _MAY_DIFFER)
        stage.record(basins=measure_basins(dataset))
        stage.costs.evaluations["md"] = dataset.n_evaluations or None
        seeds = Seeds(seed)
        flow = build_flow(dataset, flow_settings, seeds.next()).to(stage.device)
        _train(stage, dataset, flow, fit_settings, seeds.next())
    return flow


def _train(
    stage: Stage, dataset: MDDataset, flow: AugmentedFlow, settings: FitSettings, seed: int
) -> None:
    directory, costs = stage.directory, stage.costs

    def save() -> None:
        flow.save(directory / "flow.pt")
        stage.config |= costs.to_config()
        stage.save()

    planned = planned_training(settings)
    with stage.open_potential(planned, settings.kl_batch_size) as potential:
        tell_precision(potential, settings)
        worth = is_worth_measuring(planned, settings.n_steps, least=WORTH_MEASURING)
        if stage.options.progress and worth and stage.is_new:
            with costs.measuring("training", potential):
                seconds = training_seconds(flow, dataset, potential, settings)
                stage.tell_duration(training=seconds)
        stage.record_ranks()
        current_ranks().broadcast(stage.choices)
        try:
            with costs.counting("training", potential):
                result = fit(
                    flow,
                    dataset,
                    potential,
                    settings=settings,
                    seed=seed,
                    log_path=directory / "training.csv",
                    checkpoint_path=directory / "training.pt",
                    checkpoint_seconds=stage.options.checkpoint_seconds,
                    resume=stage.options.resume,
                    progress=stage.options.progress,
                )
        except KeyboardInterrupt:
            # An interrupt before the first step leaves the flow without weights worth keeping.
            if load_best_weights(flow, directory / "training.pt"):
                save()
            raise
    elsewhere = result.earlier_evaluations + result.evaluations_elsewhere
    costs.add("training", elsewhere, result.earlier_seconds)
    save()


def _join(dataset: MDDataset, directory: Path, options: RunOptions) -> AugmentedFlow:
    """Train together with rank 0, which has recorded how."""
    choices, molecule = current_ranks().broadcast(), dataset.molecule
    assert molecule is not None
    where = f"{directory}/config.json"
    flow_settings = from_plain_data(FlowSettings, choices["settings"]["flow"], where)
    settings = from_plain_data(FitSettings, choices["settings"]["fit"], where)
    seeds, device = Seeds(choices["seed"]), check_device(options.choose_device(choices))
    flow = build_flow(dataset, flow_settings, seeds.next()).to(device)
    planned, batch = planned_training(settings), settings.kl_batch_size
    parts = choices["potential"], options.platform, planned, batch, device
    with reopen_potential(molecule, *parts) as potential:
        fit(
            flow,
            dataset,
            potential,
            settings=settings,
            seed=seeds.next(),
            checkpoint_path=directory / "training.pt",
            progress=False,
        )
    return flow


def build_flow(dataset: MDDataset, settings: FlowSettings, seed: int) -> AugmentedFlow:
    """Return an untrained flow with its fixed layers fitted on the training part of the frames."""
    flow_class = {"tsf": TemperatureSteerableFlow, "realnvp": RealNVPFlow}[settings.kind]
    options = asdict(settings)
    del options["kind"]
    options["conditioner_dtype"] = getattr(torch, settings.conditioner_dtype)
    return flow_class.from_dataset(dataset, seed=seed, check=False, **options)
