"""Whether kernels fit the sampler that applies them: constants, energies, domains, step sizes."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies as evaluate
from openmm_tsf.sampling.kernels.base import Kernel, SteerableMap
from openmm_tsf.sampling.kernels.dynamics import DynamicsKernel
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.sampling.tuning import HasStepSize
from openmm_tsf.systems.molecule import MolecularSystem

#: The number of walkers on which two potentials are compared.
_N_COMPARED = 4


def with_members(kernels: Iterable[Kernel]) -> Iterator[tuple[str, Kernel]]:
    """Yield kernels by name, and their members as ``"mixture.member"``, to any depth."""
    for kernel in kernels:
        yield kernel.name, kernel
        for name, member in with_members(getattr(kernel, "members", ())):
            yield f"{kernel.name}.{name}", member


def member_infos(infos: Mapping[str, KernelInfo]) -> Iterator[tuple[str, KernelInfo]]:
    """Yield counts under the names of :func:`with_members`."""
    for name, info in infos.items():
        yield name, info
        for member, part in member_infos(info.members):
            yield f"{name}.{member}", part


def check_distinct(kernels: Iterable[Kernel]) -> None:
    """Refuse a kernel that occurs in two places: it would be tuned, and count its calls, twice."""
    names: dict[int, str] = {}
    for name, kernel in with_members(kernels):
        other = names.setdefault(id(kernel), name)
        if other != name:
            raise ValueError(
                f"kernels: expected each in one place, got the same object as {other} and {name}; "
                "make a second one"
            )


def check_constants(kernels: Iterable[Kernel], potential: Potential) -> None:
    """Refuse kernels made for another Boltzmann constant, or whose potential is."""
    expected = potential.boltzmann_constant
    for name, kernel in with_members(kernels):
        for holder in (kernel, getattr(kernel, "potential", None)):
            constant = getattr(holder, "boltzmann_constant", expected)
            if not math.isclose(constant, expected, rel_tol=1e-9):
                raise ValueError(
                    f"kernels: {name} was made for the Boltzmann constant {constant!r}, expected "
                    f"the potential's, {expected!r} (in its energy unit per kelvin)"
                )


def check_domains(kernels: Iterable[Kernel]) -> None:
    """Refuse dynamics that may leave the domain of the coordinates in another kernel's flow."""
    named = list(with_members(kernels))
    flows = [(name, getattr(kernel, "flow", None)) for name, kernel in named]
    bounded = [name for name, flow in flows if getattr(flow, "coordinates", None) is not None]
    for name, kernel in named:
        if bounded and isinstance(kernel, DynamicsKernel) and kernel.flow is None:
            raise ValueError(
                f"kernels: {name} has flow=None and lets walkers leave the domain of the "
                f"coordinates (mirror images) in which {bounded[0]} works; make it with flow=flow"
            )


def check_constraints(kernels: Iterable[Kernel], molecule: MolecularSystem | None) -> None:
    """Refuse dynamics, and flows, of other constraints or another measure than the molecule's."""
    if molecule is None:
        return
    expected = molecule.constraints
    for name, kernel in with_members(kernels):
        layer = getattr(getattr(kernel, "flow", None), "coordinates", None)
        of = kernel if isinstance(kernel, DynamicsKernel) else layer
        if of is None:
            continue
        given = getattr(of, "constraints", None)
        if not (given is None if expected is None else expected.is_same_as(given)):
            n, got = (0 if c is None else c.n_constraints for c in (expected, given))
            raise ValueError(
                f"kernels: expected {name} with the {n} constraints of the molecule, got {got} "
                "others; make it with flow=flow or constraints=molecule.constraints"
            )
        if expected is not None and of.measure != molecule.measure:
            raise ValueError(
                f"kernels: expected {name} with the molecule's measure, {molecule.measure!r}, got "
                f"{of.measure!r}"
            )


def check_pose(
    kernels: Iterable[Kernel], flow: SteerableMap, molecule: MolecularSystem | None
) -> None:
    """Refuse flows of a molecule whose energy depends on its position or orientation."""
    flows = [flow, *(getattr(kernel, "flow", None) for _, kernel in with_members(kernels))]
    if molecule is not None and any(
        isinstance(item, AugmentedFlow) and item.coordinates is not None for item in flows
    ):
        molecule.check_pose_independent()


def check_step_sizes(kernels: Iterable[Kernel]) -> None:
    """Refuse step sizes ``sigma`` that are not a Tensor [R] > 0, or have no counts per rung."""
    for name, kernel in with_members(kernels):
        if not isinstance(kernel, HasStepSize):
            continue
        sigma: Any = kernel.sigma
        shape = (len(kernel.temperatures),)
        if not isinstance(sigma, torch.Tensor):
            raise TypeError(
                f"kernels: expected the attribute sigma of {name} to be a Tensor of "
                f"{shape[0]} step sizes, one for each rung, got {sigma!r}"
            )
        positive = bool(((sigma > 0) & sigma.isfinite()).all())
        if tuple(sigma.shape) != shape or not sigma.is_floating_point() or not positive:
            raise ValueError(
                f"kernels: expected the attribute sigma of {name} to be {shape[0]} positive step "
                f"sizes, one for each rung, got {sigma!r}"
            )
        if tuple(kernel.counts_shape) != shape:
            raise ValueError(
                f"kernels: {name} has step sizes, expected counts by rung {shape} to tune them "
                f"by, got counts of shape {tuple(kernel.counts_shape)}"
            )


def check_velocities(kernels: Iterable[Kernel], state: WalkerState) -> None:
    """Refuse walkers without velocities where a kernel needs them."""
    for name, kernel in with_members(kernels):
        needed = isinstance(kernel, DynamicsKernel) and kernel.needs_velocities
        if needed and state.velocities is None:
            raise ValueError(
                f"velocities: expected some of shape {tuple(state.x.shape)} for the kernel {name}, "
                "got None; they are drawn by default only where a molecule has masses"
            )


def check_potentials(kernels: Iterable[Kernel], potential: Potential, state: WalkerState) -> None:
    """Compare the energies of the kernels' potentials with those that the walkers carry.

    On a few walkers of the hottest rung, where they differ most from each other. Another object for
    the same energy is allowed, with the differences of precision that platforms have: a relative
    1e-6, or 0.001 kT.
    """
    x, expected = state.x[:_N_COMPARED, -1], state.energy[:_N_COMPARED, -1]
    compared = {id(potential)}
    for name, kernel in with_members(kernels):
        other: Any = getattr(kernel, "potential", None)
        if not hasattr(other, "energy") or id(other) in compared:
            continue
        compared.add(id(other))
        with torch.no_grad():
            energy = evaluate.energy(other, x)
        kt = potential.boltzmann_constant * kernel.temperatures[-1]
        wrong = ~torch.isclose(energy, expected, rtol=1e-6, atol=1e-3 * kt)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"kernels: the potential of {name} gives walker {row} the energy "
                f"{energy[row].item()!r}, expected {expected[row].item()!r} as the sampler's "
                "potential gives; make the kernel with the sampler's potential"
            )
