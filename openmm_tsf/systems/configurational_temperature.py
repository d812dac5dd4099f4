"""The temperature of frames, from the forces on them.

In the Boltzmann ensemble of a smooth potential energy U, integration by parts gives

    kT = <|grad U|^2> / <laplacian of U>

(Rugh, Phys. Rev. Lett. 78, 772 (1997); Butler et al., J. Chem. Phys. 109, 6519 (1998)). Frames of
another temperature have another ratio, and so have minimised frames and those of a System with
other bonds or angles: stiff terms have the largest share. It holds within each basin, whatever the
basins' populations. The Laplacian is Hutchinson's estimate z.Hz with random signs z, where Hz is a
finite difference of forces.

With constraints the same holds in the internal coordinates u that remain, of which the density is
exp(-U/kT) w(u), w = |Z|^(1/2) or one by the measure, in volume coordinates:

    kT = <sum m (dU/du)^2> / <sum m d^2 U/du^2 + m dU/du dln w/du + dm/du dU/du>

The weights m are squared scales of u, times 1 - u^2 for cosines, whose derivatives are not finite
where an angle is straight.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.coordinates.zmatrix import ANGLE
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB
from openmm_tsf.utils.random import seeded_generator

#: nm; far below a bond's vibration, and far above the rounding of single precision.
_DISPLACEMENT = 3e-4
#: The same for internal coordinates, in standard deviations of them; torsions move by no more than
#: this many radians in one.
_FRACTION, _LARGEST_SCALE = 3e-3, 0.3
#: Relative change of second derivatives with a tenth of the displacement, above which forces jump.
_SMOOTH = 0.4
#: Blocks of frames for the standard error; fewer than twice as many frames are not judged.
_N_BLOCKS = 16
#: Frames that are used: fewer for larger molecules, which have more degrees of freedom in each.
_MOST_FRAMES, _LEAST_FRAMES, _ATOMS_IN_ALL = 256, 64, 6000


class ConfigurationalTemperature(NamedTuple):
    """A temperature and its standard error, in K."""

    kelvin: float
    error: float


def evenly_spaced(positions: Tensor, number: int) -> Tensor:
    """Return at most `number` of the frames [F, N, 3], evenly spaced, in float64 on the CPU."""
    last, n = len(positions) - 1, min(number, len(positions))
    index = torch.linspace(0, last, n, dtype=torch.float64, device="cpu").long()
    return positions[index.to(positions.device)].detach().to("cpu", torch.float64)


def measure_temperature(
    molecule: MolecularSystem, positions: Tensor, number: int | None = None
) -> ConfigurationalTemperature | None:
    """Return the configurational temperature of frames [F, N, 3] (nm), or None if it has none.

    There is none with fewer than 32 frames, or where the energy is not convex on average (free
    particles) or its gradient jumps (``abs`` in the expression of a custom Force). At most `number`
    of the frames are used, by default 64 to 256 by the number of atoms. With constraints there is
    none either for a molecule that has no internal coordinates.
    """
    if len(positions) < 2 * _N_BLOCKS:
        return None
    if number is None:
        number = min(_ATOMS_IN_ALL // molecule.n_atoms, _MOST_FRAMES)
    x = evenly_spaced(positions, max(number, _LEAST_FRAMES))
    layer = None
    if molecule.constraints is not None:
        parts = molecule.topology, molecule.positions
        try:
            layer = InternalCoordinates.from_topology(*parts, **molecule.constraint_options)
        except ValueError:
            return None
    # One thread of the CPU platform is fast for every Force, and always gives the same.
    settings = {"Threads": "1", "DeterministicForces": "true"}
    with OpenMMPotential(molecule.system, "CPU", settings, n_contexts=1) as potential:
        if layer is None:
            squared, laplacian_with = _in_space(potential, x)
            step = _DISPLACEMENT
        else:
            squared, laplacian_with = _in_coordinates(layer, potential, x)
            step = _FRACTION
        laplacian = laplacian_with(step)
        change = (laplacian_with(0.1 * step) - laplacian).abs()
    mean = float(laplacian.mean())
    if not mean > 0 or float(change.mean()) > _SMOOTH * mean:
        return None
    ratio = squared.mean() / laplacian.mean()
    deviations = (squared - ratio * laplacian) / laplacian.mean()
    blocks = torch.stack([block.mean() for block in deviations.tensor_split(_N_BLOCKS)])
    errors = (values.std() / len(values) ** 0.5 for values in (deviations, blocks))
    return ConfigurationalTemperature(float(ratio) / KB, max(map(float, errors)) / KB)


def _signs(x: Tensor) -> Tensor:
    """Random signs for Hutchinson's estimate."""
    signs = torch.randint(0, 2, x.shape, generator=seeded_generator(1), dtype=x.dtype, device="cpu")
    return 2 * signs - 1


def _in_space(potential: OpenMMPotential, x: Tensor) -> tuple[Tensor, Callable[[float], Tensor]]:
    """Return |grad U|^2 [F] at x [F, N, 3], and its Laplacian [F] by the size of a difference."""
    signs = _signs(x)

    def laplacian(step: float) -> Tensor:
        forces = [potential.energy_and_forces(x + h * signs)[1] for h in (step, -step)]
        return ((forces[1] - forces[0]) * signs).sum(dim=(1, 2)) / (2 * step)

    return potential.energy_and_forces(x)[1].square().sum(dim=(1, 2)), laplacian


def _in_coordinates(
    layer: InternalCoordinates, potential: OpenMMPotential, x: Tensor
) -> tuple[Tensor, Callable[[float], Tensor]]:
    """Return what :func:`_in_space` does, in internal coordinates in units of their scales."""
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
    direction = _signs(scaled) * weight.sqrt()

    def laplacian(step: float) -> Tensor:
        above, below = (gradient(scaled + h * direction)[0] for h in (step, -step))
        return ((above - below) * direction).sum(dim=1) / (2 * step) + mixed

    return (weight * of_energy.square()).sum(dim=1), laplacian
