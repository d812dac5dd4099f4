"""Where randomness comes from: generators and seeds that follow from the user's seed."""

import numpy as np
import torch

from openmm_tsf.utils.validation import check_seed

_TORCH_SEEDS = 2**32


def generator_seed(seed: int) -> int:
    """What torch's generator of 32 bits is seeded with: larger seeds are hashed, not cut off.

    torch takes any number below 2^64 and uses its lower half: 1 and 2^32 + 1 would be the same.
    """
    number = check_seed(seed)
    if number < _TORCH_SEEDS:
        return number
    return int(np.random.SeedSequence(number).generate_state(1)[0])


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator with the given seed.

    Raises
    ------
    ValueError
        If it is no integer from 0 to 2^64 - 1.
    """
    return torch.Generator().manual_seed(generator_seed(seed))


class Seeds:
    """One independent seed for each purpose, from the user's.

    Raises
    ------
    ValueError
        If `seed` is no integer from 0 to 2^64 - 1.
    """

    def __init__(self, seed: int) -> None:
        self._sequence = np.random.SeedSequence(check_seed(seed))

    def next(self) -> int:
        """The next seed."""
        return int(self._sequence.spawn(1)[0].generate_state(1)[0])
