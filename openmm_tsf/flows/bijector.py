"""The contract of an invertible map, and the composition of several."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Bijector(Protocol):
    """An invertible map, batch first.

    ``is_constant_log_det`` promises that the log-determinant is the same number at every point of
    the domain, which is what the steering condition asks for (arXiv:2012.00429, eq. 4).
    """

    is_constant_log_det: bool

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """y = f(u) and log|det df/du| [B]."""
        ...

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u = f^-1(x) and log|det df^-1/dx| [B]."""
        ...


class Chain(nn.Module):
    """Bijectors applied one after the other: the first in the list acts first in ``forward``."""

    def __init__(self, bijectors: Sequence[nn.Module]) -> None:
        super().__init__()
        self.bijectors = nn.ModuleList(bijectors)

    @property
    def is_constant_log_det(self) -> bool:
        """Whether every link's log-determinant is constant."""
        return all(bool(link.is_constant_log_det) for link in self.bijectors)

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Image of u [B, ...] and log|det| [B]."""
        total = torch.zeros(len(u), dtype=u.dtype, device=u.device)
        for link in self.bijectors:
            u, log_det = link.forward_and_log_det(u)  # type: ignore[operator]
            total = total + log_det
        return u, total

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Preimage of x [B, ...] and log|det| of the inverse [B]."""
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for link in reversed(self.bijectors):
            x, log_det = link.inverse_and_log_det(x)  # type: ignore[operator]
            total = total + log_det
        return x, total
