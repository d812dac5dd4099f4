"""Replica exchange with a frozen flow into a run directory: started, continued, analysed."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.analysis.analyze import analyze
from openmm_tsf.analysis.load import load_run
from openmm_tsf.analysis.reference import REFERENCE_FILE, has_reference
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.compilation import compile_for_sampling
from openmm_tsf.flows.load import load_flow, place_for_sampling
from openmm_tsf.io.directory import open_output_directory
from openmm_tsf.io.files import PathLike
from openmm_tsf.io.run_config import CONFIG, read_config
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.kernels.schedule import Scheduled, SequenceSettings, default_kernels
from openmm_tsf.sampling.provenance import hash_of, read_sampler_config
from openmm_tsf.sampling.run_writer import CHECKPOINT, RunWriter
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import holds_molecule, read_molecule
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.random import Seeds, make_generator
from openmm_tsf.utils.threads import torch_threads
from openmm_tsf.utils.validation import check_instance
from openmm_tsf.workflow.costs import Costs
from openmm_tsf.workflow.duration import WORTH_MEASURING, is_worth_measuring, iteration_seconds
from openmm_tsf.workflow.frames import hash_of_frames, measure_basins
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.potential_choice import batch_of, planned_sampling
from openmm_tsf.workflow.record import (
    check_same_request,
    new_config,
    recorded_choices,
    recorded_settings,
    resumed_choices,
    sampling_part,
    warn_of_other_versions,
)
from openmm_tsf.workflow.settings import SamplingSettings
from openmm_tsf.workflow.stage import Stage
from openmm_tsf.workflow.start import start_positions
from openmm_tsf.workflow.until import (
    check_targets,
    known_observables,
    record_observables,
    sample_until,
)

logger = logging.getLogger(__name__)

#: What a continuation may be given anew.
_MAY_DIFFER = ("n_iterations", "until")


def sampler_seeds(seeds: Seeds, fresh: bool) -> tuple[int, int | None]:
    """Return the seeds of a sampler and, with `fresh`, of its walkers' start.

    A resumed run takes them also for samplers that it skips, so that later ones get the same.
    """
    return seeds.next(), seeds.next() if fresh else None


def sampling_threads(recorded: int | None = None) -> AbstractContextManager[None]:
    """Use one of two threads of torch: the second is for training, networks of this size are faster
    on one. Other numbers, and those `recorded` at the start, are left as the user chose them.
    """
    now = torch.get_num_threads()
    return torch_threads(1 if now == 2 and recorded in (None, 1) else now)


def kernels_of(
    settings: SamplingSettings, molecule: MolecularSystem, flow: AugmentedFlow, potential: Potential
) -> list[Scheduled]:
    """Return the kernels of an iteration, in their order."""
    sequence = SequenceSettings(
        n_flow_independent=settings.n_independent,
        n_flow_crank_nicolson=settings.n_crank_nicolson,
        n_flow_walk=settings.n_walk,
        swap=settings.swap,
        local_interval=settings.local_interval,
    )
    masses = torch.tensor(molecule.dynamics_masses, dtype=torch.float64, device="cpu")
    return default_kernels(potential, flow, settings.temperatures, masses, sequence)


def flow_block(n_walkers: int, n_rungs: int, device: torch.device) -> int:
    """Return the rows of a compiled flow's block: all on a GPU, as many as fit a cache on a CPU."""
    return min(n_walkers * n_rungs, 16384 if device.type != "cpu" else 64)


def flow_for_production(
    stage: Stage, flow: AugmentedFlow, n_walkers: int, n_rungs: int
) -> AugmentedFlow:
    """Return the flow on the stage's device, compiled if that was chosen, which is recorded."""
    flow = place_for_sampling(flow, stage.device)
    is_compiled = stage.options.choose_compile_flow(stage.choices)
    if is_compiled != stage.choices.get("compile_flow", False):
        stage.record(compile_flow=is_compiled)
    if not is_compiled:
        return flow
    return compile_for_sampling(flow, flow_block(n_walkers, n_rungs, stage.device))


