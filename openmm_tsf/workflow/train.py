"""The stages of a run, each usable alone on a user's own files: train and sample."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.io.directory import open_output_directory
from openmm_tsf.io.files import PathLike, write_json
from openmm_tsf.io.serialization import from_plain_data
from openmm_tsf.potentials.platforms import check_platform
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import write_molecule
from openmm_tsf.training import FitSettings, fit
from openmm_tsf.training.checkpoint import load_best_weights
from openmm_tsf.utils.random import Seeds
from openmm_tsf.utils.validation import check_seconds, check_seed
from openmm_tsf.workflow.costs import Costs
from openmm_tsf.workflow.frames import hash_of_frames
from openmm_tsf.workflow.potential_choice import (
    planned_training,
    reopen_potential,
)
from openmm_tsf.workflow.record import (
    SETTINGS,
    check_same_record,
    new_record,
    note_potential,
    read_record,
    write_record,
)
from openmm_tsf.workflow.settings import FlowSettings

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0


def train(
    dataset: MDDataset,
    output: PathLike,
    flow_settings: FlowSettings | None = None,
    fit_settings: FitSettings | None = None,
    *,
    seed: int | None = None,
    platform: str | None = None,
    resume: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    source: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> AugmentedFlow:
    """Train a flow on frames; Ctrl-C keeps the best weights so far.

    Parameters
    ----------
    dataset
        Frames of a molecule at one temperature.
    output
        Directory for ``flow.pt``, ``training.csv``, ``settings.json`` (what was asked),
        ``config.json`` (what it cost), ``topology.pdb``, ``system.xml`` and ``training.pt`` (to
        resume from).
    flow_settings, fit_settings
        What to train, and how; when resuming, by default as before.
    seed
        Seed of everything (default 1).
    platform
        OpenMM platform; by default the fastest, by a short measurement.
    resume
        Continue an interrupted training in `output`, made with the same settings, frames and seed:
        the flow is the same as if it had not stopped. Where nothing was begun yet, begin.
    checkpoint_seconds
        Time between checkpoints; there is one at every validation, too.
    source
        Where the frames come from, to be noted in ``settings.json`` (json-able).
    progress
        Show a progress bar.

    Raises
    ------
    FileExistsError
        If `output` is not empty and `resume` is false.
    DirectoryInUse
        If another process writes to `output`.
    ValueError
        If `output` was made with other settings, frames or molecule; if there are too few frames,
        or there is no such platform.
    """
    molecule = dataset.molecule
    if molecule is None:
        raise ValueError("dataset: expected frames of a molecule, got none")
    if platform is not None:
        check_platform(platform)
    check_seconds(checkpoint_seconds)
    dataset.split()  # too few frames are refused before anything is written
    seed = None if seed is None else check_seed(seed)
    with open_output_directory(output, resume=resume) as lock:
        folder = lock.directory
        record = read_record(folder, ["train"]) if resume else None
        where = str(folder / SETTINGS)
        if record is not None:
            seed = record["seed"] if seed is None else seed
            parts = record["settings"]
            flow_settings = flow_settings or from_plain_data(FlowSettings, parts.get("flow"), where)
            fit_settings = fit_settings or from_plain_data(FitSettings, parts.get("fit"), where)
        flow_settings, fit_settings = flow_settings or FlowSettings(), fit_settings or FitSettings()
        seed = 1 if seed is None else seed
        seeds = Seeds(seed)
        asked = new_record(
            "train",
            molecule,
            settings={"flow": flow_settings, "fit": fit_settings},
            seed=seed,
            frames_sha256=hash_of_frames(dataset),
            source=dict(source or {}) if record is None else record.get("source"),
        )
        if record is None:
            record = asked
            write_record(folder, record)
        check_same_record(folder, record, asked)
        write_molecule(molecule, folder)
        costs = Costs()
        costs.evaluations["md"] = dataset.n_evaluations or None
        frames = {
            "source": dataset.name,
            "n_frames": len(dataset),
            "temperature_K": dataset.temperature,
        }
        planned, batch = planned_training(fit_settings), fit_settings.kl_batch_size
        flow = build_flow(dataset, flow_settings, seeds.next())

        def keep() -> None:
            flow.save(folder / "flow.pt")
            choices = record | {"frames": frames}  # the potential's among them
            config = {"format": 1, "stage": "train", "choices": choices, **costs.to_config()}
            write_json(folder / "config.json", config)

        with reopen_potential(
            molecule, record.get("potential"), platform, planned, batch
        ) as potential:
            note_potential(folder, record, potential)
            try:
                with costs.counting("training", potential):
                    result = fit(
                        flow,
                        dataset,
                        potential,
                        settings=fit_settings,
                        seed=seeds.next(),
                        log_path=folder / "training.csv",
                        checkpoint_path=folder / "training.pt",
                        checkpoint_seconds=checkpoint_seconds,
                        resume=resume,
                        progress=progress,
                    )
            except KeyboardInterrupt:
                # Interrupted before it went on, the flow has no weights yet that are worth a file.
                if load_best_weights(flow, folder / "training.pt"):
                    keep()
                raise
        costs.add("training", result.earlier_evaluations, result.earlier_seconds)
        keep()
    return flow


def build_flow(dataset: MDDataset, settings: FlowSettings, seed: int) -> AugmentedFlow:
    """An untrained flow with its fixed layers fitted on the training part of the frames."""
    kind = {"tsf": TemperatureSteerableFlow, "realnvp": RealNVPFlow}[settings.kind]
    return kind.from_dataset(
        dataset,
        n_momenta=settings.n_momenta,
        n_blocks=settings.n_blocks,
        hidden=settings.hidden,
        coordinates=settings.coordinates,
        conditioner_dtype=getattr(torch, settings.conditioner_dtype),
        overlap=settings.overlap,
        seed=seed,
    )
