"""An implicit-solvent OpenMM System as one batched, differentiable torch function."""

import logging
import threading
from collections.abc import Iterable, Mapping
from math import isfinite
from numbers import Real
from typing import Any, Self, cast

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from openmm_tsf.potentials.arguments import check_bytes, check_device, check_flag, check_groups
from openmm_tsf.potentials.base import Potential
from openmm_tsf.potentials.blocks import (
    LEAST_COMPILED,
    block_size,
    bytes_per_conformation,
    compiled_block_size,
    plain,
    settle_non_finite,
    share,
    slices,
    threads_for,
)
from openmm_tsf.potentials.compilation import CompiledEnergy
from openmm_tsf.potentials.forces.geometry import AllPairs, Frame
from openmm_tsf.potentials.forces.registry import global_parameters, read_forces
from openmm_tsf.potentials.verification import (
    ForceAgreement,
    check_tolerance,
    choose_conformations,
    compare,
    judge,
)
from openmm_tsf.units import KB

logger = logging.getLogger(__name__)

#: Largest relative errors that the check at construction lets pass, by dtype: energy, forces.
_TOLERANCES = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-3, 1e-3)}


class TooLarge(ValueError):
    """A System that one block of the memory allowed cannot hold."""


class TorchPotential(Potential):
    """The potential energy of an OpenMM System, in torch, for whole batches.

    Energies are in kJ/mol, positions in nm, forces in kJ/(mol nm). The energy is differentiable to
    any order. Nothing is a copy of OpenMM's results: the Forces are read from the System and their
    energies written out in torch operations, on the CPU or a GPU, and compared Force by Force with
    OpenMM's Reference platform before the object comes into being (see :meth:`check`).

    An energy is +inf with zero force, and counted in ``n_non_finite``, where positions, energy or a
    force are not finite.

    Batches of any size are evaluated block by block within `memory`, gradients included; only
    second and higher derivatives keep the whole batch's graph. Derivatives are those of
    ``torch.autograd``; the transforms of ``torch.func`` are not supported. An angle of exactly 180
    degrees has no plane to bend in: its force is zero, as in OpenMM, and so is its part of the
    second derivative.

    Make it by :meth:`from_system`.

    Attributes
    ----------
    event_shape : tuple of int
        (N, 3).
    boltzmann_constant : float
        In kJ/(mol K).
    n_evaluations, n_non_finite : int
        See :class:`~openmm_tsf.potentials.base.Potential`.
    dtype : torch.dtype
        Of positions, energies and forces.
    device : torch.device
        Of positions, energies and forces.
    agreement : list of ForceAgreement
        What the last :meth:`check` found.
    """

    boltzmann_constant = KB

    @torch.inference_mode(False)  # constants made in inference mode could not be differentiated
    def __init__(
        self,
        system: openmm.System,
        dtype: torch.dtype,
        device: torch.device,
        compile: bool,
        force_groups: tuple[int, ...] | None,
        memory: int,
    ) -> None:
        n_atoms = system.getNumParticles()
        # First of all: some Forces that are not covered cannot even be serialized.
        pairs = AllPairs(n_atoms, with_list=False)
        self._forces = read_forces(system, pairs, force_groups)
        self._xml = openmm.XmlSerializer.serialize(system)
        self._system = openmm.XmlSerializer.deserialize(self._xml)
        self.dtype, self.device = dtype, device
        self.force_groups, self.memory = force_groups, memory
        self.compile_requested = compile
        self.event_shape = (n_atoms, 3)
        self.n_evaluations = 0
        self.n_non_finite = 0
        self.agreement: list[ForceAgreement] = []
        self._pairs = pairs.to(device, dtype)
        self._terms = nn.ModuleList(force.term for force in self._forces).to(device, dtype)
        self._parameters = {
            name: torch.tensor(value, dtype=dtype, device=device)
            for name, value in global_parameters(self._system).items()
        }
        self._lock = threading.Lock()
        self._compiled: CompiledEnergy | None = None
        if compile:
            size = compiled_block_size(n_atoms, dtype, device, memory)
            if size >= LEAST_COMPILED:
                self._compiled = CompiledEnergy(self._total, n_atoms, size)
            else:
                logger.warning(
                    "not compiled, operations stay single: blocks of %d conformations of %d atoms "
                    "fill the memory allowed",
                    size,
                    n_atoms,
                )

    @classmethod
    def from_system(
        cls,
        system: openmm.System,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        compile: bool = False,
        *,
        positions: Any = None,
        force_groups: Iterable[int] | None = None,
        memory: int = 2**30,
        tolerance: tuple[float, float] | None = None,
    ) -> Self:
        """Read a System, and refuse to differ from OpenMM.

        Parameters
        ----------
        system
            The System: without periodic box, cutoffs and virtual sites; it is copied. Constraints
            carry no energy and are left to the dynamics.
        dtype
            ``torch.float64`` or ``torch.float32``.
        device
            Where positions are and energies will be; the CPU by default.
        compile
            Fuse all operations by torch's compiler at the first batch that is large enough. That
            takes up to minutes the first time on a machine (seconds later: torch caches it on
            disk) and pays from about a million evaluations on. Without a C++ compiler (or Triton
            on a GPU) a warning is logged and operations stay single; :attr:`is_compiled` tells.
        positions
            A conformation [N, 3] in nm (or a Quantity) on which, perturbed, energies are compared
            with OpenMM's, besides atoms scattered at random.
        force_groups
            Force groups (0 to 31) that count; all by default.
        memory
            Bytes that one block of a batch may take, its derivatives included.
        tolerance
            Largest relative errors of energies and forces in the check: (1e-10, 1e-8) in float64,
            (1e-3, 1e-3) in float32.

        Raises
        ------
        TypeError
            If `system` is no System.
        NotCovered
            A ValueError that names the Force, and what in it has no counterpart here.
        Disagreement
            A ValueError: energies or forces are not OpenMM's within `tolerance`.
        TooLarge
            A ValueError: one conformation does not fit `memory`.
        ValueError
            If the System is empty or has virtual sites, or another argument is out of range.
        openmm.OpenMMException
            If OpenMM itself refuses the System.
        """
        if not isinstance(system, openmm.System):
            raise TypeError(f"system: expected an openmm.System, got {type(system).__name__}")
        n_atoms = system.getNumParticles()
        if n_atoms == 0:
            raise ValueError("system: expected at least one particle, got none")
        for index in range(n_atoms):
            if system.isVirtualSite(index):
                raise ValueError(
                    f"system: virtual sites are not supported, particle {index} is one"
                )
        if dtype not in _TOLERANCES:
            raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {dtype}")
        fuse, budget = check_flag(compile), check_bytes(memory)
        needed = bytes_per_conformation(n_atoms, dtype)
        if budget < needed:
            raise TooLarge(
                f"memory: expected at least {needed} bytes, which one conformation of {n_atoms} "
                f"atoms takes, got {budget}"
            )
        where, groups = check_device(device), check_groups(force_groups)
        checked = cls(system, torch.float64, torch.device("cpu"), False, groups, budget)
        exact = dtype == torch.float64
        checked.check(positions, tolerance=tolerance if exact else None)
        if exact and where == checked.device and not fuse:
            return checked
        potential = cls(system, dtype, where, fuse, groups, budget)
        if exact and where == checked.device:
            potential.agreement = checked.agreement
        else:
            potential.check(positions, tolerance=tolerance)
        return potential

    # -- what it is ----------------------------------------------------------------------------

    @property
    def is_compiled(self) -> bool:
        """Whether batches run fused; False until the first large batch, and without compiler."""
        return self._compiled is not None and self._compiled.is_ready

    @property
    def compile_seconds(self) -> float:
        """Time spent in compilation so far."""
        return 0.0 if self._compiled is None else self._compiled.seconds

    @property
    def global_parameters(self) -> dict[str, float]:
        """The global parameters of the System and their present values."""
        return {name: float(value) for name, value in self._parameters.items()}

    def set_global_parameter(self, name: str, value: Any) -> None:
        """Change a global parameter, as ``Context.setParameter`` does.

        Raises
        ------
        ValueError
            If there is no such parameter, or the value is not finite.
        """
        if name not in self._parameters:
            known = ", ".join(sorted(self._parameters)) or "none"
            raise ValueError(f"name: expected a global parameter ({known}), got {name!r}")
        if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
            raise ValueError(f"value: expected a finite number, got {value!r}")
        self._parameters[name] = torch.tensor(float(value), dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        kind = "compiled" if self._compiled is not None else "eager"
        names = ", ".join(force.name for force in self._forces)
        return (
            f"TorchPotential({self.event_shape[0]} atoms, {self.dtype}, {self.device}, {kind}: "
            f"{names})"
        )

    # -- energies ------------------------------------------------------------------------------

    def energy(self, x: Tensor) -> Tensor:
        """Potential energies, differentiable to any order.

        Parameters
        ----------
        x
            Positions [B, N, 3] in nm, of the potential's dtype and device.

        Returns
        -------
        Tensor [B]
            Energies in kJ/mol.

        Raises
        ------
        TypeError, ValueError
            If `x` is not a floating tensor [B, N, 3] of this dtype on this device.
        """
        self._check(x)
        if x.requires_grad and torch.is_grad_enabled():
            return cast(Tensor, _Energy.apply(x, self))
        return self._evaluate(x, with_forces=False)[0]

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Potential energies and forces, detached.

        Parameters
        ----------
        x
            Positions [B, N, 3] in nm.

        Returns
        -------
        energies : Tensor [B]
            In kJ/mol.
        forces : Tensor [B, N, 3]
            In kJ/(mol nm).

        Raises
        ------
        TypeError, ValueError
            As :meth:`energy`.
        """
        self._check(x)
        energies, forces = self._evaluate(x, with_forces=True)
        assert forces is not None
        return energies, forces

    def _check(self, x: Tensor) -> None:
        self.check_shape(x)
        if x.dtype != self.dtype or x.device != self.device:
            raise ValueError(
                f"x: expected {self.dtype} on {self.device}, got {x.dtype} on {x.device}"
            )

    def _total(self, y: Tensor, *parameters: Tensor) -> Tensor:
        """Energies [B] of positions [3, N, B]: what is differentiated, traced and compiled."""
        named = dict(zip(self._parameters, parameters, strict=True))
        frame = Frame(y, self._pairs)
        energy = y.new_zeros(y.shape[-1])
        for force in self._forces:
            energy = energy + force.term.energy(frame, named)
        return energy

    def _block_size(self) -> int:
        return block_size(self.event_shape[0], self.dtype, self.device, self.memory)

    # Outside inference mode and autocast: neither may take the derivative or the digits away.
    @torch.inference_mode(False)
    def _evaluate(self, x: Tensor, with_forces: bool) -> tuple[Tensor, Tensor | None]:
        x = x.clone() if x.is_inference() else x.detach()
        energies = x.new_empty(len(x))
        forces = torch.empty_like(x) if with_forces else None
        compiled = self._compiled if self._compiled and self._compiled.wants(len(x)) else None
        size = self._block_size() if compiled is None else compiled.block_size
        parameters = tuple(self._parameters.values())

        def run(rows: slice) -> None:
            with torch.autocast(self.device.type, enabled=False):
                y = x[rows].permute(2, 1, 0).contiguous()
                if compiled is not None:
                    energy, slope = compiled(y, parameters, with_forces)
                else:
                    energy, slope = plain(self._total, y, parameters, with_forces)
            # Here and not for the whole batch: its temporaries would be as large as the batch.
            force = None if slope is None else -slope.permute(2, 1, 0)
            bad = settle_non_finite(energy, force)
            energies[rows] = energy
            if forces is not None and force is not None:
                forces[rows] = force
            with self._lock:
                self.n_non_finite += bad

        with torch.no_grad():
            share(run, list(slices(len(x), size)), threads_for(self.event_shape[0], self.device))
        with self._lock:
            self.n_evaluations += len(x)
        return energies, forces

    # -- OpenMM's word -------------------------------------------------------------------------

    def check(
        self,
        positions: Any = None,
        n_conformations: int = 4,
        tolerance: tuple[float, float] | None = None,
        seed: int = 0,
    ) -> list[ForceAgreement]:
        """Compare energies and forces with OpenMM's Reference platform, Force by Force.

        Parameters
        ----------
        positions
            [N, 3] in nm (or a Quantity): half the conformations are these, perturbed by 0.01 nm;
            the others, or all, are atoms scattered over a jittered lattice. [n, N, 3] are compared
            as they are.
        n_conformations
            How many.
        tolerance
            Largest relative errors of energies and forces; see :meth:`from_system`.
        seed
            Of the perturbations.

        Returns
        -------
        list of ForceAgreement
            The errors found, one item for each Force.

        Raises
        ------
        Disagreement
            If an error is larger, or a Force could not be compared because OpenMM's energy is
            finite at none of the conformations.
        ValueError
            If an argument is out of range.
        """
        limits = check_tolerance(_TOLERANCES[self.dtype] if tolerance is None else tolerance)
        x = choose_conformations(self.event_shape[0], positions, n_conformations, seed)
        indices = [force.index for force in self._forces]
        now = self.global_parameters
        found = compare(self._system, indices, now, self._one_force, x)
        judge(found, limits, len(x), None)
        if now:  # what the present values switch off must be right as well
            other = {name: 0.7 * value + 0.2 for name, value in now.items()}
            judge(compare(self._system, indices, other, self._one_force, x), limits, len(x), other)
        self.agreement = found
        return found

    @torch.inference_mode(False)
    def _one_force(
        self, index: int, x: NDArray[np.float64], values: Mapping[str, float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Energies [n] and forces [n, N, 3] of a single Force."""
        term = next(force.term for force in self._forces if force.index == index)
        y = torch.tensor(x, dtype=self.dtype, device=self.device).permute(2, 1, 0).contiguous()

        def total(z: Tensor, *parameters: Tensor) -> Tensor:
            named = dict(zip(self._parameters, parameters, strict=True))
            return term.energy(Frame(z, self._pairs), named)

        parameters = tuple(y.new_tensor(values[name]) for name in self._parameters)
        with torch.autocast(self.device.type, enabled=False):
            energy, slope = plain(total, y, parameters, True)
        assert slope is not None
        forces = -slope.permute(2, 1, 0)
        return energy.double().cpu().numpy(), forces.double().cpu().numpy()

    # -- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {
            "xml": self._xml,
            "dtype": self.dtype,
            "device": str(self.device),
            "compile": self.compile_requested,
            "force_groups": self.force_groups,
            "memory": self.memory,
            "parameters": self.global_parameters,
            "agreement": self.agreement,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(  # type: ignore[misc]
            openmm.XmlSerializer.deserialize(state["xml"]),
            state["dtype"],
            torch.device(state["device"]),
            state["compile"],
            state["force_groups"],
            state["memory"],
        )
        for name, value in state["parameters"].items():
            self.set_global_parameter(name, value)
        self.agreement = state["agreement"]


class _Energy(torch.autograd.Function):
    """U(x), whose gradient is computed with it, block by block, and kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, potential: TorchPotential) -> Tensor:
        energies, forces = potential.energy_and_forces(x)
        ctx.save_for_backward(x, forces, energies.isfinite())
        # The parameters of now, should they change before the derivative is asked for.
        ctx.total, ctx.parameters = potential._total, tuple(potential._parameters.values())
        return energies

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        x, forces, finite = ctx.saved_tensors
        # A non-finite row may well come with a gradient of inf or NaN: zero force, zero gradient.
        weight = torch.where(finite, grad_outputs[0], 0.0)[:, None, None]
        if not torch.is_grad_enabled():
            return -weight * forces, None
        # Higher derivatives were asked for: the same gradient, now with its graph.
        rows = finite.nonzero().flatten()
        kept = x.index_select(0, rows)
        with torch.autocast(x.device.type, enabled=False):
            energy = ctx.total(kept.permute(2, 1, 0), *ctx.parameters)
        if not energy.requires_grad:
            return -weight * forces, None
        (slope,) = torch.autograd.grad(energy.sum(), kept, create_graph=True)
        return weight * torch.zeros_like(x).index_add(0, rows, slope), None
