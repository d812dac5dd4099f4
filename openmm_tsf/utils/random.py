"""Generators and seeds that derive from the user's seed."""

import numpy as np
import torch

from openmm_tsf.utils.validation import check_seed

_TORCH_SEEDS = 2**32


def generator_seed(seed: int) -> int:
    """Return the number below 2^32 that seeds torch's generator; larger seeds are hashed.

    torch accepts seeds up to 2^64 - 1 but uses only 32 bits: 1 and 2^32 + 1 would be the same.
    """
    number = check_seed(seed)
    if number < _TORCH_SEEDS:
        return number
    return int(np.random.SeedSequence(number).generate_state(1)[0])


def make_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator of a device with the given seed, an integer from 0 to 2^64 - 1.

    Those of the CPU (Mersenne Twister) and of GPUs (Philox) draw different numbers.
    """
    return torch.Generator(device=device).manual_seed(generator_seed(seed))


def seeded_generator(seed: int) -> torch.Generator:
    """Return a CPU generator with the given seed, an integer from 0 to 2^64 - 1."""
    return make_generator(seed)


class Seeds:
    """A sequence of independent seeds that derive from one."""

    def __init__(self, seed: int) -> None:
        self._sequence = np.random.SeedSequence(check_seed(seed))

    def next(self) -> int:
        """Return the next seed."""
        return int(self._sequence.spawn(1)[0].generate_state(1)[0])
