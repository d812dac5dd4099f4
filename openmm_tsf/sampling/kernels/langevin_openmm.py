"""Local dynamics: legs of Langevin dynamics whose deterministic steps OpenMM takes.

A leg is O V^n O: half of the leg's Ornstein-Uhlenbeck thermostat, n steps of velocity Verlet by
``openmm.VerletIntegrator``, the other half (Bussi and Parrinello 2007; generalised hybrid Monte
Carlo, Horowitz 1991). Why not ``LangevinMiddleIntegrator``: its noise comes from the platform's
own generator, which is one global stream for all Contexts on the Reference platform and cannot be
saved on the CPU platform. Here the noise comes from the sampler's generator, so results depend
neither on the number of Contexts and threads nor on where a run was interrupted; and the
deterministic part can be Metropolised, which removes the time-step error altogether.
"""

from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol, runtime_checkable

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_tsf.potentials.context_pool import NUMERICAL_ERROR
from openmm_tsf.sampling.kernels.dynamics import LangevinDynamics
from openmm_tsf.sampling.kernels.flow import SteerableMap


@runtime_checkable
class DynamicsPotential(Protocol):
    """A potential that can open OpenMM Contexts (:class:`openmm_tsf.OpenMMPotential`)."""

    event_shape: tuple[int, ...]
    boltzmann_constant: float
    n_evaluations: int

    @property
    def n_contexts(self) -> int: ...
    @property
    def platform_properties(self) -> dict[str, str]: ...
    def make_context(self, integrator: openmm.Integrator) -> openmm.Context: ...


class OpenMMLangevin(LangevinDynamics):
    """n steps of Langevin dynamics for every walker at its rung's temperature.

    With ``metropolized=True`` the leg is accepted with probability min(1, exp(-dH/kT)), H the total
    energy before and after the Verlet steps; a rejected walker keeps its positions and reverses
    its velocities (the leg is then exact). With False there is no such step, and averages carry
    an error of order dt^2. Either way a leg that ends in a non-finite energy or outside the flow's
    domain (the mirror image, first of all) is rejected in the same manner and counted.

    Parameters
    ----------
    potential
        Gives Contexts and counts evaluations: n_steps + 1 per walker.
    temperatures
        The ladder, K.
    masses
        [N] amu.
    flow
        Its domain is the walkers'; None to allow every configuration.
    n_steps
        Verlet steps a leg.
    timestep
        ps.
    friction
        1/ps.
    metropolized
        Accept or reject by the energy error.
    n_contexts
        Contexts, each with its thread; the potential's number by default.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    def __init__(
        self,
        potential: DynamicsPotential,
        temperatures: Any,
        masses: Any,
        flow: SteerableMap | None = None,
        n_steps: int = 20,
        timestep: Any = 0.001,
        friction: Any = 1.0,
        metropolized: bool = True,
        n_contexts: int | None = None,
        name: str = "local",
    ) -> None:
        super().__init__(
            potential, temperatures, masses, flow, n_steps, timestep, friction, metropolized, name
        )
        self.potential = potential
        self.n_contexts = potential.n_contexts if n_contexts is None else n_contexts
        if self.n_contexts < 1:
            raise ValueError(f"n_contexts: expected at least 1, got {n_contexts!r}")
        half_kick = 0.5 * self.timestep / self._mass.numpy()
        self._workers = [
            _Verlet(potential, half_kick, self.timestep, n_steps) for _ in range(self.n_contexts)
        ]
        self._pool = ThreadPoolExecutor(self.n_contexts, "langevin")

    def _propagate(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, velocities and energies [B] after the Verlet steps."""
        if not self._workers:
            raise RuntimeError(f"{self.name}: this Langevin leg is closed")
        x_end, v_end = x.clone(), v.clone()
        u_end = torch.empty(len(x), dtype=torch.float64)
        positions, velocities, energies = x_end.numpy(), v_end.numpy(), u_end.numpy()
        blocks = np.array_split(np.arange(len(x)), len(self._workers))
        tasks = [
            (worker, positions[b[0] : b[-1] + 1], velocities[b[0] : b[-1] + 1],
             energies[b[0] : b[-1] + 1])
            for worker, b in zip(self._workers, blocks, strict=True)
            if len(b)
        ]  # fmt: skip
        if len(tasks) == 1:
            worker, *arrays = tasks[0]
            worker.run(*arrays)
        else:
            futures = [self._pool.submit(worker.run, *arrays) for worker, *arrays in tasks]
            wait(futures)  # all of them, so that a failure leaves no thread behind in a Context
            for future in futures:
                future.result()
        self.potential.n_evaluations += len(x) * (self.n_steps + 1)
        return x_end, v_end, u_end

    def close(self) -> None:
        """Free the Contexts and threads. Calling it twice is allowed."""
        self._pool.shutdown()
        self._workers = []


