"""An implicit-solvent OpenMM System as one batched, differentiable torch function."""

import copy
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isfinite
from numbers import Real
from typing import Any, Self, cast

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_tsf.potentials.arguments import TOLERANCES, TorchSettings, check_settings
from openmm_tsf.potentials.blocks import bytes_per_conformation, evaluate_eagerly
from openmm_tsf.potentials.energy_function import SystemEnergy
from openmm_tsf.potentials.evaluation import BatchEvaluator
from openmm_tsf.potentials.molecular import MolecularPotential, check_system
from openmm_tsf.potentials.verification import (
    ForceAgreement,
    check_tolerance,
    choose_conformations,
    compare_forces,
    require_agreement,
)
from openmm_tsf.units import in_md_units
from openmm_tsf.utils.validation import unwrap_scalar


class TooLarge(ValueError):
    """One conformation of a System does not fit the memory allowed."""


class TorchPotential(MolecularPotential):
    """The potential energy of an OpenMM System, in torch, for whole batches.

    Energies are in kJ/mol, positions in nm, forces in kJ/(mol nm). The energy is differentiable to
    any order. The Forces are read from the System and their energies written out in torch
    operations, on the CPU or a GPU, and compared Force by Force with OpenMM's Reference platform
    before the object exists (see :meth:`check`).

    An energy is +inf with zero force, and counted in ``n_non_finite``, where positions, energy or a
    force are not finite.

    Batches of any size are evaluated block by block within `memory`, gradients included; only
    second and higher derivatives keep the whole batch's graph. Derivatives are those of
    ``torch.autograd``; the transforms of ``torch.func`` are not supported. An angle of exactly 180
    degrees has no plane to bend in: its force is zero, as in OpenMM, and so is its part of the
    second derivative.

    Construct it with :meth:`from_system`.

    Attributes
    ----------
    event_shape, boltzmann_constant, n_evaluations, n_non_finite
        See :class:`~openmm_tsf.potentials.base.Potential`; k_B is in kJ/(mol K).
    dtype, device : torch.dtype, torch.device
        Of positions, energies and forces.
    force_groups, memory, compile_requested
        As given to :meth:`from_system`.
    agreement : list of ForceAgreement
        The result of the last :meth:`check`.

    Examples
    --------
    >>> import openmm, torch
    >>> from openmm_tsf import TorchPotential
    >>> system, bond = openmm.System(), openmm.HarmonicBondForce()
    >>> _ = system.addParticle(12.0), system.addParticle(12.0)
    >>> _ = bond.addBond(0, 1, 0.1, 1000.0), system.addForce(bond)
    >>> potential = TorchPotential.from_system(system)
    >>> x = torch.tensor([[[0.0, 0.0, 0.0], [0.2, 0.0, 0.0]]], dtype=torch.float64)
    >>> energies, forces = potential.energy_and_forces(x)
    >>> round(energies[0].item(), 9), round(forces[0, 0, 0].item(), 9)
    (5.0, 100.0)
    >>> [item.name for item in potential.agreement]
    ['HarmonicBondForce']
    """

    @torch.inference_mode(False)  # constants made in inference mode could not be differentiated
    def __init__(self, system: openmm.System, settings: TorchSettings) -> None:
        # Before the System is serialized: some Forces that are not covered cannot be.
        energy = SystemEnergy(system, settings.force_groups)
        self._xml = openmm.XmlSerializer.serialize(system)
        self._system = openmm.XmlSerializer.deserialize(self._xml)
        self._settings = settings
        self.dtype, self.device = settings.dtype, settings.device
        self.force_groups, self.memory = settings.force_groups, settings.memory
        self.compile_requested = settings.compile
        self.event_shape = (system.getNumParticles(), 3)
        self.n_evaluations = 0
        self._n_non_finite: int | Tensor = 0
        self.agreement: list[ForceAgreement] = []
        self._energy = energy.to(settings.device, settings.dtype)
        self._parameters = {
            name: torch.tensor(value, dtype=settings.dtype, device=settings.device)
            for name, value in energy.default_parameters.items()
        }
        self._single: BatchEvaluator | None = None  # made when it is first used
        self._evaluator = BatchEvaluator(energy, self.event_shape[0], settings)
        self._lock = threading.Lock()

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
        """Read a System, and compare the energies of its Forces with OpenMM's.

        Parameters
        ----------
        system
            The System: without periodic box and virtual sites; it is copied. Energies with a cutoff
            jump at it, as in OpenMM; derivatives are those on either side. Constraints
            have no energy and are left to the dynamics.
        dtype
            ``torch.float64`` or ``torch.float32``.
        device
            Of positions and energies; the CPU by default.
        compile
            Compile all operations at the first batch that is large enough. That takes up to
            minutes the first time on a machine (seconds later: torch caches it on disk) and pays
            from about a million evaluations on. Without a C++ compiler (or Triton on a GPU) a
            warning is logged and energies are evaluated eagerly; see :attr:`is_compiled`.
        positions
            A conformation [N, 3] in nm (or a Quantity) on which, perturbed, energies are compared
            with OpenMM's, besides atoms placed at random.
        force_groups
            Force groups (0 to 31) that are included; all by default.
        memory
            Bytes that one block of a batch may take, its derivatives included.
        tolerance
            Largest relative errors of energies and forces in the comparison: (1e-10, 1e-8) in
            float64, (1e-3, 1e-3) in float32.

        Raises
        ------
        NotCovered
            A ValueError that names the Force, and what in it has no counterpart here.
        Disagreement
            A ValueError: energies or forces are not OpenMM's within `tolerance`.
        TooLarge
            A ValueError: one conformation does not fit `memory`.
        ValueError
            If the System is empty or has virtual sites.
        """
        check_system(system)
        settings = check_settings(dtype, device, compile, force_groups, memory)
        n_atoms = system.getNumParticles()
        needed = bytes_per_conformation(n_atoms, dtype)
        if settings.memory < needed:
            needed_by = f"{needed} bytes, which one conformation of {n_atoms} atoms takes"
            raise TooLarge(f"memory: expected at least {needed_by}, got {settings.memory}")
        # Always checked in double precision: errors of single precision would hide wrong terms.
        cpu = torch.device("cpu")
        exact = replace(settings, dtype=torch.float64, device=cpu, compile=False)
        reference = cls(system, exact)
        is_exact = (settings.dtype, settings.device) == (exact.dtype, exact.device)
        reference.check(positions, tolerance=tolerance if dtype == torch.float64 else None)
        if settings == exact:
            return reference
        potential = cls(system, settings)
        if is_exact:
            potential.agreement = reference.agreement
        else:
            potential.check(positions, tolerance=tolerance)
        return potential

    @property
    def is_compiled(self) -> bool:
        """Whether batches run compiled; False until the first large batch, and without compiler."""
        compiled = self._evaluator.compiled
        return compiled is not None and compiled.is_ready

    @property
    def compile_seconds(self) -> float:
        """Time spent in compilation so far."""
        evaluators = [self._evaluator] if self._single is None else [self._evaluator, self._single]
        return sum(e.compiled.seconds for e in evaluators if e.compiled is not None)

    @property
    def global_parameters(self) -> dict[str, float]:
        """The global parameters of the System and their present values."""
        return {name: float(value) for name, value in self._parameters.items()}

    def set_global_parameter(self, name: str, value: Any) -> None:
        """Change a global parameter, as ``Context.setParameter`` does.

        The value of a Quantity is taken in OpenMM's unit system (nm, kJ/mol, ps, K, rad; bar).
        """
        if name not in self._parameters:
            known = ", ".join(sorted(self._parameters)) or "none"
            raise ValueError(f"name: expected a global parameter ({known}), got {name!r}")
        number = unwrap_scalar(in_md_units(value))
        if isinstance(number, bool) or not isinstance(number, Real) or not isfinite(number):
            raise ValueError(f"value: expected a finite number, got {value!r}")
        self._parameters[name] = torch.tensor(float(number), dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        mode = "eager" if self._evaluator.compiled is None else "compiled"
        names = ", ".join(force.name for force in self._energy.forces)
        settings = f"{self.event_shape[0]} atoms, {self.dtype}, {self.device}, {mode}"
        return f"TorchPotential({settings}: {names})"

    def check_positions(self, x: Tensor) -> None:
        """Refuse anything but a tensor [B, N, 3] of the potential's dtype on its device."""
        super().check_positions(x)
        if x.dtype != self.dtype or x.device != self.device:
            expected = f"{self.dtype} on {self.device}"
            raise ValueError(f"x: expected {expected}, got {x.dtype} on {x.device}")

    def _differentiable_energy(self, x: Tensor) -> Tensor:
        parameters = tuple(self._parameters.values())
        return cast(Tensor, _TorchEnergy.apply(x, self, self._energy, parameters))

    def _evaluate(self, x: Tensor, with_forces: bool) -> tuple[Tensor, Tensor | None]:
        parameters = tuple(self._parameters.values())
        energies, forces, n_non_finite = self._evaluator(x, parameters, with_forces)
        with self._lock:
            self.n_evaluations += len(x)
            self._n_non_finite += n_non_finite
        return energies, forces

    @property
    def n_non_finite(self) -> int:  # type: ignore[override]
        """The number of energies computed so far that were not finite; a GPU is waited for."""
        return int(self._n_non_finite)

    def single_precision_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies [B] and forces [B, N, 3] of x, computed in float32.

        On CPUs they take half of the time. A Metropolised trajectory stays exact with them: any
        function of x gives reversible, volume-preserving steps, and the energies at its ends decide
        (here in double precision). They have the dtype of x.
        """
        self.check_positions(x)
        with self._lock:  # threads that share a batch make one evaluator, compiled once
            if self._single is None:
                single = replace(self._settings, dtype=torch.float32)
                energy = copy.deepcopy(self._energy).to(single.dtype)
                self._single = BatchEvaluator(energy, self.event_shape[0], single)
        parameters = tuple(value.float() for value in self._parameters.values())
        energies, forces, n_non_finite = self._single(x.float(), parameters, True)
        assert forces is not None
        with self._lock:
            self.n_evaluations += len(x)
            self._n_non_finite += n_non_finite
        return energies.to(x), forces.to(x)

    def check(
        self,
        positions: Any = None,
        n_conformations: int = 4,
        tolerance: tuple[float, float] | None = None,
        seed: int = 0,
    ) -> list[ForceAgreement]:
        """Return the errors of each Force's energies and forces against OpenMM's Reference.

        Parameters
        ----------
        positions
            [N, 3] in nm (or a Quantity): half the conformations are these, perturbed by 0.01 nm;
            the others, or all, are atoms on the sites of a perturbed lattice. [n, N, 3] are
            compared as they are.
        n_conformations, seed
            Number of conformations, and seed of the perturbations.
        tolerance
            Largest relative errors of energies and forces; see :meth:`from_system`.

        Raises
        ------
        Disagreement
            If an error is larger, or a Force could not be compared because OpenMM's energy is
            finite at none of the conformations.
        """
        limits = check_tolerance(TOLERANCES[self.dtype] if tolerance is None else tolerance)
        x = choose_conformations(self.event_shape[0], positions, n_conformations, seed)
        indices = [force.index for force in self._energy.forces]
        present = self.global_parameters
        agreement = compare_forces(self._system, indices, present, self._one_force, x)
        require_agreement(agreement, limits, len(x))
        if present:  # what the present values switch off must be right as well
            other = {name: 0.7 * value + 0.2 for name, value in present.items()}
            at_other = compare_forces(self._system, indices, other, self._one_force, x)
            require_agreement(at_other, limits, len(x), other)
        self.agreement = agreement
        return agreement

    @torch.inference_mode(False)
    def _one_force(
        self, index: int, x: NDArray[np.float64], parameters: Mapping[str, float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the energies [n] and forces [n, N, 3] of a single Force."""
        y = torch.tensor(x, dtype=self.dtype, device=self.device).permute(2, 1, 0).contiguous()

        def function(y: Tensor, *values: Tensor) -> Tensor:
            return self._energy.of_force(index, y, *values)

        values = tuple(y.new_tensor(parameters[name]) for name in self._parameters)
        with torch.autocast(self.device.type, enabled=False):
            energy, gradient = evaluate_eagerly(function, y, values, with_forces=True)
        assert gradient is not None
        forces = -gradient.permute(2, 1, 0)
        return energy.double().cpu().numpy(), forces.double().cpu().numpy()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "xml": self._xml,
            "settings": self._settings,
            "parameters": self.global_parameters,
            "agreement": self.agreement,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        TorchPotential.__init__(
            self, openmm.XmlSerializer.deserialize(state["xml"]), state["settings"]
        )
        for name, value in state["parameters"].items():
            self.set_global_parameter(name, value)
        self.agreement = state["agreement"]


class _TorchEnergy(torch.autograd.Function):
    """U(x), whose gradient is computed with it, block by block, and kept.

    `parameters` are those at the time of the energy, should they change before its gradient is
    taken.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        potential: TorchPotential,
        function: SystemEnergy,
        parameters: tuple[Tensor, ...],
    ) -> Tensor:
        energies, forces = potential.energy_and_forces(x)
        ctx.save_for_backward(x, forces, energies.isfinite())
        ctx.function, ctx.parameters = function, parameters
        return energies

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        x, forces, finite = ctx.saved_tensors
        # A non-finite row may well come with a gradient of inf or NaN: zero force, zero gradient.
        weight = torch.where(finite, grad_outputs[0], 0.0)[:, None, None]
        if not torch.is_grad_enabled():
            return -weight * forces, None, None, None
        # For higher derivatives: the same gradient, now with its graph.
        rows = finite.nonzero().flatten()
        kept = x.index_select(0, rows)
        with torch.autocast(x.device.type, enabled=False):
            energy = ctx.function(kept.permute(2, 1, 0), *ctx.parameters)
        if not energy.requires_grad:
            return -weight * forces, None, None, None
        (gradient,) = torch.autograd.grad(energy.sum(), kept, create_graph=True)
        whole = torch.zeros_like(x).index_add(0, rows, gradient)
        return weight * whole, None, None, None
