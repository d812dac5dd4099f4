"""The φ⁴ model on a line and on a torus, with Gaussian base measures; exact answers on the line."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from openmm_tsf.potentials.toy import GaussianWell, ModelPotential
from openmm_tsf.potentials.transfer_matrix import ChainMarginals, solve_chain
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_float, check_int, check_positive


class LatticeField(ModelPotential):
    """A field on the sites of a lattice: configurations φ [B, sites].

    Its coupling is stiffness/2 times the sum of squared differences of neighbours, and an integral
    over space gives each site a weight. Both define the Gaussian base measures.
    """

    #: Set by the constructors of subclasses.
    _stiffness: float
    _site_weight: float

    @abstractmethod
    def laplacian(self, x: Tensor) -> Tensor:
        """Return minus the lattice Laplacian of φ [B, sites]: sums of φ_i - φ_j over neighbours."""

    def coupled_gaussian(self, variance: float = 1.0) -> GaussianWell:
        """Return U_B(φ) = coupling + ∫ φ² / (2 variance): the base measure that knows the coupling.

        Its Boltzmann distribution at the temperature of the model is the base measure.
        """
        mass = self._site_weight / check_positive(variance, "variance")
        identity = torch.eye(self.event_shape[0], dtype=torch.float64, device="cpu")
        return GaussianWell(self._stiffness * self.laplacian(identity) + mass * identity)

    def uncoupled_gaussian(self, variance: float = 1.0) -> GaussianWell:
        """Return U_B(φ) = ∫ φ² / (2 variance), in which sites are independent."""
        mass = self._site_weight / check_positive(variance, "variance")
        identity = torch.eye(self.event_shape[0], dtype=torch.float64, device="cpu")
        return GaussianWell(mass * identity)


class PhiFourChain(LatticeField):
    """The φ⁴ model on [0, 1] with φ(0) = φ(1) = 0, on N inner sites of spacing h = 1/(N + 1).

    U(φ) = ∫ [a/2 |∇φ|² + ½(φ² - 1)² + b φ] ds + λ (∫φ ds - m)², with forward differences and
    ∫ = h Σ. At a = 0.02 and T = 0.01 it is the model of Gabrié, Rotskoff and Vanden-Eijnden, PNAS
    119, e2109420119 (2022), who write a = 0.1 and β = 20 with V = (1 - φ²)²/(4a): two states, near
    +1 and -1, that no local move connects. Exact answers are by a transfer matrix with `n_points`
    values of φ at every site.

    Parameters
    ----------
    n_sites
        N.
    stiffness, field
        a > 0 and b.
    restraint, restrained_mean
        λ of at least 0, and m.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials import PhiFourChain
    >>> chain = PhiFourChain(field=0.02)
    >>> chain.event_shape
    (100,)
    >>> mean = chain.mean_field(temperature=0.01)  # both states, of which b favours the lower
    >>> bool(-1.0 < mean < 0.0)
    True
    """

    def __init__(
        self,
        n_sites: int = 100,
        stiffness: float = 0.02,
        field: float = 0.0,
        restraint: float = 0.0,
        restrained_mean: float = 0.0,
    ) -> None:
        super().__init__(check_int(n_sites, "n_sites"))
        self.stiffness = check_positive(stiffness, "stiffness")
        self.field = check_float(field, "field")
        self.restraint = check_float(restraint, "restraint")
        if self.restraint < 0:
            raise ValueError(f"restraint: expected a number of at least 0, got {restraint!r}")
        self.restrained_mean = check_float(restrained_mean, "restrained_mean")
        self.spacing = 1.0 / (self.event_shape[0] + 1)
        self._stiffness, self._site_weight = self.stiffness / self.spacing, self.spacing

    def formula(self, x: Tensor) -> Tensor:
        inner = (x[:, 1:] - x[:, :-1]).square().sum(dim=1)
        bonds = inner + x[:, 0].square() + x[:, -1].square()
        energy = 0.5 * self._stiffness * bonds + self.spacing * self._local(x).sum(dim=1)
        if self.restraint:
            deviation = self.integral(x) - self.restrained_mean
            energy = energy + self.restraint * deviation.square()
        return energy

    def _local(self, x: Tensor) -> Tensor:
        """Return V + b φ, elementwise."""
        return 0.5 * (x * x - 1.0).square() + self.field * x

    def integral(self, x: Tensor) -> Tensor:
        """Return ∫φ ds [B] of φ [B, N]."""
        return self.spacing * x.sum(dim=1)

    def laplacian(self, x: Tensor) -> Tensor:
        """Return 2 φ_i - φ_{i-1} - φ_{i+1} [B, N], with zeros beyond the ends."""
        padded = torch.nn.functional.pad(x, (1, 1))
        return 2.0 * x - padded[:, :-2] - padded[:, 2:]

    def log_partition_function(self, temperature: float, n_points: int = 201) -> float:
        """Return ln Z = ln ∫ exp(-U/T) Π dφ_i."""
        return self._solve(temperature, n_points).log_partition

    def mean_field(self, temperature: float, n_points: int = 201) -> float:
        """Return ⟨∫φ ds⟩."""
        return self.spacing * float(self.moment(1, temperature, n_points).sum())

    def moment(self, order: int, temperature: float, n_points: int = 201) -> Tensor:
        """Return ⟨φ_i^order⟩ [N], float64."""
        marginals = self._solve(temperature, n_points)
        return marginals.probabilities @ marginals.grid ** check_int(order, "order")

    def probability_positive(self, temperature: float, n_points: int = 201) -> Tensor:
        """Return P(φ_i > 0) [N], float64; `n_points` should be odd.

        The free-energy difference of the two states is ln[P/(1 - P)] of the site in the middle.
        """
        marginals = self._solve(temperature, n_points)
        return marginals.probabilities @ (0.5 * (1.0 + marginals.grid.sign()))

    def _solve(self, temperature: float, n_points: int) -> ChainMarginals:
        temperature = as_temperature(temperature)
        half_width = self._half_width(temperature)
        # Not by linspace, so that 0 is a point where the number of points is odd.
        steps = torch.arange(check_int(n_points, "n_points", 3), dtype=torch.float64, device="cpu")
        grid = half_width * (2.0 * steps - steps[-1]) / steps[-1]
        waves, coefficients = self._waves(temperature, half_width)
        return solve_chain(
            grid,
            -self.spacing * self._local(grid) / temperature,
            self._stiffness / temperature,
            self.event_shape[0],
            waves,
            coefficients,
        )

    def _half_width(self, temperature: float) -> float:
        """Return half the width of a symmetric range with all but e^-60 of a site's weight."""
        unit = torch.linspace(-1.0, 1.0, 201, dtype=torch.float64, device="cpu")
        half_width = 1.0
        while True:
            local = self.spacing * self._local(unit * half_width) / temperature
            if min(local[0], local[-1]) > local.min() + 60.0:
                return half_width
            half_width *= 1.1

    def _waves(self, temperature: float, half_width: float) -> tuple[Tensor, Tensor]:
        """Return wave numbers and coefficients whose sum over Σφ is the weight of the restraint.

        exp[-(λ/T)(M - m)²] = √(T/4πλ) ∫ dk exp[-k²T/4λ + i k (M - m)], by the trapezium rule.
        """
        if not self.restraint:
            zero = torch.zeros(1, dtype=torch.float64, device="cpu")
            return zero, torch.complex(zero + 1.0, zero)
        ratio = self.restraint / temperature
        # Images of the Gaussian, one period apart, have weights below e^-40.
        period = half_width + abs(self.restrained_mean) + math.sqrt(40.0 / ratio)
        spacing = 2.0 * math.pi / period
        n = math.ceil(math.sqrt(160.0 * ratio) / spacing) + 1
        k = spacing * torch.arange(n, dtype=torch.float64, device="cpu")
        size = 2.0 * spacing / math.sqrt(4.0 * math.pi * ratio) * torch.exp(-k * k / (4.0 * ratio))
        size[0] *= 0.5  # k and -k are complex conjugates of each other
        return k * self.spacing, torch.polar(size, -k * self.restrained_mean)


