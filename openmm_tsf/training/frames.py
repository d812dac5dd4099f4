"""Batches of training frames."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.losses import whiten
from openmm_tsf.utils.distributed import Ranks


class TrainingFrames:
    """All training frames in the network's output space.

    A dataset's fraction of a batch is given by its weight, however many frames it has; of each,
    the fraction `basin_share` is spread evenly over the basins.
    """

    def __init__(
        self,
        flow: AugmentedFlow,
        datasets: Sequence[MDDataset],
        basins: BasinPartition,
        dtype: torch.dtype,
        basin_share: float,
        generator: torch.Generator,
    ) -> None:
        self.parts: list[tuple[Tensor, Tensor, float]] = []
        self.pickers: list[FramePicker] = []
        self.dataset_weights = dataset_weights(datasets)
        for dataset in datasets:
            basin = basins.labels(dataset.positions).to(flow.device)
            self.pickers.append(FramePicker(basin, basin_share))
            y, log_det = whiten_frames(flow, dataset, generator)
            tau = dataset.temperature / flow.reference_temperature
            self.parts.append((y.to(dtype), log_det.to(dtype), tau))

    def batch(
        self, n: int, generator: torch.Generator, ranks: Ranks | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw n frames: y [n, d], log|det dy/dx| [n] and tau [n]; those of one of `ranks`."""
        ys, log_dets, taus = [], [], []
        counts = map((ranks or Ranks()).count_share, split_batch(self.dataset_weights, n))
        for (y, log_det, tau), picker, count in zip(self.parts, self.pickers, counts, strict=True):
            index = picker.draw(count, generator)
            ys.append(y[index])
            log_dets.append(log_det[index])
            taus.append(torch.full((count,), tau, dtype=y.dtype, device=y.device))
        return torch.cat(ys), torch.cat(log_dets), torch.cat(taus)


class FramePicker:
    """Draws frames, with replacement, so that each basin has a part of every batch.

    Of K basins with a fraction p_b of the frames each, basin b has the fraction (1 - s) p_b + s/K
    of the draws, where s is `basin_share`; within a basin all frames are equal. `basin` [F] is the
    basin of every frame.
    """

    def __init__(self, basin: Tensor, basin_share: float) -> None:
        counts = torch.bincount(basin).double()
        self.present = counts.nonzero().flatten()
        populations = counts / len(basin)
        share = torch.where(counts > 0, basin_share / len(self.present), 0.0)
        self._cumulative: Tensor | None = None
        self._n, self._device = len(basin), basin.device
        if basin_share > 0 and len(self.present) > 1:
            weights = ((1 - basin_share) * populations + share) / counts.clamp(min=1)
            cumulative = weights[basin].cumsum(0)
            self._cumulative = cumulative / cumulative[-1]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return the indices [n] of frames."""
        if self._cumulative is None:
            return torch.randint(
                self._n, (n,), generator=generator, dtype=torch.int64, device=self._device
            )
        drawn = torch.rand(n, generator=generator, dtype=torch.float64, device=self._device)
        return torch.searchsorted(self._cumulative, drawn).clamp(max=self._n - 1)


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
    """Map a dataset to the network's output space: y [F, d] and log|det dy/dx| [F].

    They are on the flow's device.
    """
    tau = dataset.temperature / flow.reference_temperature
    y, log_det = whiten(flow, dataset.positions.to(flow.device), tau, generator)
    inside = torch.isfinite(log_det) & torch.isfinite(y).all(dim=1)
    if not bool(inside.all()):
        outside = f"{int((~inside).sum())} of {len(y)} frames are outside the flow's domain"
        raise ValueError(f"dataset: {outside} (other handedness, or not computable)")
    return y, log_det
