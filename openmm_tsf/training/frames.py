"""Batches of data: which frames a training step sees."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.basins import basin_labels
from openmm_tsf.training.losses import whitened


class TrainingFrames:
    """All training frames in the network's output space.

    A dataset's share of a batch is its weight, however many frames it has, so that a rung with few
    samples is not drowned; within it a minor basin has at least `basin_share`.
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
        self.weights: list[Tensor | None] = []
        self.shares = torch.tensor([dataset.weight for dataset in datasets], dtype=torch.float64)
        for dataset in datasets:
            self.weights.append(basin_weights(dataset, basin_share))
            tau = dataset.temperature / flow.reference_temperature
            y, log_det = whitened(flow, dataset.positions, tau, generator)
            inside = torch.isfinite(log_det) & torch.isfinite(y).all(dim=1)
            if not bool(inside.all()):
                raise ValueError(
                    f"dataset: {int((~inside).sum())} of {len(y)} frames are outside the flow's "
                    "domain (other handedness, or not computable)"
                )
            self.parts.append((y.to(dtype), log_det.to(dtype), tau))

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """y [n, d], log|det dy/dx| [n] and tau [n] of frames drawn at random."""
        ys, log_dets, taus = [], [], []
        for (y, log_det, tau), weights, share in zip(
            self.parts, self.weights, n_from_each(self.shares, n), strict=True
        ):
            if weights is None:
                index = torch.randint(len(y), (share,), generator=generator)
            else:
                index = torch.searchsorted(weights, torch.rand(share, generator=generator))
            ys.append(y[index])
            log_dets.append(log_det[index])
            taus.append(torch.full((share,), tau, dtype=y.dtype))
        return torch.cat(ys), torch.cat(log_dets), torch.cat(taus)


def n_from_each(shares: Tensor, n: int) -> list[int]:
    """How many of n frames of a batch come from each dataset, by their shares."""
    edges = (shares.cumsum(0) / shares.sum() * n).round().long()
    counts: list[int] = torch.diff(edges, prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    return counts


def basin_weights(dataset: MDDataset, share: float) -> Tensor | None:
    """Cumulative weights [F] that give a minor basin its least share; None if it has it."""
    minor = basin_labels(dataset.molecule, dataset.positions).bool()
    if float(minor.double().mean()) > 0.5:
        minor = ~minor
    found = float(minor.double().mean())
    if not 0 < found < share:
        return None
    weights = torch.where(minor, share / found, (1 - share) / (1 - found))
    cumulative = (weights.double() / len(minor)).cumsum(0).float()
    return cumulative / cumulative[-1]