def make_sampler(
    molecule: MolecularSystem,
    flow: AugmentedFlow,
    settings: SamplingSettings,
    potential: Potential,
    seeds: tuple[int, int | None],
    start: WalkerState | torch.Tensor | MDDataset | None,
) -> ParallelTempering:
    """Return a sampler; its walkers start from earlier ones, positions [W, R, N, 3], or the flow.

    With frames, only half of them start from the flow, the others from random frames: walkers that
    start alike would agree with each other before they agree with the Boltzmann distribution.
    """
    sampler = ParallelTempering(
        molecule,
        flow,
        settings.temperatures,
        settings.n_walkers,
        kernels_of(settings, molecule, flow, potential),
        potential=potential,
        seed=seeds[0],
    )
    if isinstance(start, WalkerState):
        sampler.set_positions(start.x, start.velocities)
        return sampler
    if isinstance(start, torch.Tensor):
        sampler.set_positions(start)
        return sampler
    assert seeds[1] is not None
    sampler.set_positions(
        start_positions(
            start, flow, potential, settings.temperatures, settings.n_walkers,
            make_generator(seeds[1], flow.device),
        )
    )  # fmt: skip
    return sampler


def has_started(directory: Path) -> bool:
    """Return whether sampling in a directory has a checkpoint to continue from.

    Samples without a checkpoint are a ValueError: to start again would delete them.
    """
    if (directory / CHECKPOINT).is_file():
        return True
    if any((directory / "segments").glob("segment_*.npz")):
        raise ValueError(
            f"{directory / CHECKPOINT}: no such checkpoint, but there are samples; they stay as "
            "they are, and cannot be continued"
        )
    return False


def start_sampling(stage: Stage, sampler: ParallelTempering) -> None:
    """Write everything of a run directory but samples; the first checkpoint comes last."""
    # A killed process may have done a part of it.
    stage.remove_sampling_entries()
    RunWriter(stage.directory, stage.molecule, sampler.temperatures, sampler.n_walkers).remove()
    # The seed of a run is the user's; the sampler's was derived from it.
    choices = stage.choices | {"sampler_seed": sampler.seed}
    config = stage.config | {"choices": choices, "seed": choices["seed"]} | stage.costs.to_config()
    if has_reference(stage.molecule.fingerprint):
        config["reference"] = REFERENCE_FILE
    saved = sampling_part(stage.choices["settings"])
    intervals = saved.get("save_interval", 1), saved.get("numbers_interval")
    sampler.start(stage.lock, config, *intervals)
    stage.reload()


