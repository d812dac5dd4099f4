"""Standardisation of internal coordinates by a map with a constant Jacobian.

Bonds, angles and offsets are stiff and correlated with each other; their means depend on the soft
torsions (a wider N-CA-C angle in one basin than in another). A shift that is a function of other
coordinates does not change the determinant, so the map may be block-triangular and still satisfy
the steering condition (arXiv:2012.00429, eq. 4).
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from openmm_tsf.coordinates.config import require_dtype
from openmm_tsf.coordinates.zmatrix import TORSION
from openmm_tsf.utils.tensors import check_tensor
from openmm_tsf.utils.validation import check_choice, require_array, require_entry

MODES = ("conditional", "full", "diagonal")
#: Ridge of the shift's regression, in frames: close to the best by held-out likelihood on 2 000 to
#: 20 000 frames of alanine dipeptide.
RIDGE_FRAMES = 20.0
#: Diagonal elements of the correlation matrix's Cholesky factor below this count as zero.
DEGENERATE = 1e-6
_TENSORS = ("soft_mean", "soft_scale", "stiff_mean", "weights", "cholesky")


class Whitening(nn.Module):
    """Map y [B, d], of about zero mean and unit covariance, to internal coordinates u [B, d].

    With t the coordinates that are only shifted and scaled and s the others:
    t = mean + scale * y_t, s = mean + W f(t) + L y_s, where f(t) are sin(k t) and cos(k t) for
    k = 1 to `harmonics`, and L is lower triangular. The log-determinant sum ln scale + sum ln L_ii
    is constant.

    Build it with :meth:`fit`, :meth:`from_covariance` or :meth:`from_config`.

    Attributes
    ----------
    mode : str
        ``"conditional"``: t are the primary torsions. ``"full"``: t is empty. ``"diagonal"``: s is
        empty.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.coordinates import Whitening
    >>> y = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1)).double()
    >>> u = y @ torch.tensor([[0.3, 0.1], [0.0, 0.2]]).double() + 5.0
    >>> whitening = Whitening.fit(u, kinds=torch.tensor([0, 0]), mode="full")
    >>> standard, _ = whitening.inverse_and_log_det(u)
    >>> torch.allclose(standard.T.cov(correction=0), torch.eye(2).double())
    True
    """

    is_constant_log_det = True

    _soft: Tensor
    _stiff: Tensor
    _order: Tensor
    soft_mean: Tensor
    soft_scale: Tensor
    stiff_mean: Tensor
    weights: Tensor
    cholesky: Tensor

    def __init__(
        self,
        mode: str,
        soft: Tensor,
        soft_mean: Tensor,
        soft_scale: Tensor,
        stiff_mean: Tensor,
        weights: Tensor,
        cholesky: Tensor,
    ) -> None:
        super().__init__()
        self.mode = check_choice(mode, "mode", MODES)
        self.n_coordinates = len(soft)
        # Number of k in sin(k t), cos(k t).
        self.harmonics = len(weights) // max(2 * int(soft.sum()), 1)
        self.register_buffer("_soft", soft.nonzero()[:, 0])
        self.register_buffer("_stiff", (~soft).nonzero()[:, 0])
        self.register_buffer("_order", torch.cat((self._soft, self._stiff)).argsort())
        tensors = (soft_mean, soft_scale, stiff_mean, weights, cholesky)
        for name, tensor in zip(_TENSORS, tensors, strict=True):
            self.register_buffer(name, tensor)

    @classmethod
    def fit(cls, u: Tensor, kinds: Tensor, mode: str = "conditional", harmonics: int = 3) -> Self:
        """Fit the map to training frames.

        Parameters
        ----------
        u, kinds, mode
            Internal coordinates [F, d] on their branches; the kind of each coordinate [d], as
            :attr:`InternalCoordinates.kinds`; ``"conditional"``, ``"full"`` or ``"diagonal"``.
        harmonics
            Highest multiple of the torsions in the shift of ``"conditional"``; 0 for a constant
            shift. (Products of functions of two torsions worsen the held-out likelihood of alanine
            dipeptide with 20 000 frames or fewer.)
        """
        _check_fit(u, kinds, mode, harmonics)
        data, is_torsion = u.detach().to(torch.float64), kinds == TORSION
        mean, scale = data.mean(0), data.std(0)
        rounding = 1e-12 * data.abs().amax(0)
        for index in (scale <= rounding).nonzero()[:, 0].tolist():
            raise ValueError(f"u: coordinate {index} does not vary (always {float(mean[index])!r})")
        if mode == "diagonal":
            is_torsion = torch.ones_like(is_torsion)
        elif mode == "full":
            is_torsion = torch.zeros_like(is_torsion)
        torsions, stiff = data[:, is_torsion], ~is_torsion
        standard = (data[:, stiff] - mean[stiff]) / scale[stiff]
        basis = _harmonics(torsions, harmonics if mode == "conditional" else 0)
        basis_mean = basis.mean(0)
        basis = basis - basis_mean
        gram = basis.T @ basis + RIDGE_FRAMES * torch.eye(
            basis.shape[1], dtype=torch.float64, device=basis.device
        )
        weights = torch.linalg.solve(gram, basis.T @ standard)
        residual = standard - basis @ weights
        factor = _cholesky(residual.T @ residual / len(u), stiff)
        weights = weights * scale[stiff]
        stiff_mean, cholesky = mean[stiff] - basis_mean @ weights, scale[stiff][:, None] * factor
        parts = (mean[is_torsion], scale[is_torsion], stiff_mean, weights, cholesky)
        # Contiguous, so that a reloaded map gives the same bits.
        tensors = [part.contiguous().to(u.dtype).to(u.device) for part in parts]
        return cls(mode, is_torsion.to(u.device), *tensors)

    @classmethod
    def from_covariance(cls, covariance: Tensor, mean: Tensor | None = None) -> Self:
        """Return the linear map of mode ``"full"`` from N(0, 1) to a Gaussian, float64.

        Below a flow's network it makes that Gaussian the base measure, whose covariance is
        proportional to T: ``whitening=Whitening.from_covariance(well.covariance(T_ref))``.

        Parameters
        ----------
        covariance, mean
            [d, d], symmetric and positive definite; [d], zeros if None.
        """
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
            shape = tuple(covariance.shape)
            raise ValueError(f"covariance: expected shape [d, d], got {shape}")
        values = covariance.detach().to(torch.float64)
        d = len(values)
        factor, failed = torch.linalg.cholesky_ex(values)
        if int(failed) or not torch.allclose(values, values.mT, rtol=1e-6, atol=0.0):
            raise ValueError("covariance: expected a symmetric positive definite matrix")
        if mean is None:
            mean = values.new_zeros(d)
        if tuple(mean.shape) != (d,):
            raise ValueError(f"mean: expected shape {(d,)}, got {tuple(mean.shape)}")
        none = values.new_zeros(0)
        soft = torch.zeros(d, dtype=torch.bool, device=values.device)
        stiff_mean = mean.detach().to(values).clone()
        return cls(
            "full", soft, none, none, stiff_mean, values.new_zeros(0, d), factor.contiguous()
        )

    @property
    def log_abs_det(self) -> Tensor:
        """log|det du/dy|, a scalar."""
        return self.soft_scale.log().sum() + self.cholesky.diagonal().log().sum()

    def _shift(self, torsions: Tensor) -> Tensor:
        return self.stiff_mean + _harmonics(torsions, self.harmonics) @ self.weights

    def forward_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Internal coordinates u [B, d] of y [B, d], and the constant log|det du/dy| [B]."""
        check_tensor(y, "y", (self.n_coordinates,), self.cholesky)
        soft = self.soft_mean + self.soft_scale * y[:, self._soft]
        stiff = self._shift(soft) + y[:, self._stiff] @ self.cholesky.T
        u = torch.cat((soft, stiff), dim=1)[:, self._order]
        return u, self.log_abs_det.expand(len(y))

    def inverse_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, d] of internal coordinates u [B, d], and log|det dy/du| [B]."""
        check_tensor(u, "u", (self.n_coordinates,), self.cholesky)
        soft = u[:, self._soft]
        residual = u[:, self._stiff] - self._shift(soft)
        stiff = torch.linalg.solve_triangular(self.cholesky, residual.T, upper=False).T
        soft = (soft - self.soft_mean) / self.soft_scale
        y = torch.cat((soft, stiff), dim=1)[:, self._order]
        return y, (-self.log_abs_det).expand(len(u))

    def to_config(self) -> dict[str, Any]:
        """Return numbers, strings and lists from which :meth:`from_config` rebuilds this."""
        soft = torch.zeros(self.n_coordinates, dtype=torch.bool, device="cpu")
        soft[self._soft.cpu()] = True
        return {
            "mode": self.mode,
            "dtype": str(self.cholesky.dtype).removeprefix("torch."),
            "soft": soft.tolist(),
            **{name: getattr(self, name).tolist() for name in _TENSORS},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Rebuild a map from what :meth:`to_config` returned; ValueError for anything else."""
        dtype = require_dtype(config)
        soft = require_array(config, "soft", "b", -1)
        n_soft, n_stiff = int(soft.sum()), int((~soft).sum())

        def numbers(name: str, *shape: int) -> Tensor:
            return torch.tensor(
                require_array(config, name, "if", *shape), dtype=dtype, device="cpu"
            )

        n_weights = len(require_entry(config, "weights", list))
        if n_weights % max(2 * n_soft, 1):
            raise ValueError(f"weights: expected a multiple of {2 * n_soft} rows, got {n_weights}")
        scale = numbers("soft_scale", n_soft)
        cholesky = numbers("cholesky", n_stiff, n_stiff)
        if not bool((scale > 0).all() and (cholesky.diagonal() > 0).all()):
            raise ValueError("soft_scale, cholesky: expected positive scales")
        means = numbers("soft_mean", n_soft), numbers("stiff_mean", n_stiff)
        weights = numbers("weights", n_weights, n_stiff)
        mode, is_soft = require_entry(config, "mode", str), torch.from_numpy(soft)
        return cls(mode, is_soft, means[0], scale, means[1], weights, cholesky)


