"""Whether kernels belong to the sampler that applies them: constants, energies, domains."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import evaluate
from openmm_tsf.sampling.state import Kernel, WalkerState

#: Walkers on which two potentials are compared.
_ROWS = 4


def with_members(kernels: Iterable[Kernel]) -> Iterator[tuple[str, Kernel]]:
    """Kernels by name, and what they are made of as ``"mixture.member"``, to any depth."""
    for kernel in kernels:
        yield kernel.name, kernel
        for name, member in with_members(getattr(kernel, "members", ())):
            yield f"{kernel.name}.{name}", member


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
