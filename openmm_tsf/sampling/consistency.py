"""Whether kernels belong to the sampler that applies them: constants, energies, domains."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies as evaluate
from openmm_tsf.sampling.kernels.base import Kernel
from openmm_tsf.sampling.kernels.dynamics import Leg
from openmm_tsf.sampling.state import KernelInfo, WalkerState

#: Walkers on which two potentials are compared.
_ROWS = 4


def with_members(kernels: Iterable[Kernel]) -> Iterator[tuple[str, Kernel]]:
    """Kernels by name, and what they are made of as ``"mixture.member"``, to any depth."""
    for kernel in kernels:
        yield kernel.name, kernel
        for name, member in with_members(getattr(kernel, "members", ())):
            yield f"{kernel.name}.{name}", member


def member_infos(infos: Mapping[str, KernelInfo]) -> Iterator[tuple[str, KernelInfo]]:
    """Counts under the names of :func:`with_members`."""
    for name, info in infos.items():
        yield name, info
        for member, part in member_infos(info.members):
            yield f"{name}.{member}", part


def check_distinct(kernels: Iterable[Kernel]) -> None:
    """Refuse a kernel that occurs in two places: it would be tuned, and count its calls, twice.

    Raises
    ------
    ValueError
        If one does.
    """
    seen: dict[int, str] = {}
    for name, kernel in with_members(kernels):
        other = seen.setdefault(id(kernel), name)
        if other != name:
            raise ValueError(
                f"kernels: expected each in one place, got the same object as {other} and {name}; "
                "make a second one"
            )


def check_constants(kernels: Iterable[Kernel], potential: Potential) -> None:
    """Refuse kernels made for another Boltzmann constant; those that have none are let pass.

    Raises
    ------
    ValueError
        If a kernel's constant, or that of its potential, is not the potential's.
    """
    expected = potential.boltzmann_constant
    for name, kernel in with_members(kernels):
        for owner in (kernel, getattr(kernel, "potential", None)):
            constant = getattr(owner, "boltzmann_constant", None)
            if constant is not None and not math.isclose(constant, expected, rel_tol=1e-9):
                raise ValueError(
                    f"kernels: {name} was made for the Boltzmann constant {constant!r}, expected "
                    f"the potential's, {expected!r} (in its energy unit per kelvin)"
                )


def check_domains(kernels: Iterable[Kernel]) -> None:
    """Refuse legs that may leave the domain of the coordinates which another kernel's flow has.

    Raises
    ------
    ValueError
        If a leg has no flow and another kernel has one with internal coordinates.
    """
    everyone = list(with_members(kernels))
    bounded = [
        name
        for name, kernel in everyone
        if getattr(getattr(kernel, "flow", None), "coordinates", None) is not None
    ]
    for name, kernel in everyone:
        if bounded and isinstance(kernel, Leg) and kernel.flow is None:
            raise ValueError(
                f"kernels: {name} has flow=None and lets walkers leave the domain of the "
                f"coordinates (mirror images) in which {bounded[0]} works; make it with flow=flow"
            )


def check_step_sizes(kernels: Iterable[Kernel]) -> None:
    """Refuse step sizes ``sigma`` that cannot be tuned and recorded.

    Raises
    ------
    TypeError, ValueError
        If ``sigma`` is no Tensor [R] of positive numbers, or the kernel does not count by rung.
    """
    for name, kernel in with_members(kernels):
        if not hasattr(kernel, "sigma"):
            continue
        sigma, shape = kernel.sigma, (len(kernel.temperatures),)
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
    """Refuse walkers without velocities where a kernel needs some.

    Raises
    ------
    ValueError
        If one does.
    """
    for name, kernel in with_members(kernels):
        if state.velocities is None and isinstance(kernel, Leg) and kernel.needs_velocities:
            raise ValueError(
                f"velocities: expected some of shape {tuple(state.x.shape)} for the kernel {name}, "
                "got None; they are drawn by default only where a molecule has masses"
            )


def check_potentials(kernels: Iterable[Kernel], potential: Potential, state: WalkerState) -> None:
    """Compare the energies of kernels' own potentials with those that the walkers carry.

    On a few walkers of the uppermost rung, where they are spread the most. Another object for the
    same energy is let pass, with the differences of precision that platforms have: a relative 1e-6,
    or 0.001 kT.

    Raises
    ------
    ValueError
        If a kernel works on another energy.
    """
    x, energy = state.x[:_ROWS, -1], state.energy[:_ROWS, -1]
    compared: set[int] = {id(potential)}
    for name, kernel in with_members(kernels):
        own: Any = getattr(kernel, "potential", None)
        if not hasattr(own, "energy") or id(own) in compared:
            continue
        compared.add(id(own))
        with torch.no_grad():
            found = evaluate.energy(own, x)
        kt = potential.boltzmann_constant * kernel.temperatures[-1]
        wrong = ~torch.isclose(found, energy, rtol=1e-6, atol=1e-3 * kt)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"kernels: the potential of {name} gives walker {row} the energy "
                f"{found[row].item()!r}, expected {energy[row].item()!r} as the sampler's potential"
                " gives; make the kernel with the sampler's potential"
            )
