"""The posterior of a planet's orbit from radial velocities of its star, exact by quadrature."""

import math
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from openmm_tsf.potentials.toy import ModelPotential
from openmm_tsf.units import DIMENSIONLESS, as_array, as_temperature
from openmm_tsf.utils.random import seeded_generator
from openmm_tsf.utils.validation import check_float, check_int, check_positive


class Priors(NamedTuple):
    """The priors of the orbit's parameters.

    v₀ ~ N(0, `offset_width`²); K ~ N(`amplitude`, `amplitude_width`²); φ₀ ~ U(0, 2π);
    ln P ~ U(ln `shortest`, ln `longest`).
    """

    offset_width: float = 1.0
    amplitude: float = 5.0
    amplitude_width: float = 3.0
    shortest: float = 2.0
    longest: float = 10.0


class _Conditional(NamedTuple):
    """U = constant + ½ θ·Mθ - r·θ with θ = (v₀, K), given phases and periods [...]."""

    m11: float
    m12: Tensor
    m22: Tensor
    r1: float
    r2: Tensor

    @property
    def determinant(self) -> Tensor:
        return self.m11 * self.m22 - self.m12.square()

    @property
    def mean(self) -> Tensor:
        """M⁻¹ r [..., 2]."""
        v0 = self.m22 * self.r1 - self.m12 * self.r2
        amplitude = self.m11 * self.r2 - self.m12 * self.r1
        return torch.stack((v0, amplitude), dim=-1) / self.determinant[..., None]

    @property
    def depth(self) -> Tensor:
        """½ r·M⁻¹ r [...]: how far the minimum is below the constant."""
        mean = self.mean
        return 0.5 * (self.r1 * mean[..., 0] + self.r2 * mean[..., 1])


