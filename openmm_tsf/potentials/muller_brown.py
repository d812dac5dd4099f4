"""The Müller-Brown potential, three wells in the plane, with exact answers by quadrature."""

from collections.abc import Callable

import torch
from torch import Tensor

from openmm_tsf.potentials.toy import ModelPotential
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_int


class MullerBrown(ModelPotential):
    """The potential of Müller and Brown, Theor. Chim. Acta 53, 75 (1979), on R².

    U = Σ_k A_k exp[a_k (x - x_k)² + b_k (x - x_k)(y - y_k) + c_k (y - y_k)²] with the published
    constants: minima of -146.7 at (-0.558, 1.442), -108.2 at (0.623, 0.028) and -80.8 at
    (-0.050, 0.467), and saddle points of -40.7 and -72.2 between them. k_B = 1.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials import MullerBrown
    >>> potential = MullerBrown()
    >>> energy = potential.energy(torch.tensor([[-0.5582, 1.4417]], dtype=torch.float64))
    >>> round(energy.item(), 1)
    -146.7
    >>> lower = potential.expectation(lambda x: (x[:, 1] > 0.55).double(), temperature=15.0)
    >>> round(lower.item(), 3)
    0.903
    """

    #: Points (odd) of the trapezium rule along each axis.
    N_POINTS = 601

    def __init__(self) -> None:
        super().__init__(2)
        rows = (
            (-200.0, -100.0, -170.0, 15.0),  # A
            (-1.0, -1.0, -6.5, 0.7),  # a
            (0.0, 0.0, 11.0, 0.6),  # b
            (-10.0, -10.0, -6.5, 0.7),  # c
            (1.0, 0.0, -0.5, -1.0),  # x_k
            (0.0, 0.5, 1.5, 1.0),  # y_k
        )
        self.constants = torch.tensor(rows, dtype=torch.float64, device="cpu")

    def formula(self, x: Tensor) -> Tensor:
        height, a, b, c, x_k, y_k = self.on_device("constants", x.device).to(x)
        dx, dy = x[:, :1] - x_k, x[:, 1:] - y_k
        return (height * torch.exp(a * dx * dx + b * dx * dy + c * dy * dy)).sum(dim=1)

    def log_partition_function(self, temperature: float) -> float:
        """Return ln Z = ln ∫ exp(-U/T) dx dy."""
        points, log_weights = self._quadrature(temperature)
        return float(log_weights.logsumexp(dim=0) + 2.0 * _step(points).log())

    def expectation(self, function: Callable[[Tensor], Tensor], temperature: float) -> Tensor:
        """Return the mean of a function of configurations, from x [P, 2] to [P, ...], float64.

        Spectrally accurate for smooth functions; the steps of an indicator cost an error of the
        order of a grid step, some 0.01.
        """
        points, log_weights = self._quadrature(temperature)
        return torch.tensordot(log_weights.softmax(dim=0), function(points), dims=1)

    def mean_energy(self, temperature: float) -> float:
        """Return ⟨U⟩."""
        return float(self.expectation(self.formula, temperature))

    def sample(self, n: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Draw independent samples [n, 2] at `temperature`, float64.

        Grid points are drawn with their quadrature weights and displaced uniformly within a grid
        step. At T = 10 a step is a quarter of the narrowest standard deviation of a well: variances
        are exact to 0.5 %.
        """
        n = check_int(n, "n", least=0)
        points, log_weights = self._quadrature(temperature)
        if n == 0:
            return points[:0]
        weights = log_weights.softmax(dim=0)
        drawn = torch.multinomial(weights, n, replacement=True, generator=generator)
        uniform = torch.rand((n, 2), dtype=torch.float64, generator=generator, device="cpu")
        return points[drawn] + (uniform - 0.5) * _step(points)

    def _quadrature(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return a square grid [P, 2] with all but e^-60 of the weight, and -U/T on it [P]."""
        temperature = as_temperature(temperature)
        half = self.N_POINTS // 2
        unit = torch.arange(-half, half + 1, dtype=torch.float64, device="cpu") / half
        half_width = 1.5
        for _ in range(60):
            coarse = -self.formula(_square(unit[::10] * half_width)) / temperature
            table = coarse.reshape(len(unit[::10]), -1)
            edge = torch.cat((table[0], table[-1], table[:, 0], table[:, -1])).max()
            if edge < coarse.max() - 60.0:
                break
            half_width *= 1.1
        points = _square(unit * half_width)
        log_weights = -self.formula(points) / temperature
        table = log_weights.reshape(self.N_POINTS, self.N_POINTS)
        # Every other point must give the same integral, or the wells are too narrow for the grid.
        change = table[::2, ::2].flatten().logsumexp(0) + torch.log(points.new_tensor(4.0))
        if not abs(float(change - log_weights.logsumexp(0))) < 1e-8:
            raise ValueError(
                f"temperature: expected one whose wells a grid of {self.N_POINTS} points along "
                f"each axis resolves, got {temperature}"
            )
        return points, log_weights


def _square(line: Tensor) -> Tensor:
    """Return the points [n², 2] of a square about (-0.5, 0.75) from offsets along an axis [n]."""
    return torch.cartesian_prod(line - 0.5, line + 0.75)


def _step(points: Tensor) -> Tensor:
    """Return the distance of neighbouring points of a square."""
    return points[1, 1] - points[0, 1]
