"""The training loop: likelihood plus energy, with checkpoints that resume exactly."""

import copy
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.flows.coupling import set_conditioner_dtype
from openmm_tsf.io.files import write_csv
from openmm_tsf.io.tensors import write_tensors
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.basins import basin_labels
from openmm_tsf.training.checkpoint import (
    CHECKPOINT_FORMAT,
    check_checkpoint,
    origin_of,
    read_checkpoint,
)
from openmm_tsf.training.objectives import OBJECTIVES
from openmm_tsf.training.optimizers import optimizers_of, set_learning_rate
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.validation import Validation, Validator
from openmm_tsf.utils.random import seeded_generator
from openmm_tsf.utils.signals import DeferredInterrupt
from openmm_tsf.utils.threads import torch_threads
from openmm_tsf.utils.validation import require_entry

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0
#: Gradients are clipped to so many times their usual norm.
_UNUSUAL = 2.0


@dataclass
class FitResult:
    """What training did.

    Attributes
    ----------
    best
        The validation whose weights the flow now has.
    history
        All validations in order.
    n_steps, n_skipped
        Steps made; steps skipped for non-finite gradients.
    n_evaluations
        Energy evaluations, those of validation included.
    wall_seconds
        Time spent, earlier parts of a resumed training included.
    earlier_evaluations, earlier_seconds
        Those of the earlier parts.
    """

    best: Validation
    history: list[Validation] = field(repr=False)
    n_steps: int = 0
    n_skipped: int = 0
    n_evaluations: int = 0
    wall_seconds: float = 0.0
    earlier_evaluations: int = 0
    earlier_seconds: float = 0.0


