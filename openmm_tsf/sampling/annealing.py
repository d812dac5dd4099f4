"""Importance sampling, annealed importance sampling and sequential Monte Carlo, with ln Z.

All three draw from a base measure whose ln Z is known and return weights with respect to
exp(-U/kT), not normalised: their mean estimates Z without bias. What follows from the weights is in
`openmm_tsf.analysis.statistics`: `reverse_ess`, `weighted_mean`, `log_mean_weight`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies
from openmm_tsf.sampling.kernels.base import Kernel
from openmm_tsf.sampling.resampling import ess_fractions, log_means, select_survivors
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_float, check_int, list_items


class BaseMeasure(Protocol):
    """A potential whose Boltzmann distribution can be drawn from and normalised.

    :class:`openmm_tsf.potentials.GaussianWell` is one, and
    :class:`openmm_tsf.potentials.GaussianMixture` at its temperature.
    """

    event_shape: tuple[int, ...]
    boltzmann_constant: float

    def energy(self, x: Tensor) -> Tensor:
        """Return the energies [B] of x [B, *event]."""

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the energies [B] and forces [B, *event] of x [B, *event]."""

    def sample(self, n: int, temperature: float, generator: Generator) -> Tensor:
        """Return independent draws [n, *event] at a temperature."""

    def log_partition_function(self, temperature: float) -> float:
        """Return ln ∫ exp(-U/kT) dx at a temperature."""


class Transport(Protocol):
    """A map that moves particles from one intermediate distribution towards the next.

    :class:`openmm_tsf.flows.Bijector` is one.
    """

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return y = f(u) and log|det df/du| [B]."""


class Interpolation(Potential):
    """U_s = (1 - s) U_base + s U: the geometric path from a base measure to a target.

    Parameters
    ----------
    base, target
        Two potentials of one event shape and Boltzmann constant.
    fraction
        s in (0, 1].

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials import DoubleWell, GaussianWell
    >>> from openmm_tsf.sampling.annealing import Interpolation
    >>> base, target = GaussianWell(torch.eye(1)), DoubleWell(0.0, -2.0, 0.5)
    >>> halfway = Interpolation(base, target, 0.5)
    >>> halfway.energy(torch.ones(1, 1))
    tensor([-0.5000])
    """

    def __init__(self, base: BaseMeasure, target: Potential, fraction: float) -> None:
        _check_pair(base, target)
        self.base, self.target = base, target
        self.fraction = check_float(fraction, "fraction")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction: expected a number in (0, 1], got {fraction!r}")
        self.event_shape = tuple(target.event_shape)
        self.boltzmann_constant = target.boltzmann_constant
        self.n_evaluations = 0

    def energy(self, x: Tensor) -> Tensor:
        """Return the energies [B] of x [B, *event], differentiable if the two potentials are."""
        self.n_evaluations += len(x)
        return _mix(self.base.energy(x), energies.energy(self.target, x), self.fraction)

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the detached energies [B] and forces [B, *event] of x [B, *event]."""
        self.n_evaluations += len(x)
        of_base, base_forces = self.base.energy_and_forces(x)
        of_target, forces = energies.energy_and_forces(self.target, x)
        mixed = _mix(of_base, of_target, self.fraction)
        return mixed, _mix(base_forces, forces, self.fraction)


#: From an intermediate potential and the temperatures (one) to the kernels of a step.
MakeKernels = Callable[[Interpolation, tuple[float, ...]], Sequence[Kernel]]


@dataclass(frozen=True)
class AnnealingSchedule:
    """The path from the base measure to the target, and what happens on it.

    Attributes
    ----------
    fractions
        s of the intermediate distributions exp(-U_s/kT), ascending from above 0 to 1.
    make_kernels
        Makes the exact kernels that move the particles at each of them, in order, from the
        :class:`Interpolation` (whose ``fraction`` is s) and the temperatures; None: no moves.
    transports
        A map for each fraction, or None, that is applied before the weights are computed.
    resample_below
        Particles are resampled where the effective sample size is below this fraction of their
        number; 0: never.

    Examples
    --------
    >>> from openmm_tsf.sampling import AnnealingSchedule
    >>> AnnealingSchedule.linear(4).fractions
    (0.25, 0.5, 0.75, 1.0)
    """

    fractions: tuple[float, ...]
    make_kernels: MakeKernels | None = None
    transports: Sequence[Transport | None] | None = None
    resample_below: float = 0.5

    def __post_init__(self) -> None:
        items = list_items(self.fractions)
        if not items:
            raise ValueError(f"fractions: expected numbers from 0 to 1, got {self.fractions!r}")
        values = tuple(check_float(value, "fractions") for value in items)
        ascending = all(low < high for low, high in zip((0.0, *values), values, strict=False))
        if not ascending or values[-1] != 1.0:
            raise ValueError(f"fractions: expected numbers ascending from 0 to 1, got {values}")
        object.__setattr__(self, "fractions", values)
        if self.transports is not None and len(self.transports) != len(values):
            n = len(self.transports)
            raise ValueError(f"transports: expected {len(values)}, one per fraction, got {n}")
        threshold = check_float(self.resample_below, "resample_below")
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"resample_below: expected a number in [0, 1], got {threshold}")

    @classmethod
    def linear(cls, n_steps: int, **choices: Any) -> "AnnealingSchedule":
        """Return a schedule of equal steps, with the other attributes as given."""
        n = check_int(n_steps, "n_steps")
        return cls(tuple(k / n for k in range(1, n + 1)), **choices)