def _harmonics(torsions: Tensor, highest: int) -> Tensor:
    """sin(k t) and cos(k t), k = 1..highest: [B, 2 * highest * n] of torsions [B, n]."""
    multiples = [k * torsions for k in range(1, highest + 1)]
    waves = [wave for t in multiples for wave in (t.sin(), t.cos())]
    return torch.cat(waves, dim=1) if waves else torsions.new_zeros(len(torsions), 0)


def _check_fit(u: Tensor, kinds: Tensor, mode: str, harmonics: int) -> None:
    check_choice(mode, "mode", MODES)
    if harmonics < 0:
        raise ValueError(f"harmonics: expected 0 or more, got {harmonics}")
    if u.ndim != 2 or tuple(kinds.shape) != tuple(u.shape[1:]):
        shapes = f"{tuple(u.shape)} and {tuple(kinds.shape)}"
        raise ValueError(f"u, kinds: expected shapes [F, d] and [d], got {shapes}")
    if not torch.isfinite(u).all():
        raise ValueError("u: expected finite numbers, got NaN or infinity")
    needed = 2 if mode == "diagonal" else u.shape[1] + 1
    if len(u) < needed:
        raise ValueError(f"u: expected at least {needed} frames for {mode!r}, got {len(u)}")


def _cholesky(covariance: Tensor, stiff: Tensor) -> Tensor:
    """Return the Cholesky factor of the residuals' covariance, naming a dependent coordinate."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    small = (factor.diagonal() < DEGENERATE).nonzero()[:, 0].tolist()
    if int(failed) or small:
        first = int(failed) - 1 if int(failed) else small[0]
        what = "is a linear function of those before it (degenerate covariance)"
        index = int(stiff.nonzero()[first, 0])
        raise ValueError(f"u: coordinate {index} {what}; more frames may help")
    return factor
