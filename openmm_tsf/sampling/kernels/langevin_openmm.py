"""Langevin dynamics whose deterministic steps are taken by OpenMM.

The noise of ``LangevinMiddleIntegrator`` comes from a generator of the platform, which cannot be
saved on the CPU platform. Here it comes from the sampler's, and ``openmm.VerletIntegrator`` takes
the steps: results depend neither on the number of Contexts and threads nor on interruptions, and
the deterministic part can be Metropolised, which removes the time-step error.
"""

from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol, runtime_checkable

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_tsf.coordinates.constraints import MEASURES, Constraints
from openmm_tsf.potentials.context_pool import NUMERICAL_ERROR, PlatformChoice, build_context
from openmm_tsf.sampling.kernels.base import SteerableMap
from openmm_tsf.sampling.kernels.dynamics import LangevinKernel, PotentialConstants
from openmm_tsf.utils.validation import check_int

#: OpenMM's tolerance of constraints, relative to the distance, in double and in single precision.
_CONSTRAINT_TOLERANCE = {True: 1e-13, False: 1e-6}
#: How far in nm a trajectory may end from its constraints, where OpenMM did not solve them ...
_DEVIATION = {True: 1e-11, False: 1e-5}
#: ... and, run back, from its start.
_RETURN = 1e-5


@runtime_checkable
class DynamicsPotential(PotentialConstants, Protocol):
    """A potential that opens OpenMM Contexts (:class:`openmm_tsf.OpenMMPotential`)."""

    n_evaluations: int

    @property
    def n_contexts(self) -> int: ...
    @property
    def platform_properties(self) -> dict[str, str]: ...
    def make_context(self, integrator: openmm.Integrator) -> openmm.Context: ...


