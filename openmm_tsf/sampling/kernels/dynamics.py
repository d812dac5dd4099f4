"""What all legs of dynamics share: thermostat, domain, the one accept rule, velocities."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.sampling.kernels.base import check_flow, kernel_name
from openmm_tsf.sampling.kernels.flow import SteerableMap
from openmm_tsf.sampling.state import KernelInfo, WalkerState, per_rung
from openmm_tsf.units import PICOSECOND, as_temperatures, in_unit
from openmm_tsf.utils.validation import as_float_tensor, check_float, check_int


class LegPotential(Protocol):
    """What a leg itself asks of its potential."""

    event_shape: tuple[int, ...]
    boltzmann_constant: float


def mass_per_coordinate(masses: Any, event_shape: Sequence[int]) -> Tensor:
    """Masses [event_shape[0], 1, ...], float64, to multiply configurations [B, *event].

    Parameters
    ----------
    masses
        One positive number for every atom (events [N, 3]) or coordinate (events [d]); for the
        latter also one number for all.
    event_shape
        Shape of a configuration.

    Raises
    ------
    ValueError
        If numbers are not finite and positive, or not as many.
    """
    values = as_float_tensor(masses, "masses")
    if values.ndim == 0 and len(event_shape) == 1:
        values = values.expand(event_shape[0]).clone()
    if values.shape != event_shape[:1] or not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(
            f"masses: expected {event_shape[0]} positive masses, one for each "
            f"{'coordinate (or one number)' if len(event_shape) == 1 else 'atom'}, got {masses!r}"
        )
    return values.reshape(-1, *(1,) * (len(event_shape) - 1))


class Leg(ABC):
    """A trajectory for every walker at its rung's temperature, accepted or rejected.

    A subclass says how velocities are refreshed before and after (:meth:`_before`,
    :meth:`_after`; each must leave the Maxwell-Boltzmann distribution invariant) and how the
    trajectory runs (:meth:`_propagate`; reversible and volume-preserving where it is metropolised).
    The end is accepted with probability min(1, exp(-dH/kT)), H the total energy; a rejected walker
    keeps its positions and reverses its velocities, which makes the leg its own reverse (Horowitz
    1991). Ends of non-finite energy or outside the flow's domain (the mirror image, first of all)
    are rejected and counted whether or not the leg is metropolised.

    Parameters
    ----------
    potential
        The energy.
    temperatures
        The ladder, K.
    masses
        [N] amu; see :func:`mass_per_coordinate`.
    flow
        Its domain is the walkers'; None to allow every configuration.
    n_steps
        Steps of a trajectory.
    metropolized
        Accept or reject by the energy error.
    name
        Name in counts and summaries.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    def __init__(
        self,
        potential: LegPotential,
        temperatures: Any,
        masses: Any,
        flow: SteerableMap | None,
        n_steps: int,
        metropolized: bool,
        name: str,
    ) -> None:
        if flow is not None:
            check_flow(flow)
        self.flow, self.name = flow, kernel_name(name)
        self.temperatures = as_temperatures(temperatures)
        self.n_steps, self.metropolized = check_int(n_steps, "n_steps"), metropolized
        self._event_shape = tuple(potential.event_shape)
        self._mass = mass_per_coordinate(masses, self._event_shape)
        kelvin = torch.tensor(self.temperatures, dtype=torch.float64)
        self._kt = potential.boltzmann_constant * kelvin

    @property
    def exact(self) -> bool:
        """Whether the leg has no time-step error."""
        return self.metropolized

    @property
    def needs_velocities(self) -> bool:
        """Whether walkers without velocities cannot be served."""
        return True

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """Shape of the counts: one number per rung."""
        return (len(self.temperatures),)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The choices made."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the noise comes from the sampler's generator."""
        return {}

    def load_state_dict(self, content: dict[str, Any]) -> None:  # noqa: B027 (not every leg has some)
        """Nothing to set."""

    def _start(self, state: WalkerState) -> Tensor:
        """Velocities [B, *event] that the leg begins with."""
        if state.velocities is None:
            raise ValueError(f"state: {self.name} expects walkers with velocities, got None")
        return state.velocities.flatten(0, 1)

    @abstractmethod
    def _before(self, v: Tensor, kt: Tensor, generator: torch.Generator) -> Tensor:
        """Velocities [B, *event] refreshed ahead of the trajectory."""

    @abstractmethod
    def _after(self, v: Tensor, kt: Tensor, generator: torch.Generator) -> Tensor:
        """Velocities [B, *event] refreshed after it."""

    @abstractmethod
    def _propagate(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, velocities and energies [B] after the steps; +inf where they failed."""

    def _trajectory(
        self, x: Tensor, v: Tensor, kt: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`_propagate`; for trajectories that are not deterministic."""
        return self._propagate(x, v)

    def __call__(
        self, state: WalkerState, generator: torch.Generator
    ) -> tuple[WalkerState, KernelInfo]:
        """One leg for every walker."""
        shape = state.energy.shape
        x, energy = state.x.flatten(0, 1), state.energy.flatten()
        kt = self._kt.repeat(shape[0])
        v = self._before(self._start(state), kt, generator)
        x_end, v_end, u_end = self._trajectory(x, v, kt, generator)

        non_finite, outside, mirror = self._forbidden(x_end, u_end)
        allowed = ~(non_finite | outside | mirror)
        before = -(energy + self._kinetic(v)) / kt
        after = torch.where(allowed, -(u_end + self._kinetic(v_end)) / kt, -torch.inf)
        accepted, _ = metropolis(before, after, generator)
        if not self.metropolized:
            accepted = allowed
        take = self._column(accepted)
        v = self._after(torch.where(take, v_end, -v), kt, generator)
        info = KernelInfo(
            *per_rung(accepted.reshape(shape), shape[0]),
            rejected_non_finite=int((non_finite | outside).sum()),
            mirror_images=int(mirror.sum()),
            n_evaluations=len(x) * (self.n_steps + 1),
            outside_domain=int(outside.sum()),
        )
        new = state.evolve(
            x=torch.where(take, x_end, x).reshape(state.x.shape),
            velocities=self._stored(state, v),
            energy=torch.where(accepted, u_end, energy).reshape(shape),
        )
        return new, info

    def _stored(self, state: WalkerState, v: Tensor) -> Tensor | None:
        """The walkers' velocities from those [B, *event] at the end."""
        return v.reshape(state.x.shape)

    @torch.no_grad()
    def _forbidden(self, x: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B] of non-finite energy, of the others those outside the domain, mirror images."""
        non_finite = ~torch.isfinite(energy)
        outside, mirror = torch.zeros_like(non_finite), torch.zeros_like(non_finite)
        rows = (~non_finite).nonzero().flatten()
        if self.flow is not None and len(rows):
            ends = x[rows].to(self.flow.dtype)
            mirror[rows] = self.flow.is_mirror_image(ends)
            momenta = ends.new_zeros(len(ends), self.flow.n_momenta)
            _, log_det = self.flow.inverse_and_log_det(ends, momenta)
            outside[rows] = ~torch.isfinite(log_det) & ~mirror[rows]
        return non_finite, outside, mirror

    def _column(self, values: Tensor) -> Tensor:
        """Values [B] as [B, 1, ...], to go with configurations [B, *event]."""
        return values.reshape(-1, *(1,) * len(self._event_shape))

    def _width(self, kt: Tensor) -> Tensor:
        """Standard deviations of velocities at kT [B]: [B, N, 1] or [B, d]."""
        return (self._column(kt) / self._mass).sqrt()

    def _mix(self, v: Tensor, width: Tensor, keep: float, generator: torch.Generator) -> Tensor:
        """keep * v + sqrt(1 - keep^2) * width * noise: the exact Ornstein-Uhlenbeck step."""
        # From the generator's own device: the chain is the same wherever the potential computes.
        noise = torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device)
        return keep * v + math.sqrt(1 - keep**2) * width * noise

    def _kinetic(self, v: Tensor) -> Tensor:
        """Kinetic energies [B]."""
        return 0.5 * (self._mass * v.square()).flatten(1).sum(dim=1)


class LangevinDynamics(Leg):
    """O V^n O: half of the leg's thermostat, n steps of velocity Verlet, the other half.

    Parameters
    ----------
    potential, temperatures, masses, flow, n_steps, metropolized, name
        See :class:`Leg`.
    timestep
        ps.
    friction
        1/ps.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    def __init__(
        self,
        potential: LegPotential,
        temperatures: Any,
        masses: Any,
        flow: SteerableMap | None,
        n_steps: int,
        timestep: Any,
        friction: Any,
        metropolized: bool,
        name: str,
    ) -> None:
        super().__init__(potential, temperatures, masses, flow, n_steps, metropolized, name)
        self.timestep = check_float(in_unit(timestep, PICOSECOND, "timestep"), "timestep")
        self.friction = check_float(in_unit(friction, 1 / PICOSECOND, "friction"), "friction")
        if not self.timestep > 0:
            raise ValueError(f"timestep: expected a positive number of ps, got {timestep!r}")
        if not self.friction >= 0:
            raise ValueError(f"friction: expected a non-negative rate in 1/ps, got {friction!r}")
        self._keep = math.exp(-self.friction * self.timestep * n_steps / 2)

    def settings(self) -> dict[str, Any]:
        """The choices made; the same for the same leg, whoever takes its steps."""
        return {
            "kernel": "Langevin",
            "integrator": "O Verlet^n O",
            "n_steps": self.n_steps,
            "timestep_ps": self.timestep,
            "friction_per_ps": self.friction,
            "metropolized": self.metropolized,
            "time_step_error": None if self.metropolized else "O(dt^2)",
        }

    def _before(self, v: Tensor, kt: Tensor, generator: torch.Generator) -> Tensor:
        return self._mix(v, self._width(kt), self._keep, generator)

    def _after(self, v: Tensor, kt: Tensor, generator: torch.Generator) -> Tensor:
        return self._mix(v, self._width(kt), self._keep, generator)
