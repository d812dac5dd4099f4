"""Ramachandran plots and histograms of a run.

Figures are made without pyplot: no window is opened and no global state changed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from openmm_tsf.analysis.comparison import (
    MeanComparison,
    ReferenceComparison,
    compare_with_reference,
)
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.plots.style import (
    FONT,
    REFERENCE_COLOUR,
    RUN_COLOUR,
    density_of,
    draw_density,
    extent,
    label_degrees,
    save_figure,
    symbol,
)
from openmm_tsf.analysis.ramachandran import BINS, RamachandranDistance
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.statistics import Array, torus_histogram
from openmm_tsf.analysis.uncertainty import MeanEstimate

_CUTOFF_KT = 8.0
_PHI_BINS = 60  # of 6°: an edge at 0
_ENERGY_BINS = 50


@dataclass(frozen=True)
class _Sample:
    """Samples of one rung of the run or the reference; arrays [n, W]."""

    phi: Array
    psi: Array
    energy: Array
    label: str
    colour: str


def plot_ramachandran(
    run: RunEstimates,
    path: str | Path,
    reference: Reference | None = None,
    residue: int | None = None,
) -> None:
    """Plot, a row per rung, (φ, ψ) of run and reference, and histograms of φ and energy.

    The path's suffix is one that matplotlib can write. The reference is drawn beside the run at the
    rungs that it has; the residue is that of φ and ψ, as in `Run.backbone`.
    """
    phi, psi = run.backbone(residue)
    run.require_samples()
    comparison = None
    if reference is not None and any(reference.rung(t) is not None for t in run.temperatures):
        comparison = compare_with_reference(run, reference)
    n_columns = 3 if comparison is None else 4
    n_maps = n_columns - 2
    figure = Figure(figsize=(4.0 * n_columns, 3.9 * run.n_rungs + 1.6))
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.06)
    grid = figure.add_gridspec(run.n_rungs + 1, n_columns, height_ratios=[1] * run.n_rungs + [0.05])
    axes = [[figure.add_subplot(grid[r, c]) for c in range(n_columns)] for r in range(run.n_rungs)]
    image = None
    for row, temperature in zip(axes, map(float, run.temperatures), strict=True):
        image = _draw_rung(row, run, (phi, psi), temperature, reference, comparison)
    assert image is not None
    bar = figure.colorbar(
        image, cax=figure.add_subplot(grid[-1, :n_maps]), orientation="horizontal", extend="max"
    )
    bar.set_label(r"$-\ln\,p(\varphi,\psi)$ above the minimum ($k_\mathrm{B}T$); white: no sample")
    figure.suptitle(_caption(run, phi, comparison), fontsize=12)
    save_figure(figure, path)


def _draw_rung(
    row: list[Axes],
    run: RunEstimates,
    names: tuple[str, str],
    temperature: float,
    reference: Reference | None,
    comparison: ReferenceComparison | None,
) -> AxesImage:
    samples = [_run_sample(run, names, temperature)]
    k = distance = None
    if comparison is not None and reference is not None:
        if temperature in comparison.temperatures:
            k = comparison.temperatures.index(temperature)
            distance = comparison.ramachandran[k]
            samples.append(_reference_sample(reference, temperature))
        else:
            _draw_missing(row[1], temperature)
    # The same zero for both maps, so that equal colours are equal probabilities.
    maps = [torus_histogram(sample.phi, sample.psi, BINS) for sample in samples]
    highest = float(maps[-1].max())
    image = draw_map(row[0], maps[0], highest, names)
    row[0].set_title(_run_title(run, temperature, distance), fontsize=10)
    if distance is not None:
        draw_map(row[1], maps[1], highest, names)
        title = _reference_title(temperature, samples[1].phi.size, distance)
        row[1].set_title(title, fontsize=10)
    label = symbol(names[0])
    _draw_phi(row[-2], samples, label)
    positive = run.positive(names[0], temperature)
    compared = None if comparison is None else comparison.phi_positive
    row[-2].set_title(_mean_title(f"P({label}>0)", positive, compared, k), fontsize=10)
    _draw_energies(row[-1], samples)
    compared = None if comparison is None else comparison.energy
    title = _mean_title("⟨U⟩ (kJ/mol)", run.mean_energy(temperature), compared, k)
    row[-1].set_title(title, fontsize=10)
    return image


def _run_sample(run: RunEstimates, names: tuple[str, str], temperature: float) -> _Sample:
    phi, psi = (run.dihedral(name, temperature) for name in names)
    return _Sample(phi, psi, run.energies(temperature), "run", RUN_COLOUR)


def _reference_sample(reference: Reference, temperature: float) -> _Sample:
    k = reference.rung(temperature)
    arrays = (reference.phi, reference.psi, reference.energy)
    phi, psi, energy = (values[:, :, k] for values in arrays)
    return _Sample(phi, psi, energy, "reference", REFERENCE_COLOUR)


def _draw_missing(axis: Axes, temperature: float) -> None:
    axis.set_axis_off()
    text = f"{temperature:.2f} K:\nnot in the reference"
    place = axis.transAxes
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=place, fontsize=FONT)


def draw_map(axis: Axes, p: Array, highest: float, names: tuple[str, str]) -> AxesImage:
    """Draw -ln of probabilities [bins, bins] of two dihedrals in kT above that of the highest."""
    with np.errstate(divide="ignore"):
        free_energy = -np.log(p / highest)
    style: dict[str, Any] = {"origin": "lower", "extent": (-180, 180, -180, 180), "cmap": "viridis"}
    style |= {"aspect": "equal", "interpolation": "nearest", "norm": Normalize(0.0, _CUTOFF_KT)}
    image = axis.imshow(np.ma.masked_invalid(free_energy.T), **style)
    label_degrees(axis, "x", symbol(names[0]))
    label_degrees(axis, "y", symbol(names[1]))
    axis.axvline(0.0, color="0.4", lw=0.7, ls=":")
    return image


def _draw_phi(axis: Axes, samples: list[_Sample], label: str) -> None:
    edges = np.linspace(-180, 180, _PHI_BINS + 1)
    smallest = []
    for sample in samples:
        density, error = density_of(np.degrees(sample.phi), edges)
        draw_density(axis, edges, density, error, sample.colour, sample.label)
        smallest.append(density[density > 0].min())
    axis.set_yscale("log")
    axis.set_ylim(bottom=max(0.5 * min(smallest), 1e-7))
    label_degrees(axis, "x", label)
    axis.axvline(0.0, color="0.4", lw=0.7, ls=":")
    axis.set_ylabel(f"p({label}) (1/°)", fontsize=FONT)
    axis.set_box_aspect(1)
    axis.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_energies(axis: Axes, samples: list[_Sample]) -> None:
    low = min(np.quantile(sample.energy, 0.0005) for sample in samples)
    high = max(np.quantile(sample.energy, 0.9995) for sample in samples)
    edges = np.linspace(low, high, _ENERGY_BINS + 1) if high > low else np.array([low - 1, low + 1])
    histograms = [density_of(sample.energy, edges) for sample in samples]
    top = max(float((density + np.nan_to_num(error)).max()) for density, error in histograms)
    for sample, (density, error) in zip(samples, histograms, strict=True):
        draw_density(axis, edges, density, error, sample.colour, sample.label)
        mean, label = float(sample.energy.mean()), f"{sample.label} mean"
        axis.vlines(mean, 0, top, color=sample.colour, lw=0.8, ls="--", label=label)
    axis.set_ylim(0, 1.35 * top)  # room for the legend
    axis.set_xlabel("U (kJ/mol)", fontsize=FONT)
    axis.set_ylabel("p(U) (mol/kJ)", fontsize=FONT)
    axis.set_box_aspect(1)
    axis.legend(frameon=False, fontsize=9, loc="upper center", ncols=2)


def _run_title(run: RunEstimates, temperature: float, distance: RamachandranDistance | None) -> str:
    title = f"{temperature:.2f} K, run: {run.n_used * run.n_walkers:,} samples"
    if distance is None:
        return title
    tv, floor = distance.total_variation, distance.floor_total_variation
    return f"{title}\nTV {tv:.3f} (floor {floor:.3f})"


def _reference_title(temperature: float, n_frames: int, distance: RamachandranDistance) -> str:
    return (
        f"{temperature:.2f} K, reference: {n_frames:,} frames\n"
        f"decorrelated: run {distance.n_decorrelated:,.0f}, "
        f"ref. {distance.n_decorrelated_reference:,.0f}"
    )


def _mean_title(
    label: str, estimate: MeanEstimate, compared: MeanComparison | None, k: int | None
) -> str:
    """Return a mean of the run, beside that of the reference at the k-th compared rung."""
    title = f"{label}: run {_plus_minus(estimate.value, estimate.stderr)}"
    if compared is None or k is None:
        return title
    reference = compared.reference[k]
    z = _figure("z", compared.z[k], "+.1f")
    return f"{title}\nref. {_plus_minus(reference.value, reference.stderr)}, {z}"


def _plus_minus(value: float, stderr: float) -> str:
    if not np.isfinite(value):
        return "not known"
    if not np.isfinite(stderr) or stderr == 0:
        return f"{value:.4g} (error not known)"
    digits = max(0, 1 - int(np.floor(np.log10(stderr))))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def _figure(name: str, value: float, form: str) -> str:
    return f"{name} = {value:{form}}" if np.isfinite(value) else f"{name} not known"


def _caption(run: RunEstimates, phi: str, comparison: ReferenceComparison | None) -> str:
    value, stderr = run.positive(phi, run.temperatures[0]).free_energy
    delta_f, kelvin = f"ΔF({symbol(phi)})/kT", f"{run.temperatures[0]:.2f} K"
    text = f"{extent(run)}, {delta_f} at {kelvin}: {_plus_minus(value, stderr)}"
    if comparison is None:
        return text
    means = {"P(φ>0)": comparison.phi_positive, "⟨U⟩": comparison.energy}
    tests = [f"{name} χ² {_figure('p', mean.p_value, '.2g')}" for name, mean in means.items()]
    return f"{text}\nover rungs, against the reference: {', '.join(tests)}"