class OpenMMLangevin(LangevinKernel):
    """n steps of Langevin dynamics for every walker at the temperature of its rung.

    With ``metropolized=True`` trajectories are accepted or rejected by the total energy, and the
    kernel is exact; with False averages have an error of order dt^2. Either way a trajectory that
    ends in a non-finite energy or outside the domain of the flow (mirror images in particular) is
    rejected and counted.

    OpenMM applies the System's constraints. A trajectory is then run back as well before it is
    metropolised, which doubles the evaluations, and rejected where it does not return.
    :class:`openmm_tsf.sampling.kernels.langevin_torch.TorchLangevin` reverses single steps, without
    an evaluation.

    Parameters
    ----------
    potential, temperatures, masses, flow, n_steps, timestep, friction, metropolized, name
        See :class:`openmm_tsf.sampling.kernels.dynamics.LangevinKernel`.
    constraints, measure
        See there; they are those of the potential's System, and only ``"rigid"`` is sampled.
    n_contexts
        The number of Contexts, each with a thread; that of the potential by default.

    Examples
    --------
    >>> import openmm
    >>> import torch
    >>> from openmm_tsf import OpenMMPotential
    >>> from openmm_tsf.sampling.kernels import OpenMMLangevin, WalkerState
    >>> system = openmm.System()
    >>> bond = openmm.HarmonicBondForce()
    >>> for _ in range(2):
    ...     _ = system.addParticle(12.0)
    >>> _ = bond.addBond(0, 1, 0.15, 1e5)
    >>> _ = system.addForce(bond)
    >>> x = torch.tensor([[0.0, 0.0, 0.0], [0.15, 0.0, 0.0]]).double().reshape(1, 1, 2, 3)
    >>> energy, replica = torch.zeros(1, 1).double(), torch.zeros(1, 1).long()
    >>> state = WalkerState(x, torch.zeros_like(x), energy, replica)
    >>> with OpenMMPotential(system, platform="Reference") as potential:
    ...     langevin = OpenMMLangevin(potential, [300.0], [12.0, 12.0], n_steps=10)
    ...     state, info = langevin(state, torch.Generator().manual_seed(1))
    ...     langevin.close()
    >>> info.n_evaluations
    11
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
        constraints: Constraints | None = None,
        measure: str | None = None,
    ) -> None:
        super().__init__(
            potential, temperatures, masses, flow, n_steps, timestep, friction, metropolized, name,
            constraints, measure,
        )  # fmt: skip
        if self.measure != MEASURES[0]:
            raise ValueError(
                f"measure: expected {MEASURES[0]!r} with OpenMM's dynamics, got {self.measure!r}; "
                "TorchLangevin samples it"
            )
        self.potential = potential
        chosen = potential.n_contexts if n_contexts is None else n_contexts
        self.n_contexts = check_int(chosen, "n_contexts")
        parts = (potential, self._mass.numpy(), self.timestep, self.n_steps, self.constraints)
        self._workers = [_Verlet(*parts) for _ in range(self.n_contexts)]
        self._pool = ThreadPoolExecutor(self.n_contexts, "langevin")

    @property
    def n_evaluations(self) -> int:
        """The number of energies, or energies with forces, of a trajectory."""
        return super().n_evaluations * (2 if self._is_run_back else 1)

    @property
    def _is_run_back(self) -> bool:
        return self.constraints is not None and self.metropolized

    def propagate(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the Verlet steps, a contiguous block of walkers in each Context."""
        x_end, v_end, u_end = self._integrate(x, v)
        if self.rattle is None or self.constraints is None:
            return x_end, v_end, u_end
        device, constraints = x.device, self.constraints.to("cpu")
        limit = _DEVIATION[self._workers[0].is_double]
        reached = constraints.deviations(x_end.cpu()).abs().amax(dim=1) <= limit
        x_end = torch.where(reached.to(device)[:, None, None], x_end, x)
        x_end = constraints.project(x_end.cpu()).to(device)
        v_end = self.rattle.project(v_end, self.rattle.locate(x_end))
        if self._is_run_back:
            back, _, _ = self._integrate(x_end, -v_end)
            reached &= ((back - x).abs().flatten(1).amax(dim=1) <= _RETURN).cpu()
        lost = ~reached.to(device) & u_end.isfinite()
        return x_end, v_end, u_end.masked_fill(lost, torch.nan)

    def _integrate(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions, velocities and energies after the steps; +inf where they failed."""
        if not self._workers:
            raise RuntimeError(f"{self.name}: this kernel of Langevin dynamics is closed")
        device = x.device
        x_end, v_end = x.cpu().clone(), v.cpu().clone()
        u_end = torch.empty(len(x), dtype=torch.float64, device="cpu")
        arrays = x_end.numpy(), v_end.numpy(), u_end.numpy()
        blocks = np.array_split(np.arange(len(x)), len(self._workers))
        tasks = [
            (worker, [array[block[0] : block[-1] + 1] for array in arrays])
            for worker, block in zip(self._workers, blocks, strict=True)
            if len(block)
        ]
        if len(tasks) == 1:
            worker, parts = tasks[0]
            worker.run(*parts)
        else:
            futures = [self._pool.submit(worker.run, *parts) for worker, parts in tasks]
            wait(futures)  # all, so that after a failure no thread is still in a Context
            for future in futures:
                future.result()
        self.potential.n_evaluations += len(x) * (self.n_steps + 1)
        return x_end.to(device), v_end.to(device), u_end.to(device)

    def close(self) -> None:
        """Free the Contexts and threads. Calling it twice is allowed."""
        self._pool.shutdown()
        self._workers = []


def _open_context(
    potential: DynamicsPotential, integrator: openmm.Integrator, masses: list[float]
) -> openmm.Context:
    """Return a Context of the potential's System with masses [N] in amu and no CMMotionRemover.

    Other masses than those of the kinetic energy, or removing the motion of the centre of mass,
    which is not Hamiltonian, would leave hardly a trajectory to accept.
    """
    context = potential.make_context(integrator)
    system = context.getSystem()
    forces, particles = enumerate(system.getForces()), range(system.getNumParticles())
    removers = [i for i, force in forces if isinstance(force, openmm.CMMotionRemover)]
    if not removers and masses == [system.getParticleMass(i)._value for i in particles]:
        return context
    system = openmm.XmlSerializer.clone(system)
    for index in reversed(removers):
        system.removeForce(index)
    for particle, mass in enumerate(masses):
        system.setParticleMass(particle, mass)
    choice = PlatformChoice(context.getPlatform().getName(), potential.platform_properties)
    del context  # an integrator belongs to one Context
    integrator = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(integrator))
    return build_context(system, integrator, choice)


def _check_constraints(system: openmm.System, constraints: Constraints | None) -> None:
    """Refuse a kernel with other constraints than the System's."""
    expected = _lengths_by_pair(Constraints.from_system(system))
    given = {} if constraints is None else _lengths_by_pair(constraints)
    if expected != given:
        raise ValueError(
            f"constraints: expected the {len(expected)} of the potential's System, got "
            f"{len(given) if given else 'none'}{' others' if given else ''}"
        )


def _lengths_by_pair(constraints: Constraints) -> dict[frozenset[int], float]:
    pairs, lengths = constraints.pairs.tolist(), constraints.lengths.tolist()
    return {frozenset(pair): length for pair, length in zip(pairs, lengths, strict=True)}


class _Verlet:
    """Velocity Verlet in one Context.

    ``VerletIntegrator`` is leapfrog: it holds v(t - dt/2). Half a step of the velocities with the
    force at either end makes its n steps velocity Verlet, reversible and volume-preserving.
    """

    def __init__(
        self,
        potential: DynamicsPotential,
        masses: np.ndarray,
        timestep: float,
        n_steps: int,
        constraints: Constraints | None,
    ) -> None:
        self._half_step, self._n_steps = 0.5 * timestep / masses, n_steps
        integrator = openmm.VerletIntegrator(timestep)
        self._context = _open_context(potential, integrator, masses.flatten().tolist())
        platform = self._context.getPlatform()
        # Positions are of double precision with "mixed", and on platforms that do not say.
        self.is_double = (
            "Precision" not in platform.getPropertyNames()
            or platform.getPropertyValue(self._context, "Precision") != "single"
        )
        if constraints is not None:
            tolerance = _CONSTRAINT_TOLERANCE[self.is_double]
            self._context.getIntegrator().setConstraintTolerance(tolerance)
        _check_constraints(self._context.getSystem(), constraints)
        self._integrator = self._context.getIntegrator()

    def run(self, x: np.ndarray, v: np.ndarray, energy: np.ndarray) -> None:
        """Advance x, v [b, N, 3] in place; a failed walker gets energy +inf."""
        for row in range(len(x)):
            energy[row] = self._run_row(x[row], v[row])

    def _run_row(self, x: np.ndarray, v: np.ndarray) -> float:
        context = self._context
        try:
            context.setPositions(x)
            force = context.getState(getForces=True).getForces(asNumpy=True)._value
            context.setVelocities(v - self._half_step * force)
            self._integrator.step(self._n_steps)
            end = context.getState(
                getPositions=True, getVelocities=True, getForces=True, getEnergy=True
            )
        except openmm.OpenMMException as error:
            # OpenMM reports a blown-up trajectory as an exception on some platforms.
            if self._is_blow_up(x, error):
                return float("inf")
            raise
        energy = float(end.getPotentialEnergy()._value)
        x_end = end.getPositions(asNumpy=True)._value
        v_end = end.getVelocities(asNumpy=True)._value
        v_end = v_end + self._half_step * end.getForces(asNumpy=True)._value
        if not (np.isfinite(energy) and np.isfinite(x_end).all() and np.isfinite(v_end).all()):
            return float("inf")
        x[:], v[:] = x_end, v_end
        return energy

    def _is_blow_up(self, x: np.ndarray, error: openmm.OpenMMException) -> bool:
        # A lost GPU or a wrong Force raises too and is no rejection. Unless the message is about
        # numbers, it is one if the energy at the start [N, 3] can still be computed.
        if NUMERICAL_ERROR.search(str(error)):
            return True
        try:
            self._context.setPositions(x)
            self._context.getState(getEnergy=True)
        except openmm.OpenMMException:
            return False
        return True