class PhiFourTorus(LatticeField):
    """The φ⁴ model on an L × L lattice with periodic boundaries; configurations [B, L²].

    U(φ) = Σ_i -β(φ_{i+e1} φ_i + φ_{i+e2} φ_i) + φ_i² + λ(φ_i² - 1)², at T = 1 the action of Del
    Debbio, Rossney and Wilson, Phys. Rev. D 104, 094507 (2021). Site (r, c) is number r L + c. At
    λ = 0 it is Gaussian: ``coupled_gaussian(1 / (2 - 4 β))``.

    Parameters
    ----------
    size
        L.
    coupling, quartic
        β and λ: λ > 0, or λ = 0 and \\|β\\| < 1/2.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials import PhiFourTorus
    >>> torus = PhiFourTorus(size=4, coupling=0.5, quartic=0.5)
    >>> torus.energy(torch.ones(1, 16))  # 16 (-2 β + 1)
    tensor([0.])
    """

    def __init__(self, size: int, coupling: float, quartic: float) -> None:
        self.size = check_int(size, "size", least=2)
        super().__init__(self.size**2)
        self.coupling = check_float(coupling, "coupling")
        self.quartic = check_float(quartic, "quartic")
        if not (self.quartic > 0 or (self.quartic == 0 and abs(self.coupling) < 0.5)):
            raise ValueError(
                "coupling, quartic: expected λ > 0, or λ = 0 and |β| < 1/2, got "
                f"{self.coupling} and {self.quartic}"
            )
        self._stiffness, self._site_weight = self.coupling, 1.0

    def formula(self, x: Tensor) -> Tensor:
        lattice = self.lattice(x)
        neighbours = lattice.roll(-1, dims=1) + lattice.roll(-1, dims=2)
        squared = lattice * lattice
        terms = squared - self.coupling * neighbours * lattice
        return (terms + self.quartic * (squared - 1.0).square()).sum(dim=(1, 2))

    def lattice(self, x: Tensor) -> Tensor:
        """Return φ [B, L, L] of configurations [B, L²]."""
        return x.reshape(-1, self.size, self.size)

    def laplacian(self, x: Tensor) -> Tensor:
        """Return the sum of φ_i - φ_j over the four neighbours j of each site [B, L²]."""
        lattice = self.lattice(x)
        near = sum(lattice.roll(shift, dims=dim) for shift in (-1, 1) for dim in (1, 2))
        return (4.0 * lattice - near).reshape(len(x), -1)