class _Fit:
    """State of one training: everything a checkpoint must hold."""

    def __init__(
        self,
        flow: AugmentedFlow,
        datasets: Sequence[MDDataset],
        potential: Potential | None,
        settings: FitSettings,
        seed: int,
    ) -> None:
        self.flow, self.potential, self.settings = flow, potential, settings
        self.generator = seeded_generator(seed)
        self.origin = origin_of(flow, datasets, seed)
        self.evaluations_at_start = potential.n_evaluations if potential else 0
        splits = [dataset.split() for dataset in datasets]
        self.temperatures = settings.temperatures or (flow.reference_temperature,)
        self.validator = Validator(
            flow,
            [split.validation for split in splits],
            potential,
            self.temperatures,
            settings.n_validation_draws,
            settings.dtype,
            seed,
            [float(basin_labels(d.molecule, d.positions).double().mean()) for d in datasets],
        )
        energies = [d.energies for d in datasets if d.energies is not None]
        if potential is not None and not energies:
            sample = datasets[0][:: max(1, len(datasets[0]) // 1000)]
            energies = [potential.energy(sample.positions)]
        kt = (potential.boltzmann_constant if potential else 1.0) * flow.reference_temperature
        self.ceiling = max((float(e.max()) for e in energies), default=0.0) + 20 * kt
        self.running: dict[str, float] = {}
        self.objective = OBJECTIVES[settings.estimator](
            flow,
            [split.train for split in splits],
            potential,
            settings,
            self.ceiling,
            self.generator,
            self._note,
        )
        self.network: Chain = copy.deepcopy(flow.network).to(settings.dtype)
        set_conditioner_dtype(self.network, None)  # all of it in the precision asked for
        self.average: Chain = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizers = optimizers_of(
            self.network, settings.optimizer, settings.learning_rate, settings.weight_decay
        )
        self.step = self.n_skipped = self.skipped_in_a_row = 0
        self.wall_seconds = 0.0
        self.earlier_evaluations, self.earlier_seconds = 0, 0.0
        self.history: list[Validation] = []
        self.best_weights: dict[str, Tensor] = copy.deepcopy(self.average.state_dict())

    @property
    def n_evaluations(self) -> int:
        now = self.potential.n_evaluations if self.potential else 0
        return self.earlier_evaluations + now - self.evaluations_at_start

    @property
    def best(self) -> Validation:
        return min(self.history, key=lambda validation: validation.score)

    def _note(self, name: str, value: float) -> None:
        if math.isfinite(value):
            old = self.running.get(name, value)
            self.running[name] = 0.98 * old + 0.02 * value

    def train_step(self) -> None:
        settings = self.settings
        set_learning_rate(self.optimizers, settings.learning_rate_at(self.step))
        self.network.zero_grad(set_to_none=True)
        mixing = settings.mixing(self.step)
        self.objective.backward(self.network, mixing, self.generator)
        # A few points that the network throws far off would lead it for many steps.
        usual = self.running.get("grad_norm", math.inf)
        limit = min(settings.max_grad_norm, _UNUSUAL * usual)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        if bool(torch.isfinite(norm)):
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.skipped_in_a_row = 0
            self._note("grad_norm", min(float(norm), limit))
        else:
            self.n_skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > settings.max_skipped:
                raise FloatingPointError(
                    f"training: {self.skipped_in_a_row} steps in a row had non-finite gradients "
                    f"(step {self.step}); lower the learning rate or check the energies"
                )
        # The running mean starts short, so that it forgets the initial weights.
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.network.parameters()), 1 - decay
            )
        self.step += 1

    def validate(self) -> Validation:
        validation = self.validator.validate(
            self.average, self.step, self.settings.mixing(self.step), self.ceiling, self.running
        )
        self.history.append(validation)
        if self.best is validation:
            self.best_weights = copy.deepcopy(self.average.state_dict())
        return validation

    @property
    def just_validated(self) -> bool:
        return self.history[-1].step == self.step

    @property
    def validation_due(self) -> bool:
        return self.step % self.settings.validate_interval == 0 or (
            self.step == self.settings.n_steps
        )

    def out_of_patience(self) -> bool:
        if self.settings.patience is None:
            return False
        # Before the ramp ends the loss itself is still changing.
        if self.step < self.settings.ramp[1] * self.settings.n_steps:
            return False
        since = len(self.history) - 1 - self.history.index(self.best)
        return since >= self.settings.patience

    def save(self, path: Path) -> None:
        content = {
            "format": CHECKPOINT_FORMAT,
            "settings": self.settings.to_config(),
            "origin": self.origin,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "best_weights": self.best_weights,
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
            "generator": self.generator.get_state(),
            "step": self.step,
            "n_skipped": self.n_skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "running": self.running,
            "objective": self.objective.state_dict(),
            "wall_seconds": self.wall_seconds,
            "n_evaluations": self.n_evaluations,
            "history": [asdict(validation) for validation in self.history],
        }
        write_tensors(path, content)

    def restore(self, path: Path) -> None:
        content = read_checkpoint(path, self.settings, self.origin)
        try:
            self._restore(content)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a readable training checkpoint ({type(error).__name__}: {error})"
            ) from error

    def _restore(self, content: dict[str, Any]) -> None:
        preparing = self.n_evaluations  # counted before, by the process that began
        check_checkpoint(content, self.network, self.optimizers, self.settings.n_steps)
        self.network.load_state_dict(content["network"])
        self.average.load_state_dict(content["average"])
        self.flow.network.load_state_dict(content["best_weights"])  # raises if they do not fit
        self.best_weights = content["best_weights"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
        self.generator.set_state(content["generator"])
        self.step, self.n_skipped = int(content["step"]), int(content["n_skipped"])
        self.skipped_in_a_row = int(content["skipped_in_a_row"])
        self.objective.load_state_dict(require_entry(content, "objective", dict))
        self.running = {str(key): float(value) for key, value in content["running"].items()}
        self.wall_seconds = self.earlier_seconds = float(content["wall_seconds"])
        self.earlier_evaluations = int(content["n_evaluations"]) - preparing
        self.history = [Validation(**row) for row in content["history"]]


def _write_log(path: Path, history: Sequence[Validation]) -> None:
    rows = [validation.row() for validation in history]
    write_csv(path, list(rows[0]), rows)


def fit(
    flow: AugmentedFlow,
    dataset: MDDataset | Sequence[MDDataset],
    potential: Potential | None = None,
    *,
    settings: FitSettings | None = None,
    seed: int = 0,
    log_path: str | os.PathLike[str] | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    resume: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train a flow in place: (1 - lambda) ML + lambda KL (arXiv:2012.00429, section 2).

    The flow ends with the averaged weights of the best validation: lowest sum of the held-out
    NLL, each temperature and each basin that is not too rare weighing the same, and the free energy
    of the flow's own draws. Ctrl-C, or SIGTERM, stops early in the same way, after the present
    step, and raises ``KeyboardInterrupt``.

    Parameters
    ----------
    flow
        The flow; its network is changed, its fixed layers are not.
    dataset
        Frames of one temperature, or several datasets each of its own temperature.
    potential
        Energies for the KL term and the validation; None trains on likelihood alone.
    settings
        Sizes and schedules.
    seed
        Seed of batches, momenta and draws.
    log_path
        CSV file with a row per validation.
    checkpoint_path
        Where to keep what `resume` goes on from, bit for bit.
    checkpoint_seconds
        Time between checkpoints; there is one at every validation, too.
    resume
        Continue from `checkpoint_path` if it exists.
    progress
        Show a progress bar.

    Raises
    ------
    TypeError
        If `settings` are no FitSettings.
    FloatingPointError
        If too many steps in a row have non-finite gradients.
    ValueError
        If data are outside the flow's domain or the checkpoint does not fit.
    """
    settings = FitSettings() if settings is None else settings
    if not isinstance(settings, FitSettings):
        raise TypeError(f"settings: expected FitSettings, got {type(settings).__name__}")
    datasets = [dataset] if isinstance(dataset, MDDataset) else list(dataset)
    if not datasets:
        raise ValueError("dataset: expected at least one MDDataset, got none")
    if potential is None and settings.lambda_max > 0:
        raise ValueError("potential: expected one for lambda_max > 0 (or set lambda_max=0)")
    if potential is None and settings.estimator == "path":
        raise ValueError("potential: expected one for path gradients (or set estimator='direct')")
    # Path gradients keep two threads busy: each may use half of torch's.
    threads = torch.get_num_threads()
    threads = max(1, threads // 2) if settings.estimator == "path" else threads
    training = _Fit(flow, datasets, potential, settings, seed)
    checkpoint = Path(checkpoint_path) if checkpoint_path is not None else None
    if resume and checkpoint is not None and checkpoint.exists():
        training.restore(checkpoint)
    saved = time.monotonic()
    began = saved - training.wall_seconds

    def keep() -> None:
        nonlocal saved
        saved = time.monotonic()
        training.wall_seconds = saved - began
        if checkpoint is not None:
            training.save(checkpoint)

    def validate() -> None:
        bar.set_postfix_str(str(training.validate()))
        keep()
        if log_path is not None:
            _write_log(Path(log_path), training.history)

    with (
        torch_threads(threads),
        DeferredInterrupt() as interrupt,
        tqdm(
            total=settings.n_steps,
            initial=training.step,
            disable=not progress,
            desc="training",
            unit="step",
        ) as bar,
    ):
        try:
            if not training.history:
                validate()
            elif log_path is not None:  # killed between the checkpoint and the log
                _write_log(Path(log_path), training.history)
            while training.step < settings.n_steps and not interrupt.requested:
                if training.just_validated and training.out_of_patience():
                    logger.info("training: no better validation for a while, stopped early")
                    break
                training.train_step()
                bar.update()
                if training.validation_due:
                    validate()
                elif time.monotonic() - saved >= checkpoint_seconds:
                    keep()
            if interrupt.requested:
                keep()
        finally:
            flow.network.load_state_dict(training.best_weights)
        if interrupt.requested:
            raise KeyboardInterrupt
    training.wall_seconds = time.monotonic() - began
    logger.info("training: kept step %d: %s", training.best.step, training.best)
    return FitResult(
        training.best,
        training.history,
        training.step,
        training.n_skipped,
        training.n_evaluations,
        training.wall_seconds,
        training.earlier_evaluations,
        training.earlier_seconds,
    )
