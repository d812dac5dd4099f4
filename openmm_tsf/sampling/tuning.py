"""Tuning of step sizes to a target acceptance."""

from typing import Any, Protocol, runtime_checkable

import torch
from openmm import unit
from torch import Tensor

from openmm_tsf.sampling.state import KernelInfo
from openmm_tsf.units import DIMENSIONLESS, as_array
from openmm_tsf.utils.validation import check_float


@runtime_checkable
class HasStepSize(Protocol):
    """A kernel with step sizes `sigma` [R], and maybe a ``target_acceptance`` of its own."""

    sigma: Tensor


def step_sizes(
    value: Any, n_rungs: int, name: str = "sigma", target: unit.Unit = DIMENSIONLESS
) -> Tensor:
    """Return step sizes [R], float64, in a unit, from one number (or Quantity) or one per rung."""
    sizes = torch.from_numpy(as_array(value, target, name))
    if sizes.ndim > 1 or (sizes.ndim == 1 and len(sizes) != n_rungs):
        raise ValueError(f"{name}: expected one number or {n_rungs}, got {tuple(sizes.shape)}")
    if not bool(((sizes > 0) & torch.isfinite(sizes)).all()):
        raise ValueError(f"{name}: expected positive step sizes, got {sizes.tolist()}")
    return sizes.expand(n_rungs).clone()


class StepSizes:
    """What kernels with step sizes share: `sigma` [R], one for every rung, and its state."""

    temperatures: tuple[float, ...]
    _sigma: Tensor

    @property
    def sigma(self) -> Tensor:
        """The step sizes [R]."""
        return self._sigma

    @sigma.setter
    def sigma(self, value: Any) -> None:
        self._sigma = step_sizes(value, len(self.temperatures))

    def state_dict(self) -> dict[str, Any]:
        """Return the step sizes."""
        return {"sigma": self._sigma.clone()}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Restore the step sizes."""
        self.sigma = content["sigma"]


class StepSizeTuner:
    """Robbins-Monro on log sigma, rung by rung; the second half's average is kept.

    log sigma <- log sigma + 2 t^-0.6 (acceptance - target), then Polyak-Ruppert averaging (Andrieu
    and Thoms 2008, section 4.2.2).
    """

    def __init__(self, kernel: HasStepSize, target: float) -> None:
        target = check_float(target, "target_acceptance")
        if not 0 < target < 1:
            raise ValueError(f"target_acceptance: expected a number between 0 and 1, got {target}")
        self.kernel = kernel
        self.target = float(getattr(kernel, "target_acceptance", target))
        self._log_sigma = kernel.sigma.log()
        self._n_updates = torch.zeros(self._log_sigma.shape, dtype=torch.int64, device="cpu")
        self._path: list[Tensor] = []

    def update(self, info: KernelInfo) -> None:
        """Adapt the step sizes by the counts of one iteration; rungs without proposals are left."""
        seen = info.proposed > 0
        rate = 2 * (self._n_updates + 1).double() ** -0.6
        step = torch.where(seen, rate * (info.acceptance - self.target), 0.0)
        self._log_sigma = self._log_sigma + step
        self._n_updates = self._n_updates + seen
        self.kernel.sigma = self._log_sigma.exp()
        self._path.append(self._log_sigma)

    @property
    def fewest_updates(self) -> int:
        """The smallest number of updates of a rung's step size."""
        return int(self._n_updates.min())

    def freeze(self) -> Tensor:
        """Set and return the averaged step sizes [R]; without updates they stay as they were."""
        if self._path:
            kept = self._path[len(self._path) // 2 :]
            self.kernel.sigma = torch.stack(kept).mean(dim=0).exp()
        return self.kernel.sigma
