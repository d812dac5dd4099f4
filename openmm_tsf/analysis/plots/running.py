"""Running estimates: means of the samples up to an iteration, with their errors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.plots.style import FONT, colours_of_rungs, draw_band
from openmm_tsf.analysis.uncertainty import estimate_mean

_POINTS = 20


class Series(NamedTuple):
    """A line of the figure: values [n, W] of the iterations that are used."""

    label: str
    colour: Any
    values: npt.ArrayLike


def series_of_rungs(run: RunEstimates, values: npt.NDArray[Any]) -> list[Series]:
    """Return a line for each rung of values [n, W, R]."""
    return [
        Series(f"{temperature:.0f} K", colour, values[:, :, rung])
        for rung, (temperature, colour) in enumerate(
            zip(run.temperatures, colours_of_rungs(run.n_rungs), strict=True)
        )
    ]


def draw_running(
    axis: Axes,
    run: RunEstimates,
    lines: Sequence[Series],
    label: str,
    *,
    is_state: bool = False,
    from_last: bool = False,
) -> None:
    """Draw running means ± SE: of a state on a logarithmic axis, or as differences from the last.

    Lines of a state that was never visited are left out, until its first visit.
    """
    drawn = False
    for series in lines:
        values = np.asarray(series.values, dtype=np.float64)
        ends = np.unique(np.linspace(len(values) / _POINTS, len(values), _POINTS).astype(int))
        ends = ends[ends > 0]
        x = run.start + 1 + run.match_frames(np.arange(run.n_used), len(values))[ends - 1]
        estimates = [estimate_mean(values[:end]) for end in ends]
        means = np.array([e.value for e in estimates])
        errors = np.nan_to_num(np.array([e.stderr for e in estimates]))
        if from_last:
            means = means - means[-1]
        visible = means > 0 if is_state else np.ones(len(means), dtype=bool)
        if not visible.any():
            continue
        drawn = True
        axis.plot(x[visible], means[visible], color=series.colour, label=series.label)
        low = np.maximum(means - errors, 0.1 * means) if is_state else means - errors
        draw_band(axis, x[visible], low[visible], (means + errors)[visible], series.colour)
    if is_state and drawn:
        axis.set_yscale("log")
    if run.start:
        axis.axvspan(0, run.start, color="0.9", lw=0, label="left out")
    if drawn:
        axis.legend(frameon=False, fontsize=9)
    else:
        axis.text(0.5, 0.5, "never visited", ha="center", transform=axis.transAxes, fontsize=FONT)
    axis.set_xlabel("saved iterations", fontsize=FONT)
    axis.set_ylabel(label, fontsize=FONT)
    axis.set_title(f"running estimate of {label.split(' -')[0]} ± SE", fontsize=FONT)
