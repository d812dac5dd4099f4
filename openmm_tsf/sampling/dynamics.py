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
from openmm_tsf.sampling.accept import metropolis
from openmm_tsf.sampling.moves import FlowLike
from openmm_tsf.sampling.state import KernelInfo, WalkerState, per_rung
from openmm_tsf.units import PICOSECOND, as_temperatures, in_unit


@runtime_checkable
class DynamicsPotential(Protocol):
    """A potential that can open OpenMM Contexts (:class:`openmm_tsf.OpenMMPotential`)."""

    boltzmann_constant: float
    n_evaluations: int

    @property
    def n_contexts(self) -> int: ...
    @property
    def platform_properties(self) -> dict[str, str]: ...
    def make_context(self, integrator: openmm.Integrator) -> openmm.Context: ...


class LangevinLeg:
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
        flow: FlowLike | None = None,
        n_steps: int = 20,
        timestep: Any = 0.001,
        friction: Any = 1.0,
        metropolized: bool = True,
        n_contexts: int | None = None,
        name: str = "local",
    ) -> None:
        self.potential, self.flow, self.name = potential, flow, name
        self.temperatures = as_temperatures(temperatures)
        self.timestep = float(in_unit(timestep, PICOSECOND, "timestep"))
        self.friction = float(in_unit(friction, 1 / PICOSECOND, "friction"))
        self.n_steps = n_steps
        self.metropolized = metropolized
        self.n_contexts = potential.n_contexts if n_contexts is None else n_contexts
        if not isinstance(n_steps, int) or n_steps < 1:
            raise ValueError(f"n_steps: expected an integer of at least 1, got {n_steps!r}")
        if not self.timestep > 0:
            raise ValueError(f"timestep: expected a positive number of ps, got {timestep!r}")
        if not self.friction >= 0:
            raise ValueError(f"friction: expected a non-negative rate in 1/ps, got {friction!r}")
        if self.n_contexts < 1:
            raise ValueError(f"n_contexts: expected at least 1, got {n_contexts!r}")
        self._masses = torch.as_tensor(masses, dtype=torch.float64).clone()
        if self._masses.ndim != 1 or not bool((self._masses > 0).all()):
            raise ValueError(f"masses: expected positive masses [N], got {masses!r}")
        kelvin = torch.tensor(self.temperatures, dtype=torch.float64)
        self._kt = potential.boltzmann_constant * kelvin
        self._keep = float(np.exp(-self.friction * self.timestep * n_steps / 2))
        half_kick = 0.5 * self.timestep / self._masses.numpy()[:, None]
        self._workers = [
            _Verlet(potential, half_kick, self.timestep, n_steps) for _ in range(self.n_contexts)
        ]
        self._pool = ThreadPoolExecutor(self.n_contexts, "langevin")

    @property
    def exact(self) -> bool:
        """Whether the leg has no time-step error."""
        return self.metropolized

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """Shape of the counts: one number per rung."""
        return (len(self.temperatures),)

    def settings(self) -> dict[str, Any]:
        """The choices made."""
        return {
            "kernel": "LangevinLeg",
            "integrator": "O Verlet^n O",
            "n_steps": self.n_steps,
            "timestep_ps": self.timestep,
            "friction_per_ps": self.friction,
            "metropolized": self.metropolized,
            "time_step_error": None if self.metropolized else "O(dt^2)",
        }

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the noise comes from the sampler's generator."""
        return {}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Nothing to set."""

    def __call__(
        self, state: WalkerState, generator: torch.Generator
    ) -> tuple[WalkerState, KernelInfo]:
        """One leg for every walker."""
        if state.velocities is None:
            raise ValueError("state: a Langevin leg expects walkers with velocities, got None")
        shape = state.energy.shape
        x, energy = state.x.flatten(0, 1), state.energy.flatten()
        kt = self._kt.repeat(shape[0])
        v = self._thermostat(state.velocities.flatten(0, 1), kt, generator)
        x_end, v_end, u_end = self._propagate(x, v)

        failed, mirror = self._outside(x_end, u_end)
        allowed = ~failed & ~mirror
        before = -(energy + self._kinetic(v)) / kt
        after = torch.where(allowed, -(u_end + self._kinetic(v_end)) / kt, -torch.inf)
        accepted, _ = metropolis(before, after, generator)
        if not self.metropolized:
            accepted = allowed
        take = accepted[:, None, None]
        # Reversing the velocities of a rejected walker is what makes the leg its own reverse.
        v = self._thermostat(torch.where(take, v_end, -v), kt, generator)
        info = KernelInfo(
            *per_rung(accepted.reshape(shape), shape[0]),
            rejected_non_finite=int(failed.sum()),
            mirror_images=int(mirror.sum()),
            n_evaluations=len(x) * (self.n_steps + 1),
        )
        new = state.evolve(
            x=torch.where(take, x_end, x).reshape(state.x.shape),
            velocities=v.reshape(state.x.shape),
            energy=torch.where(accepted, u_end, energy).reshape(shape),
        )
        return new, info

    @torch.no_grad()
    def _outside(self, x: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B] outside the flow's domain or of non-finite energy; mirror images apart."""
        failed = ~torch.isfinite(energy)
        mirror = torch.zeros_like(failed)
        rows = (~failed).nonzero().flatten()
        if self.flow is not None and len(rows):
            ends = x[rows].to(self.flow.dtype)
            mirror[rows] = self.flow.is_mirror_image(ends)
            momenta = ends.new_zeros(len(ends), self.flow.n_momenta)
            _, log_det = self.flow.inverse_and_log_det(ends, momenta)
            failed[rows] = ~torch.isfinite(log_det) & ~mirror[rows]
        return failed, mirror

    def _thermostat(self, v: Tensor, kt: Tensor, generator: torch.Generator) -> Tensor:
        """The exact Ornstein-Uhlenbeck step over half a leg."""
        noise = torch.randn(v.shape, generator=generator, dtype=v.dtype)
        width = (kt[:, None] / self._masses[None, :] * (1 - self._keep**2)).sqrt()
        return self._keep * v + noise * width[:, :, None]

    def _kinetic(self, v: Tensor) -> Tensor:
        return 0.5 * (self._masses[None, :, None] * v.square()).sum(dim=(1, 2))

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


def minimised(potential: DynamicsPotential, positions: np.ndarray) -> np.ndarray:
    """Positions [N, 3] in nm after at most 200 steps of OpenMM's local minimiser."""
    context = potential.make_context(openmm.VerletIntegrator(0.001))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 200)
    state = context.getState(getPositions=True)
    return np.asarray(state.getPositions(asNumpy=True)._value)


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
