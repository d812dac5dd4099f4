"""The temperature of frames, from the forces on them.

In the Boltzmann ensemble of a smooth potential energy U, integration by parts gives

    kT = <|grad U|^2> / <laplacian of U>

(Rugh, Phys. Rev. Lett. 78, 772 (1997); Butler et al., J. Chem. Phys. 109, 6519 (1998)). Frames of
another temperature have another ratio, and so have minimised frames and those of a System with
other bonds or angles: stiff terms have the largest share. It holds within each basin, whatever the
basins' populations. The Laplacian is Hutchinson's estimate z.Hz with random signs z, where Hz is a
finite difference of forces.

The same holds for displacements of each heavy atom together with its hydrogens: their bonds, which
have most of the error of a long time step, do not change then.

With constraints it is measured in internal coordinates:
:mod:`openmm_tsf.systems.constrained_temperature`.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.systems.constrained_temperature import constrained_terms
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB
from openmm_tsf.utils.random import seeded_generator
from openmm_tsf.utils.topology import neighbours_of

#: nm; far below a bond's vibration, and far above the rounding of single precision.
_DISPLACEMENT = 3e-4
#: Relative change of second derivatives with a tenth of the displacement, above which forces jump.
_SMOOTH = 0.4
#: Blocks of frames for the standard error; fewer than twice as many frames are not judged.
_N_BLOCKS = 16
#: Frames that are used: fewer for larger molecules, which have more degrees of freedom in each.
_MOST_FRAMES, _LEAST_FRAMES, _ATOMS_IN_ALL = 256, 64, 6000
_ALL = slice(None)


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
    molecule: MolecularSystem,
    positions: Tensor,
    number: int | None = None,
    *,
    with_hydrogens: bool = False,
) -> ConfigurationalTemperature | None:
    """Return the configurational temperature of frames [F, N, 3] (nm), or None if it has none.

    There is none with fewer than 32 frames, or where the energy is not convex on average (free
    particles) or its gradient jumps (``abs`` in the expression of a custom Force). At most `number`
    of the frames are used, by default 64 to 256 by the number of atoms. `with_hydrogens` displaces
    each heavy atom together with its hydrogens; not with constraints.
    """
    if len(positions) < 2 * _N_BLOCKS:
        return None
    if number is None:
        number = min(_ATOMS_IN_ALL // molecule.n_atoms, _MOST_FRAMES)
    x = evenly_spaced(positions, max(number, _LEAST_FRAMES))
    if molecule.constraints is not None:
        terms = constrained_terms(molecule, x)
        return None if terms is None else _estimate(*terms)
    signs = torch.randint(0, 2, x.shape, generator=seeded_generator(1), dtype=x.dtype, device="cpu")
    moved_with = torch.arange(molecule.n_atoms, dtype=torch.int64, device="cpu")
    if with_hydrogens:
        moved_with = torch.from_numpy(_heavy_atoms(molecule))
    signs = (2 * signs - 1)[:, moved_with]
    # One thread of the CPU platform is fast for every Force, and always gives the same.
    settings = {"Threads": "1", "DeterministicForces": "true"}
    with OpenMMPotential(molecule.system, "CPU", settings, n_contexts=1) as potential:

        def laplacian_with(step: float, rows: slice = _ALL) -> Tensor:
            at, z = x[rows], signs[rows]
            plus, minus = (potential.energy_and_forces(at + h * z)[1] for h in (step, -step))
            return ((minus - plus) * z).sum(dim=(1, 2)) / (2 * step)

        forces = potential.energy_and_forces(x)[1]
        squared = torch.zeros_like(forces).index_add(1, moved_with, forces).square().sum(dim=(1, 2))
        laplacian = laplacian_with(_DISPLACEMENT)
        rows = slice(None, None, 1 + len(x) // (_MOST_FRAMES + 1))
        change = (laplacian_with(0.1 * _DISPLACEMENT, rows) - laplacian[rows]).abs()
    return _estimate(squared, laplacian, change)


def _estimate(
    squared: Tensor, laplacian: Tensor, change: Tensor
) -> ConfigurationalTemperature | None:
    """The ratio of means; None where the energy is not convex, or its gradient jumps.

    `change` is that of the Laplacian with a smaller difference, of some frames.
    """
    mean = float(laplacian.mean())
    if not mean > 0 or float(change.mean()) > _SMOOTH * mean:
        return None
    ratio = squared.mean() / laplacian.mean()
    deviations = (squared - ratio * laplacian) / laplacian.mean()
    blocks = torch.stack([block.mean() for block in deviations.tensor_split(_N_BLOCKS)])
    errors = (values.std() / len(values) ** 0.5 for values in (deviations, blocks))
    return ConfigurationalTemperature(float(ratio) / KB, max(map(float, errors)) / KB)


def _heavy_atoms(molecule: MolecularSystem) -> npt.NDArray[np.int64]:
    """Return for each atom [N] itself or, for hydrogen, the first heavy atom bonded to it."""
    light = [atom.element is not None and atom.element.symbol in ("H", "D")
             for atom in molecule.topology.atoms()]  # fmt: skip
    heavy = list(range(molecule.n_atoms))
    for atom, bonded in enumerate(neighbours_of(molecule.topology)):
        if light[atom]:
            heavy[atom] = next((other for other in bonded if not light[other]), atom)
    return np.array(heavy, dtype=np.int64)
