"""Whether frames can be conformations of a molecule."""

import torch
from torch import Tensor

from openmm_tsf.systems.consistency import (
    _BLOCK,
    _HINT,
    MEAN_STRETCH,
    OVERLAP,
    STRETCH,
    Pair,
    _rest_lengths,
)
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.topology import atom_label, bonds_of


def check_frames(molecule: "MolecularSystem", positions: Tensor) -> None:
    """Refuse frames [F, N, 3] (nm) that are not conformations of the molecule.

    Raises
    ------
    ValueError
        If atoms overlap, or bonds are far longer or shorter than both in the molecule's reference
        positions and the System's rest length: in a frame, or (atoms that have changed places) in
        the mean.
    """
    bonds = torch.from_numpy(bonds_of(molecule.topology)).to(positions.device)
    reference = positions.new_tensor(molecule.positions)[None]
    expected = _lengths(reference, bonds)[0]
    # The reference may be a poor conformation: the System's own lengths are as good.
    rest = expected.new_tensor(_rest_lengths(molecule.system, bonds.cpu().numpy()))
    rest = torch.where(rest > 0, rest, expected)
    low, high = torch.minimum(rest, expected), torch.maximum(rest, expected)
    n_frames, n_atoms = positions.shape[:2]
    total = torch.zeros_like(expected)
    torn = torch.zeros(n_frames, dtype=torch.bool, device=positions.device)
    overlapping = torch.zeros_like(torn)
    size = max(1, _BLOCK // n_atoms)
    for start in range(0, n_frames, size):
        rows = slice(start, start + size)
        lengths = _lengths(positions[rows], bonds)
        total += lengths.sum(dim=0)
        wrong = (lengths > STRETCH * high) | (lengths < low / STRETCH)
        torn[rows] = wrong.any(dim=1)
        overlapping[rows] = _overlapping(positions[rows])
    labels = [atom_label(atom) for atom in molecule.topology.atoms()]
    if bool(torn.any()):
        frame = int(torn.nonzero()[0])
        lengths = _lengths(positions[frame : frame + 1], bonds)[0]
        worst = int((lengths / expected).log().abs().argmax())
        first, second = (labels[int(atom)] for atom in bonds[worst])
        raise ValueError(
            "positions: expected this molecule's bonds, up to a factor of "
            f"{STRETCH:g}, but {int(torn.sum())} of {n_frames} frames have others; the first is "
            f"frame {frame}, with {first} and {second} at {float(lengths[worst]):.4g} nm "
            f"(reference positions: {float(expected[worst]):.4g} nm); {_HINT}"
        )
    if bool(overlapping.any()):
        frame = int(overlapping.nonzero()[0])
        i, j = _closest(positions[frame])
        raise ValueError(
            f"positions: expected atoms at least {OVERLAP} nm apart, but in "
            f"{int(overlapping.sum())} of {n_frames} frames some are closer; the first is frame "
            f"{frame}, with {labels[i]} and {labels[j]} at "
            f"{float((positions[frame, i] - positions[frame, j]).norm()):.4g} nm"
        )
    mean = total / n_frames
    swapped = ((mean > MEAN_STRETCH * high) | (mean < low / MEAN_STRETCH)).nonzero().flatten()
    if len(swapped):
        first, second = (labels[int(atom)] for atom in bonds[swapped[0]])
        raise ValueError(
            "positions: expected the molecule's atoms in its order, but "
            f"{first} and {second} are bonded at {float(mean[swapped[0]]):.4g} nm in the mean of "
            f"{n_frames} frames (reference positions: {float(expected[swapped[0]]):.4g} nm)"
        )


def _lengths(positions: Tensor, bonds: Tensor) -> Tensor:
    """Bond lengths [F, n]."""
    return (positions[:, bonds[:, 0]] - positions[:, bonds[:, 1]]).norm(dim=2)


def _closest(x: Tensor) -> Pair:
    """The two atoms of x [N, 3] that are closest."""
    first, second = torch.triu_indices(len(x), len(x), offset=1)
    pair = int((x[first] - x[second]).norm(dim=1).argmin())
    return int(first[pair]), int(second[pair])


def _overlapping(positions: Tensor) -> Tensor:
    """Whether any two atoms of each frame are closer than they may be: bool [F].

    Atoms are compared with those that follow them along x, until none is near: far fewer pairs
    than there are.
    """
    order = positions[:, :, 0].argsort(dim=1)
    x = positions.gather(1, order[:, :, None].expand_as(positions)).permute(2, 0, 1).contiguous()
    found = torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
    for away in range(1, positions.shape[1]):
        step = x[:, :, away:] - x[:, :, :-away]
        if not bool((step[0] < OVERLAP).any()):
            break
        found |= (step.square().sum(dim=0) < OVERLAP**2).any(dim=1)
    return found
