"""Pictures of a run. Figures are made without pyplot, so no window or global state is touched."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from openmm_tsf.analysis.errors import estimate_mean
from openmm_tsf.analysis.ramachandran import BINS
from openmm_tsf.analysis.reference import Comparison, Reference, compare
from openmm_tsf.analysis.run import Run
from openmm_tsf.statistics import group_means, torus_histogram

Array = npt.NDArray[np.float64]

_RUN, _REFERENCE = "#0b5394", "#c0392b"
_CUTOFF_KT = 8.0
_PHI_BINS = 60  # of 6°: an edge at 0
_ENERGY_BINS = 50
_RUNNING_POINTS = 20
_DPI = 150
_FONT = 11


@dataclass(frozen=True)
class _Sample:
    """What is drawn of one rung of a run or of the reference; arrays [n, W]."""

    phi: Array
    psi: Array
    energy: Array
    label: str
    colour: str


def plot_ramachandran(run: Run, path: str | Path, reference: Reference | None = None) -> None:
    """A row per rung: (φ, ψ) of the run and the reference, φ and energy histograms.

    Parameters
    ----------
    run
        Must have recorded φ and ψ.
    path
        A file whose suffix matplotlib can write.
    reference
        Drawn beside the run where it has the same rungs.

    Raises
    ------
    ValueError
        If the run has no φ and ψ, or no data yet.
    """
    run.ramachandran(run.temperatures[0])
    run.mean_energy(run.temperatures[0])
    comparison = None
    if reference is not None and any(reference.rung(t) is not None for t in run.temperatures):
        comparison = compare(run, reference)
    n_columns = 3 if comparison is None else 4
    figure = Figure(figsize=(4.3 * n_columns, 3.9 * run.n_rungs + 0.5), layout="constrained")
    axes = figure.subplots(run.n_rungs, n_columns, squeeze=False)
    image = None
    for row, temperature in zip(axes, map(float, run.temperatures), strict=True):
        ours = _Sample(
            run.dihedral("phi", temperature),
            run.dihedral("psi", temperature),
            run.energies(temperature),
            "run",
            _RUN,
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
                    _REFERENCE,
                )
            )
        image = _draw_torus(row[0], ours)
        row[0].set_title(_run_title(run, temperature, comparison), fontsize=10)
        if comparison is not None:
            if len(samples) == 2:
                _draw_torus(row[1], samples[1])
                row[1].set_title(_reference_title(temperature, comparison), fontsize=10)
            else:
                row[1].set_axis_off()
                row[1].text(
                    0.5, 0.5, f"{temperature:.2f} K:\nnot in the reference",
                    ha="center", va="center", transform=row[1].transAxes, fontsize=_FONT,
                )  # fmt: skip
        _draw_phi(row[-2], samples)
        row[-2].set_title(_phi_title(run, temperature, comparison), fontsize=10)
        _draw_energies(row[-1], samples)
        row[-1].set_title(_energy_title(run, temperature, comparison), fontsize=10)
    assert image is not None
    bar = figure.colorbar(
        image, ax=axes[:, : n_columns - 2], location="bottom", shrink=0.6, extend="max",
        aspect=40, pad=0.01,
    )  # fmt: skip
    bar.set_label(r"$-\ln\,p(\varphi,\psi)$ above the minimum ($k_\mathrm{B}T$); white: no sample")
    figure.suptitle(_caption(run, comparison), fontsize=12)
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI)


def _degree_axis(axis: Axes, which: str, symbol: str) -> None:
    getattr(axis, f"set_{which}lim")(-180, 180)
    getattr(axis, f"set_{which}ticks")(range(-180, 181, 90))
    getattr(axis, f"set_{which}label")(f"{symbol} (°)", fontsize=_FONT)


def _draw_torus(axis: Axes, sample: _Sample) -> AxesImage:
    p = torus_histogram(sample.phi, sample.psi, BINS)
    with np.errstate(divide="ignore"):
        free_energy = -np.log(p / p.max())
    image = axis.imshow(
        np.ma.masked_invalid(free_energy.T),
        origin="lower",
        extent=(-180, 180, -180, 180),
        aspect="equal",
        interpolation="nearest",
        cmap="viridis",
        norm=Normalize(0.0, _CUTOFF_KT),
    )
    _degree_axis(axis, "x", "φ")
    _degree_axis(axis, "y", "ψ")
    axis.axvline(0.0, color="0.4", lw=0.7, ls=":")
    return image


def _draw_phi(axis: Axes, samples: list[_Sample]) -> None:
    edges = np.linspace(-180, 180, _PHI_BINS + 1)
    smallest = []
    for sample in samples:
        density, error = _histogram(np.degrees(sample.phi), edges)
        _draw_histogram(axis, edges, density, error, sample)
        smallest.append(density[density > 0].min())
    axis.set_yscale("log")
    axis.set_ylim(bottom=max(0.5 * min(smallest), 1e-7))
    _degree_axis(axis, "x", "φ")
    axis.axvline(0.0, color="0.4", lw=0.7, ls=":")
    axis.set_ylabel("p(φ) (1/°)", fontsize=_FONT)
    axis.set_box_aspect(1)
    axis.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_energies(axis: Axes, samples: list[_Sample]) -> None:
    low = min(np.quantile(sample.energy, 0.0005) for sample in samples)
    high = max(np.quantile(sample.energy, 0.9995) for sample in samples)
    edges = np.linspace(low, high, _ENERGY_BINS + 1) if high > low else np.array([low - 1, low + 1])
    for sample in samples:
        density, error = _histogram(sample.energy, edges)
        _draw_histogram(axis, edges, density, error, sample)
        axis.axvline(float(sample.energy.mean()), color=sample.colour, lw=0.8, ls="--")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("U (kJ/mol)", fontsize=_FONT)
    axis.set_ylabel("p(U) (mol/kJ)", fontsize=_FONT)
    axis.set_box_aspect(1)
    axis.legend(frameon=False, fontsize=9, loc="upper right")


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


def _run_title(run: Run, temperature: float, comparison: Comparison | None) -> str:
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


def _phi_title(run: Run, temperature: float, comparison: Comparison | None) -> str:
    ours = run.positive("phi", temperature)
    title = f"P(φ>0): run {_plus_minus(ours.value, ours.stderr)}"
    k = _position(temperature, comparison)
    if comparison is None or k is None:
        return title
    theirs = comparison.phi_positive.reference[k]
    z = comparison.phi_positive.z[k]
    return f"{title}\nref. {_plus_minus(theirs.value, theirs.stderr)}, z = {z:+.1f}"


def _energy_title(run: Run, temperature: float, comparison: Comparison | None) -> str:
    ours = run.mean_energy(temperature)
    title = f"⟨U⟩: run {_plus_minus(ours.value, ours.stderr)} kJ/mol"
    k = _position(temperature, comparison)
    if comparison is None or k is None:
        return title
    theirs = comparison.energy.reference[k]
    z = comparison.energy.z[k]
    return f"{title}\nref. {_plus_minus(theirs.value, theirs.stderr)}, z = {z:+.1f}"


def _plus_minus(value: float, stderr: float) -> str:
    if not np.isfinite(stderr) or stderr == 0:
        return f"{value:.4g} ± unknown"
    digits = max(0, 1 - int(np.floor(np.log10(stderr))))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def _caption(run: Run, comparison: Comparison | None) -> str:
    text = f"{run.n_walkers} walkers × {run.n_iterations} saved iterations"
    if "phi" in run.dihedral_atoms:
        value, stderr = run.positive("phi", run.temperatures[0]).free_energy
        text += f", ΔF(φ) at {run.temperatures[0]:.2f} K: {_plus_minus(value, stderr)} kT"
    if comparison is not None:
        text += (
            f"\nover rungs, against the reference: P(φ>0) χ² p = "
            f"{comparison.phi_positive.p_value:.2g}, ⟨U⟩ χ² p = {comparison.energy.p_value:.2g}"
        )
    return text


# ------------------------------------------------------------------ diagnostics


def plot_diagnostics(run: Run, path: str | Path) -> None:
    """Acceptance per kernel, exchange of replicas, and running estimates with their errors.

    Raises
    ------
    ValueError
        If the run has no data yet.
    """
    run.mean_energy(run.temperatures[0])
    figure = Figure(figsize=(13.5, 9.0), layout="constrained")
    axes = figure.subplots(2, 3)
    _draw_acceptance(axes[0, 0], run)
    _draw_swaps(axes[0, 1], run)
    _draw_mixing(figure, axes[0, 2], run)
    name = "phi" if "phi" in run.dihedral_atoms else next(iter(run.dihedral_atoms), None)
    if name is None:
        axes[1, 0].set_axis_off()
    else:
        _draw_running(
            axes[1, 0], run, lambda t: run.dihedral(name, t) > 0, f"P({_symbol(name)}>0)", True
        )
    _draw_running(axes[1, 1], run, run.energies, "⟨U⟩ - final (kJ/mol)", False)
    _draw_replica(axes[1, 2], run)
    figure.suptitle(
        f"{run.n_walkers} walkers × {run.n_iterations} saved iterations; "
        f"{run.segments.n_evaluations:,} energy evaluations in {run.segments.wall_seconds:,.0f} s; "
        f"rejected non-finite {run.segments.rejected_non_finite:,}, "
        f"mirror images {run.segments.mirror_images:,}",
        fontsize=12,
    )
    _save(figure, path)


def _symbol(name: str) -> str:
    return {"phi": "φ", "psi": "ψ"}.get(name, name)


def _draw_acceptance(axis: Axes, run: Run) -> None:
    tables = {k: v for k, v in run.acceptance().items() if v.shape == (run.n_rungs,)}
    for name, rates in tables.items():
        axis.plot(run.temperatures, rates, "o-", label=name)
    if tables:
        axis.legend(frameon=False, fontsize=9)
    axis.set_ylim(0, 1.02)
    axis.set_xticks(run.temperatures, [f"{t:.0f}" for t in run.temperatures])
    axis.set_xlabel("T (K)", fontsize=_FONT)
    axis.set_ylabel("accepted / proposed", fontsize=_FONT)
    axis.set_title("moves", fontsize=_FONT)


def _draw_swaps(axis: Axes, run: Run) -> None:
    pairs = [
        f"{a:.0f}–{b:.0f}" for a, b in zip(run.temperatures, run.temperatures[1:], strict=False)
    ]
    drawn = False
    for name, rates in run.acceptance().items():
        if rates.shape == (run.n_rungs,):
            continue
        neighbours = np.diagonal(rates, offset=1) if rates.ndim == 2 else rates
        axis.plot(range(len(pairs)), neighbours, "s-", label=name)
        drawn = True
    if drawn:
        axis.legend(frameon=False, fontsize=9)
    axis.set_ylim(0, 1.02)
    axis.set_xticks(range(len(pairs)), pairs)
    axis.set_xlabel("neighbouring rungs (K)", fontsize=_FONT)
    axis.set_ylabel("accepted / proposed", fontsize=_FONT)
    axis.set_title("swaps", fontsize=_FONT)


def _draw_mixing(figure: Figure, axis: Axes, run: Run) -> None:
    matrix = run.mixing_matrix()
    image = axis.imshow(np.ma.masked_invalid(matrix), cmap="Blues", vmin=0, vmax=1)
    if run.n_rungs <= 8:
        for (i, j), value in np.ndenumerate(matrix):
            axis.text(
                j, i, f"{value:.2f}", ha="center", va="center",
                color="white" if value > 0.6 else "black", fontsize=9,
            )  # fmt: skip
    labels = [f"{t:.0f}" for t in run.temperatures]
    axis.set_xticks(range(run.n_rungs), labels)
    axis.set_yticks(range(run.n_rungs), labels)
    axis.set_xlabel("rung one saved iteration later (K)", fontsize=_FONT)
    axis.set_ylabel("rung of the replica (K)", fontsize=_FONT)
    axis.set_title(f"mixing; {run.round_trips().sum():,} round trips", fontsize=_FONT)
    figure.colorbar(image, ax=axis, shrink=0.8, label="probability")


def _draw_running(
    axis: Axes, run: Run, series: Callable[[float], npt.ArrayLike], label: str, log: bool
) -> None:
    ends = np.unique(np.linspace(run.n_iterations / _RUNNING_POINTS, run.n_iterations,
                                 _RUNNING_POINTS).astype(int))  # fmt: skip
    ends = ends[ends > 0]
    colours = _temperature_colours(run)
    drawn = False
    for temperature, colour in zip(run.temperatures, colours, strict=True):
        values = np.asarray(series(temperature), dtype=np.float64)
        estimates = [estimate_mean(values[:end]) for end in ends]
        means = np.array([e.value for e in estimates])
        errors = np.nan_to_num(np.array([e.stderr for e in estimates]))
        if not log:
            means = means - means[-1]
        visible = means > 0 if log else np.ones(len(means), dtype=bool)
        axis.plot(ends[visible], means[visible], color=colour, label=f"{temperature:.0f} K")
        low = means - errors
        if log:
            low = np.maximum(low, 0.1 * means)
        axis.fill_between(
            ends[visible], low[visible], (means + errors)[visible], color=colour, alpha=0.25, lw=0
        )
        drawn |= bool(visible.any())
    if log and drawn:
        axis.set_yscale("log")
    if not drawn:
        axis.text(0.5, 0.5, "never seen", ha="center", transform=axis.transAxes, fontsize=_FONT)
    axis.set_xlabel("saved iterations", fontsize=_FONT)
    axis.set_ylabel(label, fontsize=_FONT)
    axis.set_title(f"running estimate of {label.split(' -')[0]} ± SE", fontsize=_FONT)
    axis.legend(frameon=False, fontsize=9)


def _draw_replica(axis: Axes, run: Run) -> None:
    rung_of = np.argsort(run.segments.replica[:, 0], axis=1)
    shown = min(run.n_iterations, 200)
    # The replica that started at the bottom, over the first iterations: enough to see it move.
    axis.plot(run.segments.iteration[:shown], run.temperatures[rung_of[:shown, 0]], "-", lw=0.9,
              drawstyle="steps-post", color=_RUN)  # fmt: skip
    axis.set_yticks(run.temperatures, [f"{t:.0f}" for t in run.temperatures])
    axis.set_xlabel("iteration", fontsize=_FONT)
    axis.set_ylabel("T (K)", fontsize=_FONT)
    axis.set_title("one replica of walker 0", fontsize=_FONT)


def _temperature_colours(run: Run) -> list[tuple[float, float, float, float]]:
    import matplotlib

    scale = matplotlib.colormaps["plasma"]
    return [scale(x) for x in np.linspace(0.05, 0.8, run.n_rungs)]
