"""What a run collects between two checkpoints, and when it is written."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from openmm_tsf.sampling.run_writer import RunWriter, dihedrals_of
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.sampling.writer_thread import WriterThread
from openmm_tsf.utils.devices import DeviceConstants, HostCopy

#: Checkpoints take at most this fraction of the time,
CHECKPOINT_SHARE = 0.02
#: unless more than this waits to be written.
SEGMENT_BYTES = 256 * 2**20


class Reporter(Protocol):
    """A callable that gets the sampler and its walkers every `interval` iterations."""

    interval: int

    def __call__(self, sampler: Any, state: WalkerState) -> None: ...


class SaveIntervals(NamedTuple):
    """The iterations from one saved frame to the next, and from one line of numbers to the next."""

    frames: int = 1
    numbers: int = 1

    @property
    def are_equal(self) -> bool:
        """Whether all numbers have a frame."""
        return self.frames == self.numbers


class TorsionAtoms(DeviceConstants):
    """The atoms of some torsions: their positions suffice for the angles."""

    def __init__(self, quartets: Sequence[Sequence[int]]) -> None:
        indices = np.asarray(quartets, dtype=np.int64).reshape(-1, 4)
        atoms, places = np.unique(indices, return_inverse=True)
        self.atoms = torch.tensor(atoms, dtype=torch.int64, device="cpu")
        self.quartets = places.reshape(-1, 4)

    def select(self, x: Tensor) -> Tensor:
        """Return the positions [W, R, A, 3] of the A atoms, from x [W, R, N, 3]."""
        return x.index_select(-2, self.on_device("atoms", x.device))


class _Saved(NamedTuple):
    """A saved iteration: energy, replica, and positions of torsions, a frame, or both."""

    iteration: int
    has_frame: bool
    copy: HostCopy


class Segment:
    """Saved iterations and the kernels' counts since the last checkpoint.

    Where frames are of fewer iterations than numbers, `torsions` give the angles of the others.
    """

    def __init__(
        self,
        infos: dict[str, KernelInfo],
        intervals: SaveIntervals = SaveIntervals(),  # noqa: B008 (it is immutable)
        torsions: TorsionAtoms | None = None,
    ) -> None:
        self._infos, self._intervals, self._torsions = infos, intervals, torsions
        self._saved: list[_Saved] = []
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
            has_frame = state.iteration % self._intervals.frames == 0
            parts = [state.energy, state.replica]
            if self._torsions is not None:
                parts.append(self._torsions.select(state.x))
            copy = HostCopy(*parts, *([state.x] if has_frame else []))
            self._saved.append(_Saved(state.iteration, has_frame, copy))
            self.n_bytes += copy.n_bytes

    def arrays(
        self, shape: tuple[int, ...]
    ) -> tuple[dict[str, np.ndarray], Sequence[np.ndarray] | np.ndarray]:
        """Return the segment's numbers, and its frames of the given shape [W, R, *event]."""
        arrays = [each.copy.arrays() for each in self._saved]
        numbers = {
            "energy": _stack([each[0] for each in arrays], shape[:2]),
            "replica": _stack([each[1] for each in arrays], shape[:2]).astype(np.int16),
            "iteration": np.array([s.iteration for s in self._saved], dtype=np.int64),
            "wall_seconds": np.array(self._seconds),
        }
        for name, info in self._infos.items():
            numbers[f"accepted_{name}"] = info.accepted.numpy()
            numbers[f"proposed_{name}"] = info.proposed.numpy()
        for total in ("rejected_non_finite", "mirror_images", "n_evaluations", "outside_domain"):
            count = sum(getattr(info, total) for info in self._infos.values())
            numbers[total] = np.array(count, dtype=np.int64)
        if not self._intervals.are_equal:
            framed = [each.iteration for each in self._saved if each.has_frame]
            numbers["frame_iteration"] = np.array(framed, dtype=np.int64)
        if self._torsions is not None:
            n_atoms = len(self._torsions.atoms)
            parts = [each[2] for each in arrays] or np.zeros((0, *shape[:2], n_atoms, 3))
            numbers["dihedrals"] = dihedrals_of(parts, self._torsions.quartets.tolist())
        frames = [a[-1] for a, each in zip(arrays, self._saved, strict=True) if each.has_frame]
        return numbers, frames or np.zeros((0, *shape))


