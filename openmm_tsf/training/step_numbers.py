"""The numbers of a training step that the host needs, read together."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: The share of the last step in a running mean.
_SHARE = 0.02


class StepNumbers:
    """Numbers that a step leaves on the device: to read each of them would wait for a GPU.

    Attributes
    ----------
    running : dict
        Exponential means of the recorded numbers by name, as far as they are read.
    """

    def __init__(self) -> None:
        self.running: dict[str, float] = {}
        self._unread: list[tuple[Tensor, Callable[[list[float]], None]]] = []

    def add(self, values: Tensor, then: Callable[[list[float]], None]) -> None:
        """Let `then` be called with numbers, of any type, when they are read."""
        self._unread.append((values, then))  # in one operation: two threads may add

    def record(self, name: str, value: Tensor) -> None:
        """Let a number without dimensions be part of a running mean when it is read."""
        self.add(value, lambda numbers: self.update(name, numbers[0]))

    def update(self, name: str, value: float) -> None:
        """Update a running mean; a value that is not finite changes nothing."""
        if math.isfinite(value):
            old = self.running.get(name, value)
            self.running[name] = (1 - _SHARE) * old + _SHARE * value

    def read(self) -> None:
        """Read what was added since the last time: on a GPU one wait."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        parts = [values.detach().double().flatten() for values, _ in unread]
        numbers = torch.cat(parts).tolist()
        for part, (_, then) in zip(parts, unread, strict=True):
            then(numbers[: len(part)])
            del numbers[: len(part)]
