"""Local dynamics in torch: all walkers and rungs step together, on any potential."""

import math
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.energies import device_of, energy_and_forces
from openmm_tsf.sampling.kernels.dynamics import LangevinDynamics
from openmm_tsf.sampling.kernels.flow import SteerableMap

INTEGRATORS = ("verlet", "baoab")


class Trajectory:
    """Positions, velocities, energies and forces of a batch on its way.

    A row whose energy is not finite stops where it was last finite, at rest, until the end: the
    batch keeps its shape, so that a compiled potential is not compiled again. All of it stays on
    the potential's device until the end, in the dtype of `x`: a potential in float32 rounds what it
    is given, not the trajectory.

    Parameters
    ----------
    potential
        The energy, with forces; evaluated once here.
    x, v
        Positions and velocities [B, *event]. They move to the potential's device here.
    mass
        See :func:`openmm_tsf.sampling.kernels.dynamics.mass_per_coordinate`.
    timestep
        One number, or one for every row [B, 1, ...].
    """

    def __init__(
        self, potential: Potential, x: Tensor, v: Tensor, mass: Tensor, timestep: Tensor | float
    ) -> None:
        self._potential, self._home = potential, x.device
        self._timestep = timestep
        self._half_kick = (0.5 * timestep / mass).to(device_of(potential, x))
        if isinstance(timestep, Tensor):
            self._timestep = timestep.to(self._half_kick.device)
        self.x, self.v = x.to(self._half_kick.device), v.to(self._half_kick.device)
        self._last = self.x
        self._alive = torch.ones(len(x), dtype=torch.bool, device=self.x.device)
        self.evaluate()

    def kick(self) -> None:
        """Half a step of the velocities."""
        self.v = self.v + self._half_kick * self.force

    def drift(self, fraction: float = 1.0) -> None:
        """A step of the positions, or a fraction of one."""
        self.x = self.x + (fraction * self._timestep) * self.v

    def evaluate(self) -> None:
        """Energy and force where the rows now are; those that fail stop."""
        self.energy, self.force = energy_and_forces(self._potential, self.x)
        self._alive = self._alive & self.energy.isfinite()
        if not bool(self._alive.all()):
            alive = self._alive.reshape(-1, *(1,) * (self.x.ndim - 1))
            self.x = torch.where(alive, self.x, self._last)
            self.v = torch.where(alive, self.v, 0.0)
            self.force = torch.where(alive, self.force, 0.0)
        self._last = self.x

    def end(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, velocities and energies [B] where they came from; +inf where a row failed."""
        finite = self._alive & self.v.isfinite().flatten(1).all(dim=1)
        energy = torch.where(finite, self.energy, torch.inf)
        return self.x.to(self._home), self.v.to(self._home), energy.to(self._home)


def velocity_verlet(
    potential: Potential,
    x: Tensor,
    v: Tensor,
    mass: Tensor,
    timestep: Tensor | float,
    n_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """n steps of velocity Verlet for a batch: n + 1 evaluations a row.

    Reversible and volume-preserving; the energy error is of order dt^2 (Swope et al. 1982).

    Parameters
    ----------
    potential, x, v, mass, timestep
        See :class:`Trajectory`.
    n_steps
        Number of steps.

    Returns
    -------
    x, v : Tensor
        [B, *event].
    energy : Tensor
        Potential energies [B] at the end; +inf where a row failed on the way.
    """
    batch = Trajectory(potential, x, v, mass, timestep)
    for _ in range(n_steps):
        batch.kick()
        batch.drift()
        batch.evaluate()
        batch.kick()
    return batch.end()


class TorchLangevin(LangevinDynamics):
    """n steps of Langevin dynamics for every walker at its rung's temperature, as one batch.

    The same leg as :class:`openmm_tsf.sampling.kernels.langevin_openmm.OpenMMLangevin`, for any
    potential: only ``energy_and_forces`` is asked of it. ``integrator="verlet"`` is O V^n O,
    metropolised by default. ``integrator="baoab"`` (Leimkuhler and Matthews 2013) has a thermostat
    in every step; its positions are those of OpenMM's ``LangevinMiddleIntegrator`` given the same
    noise, its velocities half a kick ahead. It is never metropolised: averages carry an error of
    order dt^2.

    Parameters
    ----------
    potential
        The energy; n_steps + 1 evaluations a walker.
    temperatures
        The ladder, K.
    masses
        [N] amu for molecules; [d] or one number for potentials on R^d.
    flow
        Its domain is the walkers'; None to allow every configuration.
    n_steps
        Steps a leg.
    timestep
        ps.
    friction
        1/ps.
    metropolized
        Accept or reject by the energy error; by default wherever the integrator allows it.
    integrator
        ``"verlet"`` or ``"baoab"``.

    Raises
    ------
    ValueError
        If a number is out of range, or BAOAB is to be metropolised.
    """

    def __init__(
        self,
        potential: Potential,
        temperatures: Any,
        masses: Any,
        flow: SteerableMap | None = None,
        n_steps: int = 20,
        timestep: Any = 0.001,
        friction: Any = 1.0,
        metropolized: bool | None = None,
        integrator: str = "verlet",
        name: str = "local",
    ) -> None:
        if integrator not in INTEGRATORS:
            raise ValueError(f"integrator: expected one of {INTEGRATORS}, got {integrator!r}")
        if integrator == "baoab" and metropolized:
            raise ValueError("metropolized: expected False with integrator='baoab', got True")
        if metropolized is None:
            metropolized = integrator == "verlet"
        super().__init__(
            potential, temperatures, masses, flow, n_steps, timestep, friction, metropolized, name
        )
        self.potential, self.integrator = potential, integrator

    def settings(self) -> dict[str, Any]:
        """The choices made."""
        choices = super().settings()
        if self.integrator == "baoab":
            choices["integrator"] = "BAOAB"
        return choices

    def _before(self, v: Tensor, kt: Tensor, generator: torch.Generator) -> Tensor:
        return v if self.integrator == "baoab" else super()._before(v, kt, generator)

    def _after(self, v: Tensor, kt: Tensor, generator: torch.Generator) -> Tensor:
        return v if self.integrator == "baoab" else super()._after(v, kt, generator)

    def _propagate(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return velocity_verlet(self.potential, x, v, self._mass, self.timestep, self.n_steps)

    def _trajectory(
        self, x: Tensor, v: Tensor, kt: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.integrator == "verlet":
            return self._propagate(x, v)
        keep = math.exp(-self.friction * self.timestep)
        batch = Trajectory(self.potential, x, v, self._mass, self.timestep)
        width = self._width(kt).to(batch.v.device)
        for _ in range(self.n_steps):
            batch.kick()
            batch.drift(0.5)
            batch.v = self._mix(batch.v, width, keep, generator)
            batch.drift(0.5)
            batch.evaluate()
            batch.kick()
        return batch.end()
