"""Training on frames, then, round by round, also on samples of all temperatures.

Until production starts, ``training/`` keeps the flow after each training, the samples and walkers
of each round, and the checkpoint of the current training. A run that is resumed skips what is
complete.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.files import remove_stale_temporaries
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.initial import restored_state
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitResult, fit
from openmm_tsf.training.checkpoint import load_best_weights
from openmm_tsf.training.log import merge_logs
from openmm_tsf.utils.devices import CPU
from openmm_tsf.utils.distributed import current_ranks
from openmm_tsf.utils.random import Seeds
from openmm_tsf.workflow.sample import make_sampler, sampler_seeds, sampling_threads
from openmm_tsf.workflow.settings import RunSettings
from openmm_tsf.workflow.stage import Stage

logger = logging.getLogger(__name__)


class Rounds:
    """Trainings and rounds of sampling of one run; the first training is on `dataset`.

    Of connected ranks, the first calls :meth:`run`. It tells the others of each training, and they
    come to :meth:`join`.
    """

    def __init__(
        self,
        stage: Stage,
        settings: RunSettings,
        dataset: MDDataset,
        potential: Potential,
        flow: AugmentedFlow,
    ) -> None:
        self.stage, self.settings, self.dataset = stage, settings, dataset
        self.potential, self.flow = potential, flow
        self.folder = stage.directory / "training"
        if current_ranks().is_first:
            self.folder.mkdir(exist_ok=True)
            remove_stale_temporaries(self.folder)

    def run(self, seeds: Seeds) -> WalkerState | None:
        """Do all that is left, and return the walkers of the last round; None without rounds."""
        walkers: WalkerState | None = None
        samples: list[list[Tensor]] = [[] for _ in self.settings.sampling.temperatures]
        for number in range(self.settings.n_rounds + 1):
            if number:
                x, walkers = self._round(number, sampler_seeds(seeds, walkers is None), walkers)
                for rung, frames in enumerate(samples):
                    frames.append(x[:, :, rung])
            self._train(number, seeds.next(), samples)
        return walkers

    def join(self, number: int, seed: int) -> None:
        """Make this rank's part of a training of which rank 0 has told."""
        samples: list[list[Tensor]] = [[] for _ in self.settings.sampling.temperatures]
        for earlier in range(1, number + 1):
            x, _ = self._read_round(self.folder / f"round_{earlier:02d}_samples.pt")
            for rung, frames in enumerate(samples):
                frames.append(x[:, :, rung])
        self._fit(number, seed, samples)

    def _round(
        self, number: int, seeds: tuple[int, int | None], start: WalkerState | None
    ) -> tuple[Tensor, WalkerState]:
        """Replica exchange with the current flow: samples [n, W, R, N, 3] and walkers."""
        settings, stage, sampling = self.settings, self.stage, self.settings.sampling
        path = self.folder / f"round_{number:02d}_samples.pt"
        if path.is_file():
            stage.restore_costs(f"round {number}")
        else:
            logger.info("round %d of %d: sampling", number, settings.n_rounds)
            progress = stage.options.progress
            with sampling_threads(), stage.costs.counting("sampling", self.potential):
                first = self.dataset if start is None else start
                sampler = make_sampler(
                    stage.molecule, self.flow, sampling, self.potential, seeds, first
                )
                with sampler:
                    sampler.tune(sampling.n_tuning, progress=progress)
                    x = sampler.run(settings.round_iterations, collect=True, progress=progress)
            assert x is not None
            kept = x[:: settings.round_stride].clone()
            stage.record_costs(f"round {number}")
            write_tensors(path, {"x": kept, "walkers": sampler.state.state_dict()})
        return self._read_round(path)

    def _read_round(self, path: Path) -> tuple[Tensor, WalkerState]:
        sampling = self.settings.sampling
        content = read_tensors(path, "file of a round's samples")
        x, shape = content.get("x"), (sampling.n_walkers, len(sampling.temperatures))
        each = (*shape, *self.potential.event_shape)
        if (
            not isinstance(x, Tensor)
            or x.dtype != torch.float64
            or x.shape[1:] != each
            or not len(x)
        ):
            raise ValueError(f"{path}: expected samples of shape {list(each)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{path}: expected finite samples, got NaN or infinity")
        return x, restored_state(content.get("walkers"), *shape, self.potential, CPU)

    def _train(self, number: int, seed: int, samples: Sequence[Sequence[Tensor]]) -> None:
        stage = self.stage
        finished = self.folder / f"round_{number:02d}_flow.pt"
        log = self.folder / f"round_{number:02d}.csv"
        if finished.is_file():
            weights = load_flow(finished, stage.molecule).network.state_dict()
            self.flow.network.load_state_dict(weights)
            stage.restore_costs(f"training {number}")
            return
        logger.info("training %d of %d", number + 1, self.settings.n_rounds + 1)
        stage.record_ranks()
        current_ranks().broadcast({"training": number, "seed": seed})
        try:
            with stage.costs.counting("training", self.potential):
                result = self._fit(number, seed, samples)
        except BaseException:
            if load_best_weights(self.flow, log.with_suffix(".pt")):
                self._save_flow()
            raise
        self._save_flow()
        elsewhere = result.earlier_evaluations + result.evaluations_elsewhere
        stage.costs.add("training", elsewhere, result.earlier_seconds)
        stage.record_costs(f"training {number}")
        self.flow.save(finished)
        log.with_suffix(".pt").unlink(missing_ok=True)

    def _fit(self, number: int, seed: int, samples: Sequence[Sequence[Tensor]]) -> FitResult:
        """Train on the dataset and, after rounds, on samples; continue from a checkpoint."""
        settings, options = self.settings, self.stage.options
        log = self.folder / f"round_{number:02d}.csv"
        data = [self.dataset]
        if number:
            odds = settings.sample_share / (1 - settings.sample_share)
            data += self._as_datasets(samples, odds / len(samples))
        plan = settings.refit if number else settings.fit
        return fit(
            self.flow,
            data,
            self.potential,
            settings=replace(plan, temperatures=settings.sampling.temperatures),
            seed=seed,
            log_path=log,
            checkpoint_path=log.with_suffix(".pt"),
            checkpoint_seconds=options.checkpoint_seconds,
            resume=True,
            progress=options.progress,
        )

    def _save_flow(self) -> None:
        self.flow.save(self.stage.directory / "flow.pt")
        merge_logs(self.stage.directory)

    def _as_datasets(self, samples: Sequence[Sequence[Tensor]], weight: float) -> list[MDDataset]:
        return [
            MDDataset(
                torch.cat(list(frames)).flatten(0, 1),
                kelvin,
                self.stage.molecule,
                weight=weight,
                chains=torch.arange(frames[0].shape[1], dtype=torch.int64, device="cpu").repeat(
                    sum(map(len, frames))
                ),
            )
            for frames, kelvin in zip(samples, self.settings.sampling.temperatures, strict=True)
        ]


def remove_training_files(directory: Path) -> None:
    """Remove the files that a run no longer needs once production has started, except logs."""
    remove_stale_temporaries(directory / "training")
    for path in (directory / "training").glob("round_*.pt"):
        path.unlink()
