"""Frames beside numbers that were saved more often: which iteration is which."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.convergence import Assessment
from openmm_tsf.analysis.run_data import RunData


class RunFrames(RunData):
    """The data of a run whose frames may be of fewer iterations than its numbers.

    Of the n iterations that are used, m have frames: all, unless the run was started with
    ``numbers_interval`` below ``save_interval``.
    """

    @property
    def n_framed(self) -> int:
        """The number m of iterations from the start on whose frames were saved."""
        return len(self._all_framed) - self._first_frame

    def frame_index(self, temperature: Any = None) -> npt.NDArray[np.int64]:
        """Return the indices [m] of iterations with frames in arrays [n, W, R] such as `energy`.

        Of those that have frames at one rung, or at all: 0, 1, ... unless frames are thinned.
        """
        if temperature is None:
            m = self.n_iterations_with_frames
        else:
            m = self._n_iterations_with_frames(self.rung(temperature))
        return self._all_framed[self._first_frame :][:m] - self.start

    def match_frames(self, values: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
        """Return numbers [n, ...] of all iterations, or [m, ...] where `length` is m.

        ValueError for another length.
        """
        if length == self.n_used:
            return values
        index = self.frame_index()
        if length != len(index):
            expected = f"{self.n_used} or, with frames, {len(index)}"
            raise ValueError(f"values: expected those of {expected} iterations, got {length}")
        return np.asarray(values[index])

    def in_saved_iterations(self, assessment: Assessment, length: int) -> Assessment:
        """Return an assessment of values of `length` iterations, n or m.

        The iterations that it needs are then lines of numbers, not frames.
        """
        needed = assessment.n_iterations_needed
        if needed is None or length == self.n_used:
            return assessment
        needed = float(np.ceil(needed * self.n_used / length))
        return dataclasses.replace(assessment, n_iterations_needed=needed)
