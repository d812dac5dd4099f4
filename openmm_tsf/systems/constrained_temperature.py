"""The terms of the temperature of frames with constraints, from the forces on them.

As :mod:`openmm_tsf.systems.configurational_temperature`, in the internal coordinates u that
constraints leave. Their density is exp(-U/kT) w(u), w = |Z|^(1/2) or one by the measure, in volume
coordinates:

    kT = <sum m (dU/du)^2> / <sum m d^2 U/du^2 + m dU/du dln w/du + dm/du dU/du>

The weights m are squared scales of u, times 1 - u^2 for cosines, whose derivatives are not finite
where an angle is straight.
"""

import torch
from torch import Tensor

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.coordinates.zmatrix import ANGLE
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.random import seeded_generator

#: Size of a difference, in standard deviations of the coordinates; torsions move by no more than
#: this many radians in one.
_FRACTION, _LARGEST_SCALE = 3e-3, 0.3


def constrained_terms(molecule: MolecularSystem, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return numerators and denominators [F] of kT in frames x [F, N, 3] on the manifold.

    The third result is by how much the denominators change with a tenth of the difference. None for
    a molecule without internal coordinates.
    """
    parts = molecule.topology, molecule.positions
    try:
        layer = InternalCoordinates.from_topology(*parts, **molecule.constraint_options)
    except ValueError:
        return None
    # One thread of the CPU platform is fast for every Force, and always gives the same.
    settings = {"Threads": "1", "DeterministicForces": "true"}
    with OpenMMPotential(molecule.system, "CPU", settings, n_contexts=1) as potential:
        return _terms(layer, potential, x)


def _terms(
    layer: InternalCoordinates, potential: OpenMMPotential, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    u, _ = layer.inverse_and_log_det(x)
    scale, pose = u.std(dim=0).clamp(max=_LARGEST_SCALE), layer.pose(x)

    def gradient(scaled: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of U and of ln w, both [F, d]."""
        leaf = scaled.clone().requires_grad_()
        at = layer.from_pose(scale * leaf, *pose)
        forces = potential.energy_and_forces(at.detach())[1]
        (of_energy,) = torch.autograd.grad(at, leaf, -forces, retain_graph=True)
        if layer.is_constant_log_det:
            return of_energy, torch.zeros_like(of_energy)
        (of_weight,) = torch.autograd.grad(layer.log_abs_det(scale * leaf, at).sum(), leaf)
        return of_energy, of_weight

    scaled, is_cosine = u / scale, layer.kinds == ANGLE
    of_energy, of_weight = gradient(scaled)
    weight = torch.where(is_cosine, 1 - u.square(), 1.0)
    of_cosines = torch.where(is_cosine, -2 * u * scale, 0.0)
    mixed = (of_energy * (weight * of_weight + of_cosines)).sum(dim=1)
    signs = torch.randint(0, 2, u.shape, generator=seeded_generator(1), dtype=u.dtype, device="cpu")
    direction = (2 * signs - 1) * weight.sqrt()

    def laplacian_with(step: float) -> Tensor:
        above, below = (gradient(scaled + h * direction)[0] for h in (step, -step))
        return ((above - below) * direction).sum(dim=1) / (2 * step) + mixed

    laplacian = laplacian_with(_FRACTION)
    change = (laplacian_with(0.1 * _FRACTION) - laplacian).abs()
    return (weight * of_energy.square()).sum(dim=1), laplacian, change
