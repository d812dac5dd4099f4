"""Production in shards: the walkers of a run in several directories (`openmm_tsf.io.shards`).

MD, training and tuning are done once, in the run's own directory (`prepare_shards`). Then each
shard is sampled by itself: in this process one after the other, by one process each (a job array,
``--shard``), or by the ranks of a job, which take shards rank, rank + size, ... Its numbers depend
on the run's seed, the frozen flow, the step sizes and its own number, and on nothing else: they are
the same bits whichever process computes them.

Step sizes are tuned on chains of the first `TUNED_SHARDS` shards, which the ranks divide: their
counts are integers, and are added before each change. These chains have random numbers of their
own and are then dropped. Every shard starts anew, with as many iterations as tuning had before the
first that is saved. More chains would not tune better, and would take a job array's first process
longer than the production of a shard.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.analysis.reference import REFERENCE_FILE, has_reference
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.compilation import compile_for_sampling
from openmm_tsf.flows.load import load_flow, place_for_sampling
from openmm_tsf.io.directory import list_contents, open_output_directory
from openmm_tsf.io.run_config import read_config
from openmm_tsf.io.shards import count_shards, read_shards, shard_directory
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.chain import tune_chains
from openmm_tsf.sampling.run_writer import CHECKPOINT
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import slow_torsions
from openmm_tsf.utils.devices import check_device, describe_device
from openmm_tsf.utils.distributed import current_ranks
from openmm_tsf.utils.random import Purpose, derive_distinct_seeds, derive_seed, make_stream
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.potential_choice import batch_of, planned_sampling, reopen_potential
from openmm_tsf.workflow.record import new_config, recorded_settings
from openmm_tsf.workflow.rounds import Rounds
from openmm_tsf.workflow.sample import (
    flow_block,
    has_started,
    kernels_of,
    sampling_threads,
    start_sampling,
)
from openmm_tsf.workflow.settings import RunSettings, SamplingSettings
from openmm_tsf.workflow.stage import Stage
from openmm_tsf.workflow.start import start_positions
from openmm_tsf.workflow.until import sample_until

logger = logging.getLogger(__name__)

#: Step sizes are tuned on chains of so many shards, whatever the number of ranks.
TUNED_SHARDS = 4
_MAY_DIFFER = ("n_iterations",)


def settings_of_shard(settings: SamplingSettings) -> SamplingSettings:
    """Return the settings of a single shard: a part of the walkers, in one directory."""
    return replace(settings, n_walkers=settings.n_walkers // settings.n_shards, n_shards=1)


def is_prepared(directory: Path) -> bool:
    """Return whether a run has a frozen flow and tuned step sizes for its shards."""
    try:
        return count_shards(read_config(directory)) > 1
    except FileNotFoundError:
        return False


def are_started(directory: Path, numbers: Sequence[int]) -> bool:
    """Return whether these shards of a run all have a checkpoint: they need no frames."""
    files = (shard_directory(directory, number) / CHECKPOINT for number in numbers)
    return is_prepared(directory) and all(file.is_file() for file in files)


def has_samples(directory: Path) -> bool:
    """Return whether any shard of a run has samples that can be read."""
    return any(shard.n_iterations for shard in read_shards(directory, read_config(directory)))


def check_prepared(directory: Path, number: int, n_shards: int | None = None) -> None:
    """Refuse to sample shard `number` of a run that has no flow and step sizes, or fewer shards."""
    if not is_prepared(directory):
        settings = recorded_settings(directory, "run", RunSettings)
        if settings is not None and settings.sampling.n_shards == 1:
            raise ValueError(f"shard: expected a run in shards, {directory} has one: no --shards S")
        of = "--resume" if (directory / "config.json").is_file() else "... --shards S"
        raise ValueError(
            f"shard: {directory} has no trained flow and tuned step sizes yet; first run "
            f"`openmm-tsf run --output {directory} {of} --prepare`"
        )
    n_shards = count_shards(read_config(directory))
    if number >= n_shards:
        raise ValueError(f"shard: expected 0 to {n_shards - 1}, as the run has, got {number}")


def check_planned(directory: Path, settings: SamplingSettings) -> None:
    """Refuse more iterations of one shard than the run has recorded, for all of them."""
    recorded = recorded_settings(directory, "run", RunSettings).sampling.n_iterations
    if settings.n_iterations > recorded:
        raise ValueError(
            f"n_iterations: expected at most {recorded} of one shard, as the run has recorded, got "
            f"{settings.n_iterations}; lengthen the run first with `openmm-tsf run --output "
            f"{directory} --resume --prepare --iterations {settings.n_iterations}`"
        )


class ShardsFailedError(RuntimeError):
    """Some shards could not be sampled; the others were."""


class ShardSampling:
    """What the shards of a run have in common, in this process.

    Parameters
    ----------
    directory, molecule, settings, options
        The run's directory; the molecule; settings of all shards together; how they are run.
    dataset
        Frames that shards start from; None where all of them have started.
    """

    def __init__(
        self,
        directory: Path,
        molecule: MolecularSystem,
        settings: SamplingSettings,
        options: RunOptions,
        dataset: MDDataset | None,
    ) -> None:
        self.directory, self.molecule, self.options = directory, molecule, options
        self.all_settings, self.settings = settings, settings_of_shard(settings)
        self.dataset = dataset
        self.config = read_config(directory)
        self.choices: dict[str, Any] = self.config["choices"]
        self.seed = int(self.choices["seed"])
        self.device = check_device(options.choose_device(self.choices))
        self.flow = load_flow(directory / "flow.pt", molecule)
        self.placed: AugmentedFlow = place_for_sampling(
            load_flow(directory / "flow.pt", molecule), self.device
        )
        if options.choose_compile_flow(self.choices):
            sizes = self.settings.n_walkers, len(settings.temperatures)
            self.placed = compile_for_sampling(self.placed, flow_block(*sizes, self.device))

    def open_potential(self) -> Potential:
        """Open the potential that the run has recorded."""
        return reopen_potential(
            self.molecule,
            self.choices.get("potential"),
            self.options.platform,
            planned_sampling(self.all_settings),
            batch_of(self.settings),
            self.device,
        )

    def make_chain(
        self, number: int, purpose: Purpose, potential: Potential, *, is_new: bool = True
    ) -> ParallelTempering:
        """Return a sampler of one shard; a new one is placed at its start."""
        seed, settings = derive_seed(self.seed, purpose, number), self.settings
        sampler = ParallelTempering(
            self.molecule,
            self.placed,
            settings.temperatures,
            settings.n_walkers,
            kernels_of(settings, self.molecule, self.placed, potential),
            potential=potential,
            seed=seed,
            generator=make_stream(seed, self.placed.device),
        )
        if is_new:
            generator = make_stream(
                derive_seed(self.seed, Purpose.START, number), self.placed.device
            )
            sampler.set_positions(
                start_positions(
                    self.dataset, self.placed, potential, settings.temperatures,
                    settings.n_walkers, generator,
                )
            )  # fmt: skip
        return sampler

    def tune(self, potential: Potential) -> tuple[dict[str, Any], int]:
        """Tune step sizes together with the other ranks.

        Returns the choices of the sampler, and the evaluations of all ranks.
        """
        ranks, n_shards = current_ranks(), self.all_settings.n_shards
        numbers = range(ranks.rank, min(TUNED_SHARDS, n_shards), ranks.size)
        before = potential.n_evaluations
        # A rank without a chain needs one to know the shapes of the sums.
        chains = [self.make_chain(k, Purpose.TUNING, potential) for k in numbers or [0]]
        try:
            tune_chains(
                chains,
                self.settings.n_tuning,
                n_advanced=len(numbers),
                add_up=ranks.sum_,
                progress=self.options.progress and ranks.is_first,
            )
            settings = self.settings
            choices = chains[0].choices(settings.save_interval, settings.numbers_interval)
        finally:
            for chain in chains:
                chain.close()
        spent = torch.tensor(potential.n_evaluations - before, dtype=torch.int64, device="cpu")
        return choices, int(ranks.sum_(spent))

    def sample(self, number: int, potential: Potential) -> int:
        """Start or continue one shard to its end; return its iterations."""
        path = shard_directory(self.directory, number)
        is_used = path.is_dir() and bool(list_contents(path))
        is_resumed = is_used and self.options.resume
        if is_used and not is_resumed:
            raise FileExistsError(
                f"output: {path} is not empty; continue this shard with `openmm-tsf run --output "
                f"{self.directory} --shard {number} --resume`"
            )
        options = replace(self.options, resume=is_resumed, shard=None, seed=None, observe={})
        request = new_config(
            "sample",
            self.molecule,
            settings=self.settings,
            seed=self.seed,
            shard=number,
            device=str(self.device),
            potential=self.choices["potential"],
        )
        path.parent.mkdir(exist_ok=True)
        with open_output_directory(path, resume=is_resumed) as lock:
            stage = Stage.open(lock, self.molecule, options, request, _MAY_DIFFER)
            stage.record_target(self.settings.n_iterations)
            with self._open_chain(stage, number, potential) as sampler:
                sample_until(stage, sampler, self.settings.n_iterations, ())
                return sampler.n_done

    def _open_chain(self, stage: Stage, number: int, potential: Potential) -> ParallelTempering:
        if has_started(stage.directory):
            sampler = self.make_chain(number, Purpose.SAMPLING, potential, is_new=False)
            return sampler.resume(stage.directory, lock=stage.lock)
        if not (stage.directory / "flow.pt").is_file():
            self.flow.save(stage.directory / "flow.pt")
        with stage.costs.counting("sampling", potential):
            sampler = self.make_chain(number, Purpose.SAMPLING, potential)
            sampler.step_sizes = self.choices["sigma"]
            sampler.run(self.settings.n_tuning, progress=self.options.progress)
        start_sampling(stage, sampler)
        return sampler


def prepare_shards(
    stage: Stage, settings: SamplingSettings, dataset: MDDataset, potential: Potential
) -> None:
    """Tune step sizes for the shards of a run with a frozen flow, and record them.

    Other ranks come to `join_preparation`.
    """
    derive_distinct_seeds(stage.choices["seed"], Purpose.SAMPLING, settings.n_shards)
    if stage.options.choose_compile_flow(stage.choices):
        stage.record(compile_flow=True)
    current_ranks().broadcast({"is_tuned": False})
    with sampling_threads(), stage.costs.counting("sampling", potential):
        directory, before = stage.directory, potential.n_evaluations
        sampling = ShardSampling(directory, stage.molecule, settings, stage.options, dataset)
        choices, n_evaluations = sampling.tune(potential)
        others = n_evaluations - (potential.n_evaluations - before)
        stage.costs.add("sampling", others, 0.0)
    choices |= {"tuned_shards": min(TUNED_SHARDS, settings.n_shards)}
    torsions = slow_torsions(stage.molecule.topology)
    stage.config |= {
        "choices": stage.choices | choices,
        "seed": stage.choices["seed"],
        "temperatures_K": list(settings.temperatures),
        "n_walkers": settings.n_walkers,
        "dihedrals": {name: list(atoms) for name, atoms in torsions.items()},
        "boltzmann_constant": potential.boltzmann_constant,
        "device": describe_device(sampling.device),
        "n_shards": settings.n_shards,
        **stage.costs.to_config(),
    }
    if has_reference(stage.molecule.fingerprint):
        stage.config["reference"] = REFERENCE_FILE
    stage.save()
    current_ranks().barrier()  # the others read it


def join_preparation(
    sampling_of: Callable[[], ShardSampling],
    trainings_of: Callable[[], AbstractContextManager[Rounds]],
) -> None:
    """Train and tune step sizes with rank 0, as far as it says that it is to be done."""
    ranks = current_ranks()
    message = ranks.broadcast()
    if "training" in message:
        with trainings_of() as rounds:
            while "training" in message:
                rounds.join(message["training"], message["seed"])
                message = ranks.broadcast()
    if message["is_tuned"]:
        return
    sampling = sampling_of()
    with sampling_threads(), sampling.open_potential() as potential:
        sampling.tune(potential)
    ranks.barrier()


def sample_shards(sampling: ShardSampling, numbers: Sequence[int]) -> dict[str, Any]:
    """Sample shards, and return the iterations of each by name.

    One that fails leaves the others going on.

    Raises
    ------
    ShardsFailedError
        If some failed, after the others; also of other ranks.
    KeyboardInterrupt
        After Ctrl-C or SIGTERM, with everything written.
    """
    n_shards, ranks = sampling.all_settings.n_shards, current_ranks()
    failed = torch.zeros(n_shards, dtype=torch.int64, device="cpu")
    done: dict[str, int] = {}
    reasons: list[str] = []
    threads = sampling.choices["torch_threads"]
    with sampling_threads(threads), sampling.open_potential() as potential:
        for number in numbers:
            name = shard_directory(sampling.directory, number).name
            logger.info("shard %s of %d", name, n_shards)
            try:
                done[name] = sampling.sample(number, potential)
            except Exception as error:
                failed[number] = 1
                reasons.append(f"shard {name}: {error}")
                is_debugged = logger.isEnabledFor(logging.DEBUG)
                logger.error("shard %s failed: %s", name, error, exc_info=is_debugged)
    ranks.barrier()
    names = [shard_directory("", k).name for k in ranks.sum_(failed).nonzero().flatten().tolist()]
    if names:
        raise ShardsFailedError(
            f"{len(names)} of {n_shards} shards failed: {', '.join(names)}"
            f"{'' if not reasons else ' (' + '; '.join(reasons) + ')'}. The same command with "
            "--resume samples what is missing"
        )
    return done
