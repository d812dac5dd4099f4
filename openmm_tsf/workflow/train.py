"""The stages of a run, each usable alone on a user's own files: train and sample."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow, load_flow
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.io.directory import DirectoryLock, claimed
from openmm_tsf.io.files import read_json, write_json
from openmm_tsf.io.serialization import from_plain, plain
from openmm_tsf.sampling.provenance import hash_of
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import (
    PathLike,
    check_platform,
    holds_molecule,
    read_molecule,
    write_molecule,
)
from openmm_tsf.systems.molecule import MolecularSystem, alanine_dipeptide
from openmm_tsf.training import FitSettings, fit
from openmm_tsf.training.checkpoint import load_best_weights
from openmm_tsf.utils.random import Seeds
from openmm_tsf.utils.validation import seconds_between, seed_number
from openmm_tsf.workflow import sample as production
from openmm_tsf.workflow.costs import Costs
from openmm_tsf.workflow.potential_choice import (
    batch_of,
    planned_sampling,
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
from openmm_tsf.workflow.settings import FlowSettings, SamplingSettings

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
    check_platform(platform)
    seconds_between(checkpoint_seconds)
    dataset.split()  # too few frames are refused before anything is written
    seed = None if seed is None else seed_number(seed)
    with claimed(output, resume=resume) as lock:
        folder = lock.directory
        record = read_record(folder, ["train"]) if resume else None
        where = str(folder / SETTINGS)
        if record is not None:
            seed = record["seed"] if seed is None else seed
            parts = record["settings"]
            flow_settings = flow_settings or from_plain(FlowSettings, parts.get("flow"), where)
            fit_settings = fit_settings or from_plain(FitSettings, parts.get("fit"), where)
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


def hash_of_frames(dataset: MDDataset) -> str:
    """SHA-256 of a dataset's positions."""
    return hashlib.sha256(
        dataset.positions.detach().cpu().contiguous().numpy().tobytes()
    ).hexdigest()


def sample(
    flow: PathLike | None,
    output: PathLike,
    settings: SamplingSettings | None = None,
    *,
    molecule: MolecularSystem | None = None,
    start: MDDataset | None = None,
    seed: int | None = None,
    platform: str | None = None,
    resume: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: bool = True,
) -> dict[str, Any]:
    """Replica exchange with a frozen flow, and its analysis.

    Parameters
    ----------
    flow
        A flow file, or a directory that ``train`` or ``run`` wrote; None where `output`, which is
        resumed, has it already.
    output
        Run directory, new or empty (or the one to resume).
    settings
        Ladder, walkers, lengths. When resuming, those of the run by default; ``n_iterations`` may
        grow: it counts the iterations of production in all.
    molecule
        The molecule; by default the one in the flow's directory, else alanine dipeptide.
    start
        Configurations to start from, drawn at random; by default draws of the flow, weighted to
        each temperature.
    seed
        Seed of everything (default 1).
    platform
        OpenMM platform; by default the fastest, by a short measurement.
    resume
        Continue the run in `output` from its checkpoint, the same as if it had not stopped. Where
        nothing was begun yet, begin.
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
        If the flow belongs to another molecule, or the run to resume does not fit.
    KeyboardInterrupt
        After Ctrl-C, with everything written and analysed.
    """
    check_platform(platform)
    seconds_between(checkpoint_seconds)
    own = Path(output)
    if resume and flow is None and (own / "flow.pt").is_file():
        flow = own
    if flow is None:
        raise ValueError("flow: expected a flow file, or a directory of train or run, got none")
    home, file = _flow_file(flow)
    if molecule is None:
        where = next((f for f in (own, home) if f is not None and holds_molecule(f)), None)
        molecule = alanine_dipeptide() if where is None else read_molecule(where)
    model = load_flow(file, molecule)
    known = home is not None and home != own and (home / "config.json").is_file()
    costs = Costs.from_config(read_json(home / "config.json")) if home and known else Costs()
    seed = None if seed is None else seed_number(seed)
    with claimed(output, resume=resume) as lock:
        if resume and production.has_begun(lock.directory):
            total = _checked_total(lock, settings, start, seed)
            return production.take_up(
                model, lock, total, molecule, platform, checkpoint_seconds, progress
            )
        return _sample_from_the_start(
            model, lock, settings, molecule, start, seed, platform, resume, costs, str(file),
            checkpoint_seconds, progress,
        )  # fmt: skip


