"""What a run collects between two checkpoints, and when it is written."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.sampling.state import KernelInfo, WalkerState

#: Checkpoints take at most this fraction of the time,
CHECKPOINT_SHARE = 0.02
#: unless more than this waits to be written.
SEGMENT_BYTES = 256 * 2**20


class Reporter(Protocol):
    """A callable that gets the sampler and its walkers every `interval` iterations."""

    interval: int

    def __call__(self, sampler: Any, state: WalkerState) -> None: ...


class Segment:
    """Saved iterations and the kernels' counts since the last checkpoint."""

    def __init__(self, infos: dict[str, KernelInfo]) -> None:
        self._infos = infos
        self._states: list[WalkerState] = []
        self._seconds = 0.0
        self.n_iterations = 0
        self.n_bytes = 0

    def add(self, infos: dict[str, KernelInfo], seconds: float, state: WalkerState | None) -> None:
        """Add one iteration: its counts, its duration, and the walkers if they are to be saved."""
        for name, info in infos.items():
            self._infos[name] = self._infos[name] + info
        self._seconds += seconds
        self.n_iterations += 1
        if state is not None:
            self._states.append(state.evolve(velocities=None))  # velocities are not written
            self.n_bytes += state.x.nbytes + state.energy.nbytes + state.replica.nbytes

    def arrays(self, like: WalkerState) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the segment's numbers, and positions [n, W, R, *event]."""
        states, shape = self._states, tuple(like.energy.shape)
        numbers = {
            "energy": _stack([s.energy for s in states], shape),
            "replica": _stack([s.replica for s in states], shape).astype(np.int16),
            "iteration": np.array([s.iteration for s in states], dtype=np.int64),
            "wall_seconds": np.array(self._seconds),
        }
        for name, info in self._infos.items():
            numbers[f"accepted_{name}"] = info.accepted.numpy()
            numbers[f"proposed_{name}"] = info.proposed.numpy()
        for total in ("rejected_non_finite", "mirror_images", "n_evaluations", "outside_domain"):
            count = sum(getattr(info, total) for info in self._infos.values())
            numbers[total] = np.array(count, dtype=np.int64)
        positions = _stack([s.x for s in states], tuple(like.x.shape))
        return numbers, positions


def _stack(tensors: list[Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """Return tensors of a shape as one array: a single copy brings them from a GPU."""
    return torch.stack(tensors).cpu().numpy() if tensors else np.zeros((0, *shape))


class Recorder:
    """Writes iterations to the run directory, segment by segment."""

    def __init__(
        self,
        writer: RunWriter,
        zero: Callable[[], dict[str, KernelInfo]],
        checkpoint: Callable[[], Mapping[str, Any]],
        interval: int | None,
        seconds: float,
    ) -> None:
        self._writer, self._zero, self._checkpoint = writer, zero, checkpoint
        self._interval, self._seconds = interval, seconds
        self._segment = Segment(zero())
        self._written, self._wait = time.monotonic(), seconds

    def add(
        self, infos: dict[str, KernelInfo], seconds: float, state: WalkerState, saved: bool
    ) -> None:
        """Add one iteration: its counts, its duration, and whether its walkers are saved."""
        self._segment.add(infos, seconds, state if saved else None)

    def write_if_due(self, state: WalkerState) -> None:
        """Write a segment and a checkpoint, if they are due."""
        now = time.monotonic()
        due = self._interval is not None and state.iteration % self._interval == 0
        full = self._segment.n_bytes >= SEGMENT_BYTES
        if due or full or now - self._written >= self._wait:
            self.write(state)
            self._written = time.monotonic()
            self._wait = max(self._seconds, (self._written - now) / CHECKPOINT_SHARE)

    def write(self, state: WalkerState) -> None:
        """Write what has been collected, if anything."""
        # Reset first: if a second Ctrl-C or a full disk ends the writing, nothing is written twice,
        # and the run continues from its last checkpoint.
        segment, self._segment = self._segment, Segment(self._zero())
        if segment.n_iterations:
            numbers, positions = segment.arrays(state)
            self._writer.write(numbers, positions, self._checkpoint())
