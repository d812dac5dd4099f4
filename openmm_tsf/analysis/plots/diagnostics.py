"""Figure of how the sampler works: acceptance, exchange of replicas, running estimates."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.plots.style import FONT, RUN_COLOUR, draw_band, extent, save_figure, symbol
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.analysis.uncertainty import estimate_mean

_RUNNING_POINTS = 20


def plot_diagnostics(run: RunEstimates, path: str | Path) -> None:
    """Plot acceptance per kernel, exchange of replicas, and running estimates with their errors."""
    run.require_samples()
    figure = Figure(figsize=(13.5, 9.0), layout="constrained")
    axes = figure.subplots(2, 3)
    _draw_moves(axes[0, 0], run)
    if run.n_rungs > 1:
        _draw_swaps(axes[0, 1], run)
        _draw_mixing(figure, axes[0, 2], run)
        _draw_replica(axes[1, 2], run)
    else:
        for axis in (axes[0, 1], axes[0, 2], axes[1, 2]):
            axis.set_axis_off()
    # A φ if one was recorded: the first recorded dihedral may be a ψ.
    name = min(run.dihedral_atoms, key=lambda n: not n.startswith("phi"), default=None)
    if name is None:
        axes[1, 0].set_axis_off()
    else:
        label = f"P({symbol(name)}>0)"
        _draw_running(axes[1, 0], run, lambda t: run.dihedral(name, t) > 0, label, True)
    _draw_running(axes[1, 1], run, run.energies, "⟨U⟩ - final (kJ/mol)", False)
    known = run.segments
    figure.suptitle(
        f"{extent(run)}; {known.n_evaluations:,} energy evaluations in "
        f"{known.wall_seconds:,.0f} s; rejected non-finite {known.rejected_non_finite:,}, "
        f"mirror images {known.mirror_images:,}",
        fontsize=12,
    )
    save_figure(figure, path)


def _draw_moves(axis: Axes, run: RunEstimates) -> None:
    rates = {k: v for k, v in run.acceptance().items() if v.shape == (run.n_rungs,)}
    _draw_rates(axis, run.temperatures, rates, "o-")
    axis.set_xticks(run.temperatures, [f"{t:.0f}" for t in run.temperatures])
    axis.set_xlabel("T (K)", fontsize=FONT)
    axis.set_title("moves", fontsize=FONT)


def _draw_swaps(axis: Axes, run: RunEstimates) -> None:
    rates = {
        name: np.diagonal(table, offset=1) if table.ndim == 2 else table
        for name, table in run.acceptance().items()
        if table.shape != (run.n_rungs,)
    }
    places = np.arange(run.n_rungs - 1)
    _draw_rates(axis, places, rates, "s-")
    axis.set_xticks(places, [f"{a:.0f}–{b:.0f}" for a, b in pairwise(run.temperatures)])
    axis.set_xlabel("neighbouring rungs (K)", fontsize=FONT)
    axis.set_title("swaps", fontsize=FONT)


def _draw_rates(axis: Axes, x: npt.ArrayLike, rates: dict[str, Array], style: str) -> None:
    for name, values in rates.items():
        axis.plot(x, values, style, label=name)
    if rates:
        axis.legend(frameon=False, fontsize=9)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("accepted / proposed", fontsize=FONT)


def _draw_mixing(figure: Figure, axis: Axes, run: RunEstimates) -> None:
    matrix = run.mixing_matrix()
    image = axis.imshow(np.ma.masked_invalid(matrix), cmap="Blues", vmin=0, vmax=1)
    if run.n_rungs <= 8:
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if value > 0.6 else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    labels = [f"{t:.0f}" for t in run.temperatures]
    axis.set_xticks(range(run.n_rungs), labels)
    axis.set_yticks(range(run.n_rungs), labels)
    axis.set_xlabel("rung one saved iteration later (K)", fontsize=FONT)
    axis.set_ylabel("rung of the replica (K)", fontsize=FONT)
    trips, iterations = run.round_trips().sum(), run.relaxation().iterations
    words = f"mixing; {trips:,} round trips, relaxation {iterations:.1f} iterations"
    axis.set_title(words, fontsize=FONT)
    figure.colorbar(image, ax=axis, shrink=0.8, label="probability")


def _draw_running(
    axis: Axes, run: RunEstimates, series: Callable[[float], npt.ArrayLike], label: str, log: bool
) -> None:
    first = run.n_used / _RUNNING_POINTS
    ends = np.unique(np.linspace(first, run.n_used, _RUNNING_POINTS).astype(int))
    ends = ends[ends > 0]
    x = run.start + ends
    colours = matplotlib.colormaps["plasma"](np.linspace(0.05, 0.8, run.n_rungs))
    drawn = False
    for temperature, colour in zip(run.temperatures, colours, strict=True):
        values = np.asarray(series(temperature), dtype=np.float64)
        estimates = [estimate_mean(values[:end]) for end in ends]
        means = np.array([e.value for e in estimates])
        errors = np.nan_to_num(np.array([e.stderr for e in estimates]))
        if not log:
            means = means - means[-1]
        visible = means > 0 if log else np.ones(len(means), dtype=bool)
        if not visible.any():
            continue
        drawn = True
        axis.plot(x[visible], means[visible], color=colour, label=f"{temperature:.0f} K")
        low = np.maximum(means - errors, 0.1 * means) if log else means - errors
        draw_band(axis, x[visible], low[visible], (means + errors)[visible], colour)
    if log and drawn:
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


def _draw_replica(axis: Axes, run: RunEstimates) -> None:
    rung_of = np.argsort(run.segments.replica[:, 0], axis=1)
    shown = min(run.n_iterations, 200)
    # The replica that started at the lowest rung, over the first iterations only.
    iterations, temperatures = run.segments.iteration[:shown], run.temperatures[rung_of[:shown, 0]]
    axis.plot(iterations, temperatures, lw=0.9, drawstyle="steps-post", color=RUN_COLOUR)
    axis.set_yticks(run.temperatures, [f"{t:.0f}" for t in run.temperatures])
    axis.set_xlabel("iteration", fontsize=FONT)
    axis.set_ylabel("T (K)", fontsize=FONT)
    axis.set_title("one replica of walker 0", fontsize=FONT)