def resume_sampling(
    stage: Stage,
    flow: AugmentedFlow,
    n_iterations: int | None,
    until: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Continue to `n_iterations` in all or `until`, by default as recorded; then analyse."""
    directory, config = stage.directory, read_sampler_config(stage.directory)
    choices = config["choices"]
    settings: SamplingSettings | None = recorded_settings(directory, "sample", SamplingSettings)
    n_iterations = n_iterations or (settings.n_iterations if settings is not None else None)
    if n_iterations is None:
        raise ValueError(f"n_iterations: expected a number in all, {directory} records none")
    if until is None:
        until = () if settings is None else settings.until
    observe = known_observables(choices, stage.options.observe)
    check_targets(until, config["temperatures_K"], stage.molecule, observe)
    record_observables(stage)
    stage.record_target(n_iterations, until)
    sizes = config["n_walkers"], len(config["temperatures_K"])
    with (
        sampling_threads(choices["torch_threads"]),
        stage.open_potential(batch=sizes[0] * sizes[1]) as potential,
    ):
        flow = flow_for_production(stage, flow, *sizes)
        sampler = ParallelTempering(
            stage.molecule,
            flow,
            config["temperatures_K"],
            config["n_walkers"],
            None if settings is None else kernels_of(settings, stage.molecule, flow, potential),
            potential=potential,
            seed=choices.get("sampler_seed", config["seed"]),
        )
        with sampler:
            sampler.resume(directory, lock=stage.lock)
            if n_iterations <= sampler.n_done:
                logger.info("all %d iterations are complete", n_iterations)
            return sample_and_analyze(stage, sampler, n_iterations, until)


def sample_and_analyze(
    stage: Stage, sampler: ParallelTempering, n_iterations: int, until: Sequence[str]
) -> dict[str, Any]:
    """Sample with everything frozen, to `n_iterations` in all or `until`; write, analyse."""
    try:
        sample_until(stage, sampler, n_iterations, until)
    except KeyboardInterrupt:
        # Done, so that the directory has been made, and saved.
        if sampler.n_done and load_run(stage.directory, start=0).n_iterations:
            analyze(stage.directory, observe=stage.options.observe)
        raise
    return analyze(stage.directory, observe=stage.options.observe)


def sample(
    flow: PathLike | None,
    output: PathLike,
    settings: SamplingSettings | None = None,
    *,
    molecule: MolecularSystem | None = None,
    start: MDDataset | None = None,
    options: RunOptions | None = None,
) -> dict[str, Any]:
    """Sample by replica exchange with a frozen flow, and return the content of ``summary.json``.

    Parameters
    ----------
    flow
        A flow file, or a directory of ``train`` or ``run``; None where `output` is resumed.
    output
        Run directory, new or empty, or the one to resume.
    settings
        Ladder, walkers, lengths. When resuming, those of the run by default; ``n_iterations``, the
        iterations of production in all, may grow, and ``until`` may be another target.
    molecule
        The molecule; by default the one in the flow's directory, else alanine dipeptide.
    start
        Configurations that half of the walkers start from, at random; the others, by default all,
        start from weighted draws of the flow.
    options
        How it is run.

    Raises
    ------
    FileExistsError, DirectoryInUse
        If `output` is not empty and not to be resumed, or another process writes to it.
    ValueError
        If the flow belongs to another molecule, the molecule's energy depends on its position or
        orientation, or the run to resume does not fit.
    KeyboardInterrupt
        After Ctrl-C, with everything written and analysed.
    """
    check_instance(settings, "settings", SamplingSettings)
    check_instance(molecule, "molecule", MolecularSystem)
    check_instance(start, "start", MDDataset)
    check_instance(options, "options", RunOptions)
    options, directory = options or RunOptions(), Path(output)
    if settings is not None and settings.n_shards > 1:
        again = f"; continue it with `openmm-tsf run --output {directory} --resume`"
        raise ValueError(
            f"n_shards: expected 1, shards are of run, got {settings.n_shards}"
            f"{again if options.resume else ''}"
        )
    if options.resume and flow is None and (directory / "flow.pt").is_file():
        flow = directory
    if flow is None:
        raise ValueError("flow: expected a flow file, or a directory of train or run, got none")
    home, file = find_flow(flow)
    if molecule is None:
        known = [f for f in (directory, home) if f is not None and holds_molecule(f)]
        molecule = read_molecule(known[0]) if known else alanine_dipeptide()
    molecule.check_pose_independent()
    if settings is not None:
        recorded = recorded_choices(directory) if options.resume else {}
        observe = known_observables(recorded, options.observe)
        check_targets(settings.until, settings.temperatures, molecule, observe)
    model = load_flow(file, molecule)
    costs = Costs()
    if home is not None and home != directory and (home / CONFIG).is_file():
        costs = Costs.from_config(read_config(home))
    with open_output_directory(output, resume=options.resume) as lock:
        if options.resume and has_started(lock.directory):
            stage = Stage(lock, molecule, options, read_sampler_config(lock.directory))
            warn_of_other_versions(lock.directory, stage.config.get("versions"))
            n_iterations = _check_target(stage, settings, start)
            until = None if settings is None else settings.until
            return resume_sampling(stage, model, n_iterations, until)
        recorded = resumed_choices(lock.directory, "sample", options)
        settings = settings or recorded_settings(lock.directory, "sample", SamplingSettings)
        settings = settings or SamplingSettings()
        request = new_config(
            "sample",
            molecule,
            settings=settings,
            seed=options.choose_seed(recorded),
            device=options.choose_device(recorded),
            flow_file=str(file),
            flow_sha256=hash_of(model),
            start_sha256=None if start is None else hash_of_frames(start),
        )
        request["costs"] = {"flow": costs.to_config()}
        stage = Stage.open(lock, molecule, options, request, _MAY_DIFFER)
        basins = _basins_of_training(home, start)
        if basins is not None:
            stage.record(basins=basins)
        frames = {} if home is None else recorded_choices(home)
        if frames.get("frames") is not None:
            stage.record(frames=frames["frames"])
        record_observables(stage)
        return _start(stage, model, settings, start)


def _basins_of_training(home: Path | None, start: MDDataset | None) -> dict[str, Any] | None:
    """Return the basins that the flow's directory records, or those of the frames to start from."""
    recorded = {} if home is None else recorded_choices(home)
    if recorded.get("basins") is not None:
        basins: dict[str, Any] = recorded["basins"]
        return basins
    return None if start is None else measure_basins(start)


def _check_target(
    stage: Stage, settings: SamplingSettings | None, start: MDDataset | None
) -> int | None:
    """Iterations in all; everything else must be what the run was started with."""
    request: dict[str, Any] = {}
    if settings is not None and stage.choices.get("settings") is not None:
        request["settings"] = to_plain_data(settings)
    if stage.options.seed is not None and "seed" in stage.choices:
        request["seed"] = stage.options.seed
    recorded = stage.choices | {"settings": sampling_part(stage.choices.get("settings"))}
    check_same_request(stage.directory, recorded, request, _MAY_DIFFER)
    if start is not None and stage.choices.get("start_sha256") != hash_of_frames(start):
        raise ValueError("start: these are not the frames that the run was started from")
    return None if settings is None else settings.n_iterations


def _start(
    stage: Stage, flow: AugmentedFlow, settings: SamplingSettings, start: MDDataset | None
) -> dict[str, Any]:
    """Tune, start sampling, sample."""
    flow.save(stage.directory / "flow.pt")  # the directory can be resumed and read without others
    stage.restore_costs("flow")
    stage.record_target(settings.n_iterations, settings.until)
    seeds = sampler_seeds(Seeds(stage.choices["seed"]), fresh=True)
    planned = planned_sampling(settings)
    flow = flow_for_production(stage, flow, settings.n_walkers, len(settings.temperatures))
    with stage.open_potential(planned, batch_of(settings)) as potential:
        worth = is_worth_measuring(planned, 0, settings.n_iterations, least=WORTH_MEASURING)
        if stage.options.progress and worth and stage.is_new:
            with stage.costs.measuring("sampling", potential):
                other = make_sampler(stage.molecule, flow, settings, potential, (0, 0), start)
                each = iteration_seconds(other, settings)
                stage.tell_duration(sampling=each * (settings.n_tuning + settings.n_iterations))
        with stage.costs.counting("sampling", potential):
            sampler = make_sampler(stage.molecule, flow, settings, potential, seeds, start)
            sampler.tune(settings.n_tuning, progress=stage.options.progress)
        with sampler:
            start_sampling(stage, sampler)
            return sample_and_analyze(stage, sampler, settings.n_iterations, settings.until)


def find_flow(flow: PathLike) -> tuple[Path | None, Path]:
    """Return the directory that a stage wrote around a flow, or None, and the flow's file."""
    path = Path(flow)
    file = path / "flow.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"flow: no such flow file {file}")
    home = file.parent
    return (home if holds_molecule(home) else None), file
