"""Energies and forces of an OpenMM System for batches of torch tensors."""

import os
import threading
from collections.abc import Mapping
from typing import Any, cast

import openmm
import torch
from torch import Tensor

from openmm_tsf.potentials.blocks import replace_non_finite
from openmm_tsf.potentials.context_pool import ContextPool, PlatformChoice, build_context, open_pool
from openmm_tsf.potentials.molecular import MolecularPotential, check_system
from openmm_tsf.potentials.platforms import check_platform, check_properties, choose_platform


class OpenMMPotential(MolecularPotential):
    """The potential energy of a non-periodic OpenMM System, computed by OpenMM.

    Energies are in kJ/mol, positions in nm, forces in kJ/(mol nm). Everything is passed to OpenMM
    in double precision; results have the dtype and device of the input. The first derivative of
    the energy is OpenMM's force; a second derivative raises.

    An energy is +inf with zero force, and counted in ``n_non_finite``, where positions are not
    finite, where OpenMM raises because of the conformation, or where the energy (or a force, if
    forces are computed) is not finite or overflows the dtype of the result.

    The object can be pickled, also into a spawned process; the copy opens new Contexts on the same
    platform and counts from zero. It may be used from several threads, one at a time.

    Parameters
    ----------
    system
        The System; it is copied.
    platform
        Name of a Platform, or an ``openmm.Platform``. By default the fastest one for this System on
        this machine, by measurement (about a second; logged).
    platform_properties
        Properties of the Platform, for example ``{"Threads": "1"}`` or ``{"DeviceIndex": "0"}``.
    n_contexts
        Contexts that share a batch, one thread each. By default the fastest number, by measurement.

    Raises
    ------
    ValueError
        If the System is empty, periodic or has virtual sites; if the platform or a property is
        unknown (the message lists what is available).
    openmm.OpenMMException
        If the platform cannot run this System.

    Examples
    --------
    >>> import openmm, torch
    >>> from openmm_tsf import OpenMMPotential
    >>> system, bond = openmm.System(), openmm.HarmonicBondForce()
    >>> _ = system.addParticle(12.0), system.addParticle(12.0)
    >>> _ = bond.addBond(0, 1, 0.1, 1000.0), system.addForce(bond)
    >>> x = torch.tensor([[[0.0, 0.0, 0.0], [0.2, 0.0, 0.0]]], dtype=torch.float64)
    >>> with OpenMMPotential(system, "Reference", n_contexts=1) as potential:
    ...     round(potential.energy(x)[0].item(), 9)
    5.0
    """

    def __init__(
        self,
        system: openmm.System,
        platform: str | openmm.Platform | None = None,
        platform_properties: Mapping[str, object] | None = None,
        n_contexts: int | None = None,
    ) -> None:
        check_system(system)
        for force in system.getForces():
            if force.usesPeriodicBoundaryConditions():
                problem = f"expected no periodic box, but {force.getName()} uses one"
                hint = "build it for the molecule alone, with nonbondedMethod=NoCutoff"
                raise ValueError(f"system: {problem}; {hint}")
        self._xml = openmm.XmlSerializer.serialize(system)
        self._system = openmm.XmlSerializer.deserialize(self._xml)
        self._open(choose_platform(self._system, platform, platform_properties, n_contexts))

    def _open(self, choice: PlatformChoice) -> None:
        self.event_shape = (self._system.getNumParticles(), 3)
        self.n_evaluations = self.n_non_finite = 0
        self._choice = choice
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._pool: ContextPool | None = open_pool(self._system, choice)

    @property
    def platform_name(self) -> str:
        """The name of the Platform in use."""
        return self._choice.name

    @property
    def platform_properties(self) -> dict[str, str]:
        """The properties in use, as far as they were given or measured."""
        return dict(self._choice.properties)

    @property
    def n_contexts(self) -> int:
        """The number of Contexts that share a batch."""
        return self._choice.n_contexts

    def __repr__(self) -> str:
        state = "" if self._pool is not None else ", closed"
        return f"OpenMMPotential({self.event_shape[0]} atoms, {self._choice}{state})"

    def make_context(self, integrator: openmm.Integrator) -> openmm.Context:
        """Return a new Context of this System on the same platform.

        The Context belongs to the caller and remains usable after :meth:`close`. Evaluations in it
        are not counted here.
        """
        if not isinstance(integrator, openmm.Integrator):
            given = type(integrator).__name__
            raise TypeError(f"integrator: expected an openmm.Integrator, got {given}")
        self._require_pool()
        return build_context(self._system, integrator, self._choice)

    def close(self) -> None:
        """Free Contexts and threads. Calling it twice is allowed."""
        if self._pool is None or os.getpid() != self._process:
            return  # in a forked child the Contexts belong to the parent
        with self._lock:
            pool, self._pool = self._pool, None
            if pool is not None:
                pool.close()

    def _require_pool(self) -> ContextPool:
        """Return the pool, or raise if this process has none."""
        if os.getpid() != self._process:
            processes = f"process {self._process} and does not survive the fork into {os.getpid()}"
            raise RuntimeError(
                f"this OpenMMPotential was opened in {processes}: use multiprocessing's start "
                "method 'spawn', or build the potential in the child"
            )
        if self._pool is None:
            raise RuntimeError("this OpenMMPotential is closed")
        return self._pool

    def _differentiable_energy(self, x: Tensor) -> Tensor:
        return cast(Tensor, _OpenMMEnergy.apply(x, self))

    def _evaluate(self, x: Tensor, with_forces: bool) -> tuple[Tensor, Tensor | None]:
        self._require_pool()
        with self._lock:
            energies, forces, n_non_finite = evaluate_in(self._require_pool(), x, with_forces)
            self.n_evaluations += len(x)
            self.n_non_finite += n_non_finite
        return energies, forces

    def __getstate__(self) -> dict[str, Any]:
        self._require_pool()
        return {"xml": self._xml, "choice": self._choice}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._xml = state["xml"]
        self._system = openmm.XmlSerializer.deserialize(self._xml)
        choice: PlatformChoice = state["choice"]
        check_properties(check_platform(choice.name), choice.properties)
        self._open(choice)


