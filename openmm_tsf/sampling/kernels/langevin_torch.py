"""Langevin dynamics and velocity Verlet in torch: one batch of all walkers, any potential."""

import math
from typing import Any

import torch
from torch import Generator, Tensor

from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.potentials.base import HasSinglePrecision, Potential
from openmm_tsf.sampling.energies import (
    device_of,
    energy,
    energy_and_forces,
    single_precision_forces,
)
from openmm_tsf.sampling.kernels.base import SteerableMap
from openmm_tsf.sampling.kernels.dynamics import LangevinKernel
from openmm_tsf.sampling.kernels.rattle import Rattle
from openmm_tsf.utils.threads import share_rows
from openmm_tsf.utils.validation import check_bool, check_choice

INTEGRATORS = ("verlet", "baoab")
#: Fewer rows would not be worth a thread.
_ROWS_OF_A_THREAD = 48


class Trajectory:
    """Positions, velocities, energies and forces of a batch during integration.

    A row whose energy is not finite stops at its last finite position: the batch keeps its shape,
    so that a compiled potential is not compiled again. It stays on the potential's device until the
    end, in the dtype of `x`: a potential in float32 does not round the trajectory. With
    `single_precision` forces are computed in float32, and the energy of the end is not. With
    `rattle` it stays on the manifold of its constraints, with tangent velocities, and a row whose
    constraints cannot be solved reversibly stops, too.
    """

    def __init__(
        self,
        potential: Potential,
        x: Tensor,
        v: Tensor,
        mass: Tensor,
        timestep: Tensor | float,
        single_precision: bool = False,
        rattle: Rattle | None = None,
    ) -> None:
        self._potential, self._device, self._rattle = potential, x.device, rattle
        self._single = single_precision
        self._forces = single_precision_forces if single_precision else energy_and_forces
        self._timestep = timestep
        self._half_step = (0.5 * timestep / mass).to(device_of(potential, x))
        if isinstance(timestep, Tensor):
            self._timestep = timestep.to(self._half_step.device)
        self.x, self.v = x.to(self._half_step.device), v.to(self._half_step.device)
        self._last = self.x
        self._running = torch.ones(len(x), dtype=torch.bool, device=self.x.device)
        self._solved = self._running
        if rattle is not None:
            self._place = rattle.locate(self.x)
        self.evaluate()

    def kick(self) -> None:
        """Advance the velocities by half a step."""
        self.v = self.v + self._half_step * self.force
        self.constrain_velocities()

    def constrain_velocities(self) -> None:
        """Remove what velocities have along the constraints, if there are any."""
        if self._rattle is not None:
            self.v = self._rattle.project(self.v, self._place)

    def drift(self, fraction: float = 1.0) -> None:
        """Advance the positions by a step, or a fraction of one."""
        if self._rattle is None:
            self.x = self.x + (fraction * self._timestep) * self.v
            return
        step = self._rattle.step(self.x, self.v, self._place, fraction * self._timestep)
        self.x, self.v, self._place, solved = step
        self._solved = self._solved & (solved | ~self._running)
        self._running = self._running & solved

    def evaluate(self) -> None:
        """Compute energies and forces at the present positions; stop rows that fail."""
        self.energy, self.force = self._forces(self._potential, self.x)
        self._running = self._running & self.energy.isfinite()
        if self.x.device.type != "cpu" or not bool(self._running.all()):
            running = self._running.reshape(-1, *(1,) * (self.x.ndim - 1))
            self.x = torch.where(running, self.x, self._last)
            self.v = torch.where(running, self.v, 0.0)
            self.force = torch.where(running, self.force, 0.0)
        self._last = self.x

    def end(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, v and energies [B] on the device that x came from.

        The energy is +inf where a row failed, NaN where its constraints were not solved.
        """
        if self._single:
            with torch.no_grad():
                self.energy = energy(self._potential, self.x)
            self._running = self._running & self.energy.isfinite()
        finite = self._running & self.v.isfinite().flatten(1).all(dim=1)
        end = torch.where(finite, self.energy, torch.inf).masked_fill(~self._solved, torch.nan)
        return self.x.to(self._device), self.v.to(self._device), end.to(self._device)


def velocity_verlet(
    potential: Potential,
    x: Tensor,
    v: Tensor,
    mass: Tensor,
    timestep: Tensor | float,
    n_steps: int,
    single_precision: bool = False,
    rattle: Rattle | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate a batch by n steps of velocity Verlet: n + 1 evaluations a row.

    With forces in `single_precision` one more, the energy of the end. With `rattle` the steps are
    those of RATTLE (Andersen 1983), from tangent velocities.

    Reversible and volume-preserving; the energy error is of order dt^2 (Swope et al. 1982).
    """
    batch = Trajectory(potential, x, v, mass, timestep, single_precision, rattle)
    for _ in range(n_steps):
        batch.kick()
        batch.drift()
        batch.evaluate()
        batch.kick()
    return batch.end()


class TorchLangevin(LangevinKernel):
    """n steps of Langevin dynamics for every walker at the temperature of its rung, as one batch.

    The same dynamics as :class:`openmm_tsf.sampling.kernels.langevin_openmm.OpenMMLangevin`, for
    any potential with ``energy_and_forces``. ``integrator="verlet"`` is O V^n O, metropolised by
    default. ``integrator="baoab"`` (Leimkuhler and Matthews 2013) has a thermostat in every step;
    its positions are those of OpenMM's ``LangevinMiddleIntegrator`` given the same noise, its
    velocities half a step ahead. It is never metropolised: averages have an error of order dt^2.

    Parameters
    ----------
    potential, temperatures, masses, flow, n_steps, timestep, friction, name, constraints, measure
        See :class:`openmm_tsf.sampling.kernels.dynamics.LangevinKernel`.
    metropolized, integrator
        Accept or reject by the energy error, by default with ``"verlet"``; that or ``"baoab"``.
    single_precision
        Compute the forces of a metropolised trajectory in float32, where the potential can
        (:meth:`openmm_tsf.TorchPotential.single_precision_forces`), and the energies that it is
        accepted by as ever: the kernel stays exact.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials.toy import GaussianWell
    >>> from openmm_tsf.sampling.kernels import TorchLangevin
    >>> potential, ladder = GaussianWell(torch.eye(2).double()), (1.0, 2.0)
    >>> langevin = TorchLangevin(potential, ladder, masses=1.0, n_steps=10, timestep=0.1)
    >>> langevin.exact
    True
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
        single_precision: bool = False,
        constraints: Constraints | None = None,
        measure: str | None = None,
    ) -> None:
        integrator = check_choice(integrator, "integrator", INTEGRATORS)
        if integrator == "baoab" and metropolized:
            raise ValueError("metropolized: expected False with integrator='baoab', got True")
        if metropolized is None:
            metropolized = integrator == "verlet"
        super().__init__(
            potential, temperatures, masses, flow, n_steps, timestep, friction, metropolized, name,
            constraints, measure,
        )  # fmt: skip
        self.potential, self.integrator = potential, integrator
        self.single_precision = check_bool(single_precision, "single_precision")
        if self.single_precision and not isinstance(potential, HasSinglePrecision):
            kind = type(potential).__name__
            raise ValueError(f"single_precision: expected False with a {kind}, got True")
        if self.single_precision and not self.metropolized:
            raise ValueError("single_precision: expected False without metropolized, got True")

    @property
    def n_evaluations(self) -> int:
        """The number of energies, or energies with forces, of a trajectory."""
        return super().n_evaluations + self.single_precision

    def settings(self) -> dict[str, Any]:
        """Return the choices made."""
        choices = super().settings()
        if self.integrator == "baoab":
            choices["integrator"] = "BAOAB"
        if self.single_precision:
            choices["forces"] = "float32"
        return choices

    def refresh_before(self, v: Tensor, kt: Tensor, generator: Generator) -> Tensor:
        """Apply half of the thermostat; BAOAB applies it within every step."""
        return v if self.integrator == "baoab" else super().refresh_before(v, kt, generator)

    refresh_after = refresh_before

    def propagate(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the Verlet steps."""
        mass = self.on_device("_mass", x.device)
        numbers = (mass, self.timestep, self.n_steps, self.single_precision, self.rattle)

        def of_rows(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            return velocity_verlet(self.potential, x[rows], v[rows], *numbers)

        # Rows do not know of each other. Others than TorchPotential have threads of their own.
        shared = self.single_precision and device_of(self.potential, x).type == "cpu"
        least = _ROWS_OF_A_THREAD if shared else len(x) + 1
        x_end, v_end, energies = share_rows(of_rows, len(x), least)
        return x_end, v_end, energies

    def trajectory(
        self, x: Tensor, v: Tensor, kt: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the steps of the integrator."""
        if self.integrator == "verlet":
            return self.propagate(x, v)
        keep = math.exp(-self.friction * self.timestep)
        mass = self.on_device("_mass", x.device)
        batch = Trajectory(self.potential, x, v, mass, self.timestep, rattle=self.rattle)
        width = self.velocity_width(kt).to(batch.v.device)
        for _ in range(self.n_steps):
            batch.kick()
            batch.drift(0.5)
            batch.v = self.ornstein_uhlenbeck(batch.v, width, keep, generator)
            batch.constrain_velocities()
            batch.drift(0.5)
            batch.evaluate()
            batch.kick()
        return batch.end()
