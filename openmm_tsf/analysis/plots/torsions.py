"""Figures of torsions, residue by residue, and of observables: histograms, running estimates."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.observables import DIHEDRAL
from openmm_tsf.analysis.observed import find_observed_wells
from openmm_tsf.analysis.plots.ramachandran import draw_map
from openmm_tsf.analysis.plots.running import Series, draw_running, series_of_rungs
from openmm_tsf.analysis.plots.style import (
    FONT,
    colours_of_rungs,
    density_of,
    draw_density,
    extent,
    label_degrees,
    save_figure,
    symbol,
)
from openmm_tsf.analysis.ramachandran import BINS
from openmm_tsf.analysis.statistics import Array, torus_histogram
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.utils.topology import is_backbone, residue_of
from openmm_tsf.utils.wells import Wells

_ANGLE_BINS, _BINS = 60, 50  # of 6°: an edge at 0
_DPI = 110
_COLUMNS = 3
_INVERSE = {"kJ/mol": "mol/kJ", "nm": "1/nm", "rad": "1/rad"}


def torsions_by_residue(run: RunEstimates) -> dict[str, tuple[str, ...]]:
    """Return the recorded torsions of each residue by the name of their figure.

    None of a run whose φ and ψ are all that it records: other figures show these.
    """
    by_number: dict[int | None, list[str]] = {}
    for name in run.dihedral_atoms:
        by_number.setdefault(residue_of(name), []).append(name)
    if [set(names) for names in by_number.values()] == [{"phi", "psi"}]:
        return {}
    order = sorted(by_number, key=lambda number: (number is not None, number))
    return {
        "torsions.png" if number is None else f"torsions_{number}.png": tuple(by_number[number])
        for number in order
    }


def plot_torsions(run: RunEstimates, path: str | Path, names: Sequence[str]) -> None:
    """Plot torsions of one residue: (φ, ψ), histograms at every rung, running populations of wells.

    (φ, ψ) where both are among the names, at the lowest, a middle and the highest rung; populations
    at the lowest and the highest.
    """
    run.require_samples()
    pair = [name for name in names if is_backbone(name)]
    has_map = len(pair) == 2
    axes, figure = _make_axes(len(names) + has_map)
    if has_map:
        _draw_maps(figure, axes[0], run, (pair[0], pair[1]))
    for row, name in zip(axes[has_map:], names, strict=True):
        _draw_dihedral(row, run, name, run.dihedral_at_all_rungs(name), run.basins.wells[name])
    figure.suptitle(f"{', '.join(map(symbol, names))}: {extent(run)}; bands: ± SE", fontsize=12)
    save_figure(figure, path, _DPI)


def plot_observables(run: RunEstimates, path: str | Path, torsions: Iterable[str] = ()) -> None:
    """Plot U, torsions and all observables, a row for each: histograms and running estimates."""
    run.require_samples()
    observables = run.observables
    names = [name for name in torsions if name not in observables]
    axes, figure = _make_axes(1 + len(names) + len(observables))
    _draw_number(axes[0], run, "U", "kJ/mol", run.energy, from_last=True)
    for row, name in zip(axes[1:], names, strict=False):
        _draw_dihedral(row, run, name, run.dihedral_at_all_rungs(name), run.basins.wells[name])
    for row, observable in zip(axes[1 + len(names) :], observables.values(), strict=True):
        values = run.observable(observable.name)
        if observable.kind == DIHEDRAL:
            wells = find_observed_wells(observable, [values])
            _draw_dihedral(row, run, observable.name, values, wells)
        else:
            _draw_number(row, run, observable.name, observable.unit, values)
    figure.suptitle(f"{extent(run)}; bands: ± SE", fontsize=12)
    save_figure(figure, path, _DPI)


def _make_axes(n_rows: int) -> tuple[Any, Figure]:
    figure = Figure(figsize=(4.5 * _COLUMNS, 3.5 * n_rows + 0.5), layout="constrained")
    return figure.subplots(n_rows, _COLUMNS, squeeze=False), figure


def _draw_maps(figure: Figure, row: Any, run: RunEstimates, names: tuple[str, str]) -> None:
    shown = sorted({0, run.n_rungs // 2, run.n_rungs - 1})
    for axis in row[len(shown) :]:
        axis.set_axis_off()
    image = None
    for axis, rung in zip(row, shown, strict=False):
        phi, psi = (run.dihedral_at_all_rungs(name)[:, :, rung] for name in names)
        histogram = torus_histogram(phi, psi, BINS)
        image = draw_map(axis, histogram, float(histogram.max()), names)
        axis.set_title(f"{run.temperatures[rung]:.2f} K", fontsize=FONT)
    assert image is not None
    bar = figure.colorbar(image, ax=row[len(shown) - 1], shrink=0.9, extend="max")
    bar.set_label("$-\\ln\\,p$ above the minimum ($k_\\mathrm{B}T$)")


def _draw_dihedral(
    row: Any, run: RunEstimates, name: str, values: Array, wells: Wells | None
) -> None:
    """Draw the histogram of a dihedral [n, W, R], and the running populations of its wells."""
    label, edges = symbol(name), np.linspace(-180, 180, _ANGLE_BINS + 1)
    _draw_densities(row[0], run, np.degrees(values), edges, is_log=True)
    label_degrees(row[0], "x", label)
    row[0].set_ylabel(f"p({label}) (1/°)", fontsize=FONT)
    borders = () if wells is None else wells.borders
    for border in borders:
        row[0].axvline(border, color="0.4", lw=0.8, ls=":")
    row[0].set_title(f"{label}; dotted: borders of wells" if borders else label, fontsize=FONT)
    rungs = sorted({0, run.n_rungs - 1})
    for axis, rung in zip(row[1:], rungs, strict=False):
        angles, kelvin = values[:, :, rung], f"{run.temperatures[rung]:.0f} K"
        if wells is None or not wells.names:
            _draw_circular(axis, run, angles, label)
        else:
            colours = matplotlib.colormaps["tab10"](np.arange(len(wells.names)) % 10)
            labels = wells.labels(angles)
            lines = [
                Series(symbol(well), colour, labels == k)
                for k, (well, colour) in enumerate(zip(wells.names, colours, strict=True))
            ]
            draw_running(axis, run, lines, "P", is_state=True)
        axis.set_title(f"{kelvin}: {axis.get_title()}", fontsize=FONT)
    for axis in row[1 + len(rungs) :]:
        axis.set_axis_off()


def _draw_circular(axis: Axes, run: RunEstimates, angles: Array, label: str) -> None:
    """Draw the running means of cosine and sine, of a dihedral with a single well."""
    lines = [
        Series(f"cos {label}", "#0b5394", np.cos(angles)),
        Series(f"sin {label}", "#e69138", np.sin(angles)),
    ]
    draw_running(axis, run, lines, "mean")


def _draw_number(
    row: Any, run: RunEstimates, name: str, unit: str, values: Array, from_last: bool = False
) -> None:
    """Draw the histogram of values [n, W, R], running means, and means at all temperatures."""
    label = f"{name} ({unit})" if unit else name
    low, high = np.quantile(values, [0.0005, 0.9995])
    edges = np.linspace(low, high, _BINS + 1) if high > low else np.array([low - 1, low + 1])
    _draw_densities(row[0], run, values, edges)
    row[0].set_xlabel(label, fontsize=FONT)
    row[0].set_ylabel(f"p({name})" + (f" ({_INVERSE[unit]})" if unit else ""), fontsize=FONT)
    row[0].set_title(name, fontsize=FONT)
    words = f"⟨{name}⟩{' - final' if from_last else ''}{label[len(name) :]}"
    draw_running(row[1], run, series_of_rungs(run, values), words, from_last=from_last)
    estimates = [estimate_mean(values[:, :, rung]) for rung in range(run.n_rungs)]
    means = np.array([each.value for each in estimates])
    errors = np.nan_to_num([each.stderr for each in estimates])
    row[2].errorbar(run.temperatures, means, errors, fmt="o-", ms=4, capsize=3, lw=1)
    row[2].set_xlabel("T (K)", fontsize=FONT)
    row[2].set_ylabel(f"⟨{name}⟩" + label[len(name) :], fontsize=FONT)
    row[2].set_title("mean of each rung ± SE", fontsize=FONT)


def _draw_densities(
    axis: Axes, run: RunEstimates, values: Array, edges: Array, is_log: bool = False
) -> None:
    """Draw the histograms of values [n, W, R], a colour for each rung."""
    smallest = []
    for rung, colour in enumerate(colours_of_rungs(run.n_rungs)):
        density, error = density_of(values[:, :, rung], edges)
        draw_density(axis, edges, density, error, colour, f"{run.temperatures[rung]:.0f} K")
        smallest.append(density[density > 0].min(initial=np.inf))
    if is_log:
        axis.set_yscale("log")
        axis.set_ylim(bottom=max(0.5 * min(smallest), 1e-7))
    axis.legend(frameon=False, fontsize=9)
