"""Generators and seeds that derive from the user's seed."""

from enum import IntEnum

import numpy as np
import torch

from openmm_tsf.utils.validation import check_int, check_seed

_TORCH_SEEDS = 2**32
#: The state of torch's Mersenne Twister: 24 bytes, then 624 words of 32 bits in 8 bytes each.
_WORDS, _FIRST_WORD = 624, 24


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


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    SAMPLING = 1
    START = 2
    TUNING = 3
    ADAPTATION = 4


def derive_seed(seed: int, purpose: Purpose, number: int) -> int:
    """Return a seed of 64 bits for stream `number` of a purpose.

    It is ``SeedSequence(seed, spawn_key=(purpose, number))``, which numpy documents as a way to
    independent streams. N of them coincide with a probability of N^2 / 2^65.

    Examples
    --------
    >>> from openmm_tsf.utils.random import Purpose, derive_seed
    >>> derive_seed(1, Purpose.SAMPLING, 0) == derive_seed(1, Purpose.SAMPLING, 1)
    False
    """
    key = (int(purpose), check_int(number, "number", least=0))
    sequence = np.random.SeedSequence(check_seed(seed), spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0])


def derive_distinct_seeds(seed: int, purpose: Purpose, n: int) -> list[int]:
    """Return the seeds of n streams; ValueError if two of them are the same."""
    seeds = [derive_seed(seed, purpose, number) for number in range(n)]
    if len(set(seeds)) < n:
        raise ValueError(f"seed: two of {n} streams would be the same with {seed}; give another")
    return seeds


def make_stream(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator of a device that depends on all 64 bits of a seed.

    Unlike `make_generator`, whose generators of the CPU are one of 2^32. Philox, on GPUs, takes 64
    bits; the state of the Mersenne Twister is made by numpy's SeedSequence, as that of numpy's is.
    """
    generator = torch.Generator(device=device).manual_seed(check_seed(seed))
    if generator.device.type != "cpu":
        return generator
    state = generator.get_state()
    words = np.random.SeedSequence(seed).generate_state(_WORDS, np.uint32).astype(np.uint64)
    words[0] = 2**31  # as numpy does: only this bit is used, and not all bits may be 0
    first, last = _FIRST_WORD, _FIRST_WORD + 8 * _WORDS
    state[first:last] = torch.from_numpy(words.view(np.uint8))
    return generator.set_state(state)


class Seeds:
    """A sequence of independent seeds that derive from one."""

    def __init__(self, seed: int) -> None:
        self._sequence = np.random.SeedSequence(check_seed(seed))

    def next(self) -> int:
        """Return the next seed."""
        return int(self._sequence.spawn(1)[0].generate_state(1)[0])
