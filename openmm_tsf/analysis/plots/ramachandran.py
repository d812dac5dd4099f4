"""Ramachandran plots and histograms of a run.

Figures are made without pyplot, so no window or global state is touched.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.plots.style import (
    FONT,
    REFERENCE_COLOUR,
    RUN_COLOUR,
    extent,
    save_figure,
    symbol,
)
from openmm_tsf.analysis.ramachandran import BINS
from openmm_tsf.analysis.reference import Comparison, Reference, compare
from openmm_tsf.analysis.statistics import group_means, torus_histogram

Array = npt.NDArray[np.float64]

_CUTOFF_KT = 8.0
_PHI_BINS = 60  # of 6°: an edge at 0
_ENERGY_BINS = 50


@dataclass(frozen=True)
class _Sample:
    """What is drawn of one rung of a run or of the reference; arrays [n, W]."""

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
    """A row per rung: (φ, ψ) of the run and the reference, φ and energy histograms.

    Parameters
    ----------
    run
        Must have recorded φ and ψ.
    path
        A file whose suffix matplotlib can write.
    reference
        Drawn beside the run where it has the same rungs.
    residue
        Which residue's φ and ψ; as in `Run.backbone`.

    Raises
    ------
    ValueError
        If the run has no such φ and ψ, or no data yet.
    """
    phi, psi = run.backbone(residue)
    run.mean_energy(run.temperatures[0])
    comparison = None
    if reference is not None and any(reference.rung(t) is not None for t in run.temperatures):
        comparison = compare(run, reference)
    n_columns = 3 if comparison is None else 4
    n_maps = n_columns - 2
    figure = Figure(figsize=(4.0 * n_columns, 3.9 * run.n_rungs + 1.6))
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.06)
    grid = figure.add_gridspec(run.n_rungs + 1, n_columns, height_ratios=[1] * run.n_rungs + [0.05])
    axes = [[figure.add_subplot(grid[r, c]) for c in range(n_columns)] for r in range(run.n_rungs)]
    image = None
    for row, temperature in zip(axes, map(float, run.temperatures), strict=True):
        ours = _Sample(
            run.dihedral(phi, temperature),
            run.dihedral(psi, temperature),
            run.energies(temperature),
            "run",
            RUN_COLOUR,
        )
        samples = [ours]
        k = None if reference is None else reference.rung(temperature)
        if comparison is not None and reference is not None and k is not None:
            samples.append(
                _Sample(
                    reference.phi[:, k, None],
                    reference.psi[:, k, None],
                    reference.energy[:, k, None],
                    "reference",
                    REFERENCE_COLOUR,
                )
            )
        # One zero for both maps, so that equal colours are equal probabilities.
        maps = [torus_histogram(sample.phi, sample.psi, BINS) for sample in samples]
        highest = float(maps[-1].max())
        image = _draw_torus(row[0], maps[0], highest, phi, psi)
        row[0].set_title(_run_title(run, temperature, comparison), fontsize=10)
        if comparison is not None:
            if len(samples) == 2:
                _draw_torus(row[1], maps[1], highest, phi, psi)
                row[1].set_title(_reference_title(temperature, comparison), fontsize=10)
            else:
                row[1].set_axis_off()
                row[1].text(
                    0.5, 0.5, f"{temperature:.2f} K:\nnot in the reference",
                    ha="center", va="center", transform=row[1].transAxes, fontsize=FONT,
                )  # fmt: skip
        _draw_phi(row[-2], samples, symbol(phi))
        row[-2].set_title(_phi_title(run, phi, temperature, comparison), fontsize=10)
        _draw_energies(row[-1], samples)
        row[-1].set_title(_energy_title(run, temperature, comparison), fontsize=10)
    assert image is not None
    bar = figure.colorbar(
        image, cax=figure.add_subplot(grid[-1, :n_maps]), orientation="horizontal", extend="max"
    )
    bar.set_label(r"$-\ln\,p(\varphi,\psi)$ above the minimum ($k_\mathrm{B}T$); white: no sample")
    figure.suptitle(_caption(run, phi, comparison), fontsize=12)
    save_figure(figure, path)


def _degree_axis(axis: Axes, which: str, label: str) -> None:
    getattr(axis, f"set_{which}lim")(-180, 180)
    getattr(axis, f"set_{which}ticks")(range(-180, 181, 90))
    getattr(axis, f"set_{which}label")(f"{label} (°)", fontsize=FONT)


def _draw_torus(axis: Axes, p: Array, highest: float, phi: str, psi: str) -> AxesImage:
    with np.errstate(divide="ignore"):
        free_energy = -np.log(p / highest)
    image = axis.imshow(
        np.ma.masked_invalid(free_energy.T),
        origin="lower",
        extent=(-180, 180, -180, 180),
        aspect="equal",
        interpolation="nearest",
        cmap="viridis",
        norm=Normalize(0.0, _CUTOFF_KT),
    )
    _degree_axis(axis, "x", symbol(phi))
    _degree_axis(axis, "y", symbol(psi))
    axis.axvline(0.0, color="0.4", lw=0.7, ls=":")
    return image


def _draw_phi(axis: Axes, samples: list[_Sample], label: str) -> None:
    edges = np.linspace(-180, 180, _PHI_BINS + 1)
    smallest = []
    for sample in samples:
        density, error = _histogram(np.degrees(sample.phi), edges)
        _draw_histogram(axis, edges, density, error, sample)
        smallest.append(density[density > 0].min())
    axis.set_yscale("log")
    axis.set_ylim(bottom=max(0.5 * min(smallest), 1e-7))
    _degree_axis(axis, "x", label)
    axis.axvline(0.0, color="0.4", lw=0.7, ls=":")
    axis.set_ylabel(f"p({label}) (1/°)", fontsize=FONT)
    axis.set_box_aspect(1)
    axis.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_energies(axis: Axes, samples: list[_Sample]) -> None:
    low = min(np.quantile(sample.energy, 0.0005) for sample in samples)
    high = max(np.quantile(sample.energy, 0.9995) for sample in samples)
    edges = np.linspace(low, high, _ENERGY_BINS + 1) if high > low else np.array([low - 1, low + 1])
    histograms = [_histogram(sample.energy, edges) for sample in samples]
    top = max(float((density + np.nan_to_num(error)).max()) for density, error in histograms)
    for sample, (density, error) in zip(samples, histograms, strict=True):
        _draw_histogram(axis, edges, density, error, sample)
        mean = float(sample.energy.mean())
        axis.vlines(
            mean, 0, top, color=sample.colour, lw=0.8, ls="--", label=f"{sample.label} mean"
        )
    axis.set_ylim(0, 1.35 * top)  # the legend's room
    axis.set_xlabel("U (kJ/mol)", fontsize=FONT)
    axis.set_ylabel("p(U) (mol/kJ)", fontsize=FONT)
    axis.set_box_aspect(1)
    axis.legend(frameon=False, fontsize=9, loc="upper center", ncols=2)


def _histogram(values: Array, edges: Array) -> tuple[Array, Array]:
    """Density and its standard error [bins] from the spread of walkers (of blocks)."""
    bins = np.digitize(values, edges) - 1
    width = np.diff(edges)
    # One column per bin would be large: group first, count within groups.
    order = np.arange(values.size).reshape(values.shape)
    groups = _group_labels(order)
    n_groups = int(groups.max()) + 1
    inside = (bins >= 0) & (bins < len(width)) & (groups >= 0)
    flat = groups[inside] * len(width) + bins[inside]
    counts = np.bincount(flat, minlength=n_groups * len(width)).reshape(n_groups, len(width))
    sizes = np.bincount(groups[groups >= 0], minlength=n_groups)
    densities = counts / sizes[:, None] / width
    error = (
        densities.std(axis=0, ddof=1) / np.sqrt(n_groups)
        if n_groups > 1
        else np.full(len(width), np.nan)
    )
    return densities.mean(axis=0), error


def _group_labels(order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Which of the groups of `group_means` every entry [n, W] belongs to; -1 for those left out."""
    n, n_walkers = order.shape
    n_blocks = len(group_means(order)) // n_walkers
    length = n // n_blocks
    block = (np.arange(n) - (n - n_blocks * length)) // length
    labels = block[:, None] * n_walkers + np.arange(n_walkers)
    labels[block < 0] = -1
    return labels


