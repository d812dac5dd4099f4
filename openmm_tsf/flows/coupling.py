"""Affine couplings, volume-preserving or not, and the trainable scale in front of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmm_tsf.flows.bijectors import Pullback

#: Log-scales are bounded smoothly to this, so that a coupling cannot overflow.
LOG_SCALE_BOUND = 2.0
_SIGMOID_RATE = 2.0 / LOG_SCALE_BOUND


def _perceptron(n_in: int, hidden: Sequence[int], n_out: int) -> nn.Sequential:
    """A multi-layer perceptron whose last layer is zero: the coupling starts as the identity."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(n_in, width, dtype=torch.float32, device="cpu"), nn.SiLU()]
        n_in = width
    last = nn.Linear(n_in, n_out, dtype=torch.float32, device="cpu")
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class AffineCoupling(nn.Module):
    """y_t = v_t * exp(s(v_c)) + t(v_c) on the transformed features t; the others c stay.

    The conditioner (s, t) may run in a lower precision than the features without loss of
    exactness: for any deterministic functions s and t, smooth or rounded, at fixed v_c the map is
    affine in v_t with determinant exp(sum s), hence a bijection that changes volumes by that
    factor. The inverse needs the same s and t: v_c is recovered to the last bits of the features'
    precision, which rarely (1 in 10^8 numbers) lie across a rounding boundary of the conditioner's,
    and matrix products may differ in their last bit between batch sizes. The round-trip check of
    the kernels measures both.

    `transformed` are the indices of the transformed features; the conditioner, with layers of
    widths `hidden`, sees the others. `volume_preserving` subtracts the mean from the log-scales, so
    that |det| = 1 (arXiv:2012.00429, section 2; GIN, arXiv:2001.04872); otherwise RealNVP
    (arXiv:1605.08803). `conditioner_dtype` None is that of the features.
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
        conditioner_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        features = {int(i) for i in transformed}
        chosen, others = sorted(features), [i for i in range(n_features) if i not in features]
        if not chosen or not others or chosen[0] < 0 or chosen[-1] >= n_features:
            expected = f"a proper non-empty subset of range({n_features})"
            raise ValueError(f"transformed: expected {expected}, got {transformed!r}")
        self.is_constant_log_det = volume_preserving
        self.conditioner_dtype = conditioner_dtype
        self.register_buffer("transformed", torch.tensor(chosen, dtype=torch.int64, device="cpu"))
        self.register_buffer("conditioner", torch.tensor(others, dtype=torch.int64, device="cpu"))
        self.register_buffer(
            "order", torch.argsort(torch.tensor(chosen + others, dtype=torch.int64, device="cpu"))
        )
        self.net = _perceptron(len(others), hidden, 2 * len(chosen))

    def check_indices(self) -> None:
        """Refuse indices, read from a file, that do not contain every feature once."""
        both = torch.cat([self.transformed, self.conditioner])
        features = torch.arange(len(both), device=both.device, dtype=torch.int64)
        if not torch.equal(both.sort()[0], features) or not torch.equal(both.argsort(), self.order):
            raise ValueError("state_dict: expected every feature once in a coupling's indices")

    # Inside, features are the first dimension: selecting them copies whole rows, and the results
    # are passed on as transposed views, so that a chain of couplings never transposes.

    def _select(self, v: Tensor) -> tuple[Tensor, Tensor]:
        vt = v.T
        return vt.index_select(0, self.transformed), vt.index_select(0, self.conditioner)

    def _split(self, v: Tensor, track: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        active, passive = self._select(v)
        if track and not passive.requires_grad:
            passive.requires_grad_()  # a leaf: nothing was computed before it
        dtype = self.conditioner_dtype or v.dtype
        hidden = passive.to(dtype)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
                hidden = torch.mm(weight, hidden).add_(bias[:, None])
            else:
                hidden = layer(hidden)
        shift, raw = hidden.split(len(active))
        # bound * (1 + tanh(raw / bound)), as the logistic function, which is faster.
        bounded = torch.sigmoid(raw if _SIGMOID_RATE == 1.0 else raw * _SIGMOID_RATE)
        log_scale = bounded.to(v.dtype) * (2 * LOG_SCALE_BOUND)
        if self.is_constant_log_det:
            log_scale = torch.sub(log_scale, log_scale.sum(dim=0), alpha=1 / len(active))
        else:
            log_scale = log_scale - LOG_SCALE_BOUND
        return active, passive, shift.to(v.dtype), log_scale

    @staticmethod
    def _through_conditioner(
        passive: Tensor, shift: Tensor, log_scale: Tensor, of_shift: Tensor, of_scale: Tensor
    ) -> Tensor:
        """Cotangent of the passive features from those of shift and log-scale; keeps the graph."""
        (cotangent,) = torch.autograd.grad(
            (shift, log_scale), passive, (of_shift, of_scale), retain_graph=True
        )
        return cotangent

    def _join(self, active: Tensor, passive: Tensor) -> Tensor:
        return torch.cat([active, passive]).index_select(0, self.order).T

    def _log_det(self, log_scale: Tensor) -> Tensor:
        if self.is_constant_log_det:
            return log_scale.new_zeros(log_scale.shape[1])
        return log_scale.sum(dim=0)

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of u [B, n_features] and log|det| [B]."""
        active, passive, shift, log_scale = self._split(u)
        active = torch.addcmul(shift, active, log_scale.exp())
        return self._join(active, passive), self._log_det(log_scale)

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the preimage of x [B, n_features] and log|det| of the inverse [B]."""
        active, passive, shift, log_scale = self._split(x)
        active = (active - shift) * log_scale.neg().exp()
        return self._join(active, passive), -self._log_det(log_scale)

    def forward_and_pullback(self, u: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return :meth:`forward_and_log_det` of u, and the inverse's pull-back to the image."""
        active, passive, shift, log_scale = self._split(u, track=True)
        image = torch.addcmul(shift, active, log_scale.exp())

        def pullback(cotangent: Tensor) -> Tensor:
            of_active, of_passive = self._select(cotangent)
            of_image = of_active * log_scale.detach().neg().exp()
            of_scale = -of_active * active.detach()
            if not self.is_constant_log_det:
                of_scale = of_scale + 1
            indirect = self._through_conditioner(passive, shift, log_scale, -of_image, of_scale)
            return self._join(of_image, of_passive + indirect)

        return self._join(image, passive), self._log_det(log_scale), pullback

    def inverse_and_pullback(self, x: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return :meth:`inverse_and_log_det` of x, and the map's pull-back to the preimage."""
        image, passive, shift, log_scale = self._split(x, track=True)
        offset = image - shift
        active = offset * log_scale.neg().exp()

        def pullback(cotangent: Tensor) -> Tensor:
            of_image, of_passive = self._select(cotangent)
            of_scale = of_image * offset.detach()
            if not self.is_constant_log_det:
                of_scale = of_scale - 1
            indirect = self._through_conditioner(passive, shift, log_scale, of_image, of_scale)
            return self._join(of_image * log_scale.detach().exp(), of_passive + indirect)

        return self._join(active, passive), -self._log_det(log_scale), pullback


def set_conditioner_dtype(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Set the precision of all couplings' conditioners; None for that of the features."""
    for module in network.modules():
        if isinstance(module, AffineCoupling):
            module.conditioner_dtype = dtype


class Scale(nn.Module):
    """Multiply the first `n_scaled` features by one trainable factor k > 0.

    The entropy of the latent and of the phase space differ by a constant that volume-preserving
    couplings cannot make up (arXiv:2012.00429, section 2).
    """

    is_constant_log_det = True
    mask: Tensor

    def __init__(self, n_features: int, n_scaled: int) -> None:
        super().__init__()
        self.log_k = nn.Parameter(torch.zeros((), dtype=torch.float32, device="cpu"))
        mask = torch.zeros(n_features, dtype=torch.float32, device="cpu")
        mask[:n_scaled] = 1.0
        self.register_buffer("mask", mask)
        self.n_scaled = n_scaled

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of u [B, n_features] and log|det| [B]."""
        log_det = (self.n_scaled * self.log_k).expand(len(u))
        return u * torch.exp(self.log_k * self.mask), log_det

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the preimage of x [B, n_features] and log|det| of the inverse [B]."""
        log_det = (-self.n_scaled * self.log_k).expand(len(x))
        return x * torch.exp(-self.log_k * self.mask), log_det

    def forward_and_pullback(self, u: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return :meth:`forward_and_log_det` of u, and the inverse's pull-back to the image."""
        factor = torch.exp(-self.log_k.detach() * self.mask)
        return *self.forward_and_log_det(u), lambda cotangent: cotangent * factor

    def inverse_and_pullback(self, x: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return :meth:`inverse_and_log_det` of x, and the map's pull-back to the preimage."""
        factor = torch.exp(self.log_k.detach() * self.mask)
        return *self.inverse_and_log_det(x), lambda cotangent: cotangent * factor