class RadialVelocity(ModelPotential):
    """U = -ln posterior of x = (v₀, K, φ₀, ln P), normalised so that ln Z at T = 1 is the evidence.

    Observations are v(t) = v₀ + K cos(2πt/P + φ₀) plus Gaussian noise (Gabrié, Rotskoff and
    Vanden-Eijnden, arXiv:2107.08001). Outside the ranges of φ₀ and ln P the energy is +inf. Given
    φ₀ and ln P the rest is Gaussian, which leaves two dimensions to the quadrature.

    Parameters
    ----------
    times, velocities
        Observations, one number [n] each, in units of one's own.
    noise
        Their standard deviation.
    priors
        See :class:`Priors`.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials import RadialVelocity
    >>> posterior = RadialVelocity.synthetic(seed=1)
    >>> x = posterior.sample(100, 1.0, torch.Generator().manual_seed(0))
    >>> posterior.energy(x).isfinite().all()
    tensor(True)
    """

    #: Points of the midpoint rule in φ₀ and in ln P.
    N_PHASES, N_PERIODS = 256, 3000

    def __init__(
        self, times: Any, velocities: Any, noise: float, priors: Priors | None = None
    ) -> None:
        super().__init__(4)
        values = []
        for name, given in (("times", times), ("velocities", velocities)):
            array = as_array(given, DIMENSIONLESS, name)
            if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
                raise ValueError(f"{name}: expected finite numbers [n], got shape {array.shape}")
            values.append(torch.from_numpy(array.copy()))
        self.times, self.velocities = values
        if len(self.times) != len(self.velocities):
            lengths = f"{len(self.times)} and {len(self.velocities)}"
            raise ValueError(f"times, velocities: expected one length, got {lengths}")
        self.noise = check_positive(noise, "noise")
        given = Priors() if priors is None else priors
        self.priors = Priors(
            *(check_positive(v, n) if n != "amplitude" else check_float(v, n)
              for n, v in given._asdict().items())
        )  # fmt: skip
        if self.priors.longest <= self.priors.shortest:
            raise ValueError(
                f"longest: expected more than {self.priors.shortest}, got {self.priors.longest}"
            )
        self._range = math.log(self.priors.shortest), math.log(self.priors.longest)
        self._norm = (
            len(self.times) * math.log(self.noise * math.sqrt(2.0 * math.pi))
            + math.log(2.0 * math.pi * self.priors.amplitude_width * self.priors.offset_width)
            + math.log(2.0 * math.pi)
            + math.log(self._range[1] - self._range[0])
        )

    @classmethod
    def synthetic(
        cls, seed: int, n_observations: int = 5, span: float = 10.0, noise: float = 0.5
    ) -> Self:
        """Return the posterior of synthetic data: default priors, truth drawn from them by `seed`.

        Times are uniform in [0, span].
        """
        n, generator = check_int(n_observations, "n_observations"), seeded_generator(seed)
        span, noise, priors = check_positive(span, "span"), check_positive(noise, "noise"), Priors()
        normal, uniform = _randn((2,), generator), _rand((2,), generator)
        low, high = math.log(priors.shortest), math.log(priors.longest)
        truth = torch.stack(
            (
                priors.offset_width * normal[0],
                priors.amplitude + priors.amplitude_width * normal[1],
                2.0 * math.pi * uniform[0],
                low + (high - low) * uniform[1],
            )
        )
        times = (span * _rand((n,), generator)).sort().values
        exact = _velocity(truth[None], times)[0]
        return cls(times, exact + noise * _randn((n,), generator), noise, priors)

    def formula(self, x: Tensor) -> Tensor:
        times, velocities = (
            self.on_device(name, x.device).to(x) for name in ("times", "velocities")
        )
        priors, (low, high) = self.priors, self._range
        residual = (velocities - _velocity(x, times)) / self.noise
        energy = 0.5 * residual.square().sum(dim=1) + self._norm
        energy = energy + 0.5 * (x[:, 0] / priors.offset_width).square()
        deviation = (x[:, 1] - priors.amplitude) / priors.amplitude_width
        energy = energy + 0.5 * deviation.square()
        phase, period = x[:, 2].detach(), x[:, 3].detach()
        inside = (phase >= 0.0) & (phase < 2.0 * math.pi) & (period >= low) & (period <= high)
        return torch.where(inside, energy, torch.inf)

    def log_partition_function(self, temperature: float = 1.0) -> float:
        """Return ln Z = ln ∫ exp(-U/T) dx; at T = 1 the evidence."""
        _, _, log_weights, _ = self._quadrature(temperature)
        cell = 2.0 * math.pi * (self._range[1] - self._range[0]) / log_weights.numel()
        return float(log_weights.flatten().logsumexp(0)) + math.log(cell)

    def mean(self, temperature: float = 1.0) -> Tensor:
        """Return the means [4] of v₀, K, φ₀ and ln P, float64."""
        log_periods, phases, log_weights, conditional = self._quadrature(temperature)
        weights = log_weights.flatten().softmax(0).reshape(log_weights.shape)
        linear = (weights[..., None] * conditional.mean).sum(dim=(0, 1))
        of_phase, of_period = weights.sum(dim=0) @ phases, weights.sum(dim=1) @ log_periods
        return torch.cat((linear, torch.stack((of_phase, of_period))))

    def log_period_density(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return ln P [P] and its marginal density [P], float64."""
        log_periods, _, log_weights, _ = self._quadrature(temperature)
        weights = log_weights.logsumexp(dim=1).softmax(dim=0)
        return log_periods, weights * self.N_PERIODS / (self._range[1] - self._range[0])

    def sample(self, n: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Draw independent samples [n, 4] at `temperature`, float64.

        φ₀ and ln P are uniform within cells of the quadrature; the rest is drawn exactly.
        """
        n, temperature = check_int(n, "n", least=0), as_temperature(temperature)
        if n == 0:
            return _rand((0, 4), generator)
        log_periods, phases, log_weights, _ = self._quadrature(temperature)
        weights = log_weights.flatten().softmax(0)
        cell = torch.multinomial(weights, n, replacement=True, generator=generator)
        shift = _rand((n, 2), generator) - 0.5
        phase = phases[cell % len(phases)] + shift[:, 0] * (phases[1] - phases[0])
        period = log_periods[cell // len(phases)]
        period = period + shift[:, 1] * (log_periods[1] - log_periods[0])
        given = self._condition(phase, period)
        noise = math.sqrt(temperature) * _randn((n, 2), generator)
        # K from its marginal, v₀ given K.
        spread = given.m22 - given.m12.square() / given.m11
        amplitude = given.mean[:, 1] + noise[:, 1] / spread.sqrt()
        v0 = (given.r1 - given.m12 * amplitude) / given.m11 + noise[:, 0] / math.sqrt(given.m11)
        return torch.stack((v0, amplitude, phase, period), dim=1)

    def _condition(self, phase: Tensor, log_period: Tensor) -> _Conditional:
        """Return the quadratic form of (v₀, K), given φ₀ and ln P [...]."""
        precision, priors = self.noise**-2, self.priors
        angle = 2.0 * math.pi * self.times * torch.exp(-log_period)[..., None]
        # cos(angle + φ₀) = c cos φ₀ - s sin φ₀: sums over times do not depend on φ₀.
        c, s, cos, sin = angle.cos(), angle.sin(), phase.cos(), phase.sin()
        squares = cos * cos * (c * c).sum(-1) + sin * sin * (s * s).sum(-1)
        squares = squares - 2.0 * cos * sin * (c * s).sum(-1)
        data = cos * (c @ self.velocities) - sin * (s @ self.velocities)
        of_amplitude = priors.amplitude_width**-2
        return _Conditional(
            m11=len(self.times) * precision + priors.offset_width**-2,
            m12=precision * (cos * c.sum(-1) - sin * s.sum(-1)),
            m22=precision * squares + of_amplitude,
            r1=precision * float(self.velocities.sum()),
            r2=precision * data + of_amplitude * priors.amplitude,
        )

    def _quadrature(self, temperature: float) -> tuple[Tensor, Tensor, Tensor, _Conditional]:
        """Return ln P [P], φ₀ [F], ln of ∫ exp(-U/T) dv₀ dK [P, F], and (v₀, K) given them."""
        temperature, (low, high) = as_temperature(temperature), self._range
        middles = (
            (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n
            for n in (self.N_PERIODS, self.N_PHASES)
        )
        log_periods, phases = next(middles) * (high - low) + low, next(middles) * 2.0 * math.pi
        given = self._condition(phases, log_periods[:, None])
        priors = self.priors
        constant = (
            0.5 * float((self.velocities / self.noise).square().sum())
            + 0.5 * (priors.amplitude / priors.amplitude_width) ** 2
            + self._norm
        )
        log_weights = (given.depth - constant) / temperature - 0.5 * given.determinant.log()
        # Every other point must give the same; the error of all points is far smaller.
        for halves, allowed in ((log_weights.mT, 1e-6), (log_weights, 1e-2)):
            even, odd = (halves[k::2].flatten().logsumexp(0) for k in (0, 1))
            if not abs(float(even - odd)) < allowed:
                raise ValueError(
                    "noise, temperature: expected a posterior that a grid of "
                    f"{self.N_PERIODS} periods and {self.N_PHASES} phases resolves"
                )
        return log_periods, phases, log_weights + math.log(2.0 * math.pi * temperature), given


def _velocity(x: Tensor, times: Tensor) -> Tensor:
    """Return v(t) [B, n] of x [B, 4] at times [n]."""
    angle = 2.0 * math.pi * times * torch.exp(-x[:, 3:]) + x[:, 2:3]
    return x[:, :1] + x[:, 1:2] * angle.cos()


def _rand(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator, device="cpu")


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