def _draw_histogram(
    axis: Axes, edges: Array, density: Array, error: Array, sample: _Sample
) -> None:
    axis.stairs(density, edges, color=sample.colour, lw=1.4, label=sample.label)
    band = np.nan_to_num(error)
    axis.fill_between(
        np.repeat(edges, 2)[1:-1],
        np.repeat(np.maximum(density - band, 0.0), 2),
        np.repeat(density + band, 2),
        color=sample.colour,
        alpha=0.25,
        lw=0,
    )


# ------------------------------------------------------------------------ words


def _position(temperature: float, comparison: Comparison | None) -> int | None:
    if comparison is None or temperature not in comparison.temperatures:
        return None
    return comparison.temperatures.index(temperature)


def _run_title(run: RunEstimates, temperature: float, comparison: Comparison | None) -> str:
    title = f"{temperature:.2f} K, run: {run.n_iterations * run.n_walkers:,} frames"
    k = _position(temperature, comparison)
    if comparison is None or k is None:
        return title
    d = comparison.ramachandran[k]
    return f"{title}\nTV {d.total_variation:.3f} (floor {d.floor_total_variation:.3f})"


def _reference_title(temperature: float, comparison: Comparison) -> str:
    k = comparison.temperatures.index(temperature)
    n_frames = comparison.phi_positive.reference[k].n_samples
    d = comparison.ramachandran[k]
    return (
        f"{temperature:.2f} K, reference: {n_frames:,} frames\n"
        f"decorrelated: run {d.n_decorrelated:,.0f}, ref. {d.n_decorrelated_reference:,.0f}"
    )


