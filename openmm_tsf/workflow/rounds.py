"""Training on frames, then, round by round, on the sampler's own samples of all temperatures.

What is done lies in ``training/`` until production has begun: the flow after each training, the
samples and walkers of each round, and the checkpoint of the training under way. A run that is
resumed skips what is there.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.directory import DirectoryLock
from openmm_tsf.io.files import remove_stale_temporaries
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.initial import restored_state
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.training import fit
from openmm_tsf.training.checkpoint import load_best_weights
from openmm_tsf.training.log import merge_logs
from openmm_tsf.utils.random import Seeds
from openmm_tsf.workflow import sample as production
from openmm_tsf.workflow.costs import Costs
from openmm_tsf.workflow.record import write_record
from openmm_tsf.workflow.settings import RunSettings

logger = logging.getLogger(__name__)


class Rounds:
    """Trainings and rounds of sampling of one run; `openmm_tsf.workflow.run` says what they are."""

    def __init__(
        self,
        flow: AugmentedFlow,
        dataset: MDDataset,
        potential: Potential,
        settings: RunSettings,
        lock: DirectoryLock,
        record: dict[str, Any],
        costs: Costs,
        checkpoint_seconds: float,
        progress: bool,
    ) -> None:
        assert dataset.molecule is not None
        self.flow, self.dataset, self.potential = flow, dataset, potential
        self.molecule: MolecularSystem = dataset.molecule
        self.settings, self.folder, self.record, self.costs = (
            settings, lock.directory, record, costs
        )  # fmt: skip
        self.checkpoint_seconds, self.progress = checkpoint_seconds, progress
        (self.folder / "training").mkdir(exist_ok=True)
        remove_stale_temporaries(self.folder / "training")

    def run(self, seeds: Seeds) -> WalkerState | None:
        """All trainings and rounds, or what is left of them.

        Returns
        -------
        walkers
            Where those of the last round are, for production to go on from.
        """
        walkers: WalkerState | None = None
        samples: list[list[Tensor]] = [[] for _ in self.settings.sampling.temperatures]
        for number in range(self.settings.n_rounds + 1):
            if number:
                of_sampler = production.sampler_seeds(seeds, walkers is None)
                walkers = self._round(number, of_sampler, walkers, samples)
            self._train(number, seeds.next(), samples)
        return walkers

    def _round(
        self,
        number: int,
        seeds: tuple[int, int | None],
        before: WalkerState | None,
        samples: Sequence[list[Tensor]],
    ) -> WalkerState:
        """Replica exchange with the flow as it is; its samples are added to `samples`."""
        settings, sampling, path = self.settings, self.settings.sampling, self._samples(number)
        if path.is_file():
            self._costs_after(f"round {number}")
        else:
            logger.info("round %d of %d: sampling", number, settings.n_rounds)
            with production.sampling_threads(), self.costs.counting("sampling", self.potential):
                sampler = production.make_sampler(
                    self.molecule, self.flow, sampling, self.potential, seeds, self.dataset, before
                )
                with sampler:
                    sampler.tune(sampling.n_tuning, progress=self.progress)
                    x = sampler.run(settings.round_iterations, collect=True, progress=self.progress)
            assert x is not None
            kept = x[:: settings.round_stride].clone()
            self._note_costs(f"round {number}")
            write_tensors(path, {"x": kept, "walkers": sampler.state.state_dict()})
        found = read_tensors(path, "file of a round's samples")
        x, shape = found.get("x"), (sampling.n_walkers, len(sampling.temperatures))
        event = tuple(self.potential.event_shape)
        if (
            not isinstance(x, Tensor)
            or x.dtype != torch.float64
            or len(x) == 0
            or x.shape[1:] != (*shape, *event)
        ):
            raise ValueError(f"{path}: expected samples of shape {[*shape, *event]}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{path}: expected finite samples, got NaN or infinity")
        for rung, frames in enumerate(samples):
            frames.append(x[:, :, rung])
        return restored_state(found.get("walkers"), *shape, self.potential)

    def _train(self, number: int, seed: int, samples: Sequence[Sequence[Tensor]]) -> None:
        settings, finished = self.settings, self._flow(number)
        if finished.is_file():
            weights = load_flow(finished, self.molecule).network.state_dict()
            self.flow.network.load_state_dict(weights)
            self._costs_after(f"training {number}")
            return
        logger.info("training %d of %d", number + 1, settings.n_rounds + 1)
        data = [self.dataset]
        if number:
            share = settings.sample_share
            weight = share / (1 - share) / len(samples)
            data += self._as_datasets(samples, weight)
        plan = settings.refit if number else settings.fit
        checkpoint = self._log(number).with_suffix(".pt")
        try:
            with self.costs.counting("training", self.potential):
                result = fit(
                    self.flow,
                    data,
                    self.potential,
                    settings=replace(plan, temperatures=settings.sampling.temperatures),
                    seed=seed,
                    log_path=self._log(number),
                    checkpoint_path=checkpoint,
                    checkpoint_seconds=self.checkpoint_seconds,
                    resume=True,
                    progress=self.progress,
                )
        except BaseException:
            if load_best_weights(self.flow, checkpoint):
                self._save_flow()
            raise
        self._save_flow()
        self.costs.add("training", result.earlier_evaluations, result.earlier_seconds)
        self._note_costs(f"training {number}")
        self.flow.save(finished)
        checkpoint.unlink(missing_ok=True)

    def _save_flow(self) -> None:
        self.flow.save(self.folder / "flow.pt")
        merge_logs(self.folder)

    def _note_costs(self, done: str) -> None:
        """Keep what the run has cost after a step, just before the file that says it is done."""
        self.record["costs"] = (self.record.get("costs") or {}) | {done: self.costs.to_config()}
        write_record(self.folder, self.record)

    def _costs_after(self, done: str) -> None:
        self.costs.restore((self.record.get("costs") or {}).get(done))

    def _as_datasets(self, samples: Sequence[Sequence[Tensor]], weight: float) -> list[MDDataset]:
        return [
            MDDataset(
                torch.cat(list(frames)).flatten(0, 1),
                kelvin,
                self.molecule,
                weight=weight,
                chains=torch.arange(frames[0].shape[1]).repeat(sum(map(len, frames))),
            )
            for frames, kelvin in zip(samples, self.settings.sampling.temperatures, strict=True)
        ]

    def _log(self, number: int) -> Path:
        return self.folder / "training" / f"round_{number:02d}.csv"

    def _flow(self, number: int) -> Path:
        return self.folder / "training" / f"round_{number:02d}_flow.pt"

    def _samples(self, number: int) -> Path:
        return self.folder / "training" / f"round_{number:02d}_samples.pt"

    @staticmethod
    def tidy(folder: Path) -> None:
        """Remove what was kept for resuming before production began; the logs stay."""
        remove_stale_temporaries(folder / "training")
        for path in (folder / "training").glob("round_*.pt"):
            path.unlink()
