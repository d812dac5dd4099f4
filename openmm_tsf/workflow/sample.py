"""Replica exchange with a frozen flow into a run directory: begun, continued, analysed."""

import logging
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.io.directory import DirectoryLock
from openmm_tsf.io.files import read_json, sweep, write_json, written_together
from openmm_tsf.io.serialization import from_plain
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.kernels.schedule import Every, default_kernels
from openmm_tsf.sampling.run_writer import CHECKPOINT, RunWriter, read_run_config
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import PathLike
from openmm_tsf.systems.molecule import MolecularSystem, alanine_dipeptide
from openmm_tsf.utils.random import Seeds, seeded_generator
from openmm_tsf.utils.threads import torch_threads
from openmm_tsf.workflow.costs import Costs
from openmm_tsf.workflow.potential_choice import reopen_potential
from openmm_tsf.workflow.record import warn_of_other_versions
from openmm_tsf.workflow.settings import SamplingSettings

logger = logging.getLogger(__name__)

REFERENCE = "ala2_reference.npz"
_DRAWS_PER_WALKER = 20


def sampler_seeds(seeds: Seeds, fresh: bool) -> tuple[int, int | None]:
    """Seeds of a sampler and, where its walkers do not go on from others, of their start.

    They are taken also for a sampler that a resumed run no longer needs, so that the next ones
    have theirs.
    """
    return seeds.next(), seeds.next() if fresh else None


def sampling_threads(begun_with: int | None = None) -> AbstractContextManager[None]:
    """Of two threads of torch, one: the second is for training, and networks of this size are
    quicker on one. Other numbers are as the user asked.

    Parameters
    ----------
    begun_with
        What sampling that is continued was begun with.
    """
    now = torch.get_num_threads()
    return torch_threads(1 if now == 2 and begun_with in (None, 1) else now)


def kernels_of(
    settings: SamplingSettings,
    molecule: MolecularSystem,
    flow: AugmentedFlow,
    potential: Potential,
) -> list[Every]:
    """The sequence of an iteration."""
    return default_kernels(
        potential,
        flow,
        settings.temperatures,
        torch.tensor(molecule.masses, dtype=torch.float64),
        n_flow_independent=settings.n_independent,
        n_flow_walk=settings.n_walk,
        swap=settings.swap,
        local_interval=settings.local_interval,
    )


def make_sampler(
    molecule: MolecularSystem,
    flow: AugmentedFlow,
    settings: SamplingSettings,
    potential: Potential,
    seeds: tuple[int, int | None],
    start: MDDataset | None,
    before: WalkerState | None,
) -> ParallelTempering:
    """A sampler whose walkers go on from earlier ones, or from frames, or from the flow."""
    sampler = ParallelTempering(
        molecule,
        flow,
        settings.temperatures,
        settings.n_walkers,
        kernels_of(settings, molecule, flow, potential),
        potential=potential,
        seed=seeds[0],
    )
    if before is not None:
        sampler.set_positions(before.x, before.velocities)
        return sampler
    assert seeds[1] is not None
    generator = seeded_generator(seeds[1])
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


def has_begun(folder: Path) -> bool:
    """Whether production in a run directory has a checkpoint to go on from.

    Raises
    ------
    ValueError
        If it has none, but samples: to begin again would be to delete them.
    """
    if (folder / CHECKPOINT).is_file():
        return True
    if any((folder / "segments").glob("segment_*.npz")):
        raise ValueError(
            f"{folder / CHECKPOINT}: no such checkpoint, but there are samples; they stay as they "
            "are, and cannot be continued"
        )
    return False


def clear_unbegun(folder: Path, molecule: MolecularSystem, settings: SamplingSettings) -> None:
    """Remove what a run that was killed before its first checkpoint left of production."""
    RunWriter(folder, molecule, settings.temperatures, settings.n_walkers).remove()


def begin(
    sampler: ParallelTempering,
    lock: DirectoryLock,
    settings: SamplingSettings,
    costs: Costs,
    choices: dict[str, Any],
    molecule: MolecularSystem,
) -> None:
    """Everything of a run directory but samples; the first checkpoint comes last."""
    choices = choices | {"sampler_seed": sampler.seed}
    clear_unbegun(lock.directory, molecule, settings)
    # The seed of a run is the user's; the sampler's was derived from it.
    entries = costs.to_config() | {"seed": choices["seed"]}
    if has_reference(molecule):
        entries["reference"] = REFERENCE
    sampler.run(
        0,
        lock.directory,
        choices=choices,
        entries=entries,
        allow_existing=True,
        lock=lock,
        progress=False,
    )


