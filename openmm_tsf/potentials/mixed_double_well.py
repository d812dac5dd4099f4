"""Double wells in mixed coordinates, the test system of arXiv:2012.00429, section 3."""

import math
from typing import Self

import torch
from torch import Tensor

from openmm_tsf.potentials.toy import DoubleWell, ModelPotential, check_floating
from openmm_tsf.units import KELVIN, in_unit
from openmm_tsf.utils.random import seeded_generator
from openmm_tsf.utils.validation import check_int, check_positive


class MixedDoubleWell(ModelPotential):
    """Double wells whose coordinates are mixed, U(x) = U_dw(A x) (arXiv:2012.00429, section 3).

    The components of y = A x are independent, so that exact thermodynamics of x follow from
    one-dimensional quadratures: with B = A⁻¹, the characteristic function of x_j = Σ_i B_ji y_i
    is the product of those of B_ji y_i, and its cumulants are their sums.

    Parameters
    ----------
    wells
        U_dw, a potential of independent y.
    mixing
        A [d, d], invertible.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials import MixedDoubleWell
    >>> potential = MixedDoubleWell.random(dimension=3, seed=0)
    >>> x = potential.sample(1000, 1.0, torch.Generator().manual_seed(0))
    >>> error = potential.energy(x).mean().item() - potential.mean_energy(1.0)
    >>> abs(error) < 0.2
    True
    """

    #: Quadratic and quartic coefficients that :meth:`random` gives every well.
    B, C = -2.0, 0.5
    #: Tilts are uniform between plus and minus this.
    TILT = 0.1
    #: Ratio of A's largest to its smallest singular value.
    CONDITION = 2.0

    def __init__(self, wells: DoubleWell, mixing: Tensor) -> None:
        if not isinstance(wells, DoubleWell):
            raise TypeError(f"wells: expected a DoubleWell, got {type(wells).__name__}")
        check_floating(mixing, "mixing")
        d = len(wells.a)
        if tuple(mixing.shape) != (d, d):
            raise ValueError(f"mixing: expected shape {(d, d)}, got {tuple(mixing.shape)}")
        super().__init__(d)
        self.wells = wells
        self.mixing = mixing.detach().to("cpu", torch.float64)
        self.inverse, failed = torch.linalg.inv_ex(self.mixing)
        if failed or not self.inverse.isfinite().all():
            raise ValueError("mixing: expected an invertible matrix")
        self._log_det = float(torch.linalg.slogdet(self.mixing).logabsdet)

    @classmethod
    def random(cls, dimension: int, seed: int) -> Self:
        """Return a potential with random tilts a and mixing A, as in the paper.

        The paper gives no constants. b = -2 and c = 1/2 put the wells at ±√2, 2 below the barrier:
        20 kT at T = 0.1, which local moves do not cross in a run of any length; 2 kT at T = 1,
        where they do, so that samples train a flow; 0.2 kT at T = 10. Tilts up to 0.1 give the two
        wells energies that differ by up to 0.1 · 2√2 = 0.28: the population of the higher one is
        44 % at T = 1 and still 5.7 % at T = 0.1, so that both matter at every temperature.

        A = V diag(s) Wᵀ with V, W uniformly random rotations (and reflections), and s geometric
        from 1/√2 to √2: every coordinate mixes all wells, the condition number is 2 in any
        dimension, and volumes are preserved.

        """
        dimension = check_int(dimension, "dimension")
        generator = seeded_generator(seed)

        def rotation() -> Tensor:
            noise = torch.randn(
                dimension, dimension, dtype=torch.float64, generator=generator, device="cpu"
            )
            q, r = torch.linalg.qr(noise)
            return q * r.diagonal().sign()  # without the signs, q would not be uniform

        tilt = torch.rand(dimension, dtype=torch.float64, generator=generator, device="cpu")
        ones = torch.ones(dimension, dtype=torch.float64, device="cpu")
        wells = DoubleWell(cls.TILT * (2.0 * tilt - 1.0), cls.B * ones, cls.C * ones)
        largest = 0.5 * math.log(cls.CONDITION)
        scales = torch.linspace(
            -largest, largest, dimension, dtype=torch.float64, device="cpu"
        ).exp()
        return cls(wells, rotation() * scales @ rotation().T)

    def formula(self, x: Tensor) -> Tensor:
        return self.wells.formula(self.unmixed(x))

    def unmixed(self, x: Tensor) -> Tensor:
        """Return y = A x [..., d]."""
        return x @ self.on_device("mixing", x.device).to(x).T

    def log_partition_function(self, temperature: float) -> float:
        """Return ln Z = ln ∫ exp(−U/T) dx."""
        return self.wells.log_partition_function(temperature) - self._log_det

    def mean_energy(self, temperature: float) -> float:
        """Return ⟨U⟩."""
        return self.wells.mean_energy(temperature)

    def entropy(self, temperature: float) -> float:
        """Return ⟨U⟩/T + ln Z in k_B: no model has a smaller mean NLL on equilibrium samples."""
        kelvin = check_positive(in_unit(temperature, KELVIN, "temperature"), "temperature")
        return self.mean_energy(kelvin) / kelvin + self.log_partition_function(kelvin)

    def cumulants(self, temperature: float) -> Tensor:
        """Return the first four cumulants of every x_j, [4, d], float64."""
        orders = zip((1, 2, 3, 4), self.wells.cumulants(temperature), strict=True)
        return torch.stack([self.inverse**order @ of_y for order, of_y in orders])

    def covariance(self, temperature: float) -> Tensor:
        """Return the covariance of x [d, d], float64."""
        return self.inverse * self.wells.cumulants(temperature)[1] @ self.inverse.T

    def moment(self, order: int, temperature: float) -> Tensor:
        """Return ⟨x_j^order⟩ [d], float64, for orders 1 to 4."""
        if order not in (1, 2, 3, 4):
            raise ValueError(f"order: expected 1, 2, 3 or 4, got {order!r}")
        mean, k2, k3, k4 = self.cumulants(temperature)
        return (
            mean,
            k2 + mean**2,
            k3 + 3.0 * k2 * mean + mean**3,
            k4 + 4.0 * k3 * mean + 3.0 * k2**2 + 6.0 * k2 * mean**2 + mean**4,
        )[order - 1]

    def marginal(self, coordinate: int, x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the density and cumulative probability [K] of x_j at points x [K], float64.

        Both, of j = `coordinate`, are Fourier series of the characteristic function.
        """
        row = self.inverse[coordinate]
        limit = (row.abs() * self.wells.half_width(temperature)).sum()  # x_j is between ±limit
        unit = math.pi / limit
        points = x.to("cpu", torch.float64)
        mean_wave = self.wells.characteristic_function(temperature)
        density = torch.full_like(points, 0.5 / float(limit))
        cumulative = 0.5 * (points / limit + 1.0)
        first, weight = 1, torch.ones(1, dtype=torch.float64, device="cpu")
        while weight.abs().max() > 1e-12:  # above the rounding errors of the phases
            k = unit * torch.arange(first, first + 64, dtype=torch.float64, device="cpu")
            weight = mean_wave(k[:, None] * row).prod(dim=1)
            wave = torch.exp(-1j * k * points[:, None])
            density += (wave @ weight).real / limit
            integral = (wave - torch.exp(1j * k * limit)) / (-1j * k)
            cumulative += (integral @ weight).real / limit
            first += 64
        beyond = points.abs() > limit  # where the series repeats itself
        density = torch.where(beyond, 0.0, density)
        cumulative = torch.where(beyond, (points > 0).to(points), cumulative)
        return density, cumulative

    def sample(self, n: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Draw independent samples A⁻¹ y [n, d] at `temperature`, float64."""
        return self.wells.sample(n, temperature, generator) @ self.inverse.T
