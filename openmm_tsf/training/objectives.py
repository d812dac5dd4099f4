"""The loss of a training step, (1 - lambda) likelihood + lambda energy, and its estimators."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.cells import mean_where
from openmm_tsf.training.frames import TrainingFrames
from openmm_tsf.training.losses import draw_normal, negative_log_likelihood, variational_free_energy
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.step_numbers import StepNumbers
from openmm_tsf.training.target import Target
from openmm_tsf.utils.distributed import Ranks


class Objective(Protocol):
    """What the training loop needs of an estimator of the loss.

    Of several ranks, each has its part of the points of a step: the gradients, and the tensors
    `exchanged`, are to be replaced by their sums over the ranks between `backward` and `update`.
    """

    exchanged: list[Tensor]

    def backward(self, network: Chain, step: int, generator: torch.Generator) -> None: ...
    def update(self, generator: torch.Generator) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, content: Mapping[str, Any]) -> None: ...


class DirectObjective:
    """Eqs. 5 and 6 of arXiv:2012.00429, differentiated directly; likelihood alone without a target.

    `generator` draws the copies of frames, where copies overlap; `numbers` records each loss. With
    several `ranks`, losses are this one's part of the means.
    """

    def __init__(
        self,
        flow: AugmentedFlow,
        train: Sequence[MDDataset],
        target: Target | None,
        basins: BasinPartition,
        settings: FitSettings,
        generator: torch.Generator,
        numbers: StepNumbers,
        ranks: Ranks | None = None,
    ) -> None:
        self.flow, self.target, self.settings, self.numbers = flow, target, settings, numbers
        self.ranks = ranks or Ranks()
        self.exchanged: list[Tensor] = []
        share = settings.basin_share
        self.data = TrainingFrames(flow, train, basins, settings.dtype, share, generator)
        temperatures = settings.temperatures or (flow.reference_temperature,)
        self.temperatures = torch.tensor(temperatures, dtype=settings.dtype, device=flow.device)

    def backward(self, network: Chain, step: int, generator: torch.Generator) -> None:
        """Set the gradients of the parameters."""
        self.loss(network, self.settings.mixing(step), generator).backward()

    def update(self, generator: torch.Generator) -> None:
        """Do nothing: there is no state."""

    def loss(self, network: Chain, mixing: float, generator: torch.Generator) -> Tensor:
        """Return the loss with its graph; NaN where no draw had a finite energy."""
        settings, flow = self.settings, self.flow
        y, log_det, tau = self.data.batch(settings.batch_size, generator, self.ranks)
        momenta = draw_normal(tau, flow.n_momenta, generator)
        nlls = negative_log_likelihood(network, y, log_det, momenta, tau)
        nll = nlls.mean()
        self.numbers.record("nll", nll)
        if self.ranks.size > 1:
            nll = nlls.sum() / settings.batch_size
        if mixing == 0 or self.target is None:
            return nll
        shape = (self.ranks.count_share(settings.kl_batch_size),)
        choice = torch.randint(
            len(self.temperatures), shape, generator=generator, dtype=torch.int64, device=tau.device
        )
        tau = self.temperatures[choice] / flow.reference_temperature
        v = draw_normal(tau, flow.n_coordinates + flow.n_momenta, generator)
        free_energy = variational_free_energy(self.target, network, v, tau)
        finite = torch.isfinite(free_energy)
        kl = mean_where(free_energy, finite)
        self.numbers.record("kl", kl)
        if self.ranks.size == 1:
            is_known = finite.any()
        else:
            n_finite = self.ranks.sum_(finite.sum())
            kl, is_known = torch.where(finite, free_energy, 0.0).sum() / n_finite, n_finite > 0
        loss = (1 - mixing) * nll + mixing * kl.to(nll.dtype)
        # Without any, a step without a gradient: counted and skipped.
        return loss / is_known

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dictionary: there is no state."""
        return {}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""
