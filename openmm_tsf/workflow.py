"""The hybrid driver: MD, training, tempering, retraining, freeze, production, analysis.

Every stage is a function of its own that works on the user's files; :func:`run` does them all.
Only production, with the flow frozen, is written as samples and enters estimates: a flow that
changes with the walkers' history breaks detailed balance.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.accounts import Costs, Seeds
from openmm_tsf.dataset import MDDataset
from openmm_tsf.energies import batch_of, open_potential, planned_sampling, planned_training
from openmm_tsf.flows.augmented import AugmentedFlow
from openmm_tsf.inputs import (
    PathLike,
    check_platform,
    claim_directory,
    load_trajectory,
    package_versions,
    write_json,
    write_molecule,
)
from openmm_tsf.md import run_md
from openmm_tsf.potentials.base import Potential
from openmm_tsf.presets import RunSettings, plain, preset
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.stages import analyze, build_flow, make_sampler, produce, sample, train
from openmm_tsf.systems import MolecularSystem, alanine_dipeptide
from openmm_tsf.training import fit
from openmm_tsf.training_log import merge_logs

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
    seed: int = 1,
    platform: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """From frames, or from nothing, to samples at every temperature.

    Parameters
    ----------
    output
        Run directory, new or empty.
    settings
        What to do; the preset ``"default"`` when left out.
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
        Seed of everything.
    platform
        OpenMM platform for energies and MD. By default energies of a long run are compiled by
        torch where it covers the System; see :func:`openmm_tsf.energies.open_potential`.
    progress
        Show progress bars.

    Returns
    -------
    summary
        The content of ``summary.json``.

    Raises
    ------
    FileExistsError
        If `output` is not empty.
    ValueError
        If arguments contradict each other or the frames do not fit the molecule.
    KeyboardInterrupt
        After Ctrl-C, with everything written: in production the samples so far are analysed first.
    """
    settings = settings or preset("default")
    molecule = molecule or alanine_dipeptide()
    seeds = Seeds(seed)
    if trajectory is not None and own_md:
        raise ValueError("trajectory: expected none where MD is to be run, got both")
    if trajectory is None and temperature is not None:
        raise ValueError("temperature: expected none without a trajectory, got one")
    check_platform(platform)
    if trajectory is not None:  # before anything is written: it may not fit
        dataset = load_trajectory(trajectory, molecule, temperature, settings.stride)
        dataset.split()  # raises if the frames are too few
        source = str(trajectory)
    folder = claim_directory(output)
    write_molecule(molecule, folder)
    choices: dict[str, Any] = {
        "settings": plain(settings),
        "seed": seed,
        "platform_asked_for": platform,
    }
    about = {"fingerprint": molecule.fingerprint, "versions": package_versions()}
    write_json(folder / "settings.json", choices | about)
    costs = Costs()
    if trajectory is None:
        dataset, source = _own_frames(
            molecule, settings, folder, own_md, seeds.next() % 2**31, platform, costs, progress
        )
    costs.evaluations["md"] = dataset.n_evaluations or None
    choices["frames"] = {
        "source": source,
        "n_frames": len(dataset),
        "temperature_K": dataset.temperature,
    }
    write_json(folder / "settings.json", choices | about)
    batch = batch_of(settings.sampling)
    with open_potential(molecule, platform, _planned(settings), batch) as potential:
        with costs.counting("training", potential):
            flow = build_flow(dataset, settings.flow, seeds.next())
        logger.info("flow with %d parameters, %d frames", flow.n_parameters, len(dataset))
        walkers = _train_and_temper(
            flow, dataset, potential, settings, folder, seeds, costs, progress
        )
        logger.info("the flow is frozen: production")
        sampling = settings.sampling
        with costs.counting("sampling", potential):
            production = make_sampler(molecule, flow, sampling, potential, seeds, dataset, walkers)
            if walkers is not None:
                walkers.close()
            production.tune(sampling.n_tuning, progress=progress)
        with production:
            return produce(production, folder, sampling, costs, choices, molecule, progress)


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
    own_md: bool,
    seed: int,
    platform: str | None,
    costs: Costs,
    progress: bool,
) -> tuple[MDDataset, str]:
    """The shipped frames, or our own MD, and which of the two."""
    if not own_md and molecule.fingerprint == alanine_dipeptide().fingerprint:
        return MDDataset.shipped(molecule, stride=settings.stride), "shipped"
    result = run_md(
        molecule,
        folder / "md",
        replace(settings.md, seed=seed),
        platform=platform,
        progress=progress,
    )
    if result.interrupted:
        raise KeyboardInterrupt
    costs.seconds["md"] = round(result.wall_seconds, 3)
    return load_trajectory(folder / "md", molecule, stride=settings.stride), "own MD"


def _train_and_temper(
    flow: AugmentedFlow,
    dataset: MDDataset,
    potential: Potential,
    settings: RunSettings,
    folder: Path,
    seeds: Seeds,
    costs: Costs,
    progress: bool,
) -> ParallelTempering | None:
    """Train on the frames; then, round by round, sample all temperatures and train on that too.

    Returns the sampler of the last round, whose walkers production starts from.
    """
    sampling, molecule = settings.sampling, dataset.molecule
    assert molecule is not None
    walkers: ParallelTempering | None = None
    samples: list[list[Tensor]] = [[] for _ in sampling.temperatures]
    for number in range(settings.n_rounds + 1):
        data = [dataset]
        if number:
            logger.info("round %d of %d: sampling", number, settings.n_rounds)
            with costs.counting("sampling", potential):
                before = walkers
                walkers = make_sampler(molecule, flow, sampling, potential, seeds, dataset, before)
                if before is not None:
                    before.close()
                walkers.tune(sampling.n_tuning, progress=progress)
                x = walkers.run(settings.round_iterations, collect=True, progress=progress)
            assert x is not None
            for rung, frames in enumerate(samples):
                frames.append(x[:: settings.round_stride, :, rung])
            share = settings.sample_share
            weight = share / (1 - share) / len(samples)
            data += _as_datasets(samples, sampling.temperatures, molecule, weight)
        logger.info("training %d of %d", number + 1, settings.n_rounds + 1)
        plan = settings.refit if number else settings.fit
        checkpoint = _log_path(folder, number).with_suffix(".pt")
        try:
            with costs.counting("training", potential):
                fit(
                    flow,
                    data,
                    potential,
                    settings=replace(plan, temperatures=sampling.temperatures),
                    seed=seeds.next(),
                    log_path=_log_path(folder, number),
                    checkpoint_path=checkpoint,
                    progress=progress,
                )
        finally:
            flow.save(folder / "flow.pt")
            merge_logs(folder)
        checkpoint.unlink(missing_ok=True)  # kept only where training ended early
    return walkers


def _as_datasets(
    samples: Sequence[Sequence[Tensor]],
    temperatures: Sequence[float],
    molecule: MolecularSystem,
    weight: float,
) -> list[MDDataset]:
    return [
        MDDataset(
            torch.cat(list(frames)).flatten(0, 1),
            kelvin,
            molecule,
            weight=weight,
            chains=torch.arange(frames[0].shape[1]).repeat(sum(map(len, frames))),
        )
        for frames, kelvin in zip(samples, temperatures, strict=True)
    ]


def _log_path(folder: Path, number: int) -> Path:
    (folder / "training").mkdir(exist_ok=True)
    return folder / "training" / f"round_{number:02d}.csv"
