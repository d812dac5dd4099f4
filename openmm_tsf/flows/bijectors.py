"""The contract of an invertible map, and the composition of several."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

#: Of a map y = g(x), run backwards from y to x: takes a cotangent c of y [B, n] to
#: J_g(x)^T c - grad_x log|det J_g(x)|, detached. The graph that x was made with is used, and stays.
Pullback = Callable[[Tensor], Tensor]


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

    def forward_and_pullback(self, u: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Image of u [B, n], log|det| [B], and the inverse's pull-back from u to the image.

        What the links have computed on the way serves again: cheaper by one pass through all of
        them than to differentiate the inverse at the image. Needs gradients enabled.
        """
        total = torch.zeros(len(u), dtype=u.dtype, device=u.device)
        pullbacks = []
        for link in self.bijectors:
            u, log_det, pullback = link.forward_and_pullback(u)  # type: ignore[operator]
            total = total + log_det
            pullbacks.append(pullback)
        return u, total, lambda cotangent: _through(pullbacks, cotangent)

    def inverse_and_pullback(self, x: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Preimage of x [B, n], log|det| of the inverse [B], and the pull-back of the map itself
        from x to the preimage. See :meth:`forward_and_pullback`.
        """
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        pullbacks = []
        for link in reversed(self.bijectors):
            x, log_det, pullback = link.inverse_and_pullback(x)  # type: ignore[operator]
            total = total + log_det
            pullbacks.append(pullback)
        return x, total, lambda cotangent: _through(pullbacks, cotangent)


def _through(pullbacks: Sequence[Pullback], cotangent: Tensor) -> Tensor:
    for pullback in pullbacks:
        cotangent = pullback(cotangent)
    return cotangent
