"""How many frames the fixed layers of a flow need: for a covariance, and for a good one.

Of n frames of d coordinates the widths of the covariance along its axes are wrong by factors from
1 - sqrt(d/n) to 1 + sqrt(d/n) (Marchenko and Pastur, Math. USSR Sb. 1, 457 (1967)): the narrowest
vanish with n = d frames, and are a third too narrow with ten times as many. The network has to
learn what the fixed layers get wrong, from the same frames.
"""

import logging
from itertools import count

import torch

from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.molecule import MolecularSystem

logger = logging.getLogger(__name__)

#: Frames to train on for each coordinate, of which fewer are a warning.
GOOD_RATIO = 10
_TRAINED_ON = 0.8  # of all frames: `MDDataset.split`


def check_enough_frames(dataset: MDDataset, molecule: MolecularSystem) -> None:
    """Refuse frames that are too few to split, or to fit the fixed layers of a flow on."""
    least, needed = _least_training_frames(molecule), least_frames(molecule)
    advice = (
        f"{molecule.n_atoms} atoms need {needed} frames or more, of which 8 in 10 are trained on: "
        "more frames, or a smaller stride (--stride)"
    )
    try:
        n_train = len(dataset.split().train)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    if n_train < least:
        expected = f"expected at least {least} frames to train on, got {n_train} of {len(dataset)}"
        raise ValueError(f"dataset: {expected}; {advice}")


def warn_of_few_frames(dataset: MDDataset, molecule: MolecularSystem) -> None:
    """Log a warning where fewer than ten frames are trained on for each coordinate."""
    _warn_of_few(len(dataset.split().train), molecule, 1)


def check_enough_md(n_frames: int, stride: int, molecule: MolecularSystem) -> None:
    """Refuse MD of too few frames before it is run; barely enough are a warning."""
    n, needed = len(range(0, n_frames, stride)), least_frames(molecule)
    n_train = int(_TRAINED_ON * n) if n >= 2 * needed else _n_training_frames(n)
    if n_train < _least_training_frames(molecule):
        raise ValueError(
            f"frames: {n_frames} with stride {stride} are too few: {n_train} of {n} are trained "
            f"on, expected at least {_least_training_frames(molecule)}; run MD of "
            f"{stride * (needed - 1) + 1} frames or more (n_frames, --frames), or use a smaller "
            "stride (--stride)"
        )
    _warn_of_few(n_train, molecule, stride)


def _warn_of_few(n_train: int, molecule: MolecularSystem, stride: int) -> None:
    n_coordinates = molecule.n_degrees_of_freedom
    good = GOOD_RATIO * n_coordinates
    if n_train < good:
        wrong = (n_coordinates / n_train) ** 0.5
        message = (
            f"{n_train:,} frames to train on are few for {n_coordinates} coordinates: the widest "
            f"and narrowest of their fluctuations are wrong by some {wrong:.0%}; "
            f"{GOOD_RATIO} for each need {stride * int(good / _TRAINED_ON):,} frames or more "
            "(--frames, or a smaller --stride)"
        )
        logger.warning("%s", message)


def _least_training_frames(molecule: MolecularSystem) -> int:
    return molecule.n_degrees_of_freedom + 1  # a full covariance


def least_frames(molecule: MolecularSystem) -> int:
    """Return the smallest number of frames with enough to train on."""
    least = _least_training_frames(molecule)
    first = max(least, int(least / _TRAINED_ON) - 20)  # each of ten blocks rounds its number
    return next(n for n in count(first) if _n_training_frames(n) >= least)


def _n_training_frames(n_frames: int) -> int:
    """Return how many of the frames are trained on; 0 where they are too few to split."""
    try:
        positions = torch.zeros(n_frames, 1, dtype=torch.float64, device="cpu")
        return len(MDDataset(positions, temperature=1.0).split().train)
    except ValueError:
        return 0
