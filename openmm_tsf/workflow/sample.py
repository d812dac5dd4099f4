"""Replica exchange with a frozen flow into a run directory: begun, continued, analysed."""

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.analysis.analyze import analyze
from openmm_tsf.analysis.reference import REFERENCE, has_reference
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.directory import DirectoryLock, open_output_directory
from openmm_tsf.io.files import PathLike, read_json, write_json
from openmm_tsf.io.run_config import read_run_config
from openmm_tsf.io.serialization import from_plain_data, to_plain_data
from openmm_tsf.potentials.base import Potential
from openmm_tsf.potentials.platforms import check_platform
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.kernels.schedule import Scheduled, default_kernels
from openmm_tsf.sampling.provenance import hash_of
from openmm_tsf.sampling.run_writer import CHECKPOINT, RunWriter
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import holds_molecule, read_molecule, write_molecule
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.random import Seeds, seeded_generator
from openmm_tsf.utils.threads import torch_threads
from openmm_tsf.utils.validation import check_seconds, check_seed
from openmm_tsf.workflow import sample as production
from openmm_tsf.workflow.costs import Costs
from openmm_tsf.workflow.frames import hash_of_frames
from openmm_tsf.workflow.potential_choice import batch_of, planned_sampling, reopen_potential
from openmm_tsf.workflow.record import (
    SETTINGS,
    check_same_record,
    new_record,
    note_potential,
    read_record,
    warn_of_other_versions,
    write_record,
)
from openmm_tsf.workflow.settings import SamplingSettings
from openmm_tsf.workflow.train import CHECKPOINT_SECONDS

logger = logging.getLogger(__name__)

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
) -> list[Scheduled]:
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
    if has_reference(molecule.fingerprint):
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
    found: SamplingSettings = from_plain_data(
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
    if platform is not None:
        check_platform(platform)
    check_seconds(checkpoint_seconds)
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
    seed = None if seed is None else check_seed(seed)
    with open_output_directory(output, resume=resume) as lock:
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
        now = {"fingerprint": "", "settings": to_plain_data(settings)}
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
        settings = settings or from_plain_data(
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
            "settings": to_plain_data(settings),
            "flow_file": file,
            "seed": seed,
            "start_sha256": record["start_sha256"],
        }
        with sampler:
            production.begin(sampler, lock, settings, costs, choices, molecule)
            return production.produce(
                sampler, lock, settings.n_iterations, checkpoint_seconds, progress
            )


def _flow_file(flow: PathLike) -> tuple[Path | None, Path]:
    """The directory that a flow's stage wrote, if it is one, and the flow's file."""
    path = Path(flow)
    file = path / "flow.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"flow: no such flow file {file}")
    home = file.parent
    return (home if holds_molecule(home) else None), file