def _stack(arrays: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(arrays) if arrays else np.zeros((0, *shape))


class Recorder:
    """Writes iterations to the run directory, segment by segment.

    Within a ``with`` statement a thread writes while the next iterations are sampled.

    Parameters
    ----------
    writer
        Of the run directory.
    zero, checkpoint
        Return counts of zero, and the state to continue from, which nothing changes later.
    interval, seconds
        Iterations (None: any number) and time between checkpoints.
    intervals
        From one saved iteration to the next.
    """

    def __init__(
        self,
        writer: RunWriter,
        zero: Callable[[], dict[str, KernelInfo]],
        checkpoint: Callable[[], Mapping[str, Any]],
        interval: int | None,
        seconds: float,
        intervals: SaveIntervals = SaveIntervals(),  # noqa: B008 (it is immutable)
    ) -> None:
        self._writer, self._zero, self._checkpoint = writer, zero, checkpoint
        self._interval, self._seconds, self._intervals = interval, seconds, intervals
        self._torsions: TorsionAtoms | None = None
        if not intervals.are_equal and writer.molecule is not None:
            self._torsions = TorsionAtoms(list(writer.dihedrals.values()))
        self._thread: WriterThread | None = None
        self._segment = self._new_segment()
        self._handed_over, self._write_seconds = time.monotonic(), 0.0

    def __enter__(self) -> Self:
        self._thread = WriterThread(self._writer.stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        thread, self._thread = self._thread, None
        assert thread is not None
        thread.close()

    def _new_segment(self) -> Segment:
        return Segment(self._zero(), self._intervals, self._torsions)

    def add(
        self, infos: dict[str, KernelInfo], seconds: float, state: WalkerState, saved: bool
    ) -> None:
        """Add one iteration: its counts, its duration, and whether its numbers are saved."""
        self._segment.add(infos, seconds, state if saved else None)

    def write_if_due(self, state: WalkerState) -> None:
        """Write a segment and a checkpoint, if they are due; raise the error of an earlier one."""
        if self._thread is not None:
            self._thread.check()
        due = self._interval is not None and state.iteration % self._interval == 0
        full = self._segment.n_bytes >= SEGMENT_BYTES
        wait = max(self._seconds, self._write_seconds / CHECKPOINT_SHARE)
        if due or full or time.monotonic() - self._handed_over >= wait:
            self.write(state)
            self._handed_over = time.monotonic()

    def write(self, state: WalkerState) -> None:
        """Write what has been collected, if anything, or let the thread do so."""
        # Reset first: if a second Ctrl-C or a full disk ends the writing, nothing is written twice,
        # and the run continues from its last checkpoint.
        segment, self._segment = self._segment, self._new_segment()
        if segment.n_iterations:
            job = partial(self._write, segment, tuple(state.x.shape), self._checkpoint())
            if self._thread is None:
                job()
                return
            is_accepted = False
            try:
                is_accepted = self._thread.submit(job)
            finally:
                if not is_accepted:
                    self._writer.note_loss()

    def _write(
        self, segment: Segment, shape: tuple[int, ...], checkpoint: Mapping[str, Any]
    ) -> None:
        start = time.monotonic()
        self._writer.write(*segment.arrays(shape), checkpoint)
        self._write_seconds = time.monotonic() - start

    def finish(self, state: WalkerState) -> None:
        """Write what has been collected, and wait until all of it is on the disk."""
        self.write(state)
        if self._thread is not None:
            self._thread.wait()
