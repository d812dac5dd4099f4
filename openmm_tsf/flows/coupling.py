"""Affine couplings, volume-preserving or not, and the trainable scale in front of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Log-scales are bounded smoothly to this, so that a coupling cannot overflow.
LOG_SCALE_BOUND = 2.0


def _perceptron(n_in: int, hidden: Sequence[int], n_out: int) -> nn.Sequential:
    """A multi-layer perceptron whose last layer is zero: the coupling starts as the identity."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(n_in, width), nn.SiLU()]
        n_in = width
    last = nn.Linear(n_in, n_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class AffineCoupling(nn.Module):
    """y_t = v_t * exp(s(v_c)) + t(v_c) on the transformed features t; the others c stay.

    Parameters
    ----------
    n_features
        Number of features of v.
    transformed
        Indices of the transformed features; the conditioner sees the others.
    hidden
        Widths of the conditioner's hidden layers.
    volume_preserving
        Subtract the mean from the log-scales, so that |det| = 1 (arXiv:2012.00429, section 2;
        GIN, arXiv:2001.04872). Otherwise RealNVP (arXiv:1605.08803).

    Raises
    ------
    ValueError
        If no feature or every feature is transformed.
    """

    transformed: Tensor
    conditioner: Tensor
    order: Tensor

    def __init__(
        self,
        n_features: int,
        transformed: Sequence[int],
        hidden: Sequence[int],
        volume_preserving: bool,
    ) -> None:
        super().__init__()
        chosen = sorted({int(i) for i in transformed})
        others = [i for i in range(n_features) if i not in set(chosen)]
        if not chosen or not others or chosen[0] < 0 or chosen[-1] >= n_features:
            raise ValueError(
                f"transformed: expected a proper non-empty subset of range({n_features}), "
                f"got {transformed!r}"
            )
        self.is_constant_log_det = volume_preserving
        self.register_buffer("transformed", torch.tensor(chosen))
        self.register_buffer("conditioner", torch.tensor(others))
        self.register_buffer("order", torch.argsort(torch.tensor(chosen + others)))
        self.net = _perceptron(len(others), hidden, 2 * len(chosen))

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        active = v.index_select(1, self.transformed)
        passive = v.index_select(1, self.conditioner)
        shift, raw = self.net(passive).chunk(2, dim=1)
        log_scale = LOG_SCALE_BOUND * torch.tanh(raw / LOG_SCALE_BOUND)
        if self.is_constant_log_det:
            log_scale = log_scale - log_scale.mean(dim=1, keepdim=True)
        return active, passive, shift, log_scale

    def _join(self, active: Tensor, passive: Tensor) -> Tensor:
        return torch.cat([active, passive], dim=1).index_select(1, self.order)

    def _log_det(self, log_scale: Tensor) -> Tensor:
        if self.is_constant_log_det:
            return log_scale.new_zeros(len(log_scale))
        return log_scale.sum(dim=1)

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Image of u [B, n_features] and log|det| [B]."""
        active, passive, shift, log_scale = self._split(u)
        return self._join(active * log_scale.exp() + shift, passive), self._log_det(log_scale)

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Preimage of x [B, n_features] and log|det| of the inverse [B]."""
        active, passive, shift, log_scale = self._split(x)
        return self._join((active - shift) * (-log_scale).exp(), passive), -self._log_det(log_scale)


class Scale(nn.Module):
    """Multiply the first `n_scaled` features by one trainable factor k > 0.

    The entropy of the latent and of the phase space differ by a constant that volume-preserving
    couplings cannot make up (arXiv:2012.00429, section 2).
    """

    is_constant_log_det = True
    mask: Tensor

    def __init__(self, n_features: int, n_scaled: int) -> None:
        super().__init__()
        self.log_k = nn.Parameter(torch.zeros(()))
        mask = torch.zeros(n_features)
        mask[:n_scaled] = 1.0
        self.register_buffer("mask", mask)
        self.n_scaled = n_scaled

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Image of u [B, n_features] and log|det| [B]."""
        log_det = (self.n_scaled * self.log_k).expand(len(u))
        return u * torch.exp(self.log_k * self.mask), log_det

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Preimage of x [B, n_features] and log|det| of the inverse [B]."""
        log_det = (-self.n_scaled * self.log_k).expand(len(x))
        return x * torch.exp(-self.log_k * self.mask), log_det
