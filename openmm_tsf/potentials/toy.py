"""Toy potentials with exact thermodynamics: batched, differentiable, k_B = 1."""

import math
from abc import abstractmethod
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.potentials.base import Potential
from openmm_tsf.units import KELVIN, in_unit
from openmm_tsf.utils.deferred import as_count
from openmm_tsf.utils.devices import DeviceConstants
from openmm_tsf.utils.validation import check_int, check_positive, unwrap_scalar


def check_floating(value: Any, name: str) -> None:
    """Refuse anything but a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating torch.Tensor, got {type(value).__name__}")


class ModelPotential(DeviceConstants, Potential):
    """A potential on R^d, or of atoms, written in torch. k_B = 1 unless a subclass has its own.

    Subclasses define :meth:`formula`. Rows that are not finite, or overflow, are +inf with zero
    gradient and are counted.
    """

    boltzmann_constant = 1.0

    def __init__(self, *event_shape: int) -> None:
        self.event_shape = event_shape
        self.n_evaluations = 0
        self._n_non_finite: int | Tensor = 0

    @property
    def n_non_finite(self) -> int:  # type: ignore[override]
        """The number of energies computed so far that were not finite; a GPU is waited for."""
        return int(self._n_non_finite)

    @abstractmethod
    def formula(self, x: Tensor) -> Tensor:
        """Return U [B] of finite x [B, *event] in x's dtype on its device, without counting."""

    def energy(self, x: Tensor) -> Tensor:
        """Return the energies [B] of x [B, *event], differentiable to any order."""
        self.check_positions(x)
        self.n_evaluations += len(x)
        energies = self.formula(x)
        if x.device.type == "cpu" and math.isfinite(energies.sum().item()):
            return energies
        finite = energies.detach().isfinite() & x.detach().isfinite().flatten(1).all(dim=1)
        self._n_non_finite += as_count((~finite).sum())
        # Without the bad rows: 0 * inf in the formula's derivative would be NaN.
        rows = finite.reshape(-1, *(1,) * (x.ndim - 1))
        energies = self.formula(torch.where(rows, x, 0.0))
        return torch.where(finite, energies, torch.inf)

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the detached energies [B] and forces [B, *event] of x [B, *event]."""
        self.check_positions(x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            energies = self.energy(leaf)
            (gradient,) = torch.autograd.grad(energies.sum(), leaf)
        return energies.detach(), -gradient


def _check_temperature(temperature: Any) -> float:
    return check_positive(in_unit(temperature, KELVIN, "temperature"), "temperature")


class GaussianWell(ModelPotential):
    """A correlated harmonic well, U(x) = x·P x / 2; its Boltzmann distribution is N(0, T P⁻¹).

    Parameters
    ----------
    precision
        P [d, d], symmetric and positive definite.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials import GaussianWell
    >>> well = GaussianWell(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    >>> well.energy(torch.tensor([[1.0, 2.0]]))
    tensor([4.])
    >>> well.mean_energy(temperature=3.0)
    3.0
    """

    def __init__(self, precision: Tensor) -> None:
        check_floating(precision, "precision")
        if precision.ndim != 2 or precision.shape[0] != precision.shape[1] or not len(precision):
            raise ValueError(f"precision: expected shape [d, d], got {tuple(precision.shape)}")
        super().__init__(len(precision))
        self.precision = precision.detach().to("cpu", torch.float64)
        factor, failed = torch.linalg.cholesky_ex(self.precision)
        if failed or not torch.allclose(self.precision, self.precision.T, rtol=1e-6, atol=0.0):
            raise ValueError("precision: expected a symmetric positive definite matrix")
        self._factor = factor

    def formula(self, x: Tensor) -> Tensor:
        return 0.5 * ((x @ self.on_device("precision", x.device).to(x)) * x).sum(dim=1)

    def log_partition_function(self, temperature: float) -> float:
        """Return ln Z = ln ∫ exp(−U/T) dx."""
        temperature = _check_temperature(temperature)
        log_det = 2.0 * self._factor.diagonal().log().sum().item()
        return 0.5 * (self.event_shape[0] * math.log(2.0 * math.pi * temperature) - log_det)

    def mean_energy(self, temperature: float) -> float:
        """Return ⟨U⟩ = d T / 2."""
        temperature = _check_temperature(temperature)
        return 0.5 * self.event_shape[0] * temperature

    def log_prob(self, x: Tensor, temperature: float) -> Tensor:
        """Return the normalised log-density [B] of x [B, d] at `temperature`."""
        self.check_positions(x)
        temperature = _check_temperature(temperature)
        return -self.formula(x) / temperature - self.log_partition_function(temperature)

    def covariance(self, temperature: float) -> Tensor:
        """Return the covariance T P⁻¹ [d, d], float64."""
        temperature = _check_temperature(temperature)
        return temperature * torch.cholesky_inverse(self._factor)

    def sample(self, n: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Draw independent samples [n, d] at `temperature`, float64."""
        n, temperature = check_int(n, "n", least=0), _check_temperature(temperature)
        noise = torch.randn(
            self.event_shape[0], n, dtype=torch.float64, generator=generator, device="cpu"
        )
        scaled = math.sqrt(temperature) * noise
        return torch.linalg.solve_triangular(self._factor.T, scaled, upper=True).T.contiguous()


class DoubleWell(ModelPotential):
    """Independent quartic wells, U(x) = Σ_i a_i x_i + b_i x_i² + c_i x_i⁴.

    Two wells where b_i < 0, tilted by a_i; harmonic where c_i = 0. Exact thermodynamics are
    products of one-dimensional quadratures.

    Parameters
    ----------
    a, b, c
        Coefficients [d], or numbers for d = 1. They confine: c_i > 0, or c_i = 0 and b_i > 0.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials import DoubleWell
    >>> well = DoubleWell(0.1, -2.0, 0.5)
    >>> well.energy(torch.tensor([[0.0], [1.0]]))
    tensor([ 0.0000, -1.4000])
    >>> round(well.probability_positive(temperature=1.0).item(), 3)
    0.439
    """

    #: Points (odd) of the trapezium rule, spectrally accurate for integrands that decay.
    N_POINTS = 20001

    def __init__(self, a: Tensor | float, b: Tensor | float, c: Tensor | float) -> None:
        coefficients = []
        for name, value in (("a", a), ("b", b), ("c", c)):
            number = unwrap_scalar(value)
            if isinstance(number, Tensor) and number.is_floating_point():
                tensor = number.detach().to("cpu", torch.float64)
            elif not isinstance(number, bool) and isinstance(number, Real):
                tensor = torch.tensor([float(number)], dtype=torch.float64, device="cpu")
            else:
                given = type(value).__name__
                raise TypeError(f"{name}: expected a number or a floating tensor, got {given}")
            if tensor.ndim != 1 or not len(tensor) or not tensor.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers [d], got {value}")
            coefficients.append(tensor)
        lengths = [len(tensor) for tensor in coefficients]
        if len(set(lengths)) != 1:
            raise ValueError(f"a, b, c: expected one length, got {lengths}")
        self.a, self.b, self.c = coefficients
        if not ((self.c > 0) | ((self.c == 0) & (self.b > 0))).all():
            raise ValueError("b, c: expected a confining potential, c > 0 or c = 0 and b > 0")
        super().__init__(len(self.a))

    def formula(self, x: Tensor) -> Tensor:
        return self._terms(x).sum(dim=1)

    def _terms(self, x: Tensor) -> Tensor:
        """Return U_i(x_i) [..., d]."""
        squared = x * x
        a, b, c = (self.on_device(name, x.device).to(x) for name in ("a", "b", "c"))
        return (a + b * x + c * squared * x) * x

    def log_partition_function(self, temperature: float) -> float:
        """Return ln Z = ln ∫ exp(−U/T) dx."""
        grid, log_weights = self._quadrature(temperature)
        steps = grid[1] - grid[0]
        return float((log_weights.logsumexp(dim=0) + steps.log()).sum())

    def moment(self, order: int, temperature: float) -> Tensor:
        """Return ⟨x_i^order⟩ [d], float64."""
        grid, log_weights = self._quadrature(temperature)
        return (log_weights.softmax(dim=0) * grid**order).sum(dim=0)

    def probability_positive(self, temperature: float) -> Tensor:
        """Return P(x_i > 0) [d], float64."""
        grid, log_weights = self._quadrature(temperature)
        # x = 0 is the middle point of the symmetric grid; half of its weight is on either side.
        return (log_weights.softmax(dim=0) * (0.5 * (1.0 + grid.sign()))).sum(dim=0)

    def mean_energy(self, temperature: float) -> float:
        """Return ⟨U⟩."""
        grid, log_weights = self._quadrature(temperature)
        return float((log_weights.softmax(dim=0) * self._terms(grid)).sum())

    def sample(self, n: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Draw independent samples [n, d] at `temperature`, float64.

        Grid points are drawn with their quadrature weights and displaced uniformly within a grid
        step. The step is about 1e-3 of a well's standard deviation (5e-3 with barriers of 100 T);
        variances are exact to the step's square.
        """
        n = check_int(n, "n", least=0)
        grid, log_weights = self._quadrature(temperature)
        weights = log_weights.softmax(dim=0).T.contiguous()
        drawn = torch.multinomial(weights, n, replacement=True, generator=generator).T
        shape = (n, len(self.a))
        uniform = torch.rand(shape, dtype=torch.float64, generator=generator, device="cpu")
        return grid.gather(0, drawn) + (uniform - 0.5) * (grid[1] - grid[0])

    def cumulants(self, temperature: float) -> Tensor:
        """Return the first four cumulants of every x_i, [4, d], float64."""
        grid, log_weights = self._quadrature(temperature)
        weights = log_weights.softmax(dim=0)
        mean = (weights * grid).sum(dim=0)
        second, third, fourth = ((weights * (grid - mean) ** k).sum(dim=0) for k in (2, 3, 4))
        return torch.stack((mean, second, third, fourth - 3.0 * second**2))

    def half_width(self, temperature: float) -> Tensor:
        """Return half the widths [d] of symmetric ranges with all but e^-60 of the weight."""
        return self._quadrature(temperature)[0][-1]

    def characteristic_function(self, temperature: float) -> Callable[[Tensor], Tensor]:
        """Return the function from wave numbers k [K, d] to ⟨exp(i k x_i)⟩ [K, d], complex128."""
        grid, log_weights = self._quadrature(temperature)
        # Every twentieth point: still ten or more in a well's standard deviation.
        grid, weights = grid[::20], log_weights[::20].softmax(dim=0)

        def mean_wave(k: Tensor) -> Tensor:
            columns = []
            for column, points, weight in zip(k.T, grid.T, weights.T, strict=True):
                phase = column[:, None] * points
                columns.append(torch.complex(phase.cos() @ weight, phase.sin() @ weight))
            return torch.stack(columns, dim=1)

        return mean_wave

    def _quadrature(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return a symmetric grid [points, d] with all but e^-60 of the weight, and −U/T on it."""
        temperature = _check_temperature(temperature)
        half = self.N_POINTS // 2
        # 0 is a point.
        unit = torch.arange(-half, half + 1, dtype=torch.float64, device="cpu")[:, None] / half
        half_width = torch.full_like(self.a, 1e-3)
        for _ in range(200):
            # On some of the points: their minimum is at most too high, and the range too wide.
            terms = self._terms(unit[::100] * half_width)
            edge = torch.minimum(terms[0], terms[-1]) - terms.amin(dim=0)
            too_short = edge < 60.0 * temperature
            if not too_short.any():
                return unit * half_width, -self._terms(unit * half_width) / temperature
            half_width = torch.where(too_short, 1.25 * half_width, half_width)
        problem = f"no finite range holds the distribution at {temperature}"
        raise ValueError(f"temperature: {problem}; rescale the coefficients")