def _checked_total(
    lock: DirectoryLock, settings: SamplingSettings | None, start: MDDataset | None,
    seed: int | None,
) -> int | None:  # fmt: skip
    """Iterations in all, where the rest of what is asked is what the run was started with."""
    choices = read_json(lock.directory / "config.json").get("choices")
    if not isinstance(choices, dict):
        raise ValueError(f"{lock.directory / 'config.json'}: damaged, choices are missing")
    if seed is not None and seed != choices.get("seed", seed):
        raise ValueError(
            f"seed: what is in {lock.directory} was made with {choices['seed']}, got {seed}"
        )
    if start is not None and choices.get("start_sha256", None) != hash_of_frames(start):
        raise ValueError("start: these are not the frames that the run was started from")
    if settings is None:
        return None
    asked = choices.get("settings")
    if isinstance(asked, dict):
        before = {"fingerprint": "", "settings": asked.get("sampling", asked)}
        now = {"fingerprint": "", "settings": plain(settings)}
        check_same_record(lock.directory, before, now, growing=["n_iterations"])
    return settings.n_iterations


def _sample_from_the_start(
    flow: AugmentedFlow,
    lock: DirectoryLock,
    settings: SamplingSettings | None,
    molecule: MolecularSystem,
    start: MDDataset | None,
    seed: int | None,
    platform: str | None,
    resume: bool,
    costs: Costs,
    file: str,
    checkpoint_seconds: float,
    progress: bool,
) -> dict[str, Any]:
    folder = lock.directory
    record = read_record(folder, ["sample"]) if resume else None
    if record is not None:
        seed = record["seed"] if seed is None else seed
        settings = settings or from_plain(
            SamplingSettings, record["settings"], str(folder / SETTINGS)
        )
        costs = Costs.from_config(record.get("costs") or {})
    settings, seed = settings or SamplingSettings(), 1 if seed is None else seed
    seeds = Seeds(seed)
    asked = new_record(
        "sample",
        molecule,
        settings=settings,
        seed=seed,
        flow_sha256=hash_of(flow),
        start_sha256=None if start is None else hash_of_frames(start),
    )
    if record is None:
        record = asked | {"costs": costs.to_config()}
        write_record(folder, record)
    check_same_record(folder, record, asked, growing=["n_iterations"])
    write_molecule(molecule, folder)
    flow.save(folder / "flow.pt")  # the directory can be resumed, moved and read alone
    planned, batch = planned_sampling(settings), batch_of(settings)
    with reopen_potential(molecule, record.get("potential"), platform, planned, batch) as potential:
        note_potential(folder, record, potential)
        with costs.counting("sampling", potential):
            sampler = production.make_sampler(
                molecule, flow, settings, potential, production.sampler_seeds(seeds, True), start,
                None,
            )  # fmt: skip
            sampler.tune(settings.n_tuning, progress=progress)
        choices = {
            "settings": plain(settings),
            "flow_file": file,
            "seed": seed,
            "start_sha256": record["start_sha256"],
        }
        with sampler:
            production.begin(sampler, lock, settings, costs, choices, molecule)
            return production.produce(
                sampler, lock, settings.n_iterations, checkpoint_seconds, progress
            )


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


def _flow_file(flow: PathLike) -> tuple[Path | None, Path]:
    """The directory that a flow's stage wrote, if it is one, and the flow's file."""
    path = Path(flow)
    file = path / "flow.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"flow: no such flow file {file}")
    home = file.parent
    return (home if holds_molecule(home) else None), file
