"""Affine couplings, volume-preserving or not, and the trainable scale in front of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openmm_tsf.flows.bijectors import Pullback
from openmm_tsf.flows.perceptron import Perceptron, Tape

#: Log-scales are bounded smoothly to this, so that a coupling cannot overflow.
LOG_SCALE_BOUND = 2.0
_SIGMOID_RATE = 2.0 / LOG_SCALE_BOUND
#: Batches of conditioners in a lower precision are padded to a multiple of this.
_MULTIPLE = 16


class AffineCoupling(nn.Module):
    """y_t = v_t * exp(s(v_c)) + t(v_c) on the transformed features t; the others c stay.

    The conditioner (s, t) may run in a lower precision than the features without loss of
    exactness: for any deterministic functions s and t, smooth or rounded, at fixed v_c the map is
    affine in v_t with determinant exp(sum s), hence a bijection that changes volumes by that
    factor. The inverse needs the same s and t: v_c is recovered to the last bits of the features'
    precision, which rarely (1 in 10^8 numbers) lie across a rounding boundary of the conditioner's,
    and they must not depend on the batch that a row is in. On CPUs they do where a batch does not
    fill the vector registers, in products of few rows and in the elements that are left over, so
    that the conditioner sees a multiple of 16 rows. The round-trip check of the kernels measures
    both, at all the batch sizes that they use.

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
        self.net = Perceptron(len(others), hidden, 2 * len(chosen))

    def check_indices(self) -> None:
        """Refuse indices, read from a file, that do not contain every feature once."""
        both = torch.cat([self.transformed, self.conditioner])
        features = torch.arange(len(both), device=both.device, dtype=torch.int64)
        if not torch.equal(both.sort()[0], features) or not torch.equal(both.argsort(), self.order):
            raise ValueError("state_dict: expected every feature once in a coupling's indices")

    # Inside, features are the first dimension: selecting them copies whole rows, and the results
    # are passed on as transposed views, so that a chain of couplings never transposes.

    def select(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transformed and the other features of v [B, n_features], features first."""
        vt = v.T
        return vt.index_select(0, self.transformed), vt.index_select(0, self.conditioner)

    def join(self, active: Tensor, passive: Tensor) -> Tensor:
        """Return [B, n_features] of the transformed and the other features."""
        return torch.cat([active, passive]).index_select(0, self.order).T

    def _shift_and_log_scale(self, passive: Tensor) -> tuple[Tensor, Tensor]:
        n, dtype = passive.shape[1], passive.dtype
        if self.conditioner_dtype in (None, dtype):
            shift, raw = self.net(passive).chunk(2)
            return shift, self.centre(bound(raw))
        inputs = passive.to(self.conditioner_dtype)
        if n % _MULTIPLE:
            inputs = nn.functional.pad(inputs, (0, -n % _MULTIPLE))
        shift, raw = self.net(inputs).chunk(2)
        return shift[:, :n].to(dtype), self.centre(bound(raw)[:, :n].to(dtype))

    def centre(self, log_scale: Tensor) -> Tensor:
        """Return log-scales of mean zero, or within +-LOG_SCALE_BOUND, from those of `bound`."""
        if self.is_constant_log_det:
            return torch.sub(log_scale, log_scale.sum(dim=0), alpha=1 / len(log_scale))
        return log_scale - LOG_SCALE_BOUND

    def sum_log_scale(self, log_scale: Tensor) -> Tensor:
        """Return log|det| [B] of the forward map."""
        if self.is_constant_log_det:
            return log_scale.new_zeros(log_scale.shape[1])
        return log_scale.sum(dim=0)

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of u [B, n_features] and log|det| [B]."""
        active, passive = self.select(u)
        shift, log_scale = self._shift_and_log_scale(passive)
        active = torch.addcmul(shift, active, log_scale.exp())
        return self.join(active, passive), self.sum_log_scale(log_scale)

    def inverse_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the preimage of x [B, n_features] and log|det| of the inverse [B]."""
        active, passive = self.select(x)
        shift, log_scale = self._shift_and_log_scale(passive)
        active = (active - shift) * log_scale.neg().exp()
        return self.join(active, passive), -self.sum_log_scale(log_scale)

    def forward_and_pullback(self, u: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return :meth:`forward_and_log_det` of u, and the inverse's pull-back to the image."""
        record = _Record(self, is_inverse=False)
        image, log_det = _Recorded.apply(record, u, *self.net.parameters())
        return image, log_det, record.pull_back

    def inverse_and_pullback(self, x: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return :meth:`inverse_and_log_det` of x, and the map's pull-back to the preimage."""
        record = _Record(self, is_inverse=True)
        preimage, log_det = _Recorded.apply(record, x, *self.net.parameters())
        return preimage, log_det, record.pull_back


def bound(raw: Tensor) -> Tensor:
    """Return b (1 + tanh(raw / b)), b the bound of log-scales."""
    # As the logistic function, which is faster.
    return torch.sigmoid(raw if _SIGMOID_RATE == 1.0 else raw * _SIGMOID_RATE).mul(
        2 * LOG_SCALE_BOUND
    )


class _Record:
    """One application of a coupling, with its derivatives written out.

    Autograd would keep and visit every operation; here those of both directions share what the
    application has computed, and the conditioner's products are all that they cost.
    """

    tape: Tape
    scale: Tensor
    active: Tensor  # in the forward map's argument
    offset: Tensor  # in its image, less the shift
    gradient: Tensor  # of the log-scale in the conditioner's outputs

    def __init__(self, coupling: AffineCoupling, is_inverse: bool) -> None:
        self.coupling, self.is_inverse = coupling, is_inverse

    def apply(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transformed features [B, n_features] and log|det| [B], detached."""
        coupling = self.coupling
        active, passive = coupling.select(z)
        outputs, self.tape = coupling.net.record(passive.to(coupling.conditioner_dtype or z.dtype))
        shift, raw = outputs.chunk(2)
        bounded = bound(raw)
        self.gradient = torch.addcmul(bounded, bounded, bounded, value=-0.5 / LOG_SCALE_BOUND)
        if _SIGMOID_RATE != 1.0:
            self.gradient *= _SIGMOID_RATE
        log_scale = coupling.centre(bounded.to(z.dtype))
        self.scale = log_scale.exp()
        log_det = coupling.sum_log_scale(log_scale)
        if self.is_inverse:
            self.offset = active - shift
            self.active = self.offset / self.scale
            return coupling.join(self.active, passive), -log_det
        self.active, self.offset = active, active * self.scale
        return coupling.join(self.offset + shift, passive), log_det

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """Return a cotangent pulled back through the other direction (see `Pullback`)."""
        with torch.no_grad():
            of_active, of_outputs, of_passive = self._through_outputs(
                cotangent, not self.is_inverse, -1.0 if self.is_inverse else 1.0
            )
            of_passive += self.tape.pull_back(of_outputs)
            return self.coupling.join(of_active, of_passive)

    def differentiate(
        self, cotangent: Tensor, of_log_det: Tensor, needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return gradients in the argument, if needed, and in the conditioner's parameters."""
        sign = -of_log_det if self.is_inverse else of_log_det
        of_active, of_outputs, of_passive = self._through_outputs(cotangent, self.is_inverse, sign)
        of_first, gradients = self.tape.gradients(of_outputs)
        if not needs_input:
            return None, gradients
        of_passive += torch.mm(self.tape.weights[0].T, of_first)
        return self.coupling.join(of_active, of_passive), gradients

    def _through_outputs(
        self, cotangent: Tensor, is_inverse: bool, of_log_scale: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents of the transformed features, the conditioner's outputs, the other features.

        `cotangent` is of the image, or of the preimage; `of_log_scale` is added to the cotangent
        of each log-scale where the map changes volumes.
        """
        of_result, of_passive = self.coupling.select(cotangent)
        if is_inverse:
            of_active, of_scale = of_result / self.scale, -of_result * self.active
            of_shift = -of_active
        else:
            of_active, of_scale = of_result * self.scale, of_result * self.offset
            of_shift = of_result
        if self.coupling.is_constant_log_det:
            of_scale = torch.sub(of_scale, of_scale.sum(dim=0), alpha=1 / len(of_scale))
        else:
            of_scale = of_scale + of_log_scale
        of_raw = of_scale.to(self.gradient.dtype).mul_(self.gradient)
        return of_active, torch.cat([of_shift.to(of_raw.dtype), of_raw]), of_passive


class _Recorded(torch.autograd.Function):
    """A coupling's application as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, record: _Record, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.record, ctx.dtypes = record, [parameter.dtype for parameter in parameters]
        return record.apply(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_result: Tensor, of_log_det: Tensor) -> tuple[Tensor | None, ...]:
        needs_input = ctx.needs_input_grad[1]
        of_input, gradients = ctx.record.differentiate(of_result, of_log_det, needs_input)
        converted = (g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, of_input, *converted


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
