"""Positions and velocities of a host on the manifold of its constraints."""

import torch
from torch import Generator, Tensor

from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.sampling.kernels.base import SteerableMap
from openmm_tsf.sampling.kernels.rattle import Rattle
from openmm_tsf.systems.constrained import LARGEST_DEVIATION
from openmm_tsf.units import KB


def constraints_of(flow: SteerableMap) -> Constraints | None:
    """Return the constraints of a flow in float64 on the CPU; None without any."""
    constraints: Constraints | None = getattr(flow.coordinates, "constraints", None)
    if constraints is None or not constraints.n_constraints:
        return None
    return Constraints.from_config(constraints.to_config(), constraints.n_atoms)


def project_positions(constraints: Constraints, x: Tensor) -> Tensor:
    """Return x [B, N, 3] in nm with the distances that dynamics hold to a tolerance.

    ValueError if one is off by more: these positions are of no dynamics with the constraints.
    """
    relative = constraints.deviations(x).abs() / constraints.lengths
    if not bool((relative <= LARGEST_DEVIATION).all()):
        raise ValueError(
            f"sampler_state: expected the constrained distances of the System, to "
            f"{LARGEST_DEVIATION:g} of them, got positions with one that is off by "
            f"{float(relative.max()):.2g} of it; start with dynamics, or minimise"
        )
    return constraints.project(x)


def carry_velocities(
    constraints: Constraints,
    velocities: Tensor,
    before: Tensor,
    after: Tensor,
    kelvin: float,
    generator: Generator,
) -> Tensor:
    """Return velocities [B, N, 3] in nm/ps, tangent at x `before`, made tangent at x `after`.

    Their projection alone would be too cold. With the components across the manifold drawn they are
    those of free atoms, whatever the positions, and the projection of these is Maxwell-Boltzmann
    distributed in the tangent space.
    """
    rattle = Rattle(constraints)
    noise = torch.randn(
        velocities.shape, generator=generator, dtype=velocities.dtype, device=velocities.device
    )
    noise = noise * (KB * kelvin * constraints.inverse_masses).sqrt()[:, None]
    free = noise + rattle.project(velocities - noise, rattle.locate(before))
    return rattle.project(free, rattle.locate(after))
