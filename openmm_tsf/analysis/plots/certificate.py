"""The picture of a certificate: energies, their ratios, how far each check is off, basins."""

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmm_tsf.analysis.certify_samples import Samples
from openmm_tsf.analysis.plots.style import FONT, REFERENCE_COLOUR, RUN_COLOUR, save_figure
from openmm_tsf.units import KB

_COLOURS = {"converged": "#2e7d32", "not yet": "#b26a00", "wrong": "#b71c1c"}
_STATUS = {
    "passed": _COLOURS["converged"],
    "warning": "#8d6e00",
    "missing": _COLOURS["not yet"],
    "undecided": _COLOURS["not yet"],
    "wrong": _COLOURS["wrong"],
}
_BINS, _LEAST_IN_BIN = 40, 10
_TITLE_WIDTH = 110


def plot_certificate(
    certificate: dict[str, Any], samples: Sequence[Samples], path: str | Path
) -> None:
    """Plot a certificate with the samples that it is of (PNG, PDF or SVG)."""
    figure = Figure(figsize=(13.5, 9.5), layout="constrained")
    axes = figure.subplots(2, 2)
    colours = matplotlib.colormaps["plasma"](np.linspace(0.05, 0.8, len(samples)))
    _draw_energies(axes[0, 0], samples, colours)
    _draw_ratios(axes[0, 1], samples, colours)
    _draw_checks(axes[1, 0], certificate)
    _draw_basins(axes[1, 1], certificate)
    verdict = certificate["verdict"]
    sentence = textwrap.fill(textwrap.shorten(verdict["sentence"], 2 * _TITLE_WIDTH), _TITLE_WIDTH)
    figure.suptitle(sentence, fontsize=13, color=_COLOURS[verdict["status"]], weight="bold")
    save_figure(figure, path)


def _finite(samples: Samples) -> Any:
    energy = samples.energy.ravel()
    return energy[np.isfinite(energy)]


def _draw_energies(axis: Axes, samples: Sequence[Samples], colours: Any) -> None:
    for each, colour in zip(samples, colours, strict=True):
        energy = _finite(each)
        if not energy.size:
            continue
        low, high = np.quantile(energy, [0.001, 0.999])
        edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1).tolist()
        label = f"{each.temperature:.0f} K, {each.n_frames:,} frames"
        axis.hist(energy, edges, density=True, histtype="step", color=colour, label=label)
    if axis.has_data():
        axis.legend(frameon=False, fontsize=9)
    axis.set_xlabel("U (kJ/mol)", fontsize=FONT)
    axis.set_ylabel("density", fontsize=FONT)
    axis.set_title("energies (0.1 % beyond each end is not shown)", fontsize=FONT)


def _draw_ratios(axis: Axes, samples: Sequence[Samples], colours: Any) -> None:
    if len(samples) < 2:
        axis.text(0.5, 0.5, "one temperature", ha="center", transform=axis.transAxes, fontsize=FONT)
        axis.set_axis_off()
        return
    for (low, high), colour in zip(pairwise(samples), colours, strict=False):
        first, second = _finite(low), _finite(high)
        start, end = max(first.min(), second.min()), min(first.max(), second.max())
        if not start < end:
            continue
        edges = np.linspace(start, end, _BINS // 2 + 1)
        counts = [np.histogram(each, edges)[0] for each in (first, second)]
        shown = np.minimum(*counts) >= _LEAST_IN_BIN
        if shown.sum() < 2:
            continue
        centres = 0.5 * (edges[1:] + edges[:-1])[shown]
        a, b = (count[shown] for count in counts)
        ratio = np.log(b / second.size) - np.log(a / first.size)
        expected = 1 / (KB * low.temperature) - 1 / (KB * high.temperature)
        weight = 1 / (1 / a + 1 / b)
        offset = np.average(ratio - expected * centres, weights=weight)
        label = f"{low.temperature:.0f} and {high.temperature:.0f} K"
        axis.errorbar(centres, ratio, weight**-0.5, fmt="o", ms=3, color=colour, label=label)
        axis.plot(centres, offset + expected * centres, color=colour, lw=1)
    if axis.has_data():
        axis.legend(frameon=False, fontsize=9)
    else:
        words = "too few frames of common energies"
        axis.text(0.5, 0.5, words, ha="center", transform=axis.transAxes, fontsize=FONT)
    axis.set_xlabel("U (kJ/mol)", fontsize=FONT)
    axis.set_ylabel("ln[P(U, high T) / P(U, low T)]", fontsize=FONT)
    axis.set_title("lines: slopes of Boltzmann distributions", fontsize=FONT)


def _draw_checks(axis: Axes, certificate: dict[str, Any]) -> None:
    """Draw a row per kind of check: a mark per temperature, coloured by its outcome."""
    checks = certificate["checks"]
    names = list(dict.fromkeys(check["name"] for check in checks))
    for row, name in enumerate(names):
        statuses = [check["status"] for check in checks if check["name"] == name]
        statuses.sort(key=list(_STATUS).index)
        marks = np.linspace(0.03, 0.6, max(12, len(statuses)))[: len(statuses)]
        axis.scatter(marks, [row] * len(marks), color=[_STATUS[s] for s in statuses], s=45)
        worst = statuses[-1]
        number = statuses.count(worst)
        words = worst if worst == "passed" else f"{worst}: {number} of {len(statuses)}"
        axis.text(0.66, row, words, va="center", fontsize=FONT, color=_STATUS[worst])
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    axis.set_xticks([])
    axis.set_title("checks", fontsize=FONT)


def _draw_basins(axis: Axes, certificate: dict[str, Any]) -> None:
    """Draw the populations at the lowest temperature with their 95 % intervals."""
    lowest = f"{certificate['temperatures_K'][0]:.2f}"
    prefix = "basin "
    basins = {
        name.removeprefix(prefix): table[lowest]
        for name, table in certificate["quantities"].items()
        if name.startswith(prefix)
    }
    if not basins:
        axis.text(0.5, 0.5, "no slow torsion", ha="center", transform=axis.transAxes, fontsize=FONT)
        axis.set_axis_off()
        return
    floor = 1e-5
    for row, assessed in enumerate(basins.values()):
        low, high = max(assessed["low"], floor), max(assessed["high"], floor)
        axis.plot([low, high], [row, row], color=RUN_COLOUR, lw=2)
        if assessed["value"] > floor:
            axis.plot(assessed["value"], row, "o", color=RUN_COLOUR)
    if certificate["coverage"]:
        table = certificate["coverage"][lowest]["basins"]
        for row, name in enumerate(basins):
            by_flow = table.get(name)
            if by_flow is None:  # of an observed dihedral
                continue
            if by_flow["high"] is not None:
                ends = [max(by_flow["low"], floor), max(by_flow["high"], floor)]
                axis.plot(ends, [row + 0.2] * 2, color=REFERENCE_COLOUR, lw=2)
            if (by_flow["p"] or 0) > floor:
                axis.plot(by_flow["p"], row + 0.2, "s", color=REFERENCE_COLOUR)
        axis.plot([], [], "s-", color=REFERENCE_COLOUR, label="weighted draws of the flow")
    axis.plot([], [], "o-", color=RUN_COLOUR, label="frames")
    axis.legend(frameon=False, fontsize=9)
    axis.set_xscale("log")
    axis.set_xlim(floor, 1.2)
    axis.set_yticks(range(len(basins)), list(basins))
    axis.set_ylim(len(basins) - 0.3, -0.7)
    axis.set_xlabel("population, 95 %", fontsize=FONT)
    axis.set_title(f"basins at {lowest} K", fontsize=FONT)