@dataclass(frozen=True)
class AnnealedSample:
    """Weighted particles of G independent populations of n.

    Attributes
    ----------
    x : Tensor
        [G, n, *event], float64.
    log_weights : Tensor
        ln of weights [G, n] with respect to exp(-U/kT): in each population their mean estimates Z.
    ess : Tensor
        Effective sample size over n [S, G] at each fraction, before resampling.
    resampled : Tensor
        Whether the populations were resampled there [S, G].
    acceptance : dict of str to tuple of float
        Of each kernel, at each fraction.
    n_evaluations : int
        Energies, or energies with forces, of the target.

    Examples
    --------
    The partition function of a double well, from a Gaussian:

    >>> import torch
    >>> from openmm_tsf.analysis.statistics import log_mean_weight
    >>> from openmm_tsf.potentials import DoubleWell, GaussianWell
    >>> from openmm_tsf.sampling import importance_sampling
    >>> base, target = GaussianWell(torch.eye(1)), DoubleWell(0.1, -1.0, 0.5)
    >>> draws = importance_sampling(base, target, 1.0, 5000, torch.Generator().manual_seed(0))
    >>> value, stderr = log_mean_weight(draws.log_weights.flatten())
    >>> abs(value - target.log_partition_function(1.0)) < 3 * stderr
    True
    """

    x: Tensor
    log_weights: Tensor
    ess: Tensor
    resampled: Tensor
    acceptance: dict[str, tuple[float, ...]]
    n_evaluations: int

    @property
    def log_partition(self) -> Tensor:
        """The estimate of ln Z [G] of each population: exp of it is unbiased and independent."""
        return log_means(self.log_weights)


def importance_sampling(
    base: BaseMeasure, potential: Potential, temperature: Any, n: int, generator: Generator
) -> AnnealedSample:
    """Return n independent draws [1, n] of the base measure with their importance weights.

    Parameters
    ----------
    base, potential, temperature, n, generator
        See :func:`sequential_monte_carlo`.
    """
    schedule = AnnealingSchedule((1.0,), resample_below=0.0)
    return sequential_monte_carlo(base, potential, temperature, (1, n), schedule, generator)


def annealed_importance_sampling(
    base: BaseMeasure,
    potential: Potential,
    temperature: Any,
    n: int,
    schedule: AnnealingSchedule,
    generator: Generator,
) -> AnnealedSample:
    """Return n independent particles [1, n] after annealing (Neal 2001), never resampled.

    Parameters
    ----------
    base, potential, temperature, n, schedule, generator
        See :func:`sequential_monte_carlo`; ``schedule.resample_below`` is not used.
    """
    alone = replace(schedule, resample_below=0.0)
    return sequential_monte_carlo(base, potential, temperature, (1, n), alone, generator)


