"""Batches of training frames."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.basins import basin_labels
from openmm_tsf.training.losses import whiten


class TrainingFrames:
    """All training frames in the network's output space.

    A dataset's fraction of a batch is given by its weight, however many frames it has; within it a
    minor basin has at least `basin_share`.
    """

    def __init__(
        self,
        flow: AugmentedFlow,
        datasets: Sequence[MDDataset],
        dtype: torch.dtype,
        basin_share: float,
        generator: torch.Generator,
    ) -> None:
        self.parts: list[tuple[Tensor, Tensor, float]] = []
        self.cumulative_weights: list[Tensor | None] = []
        self.dataset_weights = dataset_weights(datasets)
        for dataset in datasets:
            self.cumulative_weights.append(_frame_weights(dataset, basin_share))
            y, log_det = whiten_frames(flow, dataset, generator)
            tau = dataset.temperature / flow.reference_temperature
            self.parts.append((y.to(dtype), log_det.to(dtype), tau))

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw n frames: y [n, d], log|det dy/dx| [n] and tau [n]."""
        ys, log_dets, taus = [], [], []
        for (y, log_det, tau), weights, count in zip(
            self.parts, self.cumulative_weights, split_batch(self.dataset_weights, n), strict=True
        ):
            if weights is None:
                index = torch.randint(
                    len(y), (count,), generator=generator, dtype=torch.int64, device="cpu"
                )
            else:
                drawn = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
                index = torch.searchsorted(weights, drawn)
            ys.append(y[index])
            log_dets.append(log_det[index])
            taus.append(torch.full((count,), tau, dtype=y.dtype, device="cpu"))
        return torch.cat(ys), torch.cat(log_dets), torch.cat(taus)


def dataset_weights(datasets: Sequence[MDDataset]) -> Tensor:
    """Return the weights of the datasets in a batch [G], float64."""
    return torch.tensor([dataset.weight for dataset in datasets], dtype=torch.float64, device="cpu")


def split_batch(weights: Tensor, n: int) -> list[int]:
    """Return how many of the n frames of a batch come from each dataset."""
    edges = (weights.cumsum(0) / weights.sum() * n).round().long()
    counts: list[int] = torch.diff(edges, prepend=edges.new_zeros(1)).tolist()
    return counts


def whiten_frames(
    flow: AugmentedFlow, dataset: MDDataset, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Map a dataset to the network's output space: y [F, d] and log|det dy/dx| [F]."""
    tau = dataset.temperature / flow.reference_temperature
    y, log_det = whiten(flow, dataset.positions, tau, generator)
    inside = torch.isfinite(log_det) & torch.isfinite(y).all(dim=1)
    if not bool(inside.all()):
        outside = f"{int((~inside).sum())} of {len(y)} frames are outside the flow's domain"
        raise ValueError(f"dataset: {outside} (other handedness, or not computable)")
    return y, log_det


def _frame_weights(dataset: MDDataset, share: float) -> Tensor | None:
    """Cumulative weights [F] that give a minor basin at least `share`; None if it has that."""
    minor = basin_labels(dataset.molecule, dataset.positions).bool()
    if float(minor.double().mean()) > 0.5:
        minor = ~minor
    population = float(minor.double().mean())
    if not 0 < population < share:
        return None
    weights = torch.where(minor, share / population, (1 - share) / (1 - population))
    cumulative = (weights.double() / len(minor)).cumsum(0).float()
    return cumulative / cumulative[-1]
