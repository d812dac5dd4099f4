"""Tuning of step sizes to a target acceptance."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from openmm_tsf.sampling.state import KernelInfo


@runtime_checkable
class HasStepSize(Protocol):
    """A kernel with one step size per rung."""

    sigma: Tensor


class StepSizeTuner:
    """Robbins-Monro on log sigma, rung by rung; the second half's average is kept.

    log sigma <- log sigma + 2 t^-0.6 (acceptance - target), then Polyak-Ruppert averaging (Andrieu
    and Thoms 2008, section 4.2.2).

    Parameters
    ----------
    kernel
        The kernel to tune.
    n_updates
        Number of updates that will come; with 0 the step sizes stay as they are.
    target
        Acceptance to reach.

    Raises
    ------
    ValueError
        If the target is not between 0 and 1, or the number of updates is negative.
    """

    def __init__(self, kernel: HasStepSize, n_updates: int, target: float) -> None:
        if not 0 < target < 1:
            raise ValueError(f"target_acceptance: expected a number between 0 and 1, got {target}")
        if n_updates < 0:
            raise ValueError(f"n_iterations: expected at least 0, got {n_updates}")
        self.kernel, self.n_updates, self.target = kernel, n_updates, target
        self._log_sigma = kernel.sigma.log()
        self._kept: list[Tensor] = []
        self._count = 0

    def update(self, info: KernelInfo) -> None:
        """Take one iteration's counts into account."""
        self._count += 1
        rate = 2 * self._count**-0.6
        self._log_sigma = self._log_sigma + rate * (info.acceptance - self.target)
        self.kernel.sigma = self._log_sigma.exp()
        if 2 * self._count > self.n_updates:
            self._kept.append(self._log_sigma)

    def freeze(self) -> Tensor:
        """Set and return the averaged step sizes [R]."""
        if self._kept:
            self.kernel.sigma = torch.stack(self._kept).mean(dim=0).exp()
        return self.kernel.sigma