def _phi_title(
    run: RunEstimates, phi: str, temperature: float, comparison: Comparison | None
) -> str:
    ours = run.positive(phi, temperature)
    title = f"P({symbol(phi)}>0): run {_plus_minus(ours.value, ours.stderr)}"
    k = _position(temperature, comparison)
    if comparison is None or k is None:
        return title
    theirs = comparison.phi_positive.reference[k]
    z = _figure("z", comparison.phi_positive.z[k], "+.1f")
    return f"{title}\nref. {_plus_minus(theirs.value, theirs.stderr)}, {z}"


def _energy_title(run: RunEstimates, temperature: float, comparison: Comparison | None) -> str:
    ours = run.mean_energy(temperature)
    title = f"⟨U⟩ (kJ/mol): run {_plus_minus(ours.value, ours.stderr)}"
    k = _position(temperature, comparison)
    if comparison is None or k is None:
        return title
    theirs = comparison.energy.reference[k]
    z = _figure("z", comparison.energy.z[k], "+.1f")
    return f"{title}\nref. {_plus_minus(theirs.value, theirs.stderr)}, {z}"


def _plus_minus(value: float, stderr: float) -> str:
    if not np.isfinite(value):
        return "not known"
    if not np.isfinite(stderr) or stderr == 0:
        return f"{value:.4g} (error not known)"
    digits = max(0, 1 - int(np.floor(np.log10(stderr))))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def _figure(name: str, value: float, form: str) -> str:
    return f"{name} = {value:{form}}" if np.isfinite(value) else f"{name} not known"


def _caption(run: RunEstimates, phi: str, comparison: Comparison | None) -> str:
    value, stderr = run.positive(phi, run.temperatures[0]).free_energy
    text = (
        f"{extent(run)}, ΔF({symbol(phi)})/kT at {run.temperatures[0]:.2f} K: "
        f"{_plus_minus(value, stderr)}"
    )
    if comparison is not None:
        text += (
            f"\nover rungs, against the reference: "
            f"P(φ>0) χ² {_figure('p', comparison.phi_positive.p_value, '.2g')}, "
            f"⟨U⟩ χ² {_figure('p', comparison.energy.p_value, '.2g')}"
        )
    return text
