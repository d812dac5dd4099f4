"""Figure of how the sampler works: acceptance, exchange of replicas, running estimates."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.plots.running import draw_running, series_of_rungs
from openmm_tsf.analysis.plots.style import FONT, RUN_COLOUR, extent, save_figure, symbol
from openmm_tsf.analysis.statistics import Array


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
    name = run.first_phi()
    if name is not None:
        inside, label = run.dihedral_at_all_rungs(name) > 0, f"P({symbol(name)}>0)"
        draw_running(axes[1, 0], run, series_of_rungs(run, inside), label, is_state=True)
    elif run.basins.names:
        rarest = min(run.basins.names, key=lambda basin: int(run.in_basin(basin).sum()))
        inside, label = run.in_basin(rarest), f"P({symbol(rarest)})"
        draw_running(axes[1, 0], run, series_of_rungs(run, inside), label, is_state=True)
    else:
        axes[1, 0].set_axis_off()
    energies = series_of_rungs(run, run.energy)
    draw_running(axes[1, 1], run, energies, "⟨U⟩ - final (kJ/mol)", from_last=True)
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
