"""The training loop: trains a flow in place, with checkpoints that resume exactly."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.log import write_log
from openmm_tsf.training.parallel import check_ranks, synchronize
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.training.validation import Validation
from openmm_tsf.units import SECOND, in_unit
from openmm_tsf.utils.activity import log_while
from openmm_tsf.utils.distributed import current_ranks
from openmm_tsf.utils.progress import progress_bar
from openmm_tsf.utils.signals import DeferredInterrupt
from openmm_tsf.utils.threads import torch_threads
from openmm_tsf.utils.validation import check_seconds, check_seed

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0


@dataclass
class FitResult:
    """The result of a training.

    Attributes
    ----------
    best
        The validation whose weights the flow now has.
    history
        All validations in order.
    n_steps, n_skipped
        Steps made; steps skipped for non-finite gradients.
    n_evaluations, wall_seconds
        Energy evaluations, including validation; time spent. Both include the earlier parts of a
        resumed training, `earlier_evaluations` and `earlier_seconds`.
    evaluations_elsewhere
        Those among `n_evaluations` that other ranks made.

    Examples
    --------
    >>> from openmm_tsf.training import FitResult, Validation
    >>> first = Validation(step=0, mixing=0.0, score=3.0, nll={"600K basin 0": 3.0})
    >>> FitResult(best=first, history=[first]).best.score
    3.0
    """

    best: Validation
    history: list[Validation] = field(repr=False)
    n_steps: int = 0
    n_skipped: int = 0
    n_evaluations: int = 0
    wall_seconds: float = 0.0
    earlier_evaluations: int = 0
    earlier_seconds: float = 0.0
    evaluations_elsewhere: int = 0


def fit(
    flow: AugmentedFlow,
    dataset: MDDataset | Sequence[MDDataset],
    potential: Potential | None = None,
    *,
    settings: FitSettings | None = None,
    seed: int = 0,
    log_path: str | os.PathLike[str] | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    checkpoint_seconds: Any = CHECKPOINT_SECONDS,
    resume: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train a flow in place: (1 - lambda) ML + lambda KL (arXiv:2012.00429, section 2).

    The flow ends with the averaged weights of the best validation: the lowest sum of the held-out
    NLL, with equal weights of temperatures and of basins that are not too rare, and the free energy
    of the flow's draws. Ctrl-C and SIGTERM stop the training in the same way after the present step
    and raise ``KeyboardInterrupt``.

    Where ranks are connected (:func:`openmm_tsf.utils.distributed.connect_ranks`), each of them
    calls this with the same arguments, makes its part of the frames, draws and chains of every
    step, and ends with the same flow; only rank 0 writes files. A checkpoint can be continued on
    another number of ranks: that is valid, but with other frames and draws.

    Parameters
    ----------
    flow
        The flow; its network is changed, its fixed layers are not. The training runs on the
        flow's device, with random numbers of that device's generator.
    dataset
        Frames at one temperature, or several datasets with one temperature each.
    potential
        Energies for the KL term and the validation, on the flow's device; None trains on
        likelihood alone.
    settings, seed
        Sizes and schedules; seed of batches, momenta and draws.
    log_path
        CSV file with a row per validation.
    checkpoint_path, checkpoint_seconds, resume
        File from which `resume` continues, bit for bit, if it exists, on the kind of device (CPU
        or GPU) where it was made; time between checkpoints in s (each validation also writes one).
    progress
        Show a progress bar.

    Raises
    ------
    ValueError
        If the energy of a dataset's molecule depends on its position or orientation, or the
        potential is on another device than the flow.
    FloatingPointError
        If too many steps in a row have non-finite gradients.
    LostRankError
        If another rank ended.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf import FitSettings, MDDataset, TemperatureSteerableFlow, fit
    >>> from openmm_tsf.potentials import GaussianWell
    >>> potential = GaussianWell(torch.eye(2, dtype=torch.float64))
    >>> frames = potential.sample(200, 1.0, torch.Generator().manual_seed(0))
    >>> flow = TemperatureSteerableFlow(n_coordinates=2, n_momenta=2, n_blocks=1, hidden=(8,))
    >>> settings = FitSettings(n_steps=5, batch_size=16, kl_batch_size=4, n_validation_draws=20)
    >>> result = fit(flow, MDDataset(frames, 1.0), potential, settings=settings, progress=False)
    >>> result.n_steps, [validation.step for validation in result.history]
    (5, [0, 5])
    """
    settings = FitSettings() if settings is None else settings
    seconds = check_seconds(in_unit(checkpoint_seconds, SECOND, "checkpoint_seconds"))
    seed = check_seed(seed)
    datasets = [dataset] if isinstance(dataset, MDDataset) else list(dataset)
    _check_arguments(flow, datasets, potential, settings)
    ranks = current_ranks()
    check_ranks(settings, ranks)
    ranks.barrier()  # others may have more to prepare than the time within which to come to a sum
    synchronize(ranks, (flow.network,))
    # On the CPU path gradients keep two threads busy: each uses half of torch's.
    threads, in_two = torch.get_num_threads(), settings.estimator == "path" and ranks.size == 1
    threads = max(1, threads // 2) if in_two and flow.device.type == "cpu" else threads
    log, checkpoint = (None if p is None else Path(p) for p in (log_path, checkpoint_path))
    show = progress and ranks.is_first
    with progress_bar("training", settings.n_steps, unit="step", show=show) as bar:
        bar.set_postfix_str("coordinates and energies of the frames")
        with log_while(logger, "coordinates and energies of the frames", announce=False):
            trainer = Trainer(flow, datasets, potential, settings, seed, ranks)
        exists = resume and checkpoint is not None and checkpoint.exists()
        if ranks.broadcast(exists) and checkpoint is not None:
            trainer.restore(checkpoint)
        ranks.barrier()
        files = _Files(trainer, log, checkpoint, seconds)
        bar.initial = bar.n = bar.last_print_n = trainer.step
        with torch_threads(threads), DeferredInterrupt() as interrupt:
            try:
                is_interrupted = _run(trainer, files, interrupt, bar)
            finally:
                flow.network.load_state_dict(trainer.best_weights)
            if is_interrupted:
                raise KeyboardInterrupt
    trainer.wall_seconds = time.monotonic() - files.started
    if ranks.is_first:
        logger.info("training: kept step %d: %s", trainer.best.step, trainer.best)
    counts = trainer.step, trainer.n_skipped, trainer.n_evaluations, trainer.wall_seconds
    earlier = trainer.earlier_evaluations, trainer.earlier_seconds
    return FitResult(
        trainer.best, trainer.history, *counts, *earlier, trainer.evaluations_elsewhere
    )


def _check_arguments(
    flow: AugmentedFlow,
    datasets: Sequence[MDDataset],
    potential: Potential | None,
    settings: FitSettings,
) -> None:
    if not isinstance(settings, FitSettings):
        raise TypeError(f"settings: expected FitSettings, got {type(settings).__name__}")
    if not datasets:
        raise ValueError("dataset: expected at least one MDDataset, got none")
    if potential is None and settings.lambda_max > 0:
        raise ValueError("potential: expected one for lambda_max > 0 (or set lambda_max=0)")
    if potential is None and settings.estimator == "path":
        raise ValueError("potential: expected one for path gradients (or set estimator='direct')")
    device = getattr(potential, "device", flow.device)  # others compute where their argument is
    if device != flow.device:
        expected = f"one on {flow.device}, the device of the flow"
        raise ValueError(f"potential: expected {expected}, got one on {device}")
    for dataset in datasets:
        if potential is not None and dataset.molecule is not None:
            dataset.molecule.check_pose_independent()


class _Files:
    """The log and the checkpoint of a training, and its time."""

    def __init__(
        self, trainer: Trainer, log: Path | None, checkpoint: Path | None, seconds: float
    ) -> None:
        self.trainer, self.log, self.checkpoint, self.seconds = trainer, log, checkpoint, seconds
        self.saved = time.monotonic()
        self.started = self.saved - trainer.wall_seconds

    @property
    def is_checkpoint_due(self) -> bool:
        return time.monotonic() - self.saved >= self.seconds

    def save_checkpoint(self) -> None:
        self.saved = time.monotonic()
        self.trainer.wall_seconds = self.saved - self.started
        if self.checkpoint is not None:
            self.trainer.save(self.checkpoint)

    def write_log(self) -> None:
        if self.log is not None and self.trainer.ranks.is_first:
            write_log(self.log, self.trainer.history)


def _run(trainer: Trainer, files: _Files, interrupt: DeferredInterrupt, bar: "tqdm[Any]") -> bool:
    """Train until the last step, an interrupt, or the end of patience; return if interrupted.

    Of several ranks, all stop after the same step, and save after the same steps.
    """
    ranks = trainer.ranks

    def validate() -> None:
        if not trainer.history:
            bar.set_postfix_str("first validation")
        with log_while(logger, "validation", announce=False):
            validation = trainer.validate()
        bar.set_postfix_str(str(validation))
        files.save_checkpoint()
        files.write_log()

    if trainer.history:  # a killed process may have written the checkpoint but not the log
        files.write_log()
    else:
        validate()
    bar.unpause()  # the time of the steps alone tells how long they take
    while not trainer.is_complete:
        if trainer.is_stop_agreed if ranks.size > 1 else interrupt.requested:
            break
        if trainer.is_out_of_patience:
            logger.info("training: no better validation for a while, stopped early")
            break
        trainer.train_step(interrupt.requested, files.is_checkpoint_due)
        bar.update()
        is_save_due = trainer.is_save_agreed if ranks.size > 1 else files.is_checkpoint_due
        if trainer.is_validation_due:
            validate()
        elif is_save_due:
            files.save_checkpoint()
    # It may have come to one of them after the last step.
    n_requests = torch.tensor(int(interrupt.requested), dtype=torch.int64, device="cpu")
    is_interrupted = bool(ranks.sum_(n_requests))
    if is_interrupted:
        files.save_checkpoint()
    return is_interrupted
