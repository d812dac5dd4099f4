"""Protocols of invertible maps, and the composition of several."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

#: Of a map y = g(x), from y back to x: takes a cotangent c of y [B, n] to
#: J_g(x)^T c - grad_x log|det J_g(x)|, detached. It uses the graph that x was made with and keeps
#: it.
Pullback = Callable[[Tensor], Tensor]


@runtime_checkable
class Bijector(Protocol):
    """An invertible map with known log-determinants; the batch is the first dimension.

    Examples
    --------
    >>> from openmm_tsf.flows import Bijector
    >>> from openmm_tsf.flows.coupling import Scale
    >>> isinstance(Scale(n_features=3, n_scaled=2), Bijector)
    True
    """

    @property
    def is_constant_log_det(self) -> bool:
        """Whether the log-determinant is constant (the steering condition needs it)."""

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return y = f(u) and log|det df/du| [B]."""

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return u = f^-1(x) and log|det df^-1/dx| [B]."""


class PathwiseBijector(Bijector, Protocol):
    """A bijector that also returns what path gradients need: the pull-back of its inverse."""

    def forward_and_pullback(self, u: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return y = f(u), log|det df/du| [B], and the pull-back of f^-1 from u to y."""

    def inverse_and_pullback(self, x: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return u = f^-1(x), log|det df^-1/dx| [B], and the pull-back of f from x to u."""


class Chain(nn.Module):
    """Bijectors applied one after the other: the first in the list acts first in ``forward``.

    Parameters
    ----------
    bijectors
        Modules that are each a :class:`PathwiseBijector`.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.flows import Chain
    >>> from openmm_tsf.flows.coupling import AffineCoupling, Scale
    >>> coupling = AffineCoupling(3, transformed=[0], hidden=[8], volume_preserving=True)
    >>> chain = Chain([Scale(n_features=3, n_scaled=2), coupling])
    >>> y, log_det = chain.forward_and_log_det(torch.ones(5, 3))
    >>> back, log_det_inverse = chain.inverse_and_log_det(y)
    >>> torch.allclose(back, torch.ones(5, 3)), torch.allclose(log_det, -log_det_inverse)
    (True, True)
    """

    def __init__(self, bijectors: Sequence[nn.Module]) -> None:
        super().__init__()
        self.bijectors = nn.ModuleList(bijectors)

    def _links(self) -> "list[PathwiseBijector]":
        return list(cast("Iterable[PathwiseBijector]", self.bijectors))

    @property
    def is_constant_log_det(self) -> bool:
        """Whether every bijector's log-determinant is constant."""
        return all(bool(link.is_constant_log_det) for link in self._links())

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of u [B, ...] and log|det| [B]."""
        return _compose((link.forward_and_log_det for link in self._links()), u)[:2]

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the preimage of x [B, ...] and log|det| of the inverse [B]."""
        return _compose((link.inverse_and_log_det for link in reversed(self._links())), x)[:2]

    def forward_and_pullback(self, u: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return the image of u [B, n], log|det| [B], and the inverse's pull-back to the image.

        The bijectors reuse intermediate results: cheaper by one pass through all of them than to
        differentiate the inverse at the image. Gradients must be enabled.
        """
        y, log_det, pullbacks = _compose((link.forward_and_pullback for link in self._links()), u)
        return y, log_det, partial(_apply_all, pullbacks)

    def inverse_and_pullback(self, x: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return the preimage of x [B, n], log|det| of the inverse [B], and the map's pull-back.

        See :meth:`forward_and_pullback`.
        """
        links = reversed(self._links())
        u, log_det, pullbacks = _compose((link.inverse_and_pullback for link in links), x)
        return u, log_det, partial(_apply_all, pullbacks)


def _compose(
    maps: Iterable[Callable[[Tensor], tuple[Any, ...]]], x: Tensor
) -> tuple[Tensor, Tensor, list[Pullback]]:
    """The image of x under the maps in turn, the sum of their log|det| [B], and any pull-backs."""
    total, pullbacks = torch.zeros(len(x), dtype=x.dtype, device=x.device), []
    for function in maps:
        x, log_det, *pullback = function(x)
        total = total + log_det
        pullbacks += pullback
    return x, total, pullbacks


def _apply_all(pullbacks: Sequence[Pullback], cotangent: Tensor) -> Tensor:
    for pullback in pullbacks:
        cotangent = pullback(cotangent)
    return cotangent
