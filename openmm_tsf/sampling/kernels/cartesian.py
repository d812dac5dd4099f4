"""Hamiltonian and Langevin Monte Carlo in Cartesian coordinates, with real masses."""

from typing import Any

from torch import Generator, Tensor

from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels.base import SteerableMap
from openmm_tsf.sampling.kernels.dynamics import DynamicsKernel
from openmm_tsf.sampling.kernels.langevin_torch import velocity_verlet
from openmm_tsf.sampling.tuning import StepSizes, step_sizes
from openmm_tsf.units import PICOSECOND
from openmm_tsf.utils.validation import check_float


class CartesianHMC(StepSizes, DynamicsKernel):
    """Hamiltonian Monte Carlo: refreshed velocities, a Verlet trajectory, accepted or rejected.

    Velocities become c v + sqrt(1 - c^2) noise, c = `persistence`, with Maxwell-Boltzmann noise of
    the rung's temperature: drawn afresh for c = 0 (Duane et al. 1987), partially refreshed
    otherwise (Horowitz 1991). Afterwards the state carries the velocities at the trajectory's end,
    or those at its beginning reversed where it was rejected. The Boltzmann distribution of
    positions and velocities together is left invariant exactly, at any time step.

    Time steps, the attribute ``sigma``, are tuned to an acceptance of 0.65 (Beskos et al. 2013).

    Parameters
    ----------
    potential, temperatures, masses, flow, n_steps, name, constraints, measure
        See :class:`openmm_tsf.sampling.kernels.dynamics.DynamicsKernel`.
    timestep
        The time step in ps, one number or one per rung [R].
    persistence
        c, at least 0 and below 1. With 0 walkers need no velocities, and have none afterwards.


    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials.toy import GaussianWell
    >>> from openmm_tsf.sampling.kernels import CartesianHMC
    >>> potential = GaussianWell(torch.eye(2).double())
    >>> hmc = CartesianHMC(potential, (1.0, 2.0), masses=1.0, n_steps=5, timestep=0.1)
    >>> hmc.target_acceptance, hmc.needs_velocities
    (0.65, False)
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
        constraints: Constraints | None = None,
        measure: str | None = None,
    ) -> None:
        parts = (potential, temperatures, masses, flow, n_steps, True, name, constraints, measure)
        super().__init__(*parts)
        self.potential = potential
        self.persistence = check_float(persistence, "persistence")
        if not 0 <= self.persistence < 1:
            raise ValueError(f"persistence: expected a number in [0, 1), got {persistence!r}")
        self._sigma = step_sizes(timestep, len(self.temperatures), "timestep", PICOSECOND)

    @property
    def needs_velocities(self) -> bool:
        """Whether walkers must have velocities."""
        return self.persistence > 0

    def settings(self) -> dict[str, Any]:
        """Return the choices made; tuned time steps are in :meth:`state_dict`."""
        return {
            "kernel": type(self).__name__,
            "integrator": "Verlet^n",
            "n_steps": self.n_steps,
            "persistence": self.persistence,
            "target_acceptance": self.target_acceptance,
            **self.constraint_settings(),
        }

    def refresh_before(self, v: Tensor, kt: Tensor, generator: Generator) -> Tensor:
        """Refresh the velocities, wholly or in part."""
        return self.ornstein_uhlenbeck(v, self.velocity_width(kt), self.persistence, generator)

    def refresh_after(self, v: Tensor, kt: Tensor, generator: Generator) -> Tensor:
        """Return the velocities as they are."""
        return v

    def propagate(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the Verlet steps."""
        sigma, mass = (self.on_device(name, x.device) for name in ("_sigma", "_mass"))
        timestep = self.as_column(sigma.repeat(len(x) // len(sigma)))
        numbers = (mass, timestep, self.n_steps)
        return velocity_verlet(self.potential, x, v, *numbers, rattle=self.rattle)


class CartesianMALA(CartesianHMC):
    """Metropolis-adjusted Langevin algorithm with the masses as preconditioner.

    x' = x + (h^2 / 2) M^-1 F(x) + h sqrt(kT) M^-1/2 noise (Rossky, Doll and Friedman 1978; Roberts
    and Tweedie 1996), accepted by the ratio of targets and of proposal densities. This is HMC with
    one step h and fresh velocities, and is computed as such: the ratio is exp(-dH/kT), and the
    walkers' velocities are those of :class:`CartesianHMC`. In the usual notation the step size is
    epsilon = h sqrt(kT) and the preconditioner M^-1. Target acceptance 0.574 (Roberts and Rosenthal
    1998).

    Parameters
    ----------
    potential, temperatures, masses, flow, timestep, name, constraints, measure
        See :class:`CartesianHMC`; `timestep` is h, and there are two evaluations a walker and rung.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.potentials.toy import GaussianWell
    >>> from openmm_tsf.sampling.kernels import CartesianMALA
    >>> potential = GaussianWell(torch.eye(2).double())
    >>> mala = CartesianMALA(potential, (1.0, 2.0), masses=1.0, timestep=[0.1, 0.2])
    >>> mala.sigma
    tensor([0.1000, 0.2000], dtype=torch.float64)
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
        constraints: Constraints | None = None,
        measure: str | None = None,
    ) -> None:
        parts = (potential, temperatures, masses, flow, 1, timestep, 0.0, name)
        super().__init__(*parts, constraints, measure)
