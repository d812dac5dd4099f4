"""Checks that frames vary as those of dynamics do: bonds that vibrate, positions on no grid."""

import numpy as np
import torch
from torch import Tensor

from openmm_tsf.systems.consistency import force_constants, pair_label
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB
from openmm_tsf.utils.topology import bonds_of

#: Fewer different conformations are not judged: they may agree by chance, or be made by hand.
LEAST_CONFORMATIONS = 10
#: Ratio of a bond's standard deviation to the thermal one, below which it is constrained. SHAKE and
#: LINCS give 1e-5 to 5e-3, and 2e-2 where a PDB file rounds the frames.
_CONSTRAINED = 0.05
#: The same within a part of the frames: a bond may be nearly at rest for a hundred steps.
_CONSTRAINED_IN_PART = 0.01
#: The stiffest covalent bond (N2: 1.4e6 kJ/(mol nm^2)), for bonds without a harmonic term.
_STIFFEST_BOND = 1.5e6
#: A weaker harmonic term may not be all that holds a bond (a Morse term beside it).
_WEAKEST_BOND = 1e5
#: Grids (nm) of GRO and XTC files, the coarsest first; PDB files have 0.0001 nm.
_GRIDS = (0.01, 0.001)
#: Conformations of which all distances to the centre agree to this (nm) are the same.
_SAME = 1e-4
#: Frames in a block, and about the most that bonds are measured in.
_BLOCK_SIZE = _MOST_FRAMES = 4096
#: The frames are split into parts of at least this number, into at most this number of parts.
_LEAST_PART, _MOST_PARTS = 100, 16


def check_variation(molecule: MolecularSystem, positions: Tensor, temperature: float) -> None:
    """Refuse frames [F, N, 3] (nm) that are rounded, or of dynamics that constrain other bonds.

    Also if only consecutive frames are, an eighth of all or more. Fewer than ten different
    conformations are not judged.
    """
    if molecule.n_atoms < 2:
        return
    blocks = positions.split(_BLOCK_SIZE)
    on_grid = torch.cat([_is_on_grid(block, _GRIDS[-1]) for block in blocks])
    rounded = positions[on_grid]
    if _are_enough(rounded):
        _refuse_rounded(rounded, len(positions))
    some = positions[:: max(1, len(positions) // _MOST_FRAMES)]
    bonds = torch.from_numpy(_free_bonds(molecule)).to(positions.device)
    if not len(bonds) or not _are_enough(some):
        return
    thermal = _thermal_deviations(molecule, bonds, temperature).to(positions)
    _check_bonds(molecule, some, temperature, bonds, thermal, _CONSTRAINED)
    # Parts may be of other dynamics, as where several files are given.
    for part in some.tensor_split(min(max(1, len(some) // _LEAST_PART), _MOST_PARTS)):
        if _are_enough(part):
            _check_bonds(molecule, part, temperature, bonds, thermal, _CONSTRAINED_IN_PART)


def _free_bonds(molecule: MolecularSystem) -> np.ndarray:
    """Return the bonds [n, 2] that are not constrained."""
    bonds, constraints = bonds_of(molecule.topology), molecule.constraints
    fixed = set() if constraints is None else set(map(frozenset, constraints.pairs.tolist()))
    return bonds[[frozenset(pair) not in fixed for pair in bonds.tolist()]]


def _are_enough(positions: Tensor) -> bool:
    """Whether there are enough different conformations, up to rotations and translations."""
    if len(positions) < LEAST_CONFORMATIONS:
        return False
    centred = positions - positions.mean(dim=1, keepdim=True)
    distances = (centred.norm(dim=2) / _SAME).round()
    return len(distances.unique(dim=0)) >= LEAST_CONFORMATIONS


def _is_on_grid(positions: Tensor, spacing: float) -> Tensor:
    """Whether all positions of each frame are on a grid, which may be shifted: bool [F]."""
    relative = (positions[:, 1:] - positions[:, :1]).flatten(1) / spacing
    # Single precision moves positions that are far from the origin.
    rounding = 2.0**-22 * positions.abs().flatten(1).amax(dim=1) / spacing + 2e-3
    distance = (relative - relative.round()).abs().amax(dim=1)
    return (distance <= rounding) & (rounding < 0.1)


def _refuse_rounded(rounded: Tensor, n_frames: int) -> None:
    spacing = next(g for g in _GRIDS if bool(_is_on_grid(rounded, g).all()))
    raise ValueError(
        f"positions: expected positions of at least PDB's precision (0.0001 nm), but in "
        f"{len(rounded)} of {n_frames} frames all are multiples of {spacing:g} nm, as XTC and GRO "
        "files round them: too coarse for energies; write DCD, NetCDF or TRR during the dynamics"
    )


def _thermal_deviations(molecule: MolecularSystem, bonds: Tensor, temperature: float) -> Tensor:
    """Return the expected standard deviations of bonds [n, 2] in nm, or lower bounds."""
    harmonic = torch.from_numpy(force_constants(molecule.system, bonds.cpu().numpy()))
    constants = torch.where(harmonic > 0, harmonic.clamp(min=_WEAKEST_BOND), _STIFFEST_BOND)
    return (KB * temperature / constants).sqrt()


def _check_bonds(
    molecule: MolecularSystem,
    positions: Tensor,
    temperature: float,
    bonds: Tensor,
    thermal: Tensor,
    least: float,
) -> None:
    """Refuse bonds that vary less than `least` times as expected."""
    lengths = (positions[:, bonds[:, 0]] - positions[:, bonds[:, 1]]).norm(dim=2)
    spread = (lengths - lengths[0]).std(dim=0)
    rigid = (spread < least * thermal).nonzero().flatten().tolist()
    if rigid:
        names = "; ".join(pair_label(molecule.topology, bonds[bond]) for bond in rigid[:3])
        first = rigid[0]
        raise ValueError(
            f"positions: expected bonds that vibrate, but {len(rigid)} of {len(bonds)} keep their "
            f"length, as in dynamics with constraints: {names}{'; ...' if len(rigid) > 3 else ''}. "
            f"The first has a standard deviation of {float(spread[first]):.1e} nm over "
            f"{len(positions)} frames, at {temperature:g} K expected about "
            f"{float(thermal[first]):.1e} nm. The molecule's System has no constraints of these "
            "bonds: use frames of dynamics without them (in OpenMM constraints=None and "
            "rigidWater=False, in GROMACS constraints = none, in Amber ntc = 1; openmm-tsf md runs "
            "it), or the System with constraints that they are of"
        )
