"""The state of one training, its steps and validations, and its checkpoints."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.flows.coupling import set_conditioner_dtype
from openmm_tsf.io.tensors import write_tensors
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.checkpoint import (
    CHECKPOINT_FORMAT,
    check_checkpoint,
    compute_origin,
    read_checkpoint,
)
from openmm_tsf.training.objectives import DirectObjective, Objective
from openmm_tsf.training.optimizers import make_optimizers, set_learning_rate
from openmm_tsf.training.parallel import gather_generators, seed_of_rank, sum_gradients, synchronize
from openmm_tsf.training.path_objective import PathObjective
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.step_numbers import StepNumbers
from openmm_tsf.training.target import Target, trains_in_single_precision
from openmm_tsf.training.validation import Validation, Validator
from openmm_tsf.utils.deferred import defer_checks
from openmm_tsf.utils.distributed import Ranks
from openmm_tsf.utils.random import make_generator
from openmm_tsf.utils.threads import torch_threads
from openmm_tsf.utils.validation import require_entry

logger = logging.getLogger(__name__)

#: Gradients are clipped to this multiple of their usual norm.
_CLIP_FACTOR = 2.0
_COUNTERS = ("step", "n_skipped", "skipped_in_a_row", "n_evaluations", "wall_seconds")


class Trainer:
    """All that a checkpoint must hold. The flow itself changes only in :meth:`restore`.

    Of several `ranks`, all make the same calls. What one asks for in a step, to stop or to save,
    is known to all after it: `is_stop_agreed`, `is_save_agreed`.
    """

    def __init__(
        self,
        flow: AugmentedFlow,
        datasets: Sequence[MDDataset],
        potential: Potential | None,
        settings: FitSettings,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.flow, self.potential, self.settings = flow, potential, settings
        self.ranks, self.seed = ranks or Ranks(), seed
        self.generator = make_generator(seed_of_rank(seed, self.ranks.rank), flow.device)
        self.threads = torch.get_num_threads()
        self.origin = compute_origin(flow, datasets, seed)
        self.evaluations_at_start = potential.n_evaluations if potential else 0
        basins = BasinPartition.find(datasets)
        target = (
            None if potential is None else make_target(flow, datasets, potential, basins, settings)
        )
        splits = [dataset.split() for dataset in datasets]
        train, held_out = zip(*((split.train, split.validation) for split in splits), strict=True)
        populations = [basins.populations(dataset.positions) for dataset in datasets]
        self.validator = Validator(flow, held_out, target, basins, settings, seed, populations)
        self.numbers = StepNumbers()
        options = settings, self.generator, self.numbers, self.ranks
        self.objective: Objective
        if settings.estimator == "path":
            assert target is not None
            self.objective = PathObjective(flow, train, target, *options)
        else:
            self.objective = DirectObjective(flow, train, target, basins, *options)
        self.network: Chain = copy.deepcopy(flow.network).to(settings.dtype)
        set_conditioner_dtype(self.network, None)  # all of it in the settings' precision
        self.average: Chain = copy.deepcopy(self.network).requires_grad_(False)
        on_cpu = flow.device.type == "cpu"
        self.optimizers = make_optimizers(
            self.network,
            settings.optimizer,
            settings.learning_rate,
            settings.weight_decay,
            # Path gradients train with half of torch's threads, twice.
            parallel=on_cpu and settings.estimator == "path" and self.threads > 1,
        )
        self.step = self.n_skipped = self.skipped_in_a_row = 0
        self.wall_seconds = 0.0
        self.earlier_evaluations, self.earlier_seconds = 0, 0.0
        #: Evaluations of other ranks, and of this one those that an earlier process had counted.
        self.evaluations_elsewhere = self._repeated = 0
        self.is_stop_agreed = self.is_save_agreed = False
        self.history: list[Validation] = []
        self.best_weights: dict[str, Tensor] = copy.deepcopy(self.average.state_dict())

    @property
    def n_evaluations(self) -> int:
        """Energy evaluations of all ranks, those before a resumption included."""
        return self.earlier_evaluations + self._n_here + self.evaluations_elsewhere

    @property
    def _n_here(self) -> int:
        """The evaluations of this process."""
        now = self.potential.n_evaluations if self.potential else 0
        return now - self.evaluations_at_start

    @property
    def best(self) -> Validation:
        """The validation with the lowest score."""
        return min(self.history, key=lambda validation: validation.score)

    def train_step(self, stop: bool = False, save: bool = False) -> None:
        """Make one step of the optimizers; too many skipped in a row: a FloatingPointError.

        On a GPU it waits for the device once. `stop` and `save` are for all ranks to agree on.
        """
        with defer_checks() as checks:
            self._train_step(stop, save)
        if checks.flags:  # read with the next numbers
            flags = torch.stack(checks.flags)
            self.numbers.add(flags, lambda failed: checks.raise_first([bool(x) for x in failed]))

    def _train_step(self, stop: bool, save: bool) -> None:
        settings, running = self.settings, self.numbers.running
        set_learning_rate(self.optimizers, settings.learning_rate_at(self.step))
        self.network.zero_grad(set_to_none=True)
        with torch.enable_grad():  # others may have disabled gradients
            self.objective.backward(self.network, self.step, self.generator)
        self._exchange(stop, save)
        # A few points that the network maps far away would misdirect it for many steps.
        usual = running.get("grad_norm", math.inf)
        limit = min(settings.max_grad_norm, _CLIP_FACTOR * usual)
        before = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        norm = self._read(before)
        self.objective.update(self.generator)
        if math.isfinite(norm):
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.skipped_in_a_row = 0
            self.numbers.update("grad_norm", min(norm, limit))
        else:
            self.n_skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > settings.max_skipped:
                what = f"{self.skipped_in_a_row} steps in a row had non-finite gradients"
                hint = f"(step {self.step}); lower the learning rate or check the energies"
                raise FloatingPointError(f"training: {what} {hint}")
        # The running mean starts short, so that it forgets the initial weights.
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.network.parameters()), 1 - decay
            )
        self.step += 1

    def _exchange(self, stop: bool, save: bool) -> None:
        """Sum the gradients over the ranks; what was asked for is known with the next numbers."""
        if self.ranks.size == 1:
            self.is_stop_agreed, self.is_save_agreed = stop, save
            return
        here = self._n_here - self._repeated

        def agree(sums: list[float]) -> None:
            self.is_stop_agreed, self.is_save_agreed = sums[0] > 0, sums[1] > 0
            self.evaluations_elsewhere = int(sums[2]) - here

        flags = float(stop), float(save), float(here)
        sums = sum_gradients(self.ranks, self.network, self.objective.exchanged, flags)
        self.numbers.add(sums, agree)

    def _read(self, number: Tensor) -> float:
        """Return a number, after all others that a step has left on the device."""
        values: list[float] = []
        self.numbers.add(number, values.extend)
        self.numbers.read()
        return values[0]

    def validate(self) -> Validation:
        """Validate the averaged weights and keep them if they are the best.

        Rank 0 does, with its running means; the others wait for the result.
        """
        self.numbers.read()
        synchronize(self.ranks, (self.network, self.average))
        row: dict[str, Any] = {}
        if self.ranks.is_first:
            step = self.step, self.settings.mixing(self.step), self.numbers.running
            with torch_threads(self.threads):  # steps may have fewer
                row = vars(self.validator.validate(self.average, *step))
        validation = Validation(**self.ranks.broadcast(row))
        self.history.append(validation)
        if self.best is validation:
            self.best_weights = copy.deepcopy(self.average.state_dict())
        return validation

    @property
    def is_complete(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.settings.n_steps

    @property
    def is_validation_due(self) -> bool:
        """Whether the present step is one after which to validate."""
        return self.step % self.settings.validate_interval == 0 or self.is_complete

    @property
    def is_out_of_patience(self) -> bool:
        """Whether to stop early; decided directly after a validation only."""
        settings = self.settings
        if settings.patience is None or self.history[-1].step != self.step:
            return False
        # Before the ramp ends the loss itself still changes.
        if self.step < settings.ramp[1] * settings.n_steps:
            return False
        since = len(self.history) - 1 - self.history.index(self.best)
        return since >= settings.patience

    def save(self, path: Path) -> None:
        """Write a checkpoint, on rank 0; every rank has to call it."""
        self.numbers.read()
        content: dict[str, Any] = {
            "format": CHECKPOINT_FORMAT,
            "settings": self.settings.to_config(),
            "origin": self.origin,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
            "generator": self.generator.get_state(),
            "generator_device": self.generator.device.type,
            "objective": self.objective.state_dict(),
            "history": [asdict(validation) for validation in self.history],
            "running": self.numbers.running,
            **{name: getattr(self, name) for name in (*_COUNTERS, "best_weights")},
        }
        if self.ranks.size > 1:
            content["generators"] = gather_generators(self.generator, self.ranks)
        if self.ranks.is_first:
            write_tensors(path, content)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint; a ValueError if it is damaged or of another training."""
        content = read_checkpoint(path, self.settings, self.origin)
        try:
            self._restore(content)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: not a readable training checkpoint ({why})") from error

    def _restore(self, content: dict[str, Any]) -> None:
        preparation = self.n_evaluations  # already counted by the process that began
        parts = self.network, self.optimizers, self.generator
        check_checkpoint(content, *parts, self.settings.n_steps)
        self.network.load_state_dict(content["network"])
        self.average.load_state_dict(content["average"])
        self.flow.network.load_state_dict(content["best_weights"])  # raises if they do not fit
        self.best_weights = content["best_weights"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
        self.step, self.n_skipped = int(content["step"]), int(content["n_skipped"])
        self._restore_generator(content)
        self.skipped_in_a_row = int(content["skipped_in_a_row"])
        self.objective.load_state_dict(require_entry(content, "objective", dict))
        running = content["running"].items()
        self.numbers.running = {str(key): float(value) for key, value in running}
        self.wall_seconds = self.earlier_seconds = float(content["wall_seconds"])
        self.earlier_evaluations = int(content["n_evaluations"]) - preparation
        self._repeated = preparation
        self.history = [Validation(**row) for row in content["history"]]

    def _restore_generator(self, content: dict[str, Any]) -> None:
        """Restore its state, or seed it anew where the checkpoint is of other ranks."""
        states, rank = content.get("generators"), self.ranks.rank
        states = content["generator"][None] if states is None else states
        if states.dtype != torch.uint8 or states.shape[1:] != content["generator"].shape:
            raise ValueError("generators: expected the states of random number generators")
        if len(states) == self.ranks.size:
            self.generator.set_state(states[rank].clone())  # torch reads from the storage's start
            return
        self.generator.manual_seed(seed_of_rank(self.seed, rank, self.step))
        if self.ranks.is_first:
            logger.warning(
                f"training: begun on {len(states)} ranks, continued on {self.ranks.size}: valid, "
                "but with other frames and draws, not the same bit by bit"
            )


def make_target(
    flow: AugmentedFlow,
    datasets: Sequence[MDDataset],
    potential: Potential,
    basins: BasinPartition,
    settings: FitSettings,
) -> Target:
    """Return the target, softened 20 kT_ref above the highest energy of the frames.

    Energies that the datasets do not have are computed for a thousand frames of the first.
    """
    energies = [dataset.energies for dataset in datasets if dataset.energies is not None]
    if not energies:
        sample = datasets[0][:: max(1, len(datasets[0]) // 1000)]
        energies = [potential.energy(sample.positions.to(flow.device))]
    kt = potential.boltzmann_constant * flow.reference_temperature
    ceiling = max(float(energy.max()) for energy in energies) + 20 * kt
    single = trains_in_single_precision(potential, settings.dtype)
    return Target(flow, potential, basins, ceiling, single)
