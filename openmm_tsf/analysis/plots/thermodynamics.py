"""Figure of the thermodynamic functions of a run, beside those of a reference."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.plots.style import (
    FONT,
    REFERENCE_COLOUR,
    RUN_COLOUR,
    draw_band,
    extent,
    label_degrees,
    save_figure,
    symbol,
)
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.run_data import TOLERANCE_K
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.analysis.thermodynamics import Thermodynamics

_PROFILE_COLOURS = ("#0b5394", "#e69138")
#: Bins of a profile with fewer effective samples are not drawn.
_MIN_KISH = 10
_MOST_BASINS = 6


@dataclass(frozen=True)
class _Tables:
    """Functions of temperature of the run, and of the reference if there is one."""

    run: Thermodynamics
    reference: Thermodynamics | None
    rungs: Array  # temperatures of the run's rungs in K


def plot_thermodynamics(
    run: RunEstimates, path: str | Path, reference: Reference | None = None
) -> Thermodynamics:
    """Plot ΔF(T), ⟨U⟩(T), C_V(T) by MBAR and profiles at the outer rungs, and return them.

    ΔF and profiles are those of the first φ; where it has one sign only, or there is none,
    populations of basins and the profile of another torsion.
    """
    table = run.thermodynamics()
    points = None if reference is None else reference.thermodynamics(run.boltzmann_constant)
    tables = _Tables(table, points, run.temperatures)
    figure = Figure(figsize=(11.5, 8.4), layout="constrained")
    axes = figure.subplots(2, 2)
    shown = run.profile_dihedral()
    # The reference has a single φ: it is that of a run whose φ has no number either.
    comparable = shown == "phi"
    if shown is not None and shown == table.dihedral:
        label = f"ΔF({symbol(shown)}) (kT)"
        phi_tables = tables if comparable else replace(tables, reference=None)
        _draw_function(axes[0, 0], phi_tables, "delta_f", label)
    else:
        _draw_basins(axes[0, 0], run, table.temperatures)
    if shown is None:
        axes[1, 1].set_axis_off()
    else:
        _draw_profiles(axes[1, 1], run, shown, reference if comparable else None)
    _draw_energy(axes[0, 1], tables)
    _draw_function(axes[1, 0], tables, "heat_capacity", "var(U)/kT² (J/mol/K)", scale=1e3)
    figure.suptitle(f"MBAR over {run.n_rungs} rungs, {extent(run)}; bands: ± SE", fontsize=12)
    save_figure(figure, path)
    return table


def _draw_function(axis: Axes, tables: _Tables, field: str, label: str, scale: float = 1.0) -> None:
    table, points = tables.run, tables.reference
    values, errors = scale * getattr(table, field), scale * getattr(table, f"{field}_stderr")
    known = np.isfinite(values)
    kelvins = table.temperatures
    axis.plot(kelvins[known], values[known], color=RUN_COLOUR, lw=1.4, label="run")
    band = np.nan_to_num(errors)
    draw_band(axis, kelvins[known], (values - band)[known], (values + band)[known], RUN_COLOUR)
    rungs = known & (np.abs(kelvins[:, None] - tables.rungs).min(axis=1) <= TOLERANCE_K)
    axis.plot(kelvins[rungs], values[rungs], "o", ms=4, color=RUN_COLOUR, label="rungs of the run")
    if points is not None:
        values, errors = scale * getattr(points, field), scale * getattr(points, f"{field}_stderr")
        style: dict[str, Any] = {"ms": 4, "capsize": 3, "color": REFERENCE_COLOUR}
        style |= {"fmt": "s", "label": "reference"}
        axis.errorbar(points.temperatures, values, np.nan_to_num(errors), **style)
    axis.set_xlabel("T (K)", fontsize=FONT)
    axis.set_ylabel(label, fontsize=FONT)
    axis.legend(frameon=False, fontsize=9)


def _draw_energy(axis: Axes, tables: _Tables) -> None:
    """Draw ⟨U⟩ minus the straight line between the outer rungs, which would hide the errors."""
    temperatures, energy = tables.run.temperatures, tables.run.energy
    (t_low, t_high), (low, high) = temperatures[[0, -1]], energy[[0, -1]]
    slope = (high - low) / (t_high - t_low) if t_high > t_low else 0.0

    def subtract_line(table: Thermodynamics) -> Thermodynamics:
        return replace(table, energy=table.energy - low - slope * (table.temperatures - t_low))

    points = None if tables.reference is None else subtract_line(tables.reference)
    flat = _Tables(subtract_line(tables.run), points, tables.rungs)
    _draw_function(axis, flat, "energy", "⟨U⟩ - line (kJ/mol)")
    axis.set_title(
        f"line: {low:.2f} kJ/mol at {t_low:.0f} K to {high:.2f} at {t_high:.0f} K", fontsize=10
    )


def _draw_basins(axis: Axes, run: RunEstimates, kelvins: Array) -> None:
    """Draw the populations of the most populated basins as functions of temperature by MBAR."""
    inside = {name: run.in_basin(name) for name in run.basins.names}
    names = sorted(inside, key=lambda name: -int(inside[name].sum()))[:_MOST_BASINS]
    if not names:
        axis.set_axis_off()
        return
    for name in names:
        curve = run.curve(inside[name], kelvins)
        (line,) = axis.plot(kelvins, curve.value, lw=1.4, label=symbol(name))
        band = np.nan_to_num(curve.stderr)
        low, high = np.maximum(curve.value - band, 0.0), np.minimum(curve.value + band, 1.0)
        draw_band(axis, kelvins, low, high, line.get_color())
    axis.set_xlabel("T (K)", fontsize=FONT)
    axis.set_ylabel("P", fontsize=FONT)
    left_out = len(inside) - len(names)
    axis.set_title(
        f"populations of basins{f' ({left_out} rarer ones left out)' if left_out else ''}",
        fontsize=10,
    )
    axis.legend(frameon=False, fontsize=9)


def _draw_profiles(axis: Axes, run: RunEstimates, name: str, reference: Reference | None) -> None:
    kelvins = [float(run.temperatures[0])]
    if run.n_rungs > 1:
        kelvins.append(float(run.temperatures[-1]))
    for kelvin, colour in zip(kelvins, _PROFILE_COLOURS, strict=False):
        profile = run.profile(name, kelvin)
        centres = np.degrees(0.5 * (profile.edges[1:] + profile.edges[:-1]))
        drawn = np.where(profile.kish >= _MIN_KISH, profile.free_energy, np.nan)
        axis.plot(centres, drawn, color=colour, lw=1.4, label=f"run, {kelvin:.0f} K")
        band = np.nan_to_num(profile.stderr)
        draw_band(axis, centres, drawn - band, drawn + band, colour)
        rung = None if reference is None else reference.rung(kelvin)
        if reference is None or rung is None:
            continue
        expected = reference.phi_profile(rung)
        seen = expected.kish >= _MIN_KISH
        style: dict[str, Any] = {"ms": 3, "capsize": 2, "lw": 0.8, "color": colour, "mfc": "white"}
        style["label"] = f"reference, {kelvin:.0f} K"
        errors = np.nan_to_num(expected.stderr[seen])
        axis.errorbar(centres[seen], expected.free_energy[seen], errors, fmt="s", **style)
    label_degrees(axis, "x", symbol(name))
    axis.set_ylabel("free energy (kT)", fontsize=FONT)
    axis.set_title(f"bins of at least {_MIN_KISH} effective samples", fontsize=10)
    axis.legend(frameon=False, fontsize=9)
