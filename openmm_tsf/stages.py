"""The stages of a run, each usable alone on a user's own files: train, sample, analyze."""

import hashlib
import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.accounts import Costs, Seeds
from openmm_tsf.dataset import MDDataset
from openmm_tsf.energies import (
    batch_of,
    open_potential,
    planned_sampling,
    planned_training,
    reopen_potential,
)
from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow, load_flow
from openmm_tsf.flows.augmented import AugmentedFlow
from openmm_tsf.inputs import (
    PathLike,
    check_platform,
    claim_directory,
    load_molecule,
    package_versions,
    read_json,
    write_json,
    write_molecule,
)
from openmm_tsf.potentials.base import Potential
from openmm_tsf.presets import FlowSettings, SamplingSettings, plain
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.systems import MolecularSystem, alanine_dipeptide
from openmm_tsf.training import FitSettings, fit

logger = logging.getLogger(__name__)

REFERENCE = "ala2_reference.npz"
_DRAWS_PER_WALKER = 20


def train(
    dataset: MDDataset,
    output: PathLike,
    flow_settings: FlowSettings | None = None,
    fit_settings: FitSettings | None = None,
    *,
    seed: int = 1,
    platform: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> AugmentedFlow:
    """Train a flow on frames; Ctrl-C keeps the best weights so far.

    Parameters
    ----------
    dataset
        Frames of a molecule at one temperature.
    output
        Directory for ``flow.pt``, ``training.csv``, ``config.json``, ``topology.pdb``,
        ``system.xml`` and ``training.pt`` (to resume from).
    flow_settings, fit_settings
        What to train, and how.
    seed
        Seed of everything.
    platform
        OpenMM platform; by default the fastest, by a short measurement.
    resume
        Continue an interrupted training in `output`, made with the same settings, frames and seed.
    progress
        Show a progress bar.

    Raises
    ------
    FileExistsError
        If `output` is not empty and `resume` is false.
    ValueError
        If there is nothing to resume, or it was made with other settings, frames or molecule; if
        there are too few frames, or there is no such platform.
    """
    molecule = dataset.molecule
    if molecule is None:
        raise ValueError("dataset: expected frames of a molecule, got none")
    flow_settings, fit_settings = flow_settings or FlowSettings(), fit_settings or FitSettings()
    seeds = Seeds(seed)
    check_platform(platform)
    dataset.split()  # too few frames are refused before anything is written
    folder, checkpoint = Path(output), Path(output) / "training.pt"
    costs = Costs()
    costs.evaluations["md"] = dataset.n_evaluations or None
    choices = {
        "flow": plain(flow_settings),
        "fit": plain(fit_settings),
        "seed": seed,
        "frames": {
            "n_frames": len(dataset),
            "temperature_K": dataset.temperature,
            "sha256": _hash_of_frames(dataset),
        },
    }
    if resume:
        if not checkpoint.is_file():
            raise ValueError(f"output: there is no training to resume in {folder}")
        _check_same_training(read_config(folder), molecule, choices, folder)
    else:
        folder = claim_directory(output)
        write_molecule(molecule, folder)
    config = {
        "format": 1,
        "stage": "train",
        "choices": choices,
        "fingerprint": molecule.fingerprint,
        "versions": package_versions(),
    }
    if not resume:
        write_json(folder / "config.json", config)
    flow = build_flow(dataset, flow_settings, seeds.next())

    def keep() -> None:
        flow.save(folder / "flow.pt")
        write_json(folder / "config.json", config | costs.to_config())

    planned, batch = planned_training(fit_settings), fit_settings.kl_batch_size
    with open_potential(molecule, platform, planned, batch) as potential:
        try:
            with costs.counting("training", potential):
                result = fit(
                    flow,
                    dataset,
                    potential,
                    settings=fit_settings,
                    seed=seeds.next(),
                    log_path=folder / "training.csv",
                    checkpoint_path=checkpoint,
                    resume=resume,
                    progress=progress,
                )
            # A resumed training knows what its earlier parts cost.
            costs.evaluations["training"] = result.n_evaluations
            costs.seconds["training"] = round(result.wall_seconds, 3)
        except ValueError:  # arguments or a checkpoint that do not fit: nothing was trained
            raise
        except BaseException:
            keep()
            raise
    keep()
    return flow


def _check_same_training(
    earlier: dict[str, Any], molecule: MolecularSystem, choices: dict[str, Any], folder: Path
) -> None:
    if earlier.get("stage") != "train":
        raise ValueError(f"output: {folder} holds no training to resume")
    if earlier["fingerprint"] != molecule.fingerprint:
        raise ValueError(f"output: the training in {folder} is of another molecule")
    different = [name for name, now in choices.items() if earlier["choices"].get(name) != now]
    if different:
        raise ValueError(
            f"output: the training in {folder} was made with other choices: "
            f"{', '.join(different)} differ"
        )


def _hash_of_frames(dataset: MDDataset) -> str:
    return hashlib.sha256(
        dataset.positions.detach().cpu().contiguous().numpy().tobytes()
    ).hexdigest()


def sample(
    flow: PathLike,
    output: PathLike,
    settings: SamplingSettings | None = None,
    *,
    molecule: MolecularSystem | None = None,
    start: MDDataset | None = None,
    seed: int = 1,
    platform: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Replica exchange with a frozen flow, and its analysis.

    Parameters
    ----------
    flow
        A flow file, or a directory that ``train`` or ``run`` wrote.
    output
        Run directory, new or empty (or the one to resume).
    settings
        Ladder, walkers, lengths. When resuming, ``n_iterations`` more are made.
    molecule
        The molecule; by default the one in the flow's directory, else alanine dipeptide.
    start
        Configurations to start from, drawn at random; by default draws of the flow, weighted to
        each temperature.
    seed
        Seed of everything.
    platform
        OpenMM platform; by default the fastest, by a short measurement.
    resume
        Continue the run in `output` from its checkpoint.
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
    ValueError
        If the flow belongs to another molecule, or the run to resume does not fit.
    KeyboardInterrupt
        After Ctrl-C, with everything written and analysed.
    """
    settings = settings or SamplingSettings()
    check_platform(platform)
    if resume and start is not None:
        raise ValueError("start: expected none where a run is resumed, got frames")
    home, file = _flow_file(flow)
    if molecule is None:
        if home is None:
            molecule = alanine_dipeptide()
        else:
            molecule = load_molecule(home / "topology.pdb", system=home / "system.xml")
    model = load_flow(file, molecule)
    known = home is not None and (home / "config.json").is_file()
    costs = Costs.from_config(read_config(home)) if home and known else Costs()
    if resume:
        return _continue(model, output, settings.n_iterations, molecule, platform, progress)
    seeds = Seeds(seed)
    folder = claim_directory(output)
    write_molecule(molecule, folder)
    planned, batch = planned_sampling(settings), batch_of(settings)
    with open_potential(molecule, platform, planned, batch) as potential:
        with costs.counting("sampling", potential):
            sampler = make_sampler(molecule, model, settings, potential, seeds, start, None)
            sampler.tune(settings.n_tuning, progress=progress)
        choices = {"settings": plain(settings), "flow_file": str(file), "seed": seed}
        with sampler:
            return produce(sampler, folder, settings, costs, choices, molecule, progress)


def analyze(path: PathLike) -> dict[str, Any]:
    """Tables and pictures of a run directory, written into it.

    ``summary.json``; ``ramachandran.png`` where the molecule has φ and ψ; ``diagnostics.png``; and
    ``thermodynamics.{csv,json,png}``, functions of the temperature over the whole ladder.

    Returns
    -------
    summary
        The content of ``summary.json``.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is no run directory, or has no samples yet.
    """
    from openmm_tsf.analysis import (
        load_reference,
        load_run,
        plot_diagnostics,
        write_summary,
        write_thermodynamics,
    )

    result = load_run(Path(path))
    if result.n_iterations == 0:
        raise ValueError(f"{path}: there are no samples yet")
    # Runs started from Python do not name the reference; the molecule's fingerprint tells.
    reference = result.reference()
    known = result.config.get("choices", {}).get("molecule")
    if reference is None and known == alanine_dipeptide().fingerprint and has_reference_file():
        reference = load_reference()
    summary = write_summary(result, result.path / "summary.json", reference)
    try:
        result.backbone()
    except ValueError:
        logger.info("no residue with both phi and psi: no Ramachandran plot")
    else:
        result.plot(result.path / "ramachandran.png", reference)
    plot_diagnostics(result, result.path / "diagnostics.png")
    write_thermodynamics(result, result.path, reference)
    return summary


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
        seed=seed,
    )


def read_config(folder: PathLike) -> dict[str, Any]:
    """``config.json`` of a directory that a stage wrote."""
    return read_json(Path(folder) / "config.json")


def make_sampler(
    molecule: MolecularSystem,
    flow: AugmentedFlow,
    settings: SamplingSettings,
    potential: Potential,
    seeds: Seeds,
    start: MDDataset | None,
    before: ParallelTempering | None,
) -> ParallelTempering:
    """A sampler whose walkers go on from an earlier one's, or from frames, or from the flow."""
    sampler = ParallelTempering(
        molecule,
        flow,
        settings.temperatures,
        settings.n_walkers,
        potential=potential,
        seed=seeds.next(),
    )
    if before is not None:
        sampler.set_positions(before.state.x, before.state.velocities)
        return sampler
    generator = torch.Generator().manual_seed(seeds.next())
    shape = (settings.n_walkers, len(settings.temperatures), *potential.event_shape)
    if start is not None:
        n = settings.n_walkers * len(settings.temperatures)
        index = torch.randint(len(start), (n,), generator=generator)
        sampler.set_positions(start.positions[index].reshape(shape))
        return sampler
    x = [_draws(flow, potential, t, settings.n_walkers, generator) for t in settings.temperatures]
    sampler.set_positions(torch.stack(x, dim=1))
    return sampler


def _draws(
    flow: AugmentedFlow, potential: Potential, kelvin: float, n: int, generator: torch.Generator
) -> Tensor:
    """n configurations from the flow, resampled by their importance weights at a temperature."""
    drawn = flow.sample(_DRAWS_PER_WALKER * n, kelvin, generator)
    x = drawn.x.to(torch.float64)
    x = torch.where(torch.isfinite(drawn.log_prob)[:, None, None], x, torch.nan)  # outside
    tau = kelvin / flow.reference_temperature
    log_weight = -potential.energy(x) / (potential.boltzmann_constant * kelvin)
    log_weight = log_weight - 0.5 * drawn.momenta.square().sum(dim=1) / tau - drawn.log_prob
    usable = torch.isfinite(log_weight)
    if not bool(usable.any()):
        raise ValueError(
            f"flow: none of {len(x)} draws at {kelvin:.2f} K has a finite energy; give frames to "
            "start from, or train the flow for longer"
        )
    weight = torch.where(usable, (log_weight - log_weight[usable].max()).exp(), 0.0)
    return x[torch.multinomial(weight, n, replacement=True, generator=generator)]


def produce(
    sampler: ParallelTempering,
    folder: Path,
    settings: SamplingSettings,
    costs: Costs,
    choices: dict[str, Any],
    molecule: MolecularSystem,
    progress: bool,
) -> dict[str, Any]:
    """Sample with everything frozen, write, analyse."""
    choices = choices | {"sampler_seed": sampler.seed}
    sampler.run(0, folder, choices=choices, allow_existing=True, progress=False)
    # The seed of a run is the user's; the sampler's was derived from it.
    config = read_config(folder) | costs.to_config() | {"seed": choices["seed"]}
    if has_reference(molecule):
        config["reference"] = REFERENCE
    write_json(folder / "config.json", config)
    return _sample_and_analyze(sampler, folder, settings.n_iterations, progress)


def _continue(
    flow: AugmentedFlow,
    output: PathLike,
    n_iterations: int,
    molecule: MolecularSystem,
    platform: str | None,
    progress: bool,
) -> dict[str, Any]:
    config = read_config(output)
    if not {"temperatures_K", "n_walkers", "seed", "choices"} <= config.keys():
        raise ValueError(f"output: {output} holds no run to resume")
    if "potential" not in config["choices"]:
        raise ValueError(f"output: {Path(output) / 'config.json'} is damaged, choices are missing")
    written = config["choices"]["potential"]
    with reopen_potential(molecule, written, platform) as potential:
        sampler = ParallelTempering(
            molecule,
            flow,
            config["temperatures_K"],
            config["n_walkers"],
            potential=potential,
            seed=config["choices"].get("sampler_seed", config["seed"]),
        )
        with sampler:
            sampler.resume(output)
            return _sample_and_analyze(sampler, Path(output), n_iterations, progress)


def _sample_and_analyze(
    sampler: ParallelTempering, folder: Path, n_iterations: int, progress: bool
) -> dict[str, Any]:
    try:
        sampler.run(n_iterations, folder, progress=progress)
    except KeyboardInterrupt:
        if any((folder / "segments").iterdir()):
            analyze(folder)
        raise
    return analyze(folder)


def has_reference_file() -> bool:
    """Whether the reference data are installed."""
    return (files("openmm_tsf.data") / REFERENCE).is_file()


def has_reference(molecule: MolecularSystem) -> bool:
    """Whether reference data of this very System are shipped."""
    return has_reference_file() and molecule.fingerprint == alanine_dipeptide().fingerprint


def _flow_file(flow: PathLike) -> tuple[Path | None, Path]:
    """The directory that a flow's stage wrote, if it is one, and the flow's file."""
    path = Path(flow)
    file = path / "flow.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"flow: no such flow file {file}")
    home = file.parent
    complete = all((home / name).is_file() for name in ("system.xml", "topology.pdb"))
    return (home if complete else None), file
