"""Hamiltonian and Langevin Monte Carlo in Cartesian coordinates, with real masses."""

from typing import Any

import torch
from torch import Tensor

from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels.dynamics import Leg
from openmm_tsf.sampling.kernels.flow import SteerableMap
from openmm_tsf.sampling.kernels.langevin_torch import velocity_verlet
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.sampling.tuning import step_sizes
from openmm_tsf.units import PICOSECOND, in_unit
from openmm_tsf.utils.validation import check_float


class CartesianHMC(Leg):
    """Hamiltonian Monte Carlo: fresh velocities, a Verlet trajectory, accepted or rejected.

    Velocities become c v + sqrt(1 - c^2) noise, c = `persistence`, with Maxwell-Boltzmann noise of
    the rung's temperature: drawn afresh for c = 0 (Duane et al. 1987), partially refreshed
    otherwise (Horowitz 1991). They are the walkers' own: after the move the state carries those of
    the trajectory's end, or of its beginning reversed where it was rejected. The Boltzmann
    distribution of positions and velocities together is left invariant exactly, at any time step.

    Time steps are per rung, tuned through :class:`openmm_tsf.sampling.tuning.StepSizeTuner` to an
    acceptance of 0.65 (Beskos et al. 2013).

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
        Verlet steps a trajectory.
    timestep
        ps; one number, or one per rung [R].
    persistence
        c, at least 0 and below 1. With 0, walkers without velocities are served too, and stay so.

    Attributes
    ----------
    sigma : Tensor
        Time steps [R] in ps, under the name that all step sizes have.
    target_acceptance : float
        What they are tuned to.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    target_acceptance = 0.65

    def __init__(
        self,
        potential: Potential,
        temperatures: Any,
        masses: Any,
        flow: SteerableMap | None = None,
        n_steps: int = 10,
        timestep: Any = 0.001,
        persistence: float = 0.0,
        name: str = "hmc",
    ) -> None:
        super().__init__(potential, temperatures, masses, flow, n_steps, True, name)
        self.potential = potential
        self.persistence = check_float(persistence, "persistence")
        if not 0 <= self.persistence < 1:
            raise ValueError(f"persistence: expected a number in [0, 1), got {persistence!r}")
        self._sigma = step_sizes(
            in_unit(timestep, PICOSECOND, "timestep"), len(self.temperatures), "timestep"
        )

    @property
    def needs_velocities(self) -> bool:
        """Whether walkers without velocities cannot be served."""
        return self.persistence > 0

    @property
    def sigma(self) -> Tensor:
        """Time steps [R], ps."""
        return self._sigma

    @sigma.setter
    def sigma(self, value: Any) -> None:
        self._sigma = step_sizes(value, len(self.temperatures))

    def settings(self) -> dict[str, Any]:
        """The choices made; tuned time steps are in :meth:`state_dict`."""
        return {
            "kernel": type(self).__name__,
            "integrator": "Verlet^n",
            "n_steps": self.n_steps,
            "persistence": self.persistence,
            "target_acceptance": self.target_acceptance,
        }

    def state_dict(self) -> dict[str, Any]:
        """The time steps."""
        return {"sigma": self._sigma.clone()}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Set the time steps."""
        self.sigma = content["sigma"]

    def _start(self, state: WalkerState) -> Tensor:
        if state.velocities is None and not self.needs_velocities:
            return torch.zeros_like(state.x).flatten(0, 1)
        return super()._start(state)

    def _stored(self, state: WalkerState, v: Tensor) -> Tensor | None:
        return None if state.velocities is None else super()._stored(state, v)

    def _before(self, v: Tensor, kt: Tensor, generator: torch.Generator) -> Tensor:
        return self._mix(v, self._width(kt), self.persistence, generator)

    def _after(self, v: Tensor, kt: Tensor, generator: torch.Generator) -> Tensor:
        return v

    def _propagate(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        timestep = self._column(self._sigma.repeat(len(x) // len(self._sigma)))
        return velocity_verlet(self.potential, x, v, self._mass, timestep, self.n_steps)


class CartesianMALA(CartesianHMC):
    """Metropolis-adjusted Langevin algorithm with the masses as preconditioner.

    x' = x + (h^2 / 2) M^-1 F(x) + h sqrt(kT) M^-1/2 noise (Rossky, Doll and Friedman 1978; Roberts
    and Tweedie 1996), accepted by the ratio of targets and of proposal densities. That is HMC with
    one step h and fresh velocities, and is computed so: the ratio is exp(-dH/kT), and the walkers'
    velocities are those of :class:`CartesianHMC`. In the usual notation the step size is
    epsilon = h sqrt(kT) and the preconditioner M^-1. Target acceptance 0.574 (Roberts and Rosenthal
    1998).

    Parameters
    ----------
    potential, temperatures, masses, flow, timestep, name
        See :class:`CartesianHMC`; `timestep` is h, and two evaluations are made a walker.
    """

    target_acceptance = 0.574

    def __init__(
        self,
        potential: Potential,
        temperatures: Any,
        masses: Any,
        flow: SteerableMap | None = None,
        timestep: Any = 0.001,
        name: str = "mala",
    ) -> None:
        super().__init__(potential, temperatures, masses, flow, 1, timestep, 0.0, name)