def _open_context(potential: DynamicsPotential, integrator: openmm.Integrator) -> openmm.Context:
    """A Context of the potential's System without CMMotionRemover.

    Taking out the centre of mass's motion is not Hamiltonian: it would bias the leg's acceptance.
    """
    context = potential.make_context(integrator)
    system = context.getSystem()
    removers = [
        index
        for index, force in enumerate(system.getForces())
        if isinstance(force, openmm.CMMotionRemover)
    ]
    if not removers:
        return context
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    for index in reversed(removers):
        system.removeForce(index)
    platform, properties = context.getPlatform(), potential.platform_properties
    del context  # an integrator belongs to one Context
    integrator = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(integrator))
    return openmm.Context(system, integrator, platform, properties)


class _Verlet:
    """Velocity Verlet in one Context.

    ``VerletIntegrator`` is leapfrog: it holds v(t - dt/2). Half a kick with the force at either end
    turns its n steps into n steps of velocity Verlet, which is reversible and preserves volume.
    """

    def __init__(
        self, potential: DynamicsPotential, half_kick: np.ndarray, timestep: float, n_steps: int
    ) -> None:
        self._half = half_kick
        self._n_steps = n_steps
        self._context = _open_context(potential, openmm.VerletIntegrator(timestep))
        self._integrator = self._context.getIntegrator()

    def run(self, x: np.ndarray, v: np.ndarray, energy: np.ndarray) -> None:
        """Advance x, v [b, N, 3] in place; a failed walker gets energy +inf."""
        for row in range(len(x)):
            energy[row] = self._one(x[row], v[row])

    def _one(self, x: np.ndarray, v: np.ndarray) -> float:
        context = self._context
        try:
            context.setPositions(x)
            force = context.getState(getForces=True).getForces(asNumpy=True)._value
            context.setVelocities(v - self._half * force)
            self._integrator.step(self._n_steps)
            end = context.getState(
                getPositions=True, getVelocities=True, getForces=True, getEnergy=True
            )
        except openmm.OpenMMException as error:
            # OpenMM reports a blown-up trajectory as an exception on some platforms.
            if self._is_trajectory_at_fault(x, error):
                return float("inf")
            raise
        energy = float(end.getPotentialEnergy()._value)
        x_end = end.getPositions(asNumpy=True)._value
        v_end = end.getVelocities(asNumpy=True)._value
        v_end = v_end + self._half * end.getForces(asNumpy=True)._value
        if not (np.isfinite(energy) and np.isfinite(x_end).all() and np.isfinite(v_end).all()):
            return float("inf")
        x[:], v[:] = x_end, v_end
        return energy

    def _is_trajectory_at_fault(self, x: np.ndarray, error: openmm.OpenMMException) -> bool:
        # A lost GPU or a wrong Force raises too, and must not pass for a rejection: unless the
        # message speaks of numbers, the conformation [N, 3] where the leg began decides.
        if NUMERICAL_ERROR.search(str(error)):
            return True
        try:
            self._context.setPositions(x)
            self._context.getState(getEnergy=True)
        except openmm.OpenMMException:
            return False
        return True
