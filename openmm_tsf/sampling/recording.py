"""What a run collects between two checkpoints."""

from typing import Any, Protocol

import numpy as np

from openmm_tsf.sampling.state import KernelInfo, WalkerState


class Reporter(Protocol):
    """A callable that sees the sampler and its walkers every `interval` iterations."""

    interval: int

    def __call__(self, sampler: Any, state: WalkerState) -> None: ...


class Segment:
    """Saved iterations and the kernels' counts since the last checkpoint.

    Parameters
    ----------
    infos
        Empty counts of every kernel, by name.
    """

    def __init__(self, infos: dict[str, KernelInfo]) -> None:
        self._infos = infos
        self._states: list[WalkerState] = []
        self._seconds = 0.0
        self.n_iterations = 0

    def add(self, infos: dict[str, KernelInfo], seconds: float, state: WalkerState | None) -> None:
        """One iteration: its counts, its duration, and the walkers if they are to be saved."""
        for name, info in infos.items():
            self._infos[name] = self._infos[name] + info
        self._seconds += seconds
        self.n_iterations += 1
        if state is not None:
            self._states.append(state)

    def arrays(self, like: WalkerState) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The segment's numbers, and positions [n, W, R, *event].

        Parameters
        ----------
        like
            Gives the shapes if no iteration was saved.
        """
        states, shape = self._states, tuple(like.energy.shape)
        numbers: dict[str, np.ndarray] = {
            "energy": np.array([s.energy.numpy() for s in states]).reshape(-1, *shape),
            "replica": np.array([s.replica.numpy() for s in states], np.int16).reshape(-1, *shape),
            "iteration": np.array([s.iteration for s in states], dtype=np.int64),
            "wall_seconds": np.array(self._seconds),
        }
        for name, info in self._infos.items():
            numbers[f"accepted_{name}"] = info.accepted.numpy()
            numbers[f"proposed_{name}"] = info.proposed.numpy()
        for total in ("rejected_non_finite", "mirror_images", "n_evaluations", "outside_domain"):
            count = sum(getattr(info, total) for info in self._infos.values())
            numbers[total] = np.array(count, dtype=np.int64)
        positions = np.array([s.x.numpy() for s in states]).reshape(-1, *like.x.shape)
        return numbers, positions