@torch.no_grad()
def sequential_monte_carlo(
    base: BaseMeasure,
    potential: Potential,
    temperature: Any,
    shape: tuple[int, int],
    schedule: AnnealingSchedule,
    generator: Generator,
) -> AnnealedSample:
    """Return annealed populations, resampled where weights degenerate (Del Moral et al. 2006).

    At each fraction s particles are transported, if there is a map, and weighted by the ratio of
    exp(-U_s/kT) to the distribution before, times the map's Jacobian (Arbel et al. 2021);
    resampled systematically where the effective sample size is low; and moved by the kernels, which
    leave exp(-U_s/kT) invariant. The kernels of the last fraction act after the last weights.

    Parameters
    ----------
    base, potential, temperature
        Where particles start, the target, and the temperature of both.
    shape
        G and n: numbers of populations and of particles in each. Only populations are independent
        of each other: the error of ln Z is that of ``log_mean_weight(result.log_partition)``.
    schedule
        The path, the kernels, transports, and when to resample.
    generator
        Source of all random numbers, on the CPU, where the particles are.

    Raises
    ------
    ValueError
        If a kernel is not exact, or all particles of a population have weight zero.
    """
    _check_pair(base, potential)
    kelvin = as_temperature(temperature)
    n_populations, n = (check_int(size, "shape") for size in shape)
    size = n_populations * n
    if generator.device.type != "cpu":
        raise ValueError(f"generator: expected one of the CPU, got one of {generator.device}")
    kt = potential.boltzmann_constant * kelvin
    x = base.sample(size, kelvin, generator).to(torch.float64)
    if x.shape[1:] != tuple(potential.event_shape):
        raise ValueError(f"base: expected draws {potential.event_shape}, got {tuple(x.shape[1:])}")
    base_energy, energy = base.energy(x), energies.energy(potential, x)
    n_evaluations, previous = size, 0.0
    log_weights = x.new_full((n_populations, n), base.log_partition_function(kelvin))
    ess, resampled, acceptance = [], [], dict[str, list[float]]()

    for step, fraction in enumerate(schedule.fractions):
        before, log_det = _mix(base_energy, energy, previous) / kt, x.new_zeros(size)
        transport = None if schedule.transports is None else schedule.transports[step]
        if transport is not None:
            x, log_det = transport.forward_and_log_det(x)
            base_energy, energy = base.energy(x), energies.energy(potential, x)
            n_evaluations += size
        gain = before - _mix(base_energy, energy, fraction) / kt + log_det
        # -inf - -inf is not a number: a weight of zero stays zero.
        gain = gain.reshape(n_populations, n).masked_fill(log_weights.isneginf(), 0.0)
        log_weights = log_weights + gain
        _check_weights(log_weights, fraction)
        ess.append(ess_fractions(log_weights))
        chosen = ess[-1] < schedule.resample_below
        rows, log_weights = select_survivors(log_weights, chosen, generator)
        resampled.append(chosen)
        x, base_energy, energy = x[rows], base_energy[rows], energy[rows]
        if schedule.make_kernels is not None:
            bridge = Interpolation(base, potential, fraction)
            kernels = schedule.make_kernels(bridge, (kelvin,))
            x, rates = _move(kernels, x, _mix(base_energy, energy, fraction), generator)
            for name, rate in rates.items():
                acceptance.setdefault(name, []).append(rate)
            n_evaluations += bridge.n_evaluations
            if step + 1 < len(schedule.fractions):
                base_energy, energy = base.energy(x), energies.energy(potential, x)
                n_evaluations += size
        previous = fraction
    return AnnealedSample(
        x=x.reshape(n_populations, n, *x.shape[1:]),
        log_weights=log_weights,
        ess=torch.stack(ess),
        resampled=torch.stack(resampled),
        acceptance={name: tuple(rates) for name, rates in acceptance.items()},
        n_evaluations=n_evaluations,
    )


def _check_pair(base: BaseMeasure, target: Potential) -> None:
    if tuple(base.event_shape) != tuple(target.event_shape):
        shapes = f"{tuple(target.event_shape)}, got {tuple(base.event_shape)}"
        raise ValueError(f"base: expected configurations of shape {shapes}")
    if base.boltzmann_constant != target.boltzmann_constant:
        constants = f"{target.boltzmann_constant}, got {base.boltzmann_constant}"
        raise ValueError(f"base: expected the target's Boltzmann constant {constants}")


def _mix(of_base: Tensor, of_target: Tensor, fraction: float) -> Tensor:
    """Return (1 - s) of_base + s of_target; that of the base alone at s = 0."""
    if fraction == 0.0:  # not 0 * inf, where a draw of the base has no finite energy
        return of_base
    return (1.0 - fraction) * of_base + fraction * of_target


def _check_weights(log_weights: Tensor, fraction: float) -> None:
    if bool(log_weights.isnan().any() | log_weights.isposinf().any()):
        raise ValueError(f"potential: weights at fraction {fraction:g} are NaN or infinite")
    if bool(log_weights.isneginf().all(dim=1).any()):
        raise ValueError(
            f"potential: all particles of a population have weight zero at fraction {fraction:g}; "
            "more particles or a wider base may help"
        )


def _move(
    kernels: Sequence[Kernel], x: Tensor, energy: Tensor, generator: Generator
) -> tuple[Tensor, dict[str, float]]:
    """Return the particles after the kernels, and the acceptance of each of these."""
    replica = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    state, rates = WalkerState(x[:, None], None, energy[:, None], replica), {}
    for kernel in kernels:
        if not kernel.exact:
            raise ValueError(f"make_kernels: expected exact kernels, got {kernel.name}")
        state, info = kernel(state, generator)
        rates[kernel.name] = float(info.acceptance.mean())
    return state.x[:, 0], rates