class ContextPotential(MolecularPotential):
    """The potential energy in a Context that belongs to the caller, who may use it in between.

    Energies, errors and derivatives are those of :class:`OpenMMPotential`. The Context's positions
    are changed, nothing else.

    Parameters
    ----------
    context
        A Context of a System without periodic box and virtual sites.

    Examples
    --------
    >>> import openmm, torch
    >>> from openmm_tsf.potentials.openmm_potential import ContextPotential
    >>> system, bond = openmm.System(), openmm.HarmonicBondForce()
    >>> _ = system.addParticle(12.0), system.addParticle(12.0)
    >>> _ = bond.addBond(0, 1, 0.1, 1000.0), system.addForce(bond)
    >>> platform = openmm.Platform.getPlatform("Reference")
    >>> context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    >>> x = torch.tensor([[[0.0, 0.0, 0.0], [0.2, 0.0, 0.0]]], dtype=torch.float64)
    >>> round(ContextPotential(context).energy(x)[0].item(), 9)
    5.0
    """

    def __init__(self, context: openmm.Context) -> None:
        self.event_shape = (context.getSystem().getNumParticles(), 3)
        self._pool = ContextPool([context])

    def _differentiable_energy(self, x: Tensor) -> Tensor:
        return cast(Tensor, _OpenMMEnergy.apply(x, self))

    def _evaluate(self, x: Tensor, with_forces: bool) -> tuple[Tensor, Tensor | None]:
        energies, forces, n_non_finite = evaluate_in(self._pool, x, with_forces)
        self.n_evaluations += len(x)
        self.n_non_finite += n_non_finite
        return energies, forces


def evaluate_in(
    pool: ContextPool, x: Tensor, with_forces: bool
) -> tuple[Tensor, Tensor | None, int]:
    """Return energies [B], forces [B, N, 3] if requested, and how many are not finite.

    They have the dtype and device of x [B, N, 3]; those that are not finite are +inf and 0.
    """
    positions = x.detach().to("cpu", torch.float64).contiguous().numpy()
    raw_energies, raw_forces, all_finite = pool.evaluate(positions, with_forces)
    energies = torch.from_numpy(raw_energies).to(x)
    forces = None if raw_forces is None else torch.from_numpy(raw_forces).to(x)
    if all_finite and x.dtype == torch.float64:
        return energies, forces, 0
    return energies, forces, int(replace_non_finite(energies, forces))


class _OpenMMEnergy(torch.autograd.Function):
    """U(x), with OpenMM's forces as its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, potential: MolecularPotential) -> Tensor:
        energies, forces = potential.energy_and_forces(x)
        ctx.save_for_backward(x, forces, energies.isfinite())
        return energies

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        x, forces, finite = ctx.saved_tensors
        # torch's once_differentiable does not raise when grad_output is a constant, as for U.sum().
        forces = _NoSecondDerivative.apply(x, forces)
        # A non-finite row may well come with a gradient of inf or NaN: zero force, zero gradient.
        weight = torch.where(finite, grad_outputs[0], 0.0)
        return -weight[:, None, None] * forces, None


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on forces, which raises if they are differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forces: Tensor) -> Tensor:
        return forces.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "OpenMMPotential: second derivatives are not available, OpenMM computes forces only"
        )
