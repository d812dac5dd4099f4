"""Checks that frames are conformations of a molecule."""

import openmm
import torch
from torch import Tensor

from openmm_tsf.systems.consistency import (
    MAX_STRETCH,
    MIN_DISTANCE,
    POSITIONS_HINT,
    Pair,
    force_constants,
    pair_label,
    rest_lengths,
)
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB
from openmm_tsf.utils.topology import bonds_of

#: Largest factor between a bond and its reference length in the mean over frames, which is wrong
#: where two atoms are exchanged.
MAX_MEAN_STRETCH = 1.3
#: Standard deviations of a soft bond by which it may be longer or shorter, in a frame and in the
#: mean, even if that is more than the factors allow.
_N_DEVIATIONS, _N_MEAN_DEVIATIONS = 6.0, 2.0
#: Forces under which atoms that are not bonded may come close to each other.
_WITHOUT_REPULSION = (
    openmm.CMAPTorsionForce,
    openmm.CMMotionRemover,
    openmm.CustomAngleForce,
    openmm.CustomBondForce,
    openmm.CustomExternalForce,
    openmm.CustomTorsionForce,
    openmm.HarmonicAngleForce,
    openmm.HarmonicBondForce,
    openmm.PeriodicTorsionForce,
    openmm.RBTorsionForce,
)
#: Atoms in one block of frames.
_BLOCK_SIZE = 2**16


def check_frames(molecule: MolecularSystem, positions: Tensor, temperature: float) -> None:
    """Refuse frames [F, N, 3] (nm) that are not conformations of the molecule.

    Atoms must not overlap, if anything in the System keeps them apart; bonds must not be far longer
    or shorter than both in the reference positions and the System's rest length: in a frame, or
    (exchanged atoms) in the mean.
    """
    bonds = torch.from_numpy(bonds_of(molecule.topology)).to(positions.device)
    reference = _lengths(positions.new_tensor(molecule.positions)[None], bonds)[0]
    # The reference may be a poor conformation: the System's rest lengths are accepted as well.
    rest = reference.new_tensor(rest_lengths(molecule.system, bonds.cpu().numpy()))
    rest = torch.where(rest > 0, rest, reference)
    low, high = torch.minimum(rest, reference), torch.maximum(rest, reference)
    constants = reference.new_tensor(force_constants(molecule.system, bonds.cpu().numpy()))
    spread = torch.where(constants > 0, KB * temperature / constants, 0.0).sqrt()
    longest = torch.maximum(MAX_STRETCH * high, high + _N_DEVIATIONS * spread)
    shortest = torch.minimum(low / MAX_STRETCH, low - _N_DEVIATIONS * spread)
    repel = not all(isinstance(f, _WITHOUT_REPULSION) for f in molecule.system.getForces())
    n_frames, n_atoms = positions.shape[:2]
    total = torch.zeros_like(reference)
    is_torn = torch.zeros(n_frames, dtype=torch.bool, device=positions.device)
    overlaps = torch.zeros_like(is_torn)
    size = max(1, _BLOCK_SIZE // n_atoms)
    for start in range(0, n_frames, size):
        rows = slice(start, start + size)
        lengths = _lengths(positions[rows], bonds)
        total += lengths.sum(dim=0)
        is_torn[rows] = ((lengths > longest) | (lengths < shortest)).any(dim=1)
        if repel:
            overlaps[rows] = _has_overlap(positions[rows])
    if bool(is_torn.any()):
        frame = int(is_torn.nonzero()[0])
        lengths = _lengths(positions[frame : frame + 1], bonds)[0]
        worst = int((lengths / reference).log().abs().argmax())
        raise ValueError(
            "positions: expected this molecule's bonds, up to a factor of "
            f"{MAX_STRETCH:g}, but {int(is_torn.sum())} of {n_frames} frames have others; the "
            f"first is frame {frame}, with {pair_label(molecule.topology, bonds[worst])} at "
            f"{float(lengths[worst]):.4g} nm (reference positions: "
            f"{float(reference[worst]):.4g} nm); {POSITIONS_HINT}"
        )
    if bool(overlaps.any()):
        frame = int(overlaps.nonzero()[0])
        i, j = _closest(positions[frame])
        raise ValueError(
            f"positions: expected atoms at least {MIN_DISTANCE} nm apart, but in "
            f"{int(overlaps.sum())} of {n_frames} frames some are closer; the first is frame "
            f"{frame}, with {pair_label(molecule.topology, (i, j))} at "
            f"{float((positions[frame, i] - positions[frame, j]).norm()):.4g} nm"
        )
    mean = total / n_frames
    longest = torch.maximum(MAX_MEAN_STRETCH * high, high + _N_MEAN_DEVIATIONS * spread)
    shortest = torch.minimum(low / MAX_MEAN_STRETCH, low - _N_MEAN_DEVIATIONS * spread)
    wrong = (mean > longest) | (mean < shortest)
    if bool(wrong.any()):
        bond = int(wrong.nonzero()[0])
        raise ValueError(
            "positions: expected the molecule's atoms in its order, but "
            f"{pair_label(molecule.topology, bonds[bond])} are bonded at {float(mean[bond]):.4g} "
            f"nm in the mean of {n_frames} frames (reference positions: "
            f"{float(reference[bond]):.4g} nm)"
        )


def _lengths(positions: Tensor, bonds: Tensor) -> Tensor:
    """Bond lengths [F, n]."""
    return (positions[:, bonds[:, 0]] - positions[:, bonds[:, 1]]).norm(dim=2)


def _closest(x: Tensor) -> Pair:
    """Return the two atoms of x [N, 3] that are closest to each other."""
    first, second = torch.triu_indices(len(x), len(x), offset=1, dtype=torch.int64, device="cpu")
    pair = int((x[first] - x[second]).norm(dim=1).argmin())
    return int(first[pair]), int(second[pair])


def _has_overlap(positions: Tensor) -> Tensor:
    """Whether any two atoms of each frame are closer than allowed: bool [F].

    Each atom is compared with those that follow it along x, until none is near: far fewer pairs
    than there are.
    """
    order = positions[:, :, 0].argsort(dim=1)
    x = positions.gather(1, order[:, :, None].expand_as(positions)).permute(2, 0, 1).contiguous()
    overlaps = torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
    for shift in range(1, positions.shape[1]):
        step = x[:, :, shift:] - x[:, :, :-shift]
        if not bool((step[0] < MIN_DISTANCE).any()):
            break
        overlaps |= (step.square().sum(dim=0) < MIN_DISTANCE**2).any(dim=1)
    return overlaps
