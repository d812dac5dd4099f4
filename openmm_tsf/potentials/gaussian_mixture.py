"""Mixtures of Gaussians of any dimension: exact samples, moments and mode of each sample."""

import math
from numbers import Real

import torch
from torch import Tensor

from openmm_tsf.potentials.toy import ModelPotential, check_floating
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_int, check_positive, unwrap_scalar


class GaussianMixture(ModelPotential):
    """A mixture of K Gaussians on R^d, U(x) = -T₀ ln Σ_k w_k N(x; μ_k, Σ_k).

    The mixture is the Boltzmann distribution at T₀, with ln Z = 0; there are no exact answers here
    at other temperatures.

    Parameters
    ----------
    means
        μ [K, d].
    covariances
        Σ [K, d, d], symmetric and positive definite, or one number: the variance of all
        coordinates of all modes.
    weights
        w [K], positive; they are divided by their sum. Equal if None.
    temperature
        T₀, by default 1; that of the target where the mixture is a base measure.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials import GaussianMixture
    >>> mixture = GaussianMixture(torch.tensor([[-4.0, 0.0], [4.0, 0.0]]), 1.0)
    >>> x = mixture.sample(1000, 1.0, torch.Generator().manual_seed(0))
    >>> mixture.modes(x).bincount()
    tensor([500, 500])
    """

    def __init__(
        self,
        means: Tensor,
        covariances: Tensor | float,
        weights: Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        check_floating(means, "means")
        if means.ndim != 2 or 0 in means.shape or not means.isfinite().all():
            raise ValueError(f"means: expected finite numbers [K, d], got {tuple(means.shape)}")
        k, d = means.shape
        super().__init__(d)
        self.temperature = as_temperature(temperature)
        self.means = means.detach().to("cpu", torch.float64)
        number = unwrap_scalar(covariances)
        if isinstance(number, Real):
            variance = check_positive(number, "covariances")
            identity = torch.eye(d, dtype=torch.float64, device="cpu")
            self.covariances = (variance * identity).repeat(k, 1, 1)
        else:
            check_floating(number, "covariances")
            if tuple(number.shape) != (k, d, d):
                raise ValueError(
                    f"covariances: expected shape {(k, d, d)}, got {tuple(number.shape)}"
                )
            self.covariances = number.detach().to("cpu", torch.float64)
        self._factors, failed = torch.linalg.cholesky_ex(self.covariances)
        symmetric = torch.allclose(self.covariances, self.covariances.mT, rtol=1e-6, atol=0.0)
        if failed.any() or not symmetric:
            raise ValueError("covariances: expected symmetric positive definite matrices")
        self.weights = _check_weights(weights, k)
        #: F with F Fᵀ = Σ⁻¹, and ln of w_k over the normalisation of N.
        self.inverse_factors = torch.linalg.inv(self._factors).mT.contiguous()
        log_det = self._factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        self.log_heights = self.weights.log() - log_det - 0.5 * d * math.log(2.0 * math.pi)

    def formula(self, x: Tensor) -> Tensor:
        return -self.temperature * self._log_terms(x).logsumexp(dim=1)

    def _log_terms(self, x: Tensor) -> Tensor:
        """Return ln [w_k N(x; μ_k, Σ_k)] [B, K]."""
        means, factors, heights = (
            self.on_device(name, x.device).to(x)
            for name in ("means", "inverse_factors", "log_heights")
        )
        standard = torch.einsum("bki,kij->bkj", x[:, None, :] - means, factors)
        return heights - 0.5 * standard.square().sum(dim=2)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Return the probability [B, K] that x [B, d] was drawn from each mode."""
        self.check_positions(x)
        return self._log_terms(x).softmax(dim=1)

    def modes(self, x: Tensor) -> Tensor:
        """Return the most probable mode [B], int64, of each x [B, d]."""
        self.check_positions(x)
        return self._log_terms(x).argmax(dim=1)

    def log_prob(self, x: Tensor, temperature: float) -> Tensor:
        """Return the normalised log-density [B] of x [B, d]; `temperature` has to be T₀."""
        self._check_temperature(temperature)
        self.check_positions(x)
        return self._log_terms(x).logsumexp(dim=1)

    def log_partition_function(self, temperature: float) -> float:
        """Return ln Z = 0; `temperature` has to be T₀."""
        self._check_temperature(temperature)
        return 0.0

    def mean(self) -> Tensor:
        """Return ⟨x⟩ [d] at T₀, float64."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Return the covariance [d, d] of x at T₀, float64."""
        centred = self.means - self.mean()
        outer = centred[:, :, None] * centred[:, None, :]
        return (self.weights[:, None, None] * (self.covariances + outer)).sum(dim=0)

    def sample(self, n: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Draw independent samples [n, d], float64; `temperature` has to be T₀."""
        n = check_int(n, "n", least=0)
        self._check_temperature(temperature)
        shape = (n, self.event_shape[0])
        if n == 0:
            return torch.zeros(shape, dtype=torch.float64, device="cpu")
        mode = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
        return self.means[mode] + torch.einsum("nij,nj->ni", self._factors[mode], noise)

    def _check_temperature(self, temperature: float) -> None:
        if as_temperature(temperature) != self.temperature:
            expected = f"{self.temperature:g}, the mixture's own"
            raise ValueError(f"temperature: expected {expected}, got {temperature!r}")


def _check_weights(weights: Tensor | None, k: int) -> Tensor:
    """Return normalised weights [K], float64."""
    if weights is None:
        return torch.full((k,), 1.0 / k, dtype=torch.float64, device="cpu")
    check_floating(weights, "weights")
    if tuple(weights.shape) != (k,) or not ((weights > 0) & weights.isfinite()).all():
        raise ValueError(f"weights: expected {k} positive numbers, got {weights}")
    values = weights.detach().to("cpu", torch.float64)
    return values / values.sum()
