"""What kernels of dynamics share: thermostat, velocities, domain, accept or reject."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from openmm_tsf.coordinates.constraints import MEASURES, Constraints
from openmm_tsf.metropolis import InvalidWalker, metropolis
from openmm_tsf.sampling.kernels.base import RungKernel, SteerableMap, check_flow, check_name
from openmm_tsf.sampling.kernels.rattle import REVERSIBLE, Rattle
from openmm_tsf.sampling.state import KernelInfo, WalkerState, per_rung
from openmm_tsf.units import AMU, PER_PICOSECOND, PICOSECOND, as_array, in_unit
from openmm_tsf.utils.deferred import as_count, check_flag
from openmm_tsf.utils.validation import (
    check_bool,
    check_choice,
    check_float,
    check_instance,
    check_int,
    check_positive,
)


class PotentialConstants(Protocol):
    """What a kernel of dynamics needs of its potential besides the trajectory."""

    event_shape: tuple[int, ...]
    boltzmann_constant: float


def mass_per_coordinate(masses: Any, event_shape: Sequence[int]) -> Tensor:
    """Return masses [event_shape[0], 1, ...], float64, to multiply configurations [B, *event]."""
    values = torch.from_numpy(as_array(masses, AMU, "masses")).clone()
    if values.ndim == 0 and len(event_shape) == 1:
        values = values.expand(event_shape[0]).clone()
    if values.shape != event_shape[:1] or not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(
            f"masses: expected {event_shape[0]} positive masses, one for each "
            f"{'coordinate (or one number)' if len(event_shape) == 1 else 'atom'}, got {masses!r}"
        )
    return values.reshape(-1, *(1,) * (len(event_shape) - 1))


def _same_constraints(
    flow: SteerableMap | None, constraints: Constraints | None, measure: str | None
) -> tuple[Constraints | None, str]:
    """Return a copy of the constraints in float64, and the measure: those of the flow, if given."""
    check_instance(constraints, "constraints", Constraints)
    layer = None if flow is None else flow.coordinates
    of_flow: Constraints | None = getattr(layer, "constraints", None)
    if constraints is None:
        constraints = of_flow
    elif layer is not None and not constraints.is_same_as(of_flow):
        n = 0 if of_flow is None else of_flow.n_constraints
        raise ValueError(f"constraints: expected the {n} of the flow's coordinates, got others")
    if measure is not None:
        measure = check_choice(measure, "measure", MEASURES)
    if of_flow is not None:
        expected = str(getattr(layer, "measure", MEASURES[0]))
        if measure not in (None, expected):
            raise ValueError(f"measure: expected that of the flow, {expected!r}, got {measure!r}")
        measure = expected
    copied = None
    if constraints is not None and constraints.n_constraints:
        copied = Constraints.from_config(constraints.to_config(), constraints.n_atoms)
    return copied, measure or MEASURES[0]


class DynamicsKernel(RungKernel, ABC):
    """A trajectory for every walker at the temperature of its rung, accepted or rejected.

    A subclass says how velocities are refreshed before and after (:meth:`refresh_before`,
    :meth:`refresh_after`; each must leave the Maxwell-Boltzmann distribution invariant) and how the
    trajectory runs (:meth:`propagate`; reversible and volume-preserving where it is metropolised).
    The end is accepted with probability min(1, exp(-dH/kT)), H the total energy; a rejected walker
    keeps its positions and reverses its velocities, which makes the kernel its own reverse
    (Horowitz 1991). Ends of non-finite energy or outside the domain of the flow (mirror images in
    particular) are rejected and counted whether or not trajectories are metropolised.

    With `constraints` trajectories stay on their manifold (RATTLE); those that cannot be followed
    reversibly are rejected and counted. The target density, with respect to
    prod_i delta(r_i - d_i) dx, is that of constrained dynamics, exp(-U/kT) |Z|^(1/2)
    (:class:`openmm_tsf.coordinates.constraints.Constraints`), or exp(-U/kT) alone, for which
    trajectories are accepted with kT/2 ln|Z| as a part of the energy. The velocities that walkers
    carry are Maxwell-Boltzmann distributed in all directions, whatever the positions, so that
    kernels which change positions alone may leave them; a trajectory takes their projection onto
    the tangent space, and afterwards the other components are drawn anew.

    Parameters
    ----------
    potential, temperatures
        The energy, with n_steps + 1 evaluations a walker and rung, and the ladder in K.
    masses
        [N] amu (or a Quantity) for molecules; [d] or one number for potentials on R^d.
    flow
        Its domain is the walkers' domain; None to allow every configuration.
    n_steps, metropolized
        The number of steps of a trajectory; whether it is rejected by its energy error.
    name
        The name in counts and summaries.
    constraints
        The molecule's constraints, by default those of the flow's coordinates, if there are any.
        `masses` are theirs, which enter the density.
    measure
        With constraints, ``"rigid"``: exp(-U/kT) |Z|^(1/2), or ``"stiff"``: exp(-U/kT), only with
        `metropolized`; by default that of the flow's coordinates, ``"rigid"`` without a flow.
    """

    def __init__(
        self,
        potential: PotentialConstants,
        temperatures: Any,
        masses: Any,
        flow: SteerableMap | None,
        n_steps: int,
        metropolized: bool,
        name: str,
        constraints: Constraints | None = None,
        measure: str | None = None,
    ) -> None:
        if flow is not None:
            check_flow(flow)
        super().__init__(temperatures, potential.boltzmann_constant)
        self.flow, self.name = flow, check_name(name)
        self.n_steps = check_int(n_steps, "n_steps")
        self.metropolized = check_bool(metropolized, "metropolized")
        self._event_shape = tuple(potential.event_shape)
        self._mass = mass_per_coordinate(masses, self._event_shape)
        self.constraints, self.measure = _same_constraints(flow, constraints, measure)
        self.rattle = None
        if self.constraints is not None:
            self._check_constraints(self.constraints)
            self.rattle = Rattle(self.constraints)

    def _check_constraints(self, constraints: Constraints) -> None:
        """Refuse constraints of other masses, and a target that is not reached."""
        if self._event_shape != (constraints.n_atoms, 3):
            n = constraints.n_atoms
            raise ValueError(f"constraints: expected {self._event_shape[0]} atoms, got {n}")
        atoms, inverse = constraints.pairs.unique().cpu(), constraints.inverse_masses.cpu()
        own, given = 1 / inverse[atoms].double(), self.masses[atoms]
        if not torch.allclose(own, given, rtol=1e-9, atol=0.0):
            atom = int(atoms[(own - given).abs().argmax()])
            raise ValueError(
                "masses: expected those of the constraints, which enter the density, got "
                f"{float(self.masses[atom]):.6g} amu for atom {atom}, which has "
                f"{1 / float(inverse[atom]):.6g}"
            )
        if self.measure == "stiff" and not self.metropolized:
            raise ValueError(
                "measure: expected 'rigid' for trajectories that are not metropolised, got 'stiff'"
            )

    def constraint_settings(self) -> dict[str, Any]:
        """Return the choices about constraints; nothing where there are none."""
        if self.constraints is None:
            return {}
        return {"n_constraints": self.constraints.n_constraints, "measure": self.measure}

    @property
    def masses(self) -> Tensor:
        """The masses in amu, [N] of atoms or [d] of coordinates."""
        return self._mass.flatten()

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the choices made."""

    @property
    def exact(self) -> bool:
        """Whether there is no time-step error."""
        return self.metropolized

    @property
    def n_evaluations(self) -> int:
        """The number of energies, or energies with forces, of a trajectory."""
        return self.n_steps + 1

    @property
    def needs_velocities(self) -> bool:
        """Whether walkers must have velocities."""
        return True

    def _start(self, state: WalkerState) -> Tensor:
        """Return the velocities [B, *event] before the first refreshment."""
        if state.velocities is None and self.needs_velocities:
            raise ValueError(f"state: {self.name} expects walkers with velocities, got None")
        v = torch.zeros_like(state.x) if state.velocities is None else state.velocities
        return v.flatten(0, 1)

    @abstractmethod
    def refresh_before(self, v: Tensor, kt: Tensor, generator: Generator) -> Tensor:
        """Return velocities [B, *event] refreshed before the trajectory, at kT [B]."""

    @abstractmethod
    def refresh_after(self, v: Tensor, kt: Tensor, generator: Generator) -> Tensor:
        """Return velocities [B, *event] refreshed after the trajectory, at kT [B]."""

    @abstractmethod
    def propagate(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions, velocities and energies [B] after the steps.

        Energies are +inf where the steps failed, NaN where constraints were not reversible.
        """

    def trajectory(
        self, x: Tensor, v: Tensor, kt: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what :meth:`propagate` does; overridden by trajectories with noise at kT [B]."""
        return self.propagate(x, v)

    def __call__(self, state: WalkerState, generator: Generator) -> tuple[WalkerState, KernelInfo]:
        """Propagate every walker, and accept or reject."""
        shape = state.energy.shape
        x, energy = state.x.flatten(0, 1), state.energy.flatten()
        kt = self.on_device("kt", x.device).repeat(shape[0])
        v = self.refresh_before(self._start(state), kt, generator)
        if self.rattle is not None:
            self._check_walkers(x)
            v = self.rattle.project(v, self.rattle.locate(x))
        x_end, v_end, u_end = self.trajectory(x, v, kt, generator)

        non_finite, outside, mirror = self._forbidden(x_end, u_end)
        allowed = ~(non_finite | outside | mirror)
        before = -(energy + self.kinetic_energy(v)) / kt
        after = -(u_end + self.kinetic_energy(v_end)) / kt
        if self.constraints is not None and self.measure == "stiff":
            constraints = self.constraints.to(x.device)
            before = before - constraints.half_log_metric(x)
            after = after - constraints.half_log_metric(x_end)
        after = torch.where(allowed, after, -torch.inf)
        accepted, _ = metropolis(before, after, generator)
        if not self.metropolized:
            accepted = allowed
        taken = self.as_column(accepted)
        x_new = torch.where(taken, x_end, x)
        v = self.refresh_after(torch.where(taken, v_end, -v), kt, generator)
        if self.rattle is not None and state.velocities is not None:
            noise = self.ornstein_uhlenbeck(v, self.velocity_width(kt), 0.0, generator)
            v = noise + self.rattle.project(v - noise, self.rattle.locate(x_new))
        not_reversible = 0 if self.rattle is None else as_count(u_end.isnan().sum())
        info = KernelInfo(
            *per_rung(accepted.reshape(shape), shape[0]),
            rejected_non_finite=as_count((non_finite | outside).sum()),
            mirror_images=as_count(mirror.sum()),
            n_evaluations=len(x) * self.n_evaluations,
            outside_domain=as_count(outside.sum()),
            not_reversible=not_reversible,
        )
        new = state.evolve(
            x=x_new.reshape(state.x.shape),
            velocities=None if state.velocities is None else v.reshape(state.x.shape),
            energy=torch.where(accepted, u_end, energy).reshape(shape),
        )
        return new, info

    def _check_walkers(self, x: Tensor) -> None:
        """Refuse walkers x [B, N, 3] that are off their constraints: they would never move."""
        assert self.constraints is not None
        worst = self.constraints.to(x.device).deviations(x).abs().amax()

        def refuse() -> None:
            raise InvalidWalker(
                f"state: expected walkers on their constraints to {REVERSIBLE:g} nm, got one that "
                f"is off by {float(worst):.3g} nm; Constraints.project moves them there"
            )

        check_flag(~(worst <= REVERSIBLE), refuse)

    @torch.no_grad()
    def _forbidden(self, x: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which rows [B] have no finite energy, leave the domain, are mirror images."""
        non_finite = ~torch.isfinite(energy)
        outside, mirror = torch.zeros_like(non_finite), torch.zeros_like(non_finite)
        if self.flow is not None:
            ends = x.to(self.flow.dtype)
            mirror = self.flow.is_mirror_image(ends) & ~non_finite
            outside = ~self.flow.is_in_domain(ends) & ~mirror & ~non_finite
        return non_finite, outside, mirror

    def as_column(self, values: Tensor) -> Tensor:
        """Return values [B] as [B, 1, ...], to multiply configurations [B, *event]."""
        return values.reshape(-1, *(1,) * len(self._event_shape))

    def velocity_width(self, kt: Tensor) -> Tensor:
        """Return standard deviations of velocities at kT [B]: [B, N, 1] or [B, d]."""
        return (self.as_column(kt) / self.on_device("_mass", kt.device)).sqrt()

    def ornstein_uhlenbeck(
        self, v: Tensor, width: Tensor, keep: float, generator: Generator
    ) -> Tensor:
        """Return keep * v + sqrt(1 - keep^2) * width * noise, the exact Ornstein-Uhlenbeck step."""
        # On the generator's device: velocities may be where the potential is, the walkers not.
        device = generator.device
        noise = torch.randn(v.shape, generator=generator, dtype=v.dtype, device=device).to(v.device)
        return keep * v + math.sqrt(1 - keep**2) * width * noise

    def kinetic_energy(self, v: Tensor) -> Tensor:
        """Return the kinetic energies [B] of velocities [B, *event]."""
        return 0.5 * (self.on_device("_mass", v.device) * v.square()).flatten(1).sum(dim=1)


class LangevinKernel(DynamicsKernel):
    """O V^n O: half of the thermostat, n steps of velocity Verlet, the other half.

    Either half is the exact Ornstein-Uhlenbeck process over half of the trajectory's time (Bussi
    and Parrinello 2007; generalised hybrid Monte Carlo, Horowitz 1991).

    Parameters
    ----------
    potential, temperatures, masses, flow, n_steps, metropolized, name, constraints, measure
        See :class:`DynamicsKernel`.
    timestep, friction
        ps, 1/ps (or Quantities).
    """

    def __init__(
        self,
        potential: PotentialConstants,
        temperatures: Any,
        masses: Any,
        flow: SteerableMap | None,
        n_steps: int,
        timestep: Any,
        friction: Any,
        metropolized: bool,
        name: str,
        constraints: Constraints | None = None,
        measure: str | None = None,
    ) -> None:
        parts = (potential, temperatures, masses, flow, n_steps, metropolized, name)
        super().__init__(*parts, constraints, measure)
        self.timestep = check_positive(in_unit(timestep, PICOSECOND, "timestep"), "timestep")
        self.friction = check_float(in_unit(friction, PER_PICOSECOND, "friction"), "friction")
        if not self.friction >= 0:
            raise ValueError(f"friction: expected a non-negative rate in 1/ps, got {friction!r}")
        self._keep = math.exp(-self.friction * self.timestep * self.n_steps / 2)

    def settings(self) -> dict[str, Any]:
        """Return the choices made, the same whichever program integrates."""
        return {
            "kernel": "Langevin",
            "integrator": "O Verlet^n O",
            "n_steps": self.n_steps,
            "timestep_ps": self.timestep,
            "friction_per_ps": self.friction,
            "metropolized": self.metropolized,
            "time_step_error": None if self.metropolized else "O(dt^2)",
            **self.constraint_settings(),
        }

    def refresh_before(self, v: Tensor, kt: Tensor, generator: Generator) -> Tensor:
        """Apply half of the thermostat."""
        return self.ornstein_uhlenbeck(v, self.velocity_width(kt), self._keep, generator)

    refresh_after = refresh_before
