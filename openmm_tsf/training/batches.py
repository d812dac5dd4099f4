"""The points of a step of training by path gradients: frames, and states of Markov chains."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.frames import FramePicker, dataset_weights, split_batch, whiten_frames
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.target_points import Points
from openmm_tsf.utils.distributed import Ranks

#: Copies drawn of each frame where the copies of a configuration overlap.
_COPIES_OF_FRAMES = 2


class Batch(NamedTuple):
    """The points of a step with group (a dataset, or a temperature's chains) and weight of each.

    The first `n_frames` are frames, the others states of chains. The weights of all ranks' frames
    together are one less the share of the chains.
    """

    points: Points
    n_frames: int
    group: Tensor
    n_groups: int
    weight: Tensor


class ChainStates(NamedTuple):
    """The points of chains, a set for each temperature; which have a home; their share."""

    parts: list[Points]
    has_home: Tensor
    share: float


class FramePoints:
    """The frames of all datasets as points of the target, which `evaluate` computes.

    Attributes
    ----------
    parts : list of Points
        Those of each dataset, several copies of each frame where copies overlap.
    log_det : float
        The NLL of y differs from that of x by this, on average.
    """

    def __init__(
        self,
        flow: AugmentedFlow,
        train: Sequence[MDDataset],
        evaluate: Callable[[Tensor, Tensor], Points],
        settings: FitSettings,
        generator: torch.Generator,
        ranks: Ranks,
    ) -> None:
        self._flow, self._settings, self._evaluate, self._ranks = flow, settings, evaluate, ranks
        weights = dataset_weights(train)
        self._counts = split_batch(weights, settings.batch_size)
        frames = [self._frames(dataset, generator) for dataset in train]
        self.parts = [points for points, _ in frames]
        self._pickers = [
            (FramePicker(points.basin, 0.0), FramePicker(points.basin, 1.0))
            for points in self.parts
        ]
        log_dets = torch.tensor(
            [log_det for _, log_det in frames], dtype=torch.float64, device="cpu"
        )
        self.log_det = float((weights * log_dets).sum() / weights.sum())

    def _frames(self, dataset: MDDataset, generator: torch.Generator) -> tuple[Points, float]:
        """Points of a dataset, and the mean log|det|."""
        ys, log_dets = [], []
        for _ in range(_COPIES_OF_FRAMES if self._flow.overlap else 1):
            y, log_det = whiten_frames(self._flow, dataset, generator)
            ys.append(y.to(self._settings.dtype))
            log_dets.append(float(log_det.mean()))
        y = torch.cat(ys)
        tau = dataset.temperature / self._flow.reference_temperature
        points = self._evaluate(y, torch.full((len(y),), tau, dtype=y.dtype, device=y.device))
        return points, sum(log_dets) / len(log_dets)

    def batch(
        self,
        n_spread_of: Callable[[int], int],
        chains: ChainStates | None,
        generator: torch.Generator,
    ) -> Batch:
        """Return frames, and the states of chains, of a step.

        `n_spread_of` says how many of n frames of a dataset are spread evenly over the basins.
        """
        settings, share_of = self._settings, self._ranks.count_share
        n_frames = sum(map(share_of, self._counts))
        parts, is_spread, share = [], [], 0.0
        picked = zip(self.parts, self._counts, self._pickers, strict=True)
        for frames, n_all, (any_frame, any_basin) in picked:
            n, n_spread = share_of(n_all), share_of(n_spread_of(n_all))
            index = [any_frame.draw(n - n_spread, generator), any_basin.draw(n_spread, generator)]
            parts.append(frames.take(torch.cat(index)))
            numbers = torch.arange(n, dtype=torch.int64, device=frames.y.device)
            is_spread.append(numbers >= n - n_spread)
        if chains is not None:
            parts += chains.parts
            is_spread.append(chains.has_home)
            share = chains.share
        points = Points.join(parts)
        groups = [torch.full_like(part.basin, number) for number, part in enumerate(parts)]
        weight = torch.where(torch.cat(is_spread), settings.basin_weight, 1.0).to(settings.dtype)
        of_frames, of_chains = weight[:n_frames].sum(), weight[n_frames:].sum()
        if self._ranks.size > 1:
            sums = self._ranks.sum_(torch.stack([of_frames, of_chains]).double())
            of_frames, of_chains = sums.to(weight).unbind()
        weight[:n_frames] *= (1 - share) / of_frames
        weight[n_frames:] *= share / of_chains.clamp(min=1e-9)
        return Batch(points, n_frames, torch.cat(groups), len(parts), weight)

    def place_in_all(self, n_chains: Sequence[int]) -> tuple[slice, int]:
        """Return where the points of this rank are among those of all ranks, and their number.

        `n_chains` are the numbers of chains, of all ranks, of each temperature.
        """
        everyone = [Ranks(rank, self._ranks.size) for rank in range(self._ranks.size)]
        counts = [sum(map(each.count_share, [*self._counts, *n_chains])) for each in everyone]
        start, here = sum(counts[: self._ranks.rank]), counts[self._ranks.rank]
        return slice(start, start + here), sum(counts)
