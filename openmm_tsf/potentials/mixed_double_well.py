"""Double wells in mixed coordinates: the test system of arXiv:2012.00429, section 3."""

import math
from typing import Self

import torch
from torch import Tensor

from openmm_tsf.potentials.toy import DoubleWell, ModelPotential
from openmm_tsf.utils.random import seeded_generator
from openmm_tsf.utils.validation import check_int


class MixedDoubleWell(ModelPotential):
    """Double wells whose coordinates are mixed, U(x) = U_dw(A x) (arXiv:2012.00429, section 3).

    y = A x are independent, so everything exact about x is made of one-dimensional quadratures in
    y: with B = A⁻¹, x_j = Σ_i B_ji y_i has the product of their characteristic functions and the
    sum of their cumulants.

    Parameters
    ----------
    wells
        U_dw, a potential of independent y.
    mixing
        A [d, d], invertible.

    Raises
    ------
    TypeError
        If `wells` is no DoubleWell, or `mixing` no floating tensor.
    ValueError
        If `mixing` is not [d, d], or singular.
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
        if not isinstance(mixing, Tensor) or not mixing.is_floating_point():
            raise TypeError(
                f"mixing: expected a floating torch.Tensor, got {type(mixing).__name__}"
            )
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
        """A potential with random tilts a and mixing A, after the paper.

        The paper names no constants. b = -2 and c = 1/2 put the wells at ±√2, 2 below the barrier:
        20 kT at T = 0.1, which no local move crosses in a run of any length; 2 kT at T = 1, where
        wells are apart and still joined, so that samples train a flow; 0.2 kT at T = 10, where
        there is nothing to cross. Tilts up to 0.1 set the wells up to 0.1 · 2√2 = 0.28 apart: the
        higher one holds 44 % at T = 1 and still 5.7 % at T = 0.1, so that both count at every
        temperature.

        A = V diag(s) Wᵀ with V, W uniformly random rotations (and reflections), and s geometric
        from 1/√2 to √2: every coordinate mixes all wells, the condition number is 2 in any
        dimension, and volumes stay as they are.

        Parameters
        ----------
        dimension
            d.
        seed
            Seed of a and A.
        """
        dimension = check_int(dimension, "dimension")
        generator = seeded_generator(seed)

        def rotation() -> Tensor:
            noise = torch.randn(dimension, dimension, dtype=torch.float64, generator=generator)
            q, r = torch.linalg.qr(noise)
            return q * r.diagonal().sign()  # without the signs, q would not be uniform

        tilt = torch.rand(dimension, dtype=torch.float64, generator=generator)
        ones = torch.ones(dimension, dtype=torch.float64)
        wells = DoubleWell(cls.TILT * (2.0 * tilt - 1.0), cls.B * ones, cls.C * ones)
        reach = 0.5 * math.log(cls.CONDITION)
        scales = torch.linspace(-reach, reach, dimension, dtype=torch.float64).exp()
        return cls(wells, rotation() * scales @ rotation().T)

    def _formula(self, x: Tensor) -> Tensor:
        return self.wells._formula(self.unmixed(x))

    def unmixed(self, x: Tensor) -> Tensor:
        """y = A x [..., d]."""
        return x @ self.mixing.to(x).T

    def log_partition_function(self, temperature: float) -> float:
        """ln Z = ln ∫ exp(−U/T) dx."""
        return self.wells.log_partition_function(temperature) - self._log_det

    def mean_energy(self, temperature: float) -> float:
        """⟨U⟩."""
        return self.wells.mean_energy(temperature)

    def entropy(self, temperature: float) -> float:
        """⟨U⟩/T + ln Z in k_B: what no model's NLL of equilibrium samples can be below."""
        return self.mean_energy(temperature) / temperature + self.log_partition_function(
            temperature
        )

    def cumulants(self, temperature: float) -> Tensor:
        """The first four cumulants of every x_j: [4, d], float64."""
        orders = zip((1, 2, 3, 4), self.wells.cumulants(temperature), strict=True)
        return torch.stack([self.inverse**order @ of_y for order, of_y in orders])

    def covariance(self, temperature: float) -> Tensor:
        """Covariance of x [d, d], float64."""
        return self.inverse * self.wells.cumulants(temperature)[1] @ self.inverse.T

    def moment(self, order: int, temperature: float) -> Tensor:
        """⟨x_j^order⟩ [d], float64, for orders 1 to 4."""
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
        """Density and cumulative probability of x_j at points x [K], float64.

        By the Fourier series of the density, whose coefficients are the characteristic function.

        Parameters
        ----------
        coordinate
            j.
        x
            Where, any numbers.
        temperature
            T.
        """
        row = self.inverse[coordinate]
        reach = (row.abs() * self.wells.reach(temperature)).sum()  # x_j is between ±reach
        unit = math.pi / reach
        points = x.to("cpu", torch.float64)
        wave = self.wells.characteristic_function(temperature)
        density = torch.full_like(points, 0.5 / float(reach))
        cumulative = 0.5 * (points / reach + 1.0)
        first, weight = 1, torch.ones(1, dtype=torch.float64)
        while weight.abs().max() > 1e-12:  # above what rounding of the phases leaves of zero
            k = unit * torch.arange(first, first + 64, dtype=torch.float64)
            weight = wave(k[:, None] * row).prod(dim=1)
            turn = torch.exp(-1j * k * points[:, None])
            density += (turn @ weight).real / reach
            since = (turn - torch.exp(1j * k * reach)) / (-1j * k)
            cumulative += (since @ weight).real / reach
            first += 64
        beyond = points.abs() > reach  # where the series repeats itself
        density = torch.where(beyond, 0.0, density)
        cumulative = torch.where(beyond, (points > 0).to(points), cumulative)
        return density, cumulative

    def sample(self, n: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Independent samples [n, d] at `temperature`, float64: A⁻¹ y."""
        return self.wells.sample(n, temperature, generator) @ self.inverse.T