def take_up(
    flow: AugmentedFlow,
    lock: DirectoryLock,
    n_iterations: int | None,
    molecule: MolecularSystem,
    platform: str | None,
    checkpoint_seconds: float,
    progress: bool,
) -> dict[str, Any]:
    """Continue a run directory to `n_iterations` in all; by default to what was asked at first."""
    folder = lock.directory
    config = read_run_config(folder)
    choices = config["choices"]
    warn_of_other_versions(folder, config.get("versions"))
    if n_iterations is None:
        asked = choices.get("settings")
        n_iterations = _asked_iterations(asked)
        if n_iterations is None:
            raise ValueError(
                f"n_iterations: expected how many there shall be in all, {folder} does not say"
            )
    note_total(folder, n_iterations)
    with (
        sampling_threads(choices.get("torch_threads", 0)),
        reopen_potential(molecule, choices["potential"], platform) as potential,
    ):
        asked = _sampling_settings(choices.get("settings"), str(folder / "config.json"))
        sampler = ParallelTempering(
            molecule,
            flow,
            config["temperatures_K"],
            config["n_walkers"],
            None if asked is None else kernels_of(asked, molecule, flow, potential),
            potential=potential,
            seed=choices.get("sampler_seed", config["seed"]),
        )
        with sampler:
            sampler.resume(folder, lock=lock)
            left = n_iterations - sampler.n_written * choices["save_interval"]
            if left <= 0:
                logger.info("all %d iterations are there already", n_iterations)
            return produce(sampler, lock, max(0, left), checkpoint_seconds, progress)


def note_total(folder: Path, n_iterations: int) -> None:
    """Keep a total that has grown, so that a run that is killed goes on to that one."""
    for name, home in (("settings.json", None), ("config.json", "choices")):
        path = folder / name
        if not path.is_file():  # of a run that was started from Python
            continue
        content = read_json(path)
        holder = content if home is None else content.get(home)
        settings = holder.get("settings") if isinstance(holder, dict) else None
        asked = settings.get("sampling", settings) if isinstance(settings, dict) else None
        if isinstance(asked, dict) and asked.get("n_iterations", n_iterations) < n_iterations:
            asked["n_iterations"] = n_iterations
            write_json(path, content)


def _sampling_settings(settings: Any, where: str) -> SamplingSettings | None:
    """SamplingSettings, or those of RunSettings, as they were written; None if none were."""
    if not isinstance(settings, dict):
        return None
    found: SamplingSettings = from_plain(
        SamplingSettings, settings.get("sampling", settings), where
    )
    return found


def _asked_iterations(settings: Any) -> int | None:
    """n_iterations of SamplingSettings or RunSettings, as they were written."""
    if not isinstance(settings, dict):
        return None
    found = settings.get("sampling", settings)
    number = found.get("n_iterations") if isinstance(found, dict) else None
    return number if isinstance(number, int) else None


def produce(
    sampler: ParallelTempering,
    lock: DirectoryLock,
    n_iterations: int,
    checkpoint_seconds: float,
    progress: bool,
) -> dict[str, Any]:
    """Sample with everything frozen, write, analyse."""
    folder = lock.directory
    try:
        sampler.run(
            n_iterations,
            folder,
            checkpoint_seconds=checkpoint_seconds,
            lock=lock,
            progress=progress,
        )
    except KeyboardInterrupt:
        if sampler.n_written:
            analyze(folder)
        raise
    return analyze(folder)


def analyze(path: PathLike) -> dict[str, Any]:
    """Tables and pictures of a run directory, written into it.

    ``summary.json``; ``ramachandran.png`` where the molecule has φ and ψ; ``diagnostics.png``; and
    ``thermodynamics.{csv,json,png}``, functions of the temperature over the whole ladder. The run
    may still be writing. The files replace earlier ones together, when all are made.

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
    sweep(result.path)
    with written_together(result.path) as folder:
        summary = write_summary(result, folder / "summary.json", reference)
        try:
            result.backbone()
        except ValueError:
            logger.info("no residue with both phi and psi: no Ramachandran plot")
        else:
            result.plot(folder / "ramachandran.png", reference)
        plot_diagnostics(result, folder / "diagnostics.png")
        write_thermodynamics(result, folder, reference)
    return summary


def has_reference_file() -> bool:
    """Whether the reference data are installed."""
    return (files("openmm_tsf.data") / REFERENCE).is_file()


def has_reference(molecule: MolecularSystem) -> bool:
    """Whether reference data of this very System are shipped."""
    return has_reference_file() and molecule.fingerprint == alanine_dipeptide().fingerprint
