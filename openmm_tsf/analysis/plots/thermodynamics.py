"""Thermodynamic functions of a run: figure, table, and how they compare with a reference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmm_tsf.analysis.ensemble_checks import heat_capacity
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.plots.style import (
    FONT,
    REFERENCE_COLOUR,
    RUN_COLOUR,
    extent,
    save_figure,
    symbol,
)
from openmm_tsf.analysis.reference import Reference, recorded_reference
from openmm_tsf.analysis.run_data import TOLERANCE_K
from openmm_tsf.analysis.summary import plain
from openmm_tsf.analysis.thermodynamics import (
    PROFILE_BINS,
    Profile,
    Thermodynamics,
    dihedral_bins,
    kish_by_bin,
    make_profile,
)
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.io.files import write_json

Array = npt.NDArray[np.float64]

_PROFILE_COLOURS = ("#0b5394", "#e69138")
#: Bins of a profile that rest on fewer samples are not drawn.
_MIN_KISH = 10
_COMPARED = (
    ("energy_kJ_mol", "energy"),
    ("heat_capacity_kJ_mol_K", "heat_capacity"),
    ("delta_F_phi_kT", "delta_f"),
)


def reference_thermodynamics(reference: Reference, boltzmann_constant: float) -> Thermodynamics:
    """The reference at its rungs, each from the rung's own samples.

    Parameters
    ----------
    reference
        The samples.
    boltzmann_constant
        In kJ/(mol K).
    """
    rungs = range(len(reference.temperatures))
    energies = [reference.mean_energy(k) for k in rungs]
    capacities = [
        heat_capacity(reference.energy[:, k, None], float(t), boltzmann_constant)
        for k, t in enumerate(reference.temperatures)
    ]
    delta_f = np.array([reference.phi_positive(k).free_energy for k in rungs])
    return Thermodynamics(
        temperatures=reference.temperatures,
        energy=np.array([e.value for e in energies]),
        energy_stderr=np.array([e.stderr for e in energies]),
        heat_capacity=np.array([c.value for c in capacities]),
        heat_capacity_stderr=np.array([c.stderr for c in capacities]),
        dihedral="phi",
        delta_f=delta_f[:, 0],
        delta_f_stderr=delta_f[:, 1],
        kish=np.full(len(delta_f), float(len(reference.phi))),
    )


def compare_thermodynamics(run: RunEstimates, reference: Reference) -> dict[str, dict[str, float]]:
    """z of the run's MBAR estimates at every rung of the reference inside the run's ladder.

    Most of these need not be rungs of the run: what is tested there is the reweighting.

    Returns
    -------
    z
        By quantity, then by temperature in K; ``delta_F_phi_kT`` where the run recorded a ``phi``.
    """
    theirs = reference_thermodynamics(reference, run.boltzmann_constant)
    low, high = run.temperatures[0] - TOLERANCE_K, run.temperatures[-1] + TOLERANCE_K
    inside = (theirs.temperatures >= low) & (theirs.temperatures <= high)
    name = "phi" if "phi" in run.dihedral_atoms else None
    ours = run.thermodynamics(theirs.temperatures[inside], name)
    keys = [f"{t:.2f}" for t in ours.temperatures]
    result = {}
    for label, field in _COMPARED:
        if field == "delta_f" and name is None:
            continue
        difference = getattr(ours, field) - getattr(theirs, field)[inside]
        error = np.hypot(
            getattr(ours, f"{field}_stderr"), getattr(theirs, f"{field}_stderr")[inside]
        )
        result[label] = dict(zip(keys, map(float, difference / error), strict=True))
    return result


def write_thermodynamics(
    run: RunEstimates, folder: str | Path, reference: Reference | None = None
) -> dict[str, Any]:
    """Write ``thermodynamics.csv``, ``thermodynamics.json`` and ``thermodynamics.png``.

    Parameters
    ----------
    run, folder
        What to write where.
    reference
        To compare with; the one that the configuration names when left out.

    Returns
    -------
    content
        Of the JSON file: ``functions`` (the rows of the CSV file), ``profiles`` of φ at every rung,
        and, beside a reference, ``reference`` (its rows) and ``z``. Numbers that are not known are
        None.

    Raises
    ------
    ValueError
        If the run has no data yet.
    """
    target, reference = Path(folder), reference or recorded_reference(run)
    table = plot_thermodynamics(run, target / "thermodynamics.png", reference)
    table.to_csv(target / "thermodynamics.csv")
    content: dict[str, Any] = {"functions": table.rows(), "profiles": {}}
    if run.first_phi() is not None:
        content["profiles"] = {
            f"{t:.2f}": _numbers(run.phi_profile(t)) for t in map(float, run.temperatures)
        }
    if reference is not None:
        content["reference"] = reference_thermodynamics(reference, run.boltzmann_constant).rows()
        content["z"] = compare_thermodynamics(run, reference)
    content = plain(content)
    write_json(target / "thermodynamics.json", content)
    return content


def _numbers(profile: Profile) -> dict[str, Any]:
    return {
        "edges_rad": profile.edges.tolist(),
        "free_energy_kT": profile.free_energy.tolist(),
        "stderr_kT": profile.stderr.tolist(),
        "probability": profile.probability.tolist(),
        "probability_stderr": profile.probability_stderr.tolist(),
        "kish": profile.kish.tolist(),
    }


def plot_thermodynamics(
    run: RunEstimates, path: str | Path, reference: Reference | None = None
) -> Thermodynamics:
    """ΔF(T), ⟨U⟩(T), C_V(T) by MBAR and φ profiles at the outer rungs, with standard errors.

    Raises
    ------
    ValueError
        If the run has no data yet.
    """
    table = run.thermodynamics()
    points = None
    if reference is not None:
        points = reference_thermodynamics(reference, run.boltzmann_constant)
    figure = Figure(figsize=(11.5, 8.4), layout="constrained")
    axes = figure.subplots(2, 2)
    if table.dihedral is None:
        axes[0, 0].set_axis_off()
        axes[1, 1].set_axis_off()
    else:
        # The reference has one φ: that of a run which calls its own simply so.
        shown = points if table.dihedral == "phi" else None
        label = f"ΔF({symbol(table.dihedral)}) (kT)"
        _draw_function(axes[0, 0], run, table, shown, "delta_f", label)
        _draw_profiles(axes[1, 1], run, table.dihedral, reference if shown is not None else None)
    _draw_energy(axes[0, 1], run, table, points)
    _draw_function(
        axes[1, 0], run, table, points, "heat_capacity", "var(U)/kT² (J/mol/K)", scale=1e3
    )
    figure.suptitle(f"MBAR over {run.n_rungs} rungs, {extent(run)}; bands: ± SE", fontsize=12)
    save_figure(figure, path)
    return table


def _draw_function(
    axis: Axes,
    run: RunEstimates,
    table: Thermodynamics,
    points: Thermodynamics | None,
    field: str,
    label: str,
    scale: float = 1.0,
) -> None:
    values, errors = scale * getattr(table, field), scale * getattr(table, f"{field}_stderr")
    known = np.isfinite(values)
    kelvins = table.temperatures
    axis.plot(kelvins[known], values[known], color=RUN_COLOUR, lw=1.4, label="run")
    band = np.nan_to_num(errors)
    axis.fill_between(
        kelvins[known], (values - band)[known], (values + band)[known],
        color=RUN_COLOUR, alpha=0.25, lw=0,
    )  # fmt: skip
    rungs = known & (np.abs(kelvins[:, None] - run.temperatures).min(axis=1) <= TOLERANCE_K)
    axis.plot(kelvins[rungs], values[rungs], "o", ms=4, color=RUN_COLOUR, label="its rungs")
    if points is not None:
        axis.errorbar(
            points.temperatures,
            scale * getattr(points, field),
            np.nan_to_num(scale * getattr(points, f"{field}_stderr")),
            fmt="s", ms=4, capsize=3, color=REFERENCE_COLOUR, label="reference",
        )  # fmt: skip
    axis.set_xlabel("T (K)", fontsize=FONT)
    axis.set_ylabel(label, fontsize=FONT)
    axis.legend(frameon=False, fontsize=9)


def _draw_energy(
    axis: Axes, run: RunEstimates, table: Thermodynamics, points: Thermodynamics | None
) -> None:
    """⟨U⟩ less the straight line between the outer rungs, which would hide the errors."""
    (t_low, t_high), (low, high) = table.temperatures[[0, -1]], table.energy[[0, -1]]
    slope = (high - low) / (t_high - t_low) if t_high > t_low else 0.0

    def less(of: Thermodynamics) -> Thermodynamics:
        return replace(of, energy=of.energy - low - slope * (of.temperatures - t_low))

    label = "⟨U⟩ - line (kJ/mol)"
    _draw_function(
        axis, run, less(table), None if points is None else less(points), "energy", label
    )
    axis.set_title(
        f"line: {low:.2f} kJ/mol at {t_low:.0f} K to {high:.2f} at {t_high:.0f} K", fontsize=10
    )


def _draw_profiles(axis: Axes, run: RunEstimates, name: str, reference: Reference | None) -> None:
    kelvins = [float(run.temperatures[0])]
    if run.n_rungs > 1:
        kelvins.append(float(run.temperatures[-1]))
    for kelvin, colour in zip(kelvins, _PROFILE_COLOURS, strict=False):
        ours = run.profile(name, kelvin)
        centres = np.degrees(0.5 * (ours.edges[1:] + ours.edges[:-1]))
        drawn = np.where(ours.kish >= _MIN_KISH, ours.free_energy, np.nan)
        axis.plot(centres, drawn, color=colour, lw=1.4, label=f"run, {kelvin:.0f} K")
        band = np.nan_to_num(ours.stderr)
        axis.fill_between(centres, drawn - band, drawn + band, color=colour, alpha=0.25, lw=0)
        rung = None if reference is None else reference.rung(kelvin)
        if reference is None or rung is None:
            continue
        theirs = _reference_profile(reference, rung, kelvin)
        seen = theirs.kish >= _MIN_KISH
        axis.errorbar(
            centres[seen], theirs.free_energy[seen], np.nan_to_num(theirs.stderr[seen]),
            fmt="s", ms=3, capsize=2, lw=0.8, color=colour, mfc="white",
            label=f"reference, {kelvin:.0f} K",
        )  # fmt: skip
    axis.set_xlim(-180, 180)
    axis.set_xticks(range(-180, 181, 90))
    axis.set_xlabel(f"{symbol(name)} (°)", fontsize=FONT)
    axis.set_ylabel("free energy (kT)", fontsize=FONT)
    axis.set_title(f"bins of at least {_MIN_KISH} effective samples", fontsize=10)
    axis.legend(frameon=False, fontsize=9)


def _reference_profile(reference: Reference, rung: int, kelvin: float) -> Profile:
    edges, index = dihedral_bins(reference.phi[:, rung, None], PROFILE_BINS)
    probability, stderr = np.zeros(PROFILE_BINS), np.full(PROFILE_BINS, np.nan)
    for b in np.unique(index):
        estimate = estimate_mean(index == b)
        probability[b], stderr[b] = estimate.value, estimate.stderr
    kish = kish_by_bin(index, np.ones(index.shape), PROFILE_BINS)
    return make_profile(kelvin, edges, probability, stderr, kish)
