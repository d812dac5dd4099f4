"""Figure 3 of arXiv:2012.00429 (Dibak, Klein and Noé) from a run: flow, sampler and reference.

Panels have the letters of the paper. The flow's draws are passed as arrays: no model is needed.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from molecule_drawing import draw_molecule

from openmm_tsf.analysis.load import Run
from openmm_tsf.analysis.plots.style import save_figure, symbol
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.statistics import group_means, torus_histogram

Array = npt.NDArray[np.float64]

# Distinct for the colour-blind (Okabe and Ito), and by width and dash without colours.
FLOW, SAMPLER, REFERENCE = "flow alone", "TSF-MCMC replica exchange", "reference"
_STYLES = {
    REFERENCE: {"color": "#000000", "lw": 1.7},
    SAMPLER: {"color": "#0072B2", "lw": 1.0},
    FLOW: {"color": "#D55E00", "lw": 1.0, "ls": (0, (3.0, 1.2))},
}
_MAP_BINS, _PHI_BINS, _ENERGY_BINS = 60, 72, 90
_CUTOFF_KT = 8.0
_FONT, _SMALL, DPI = 7.5, 6.5, 300
_WIDTH, _PANEL = 7.2, 1.36  # inches: two columns of a journal
_CAPTION_CHARACTERS = 146


@dataclass(frozen=True)
class FlowDraws:
    """Independent draws from the flow alone at one temperature."""

    phi: Array  # [n] in rad, of the draws inside the flow's domain
    psi: Array
    energy: Array  # [n] in kJ/mol
    n_drawn: int  # with those outside
    ess: float  # over draws, reverse, of the joint (x, p) weights
    ess_spread: float  # its standard deviation over tenths of the draws
    largest_weight: float  # normalised

    def __post_init__(self) -> None:
        for name in ("phi", "psi", "energy"):
            values = getattr(self, name)
            if values.shape != self.phi.shape or values.ndim != 1 or not len(values):
                raise ValueError(f"{name}: expected shape {self.phi.shape}, got {values.shape}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name}: expected finite values")
        if self.n_drawn < len(self.phi):
            raise ValueError(f"n_drawn: expected at least {len(self.phi)}, got {self.n_drawn}")


@dataclass(frozen=True)
class Series:
    """One sample at one temperature: φ, ψ in rad and energies in kJ/mol, each [n, W]."""

    phi: Array
    psi: Array
    energy: Array


def series_of(
    run: Run, draws: Mapping[float, FlowDraws], reference: Reference | None
) -> dict[float, dict[str, Series]]:
    """The samples that the figure shows, by temperature and source."""
    if len(draws) != 2:
        raise ValueError(f"draws: expected two temperatures, got {sorted(draws)}")
    phi, psi = run.backbone()
    series: dict[float, dict[str, Series]] = {}
    for kelvin in sorted(draws):
        flow = draws[kelvin]
        series[kelvin] = {
            FLOW: Series(flow.phi[:, None], flow.psi[:, None], flow.energy[:, None]),
            SAMPLER: Series(
                run.dihedral(phi, kelvin), run.dihedral(psi, kelvin), run.energies(kelvin)
            ),
        }
        if reference is None:
            continue
        k = reference.rung(kelvin)
        if k is None:
            known = reference.temperatures.tolist()
            raise ValueError(f"reference: expected a rung at {kelvin:.2f} K, got {known}")
        series[kelvin][REFERENCE] = Series(
            reference.phi[:, :, k], reference.psi[:, :, k], reference.energy[:, :, k]
        )
    return series


def plot_figure3(
    run: Run,
    draws: Mapping[float, FlowDraws],
    path: str | Path,
    reference: Reference | None = None,
    caption: str = "",
) -> None:
    """Draw the figure: (φ, ψ) of flow and reference, φ and energy histograms, the molecule.

    Bands are one standard error, from the spread between walkers, or between consecutive blocks
    where walkers are few. Without a reference the maps B and F are the sampler's. The run must have
    recorded φ and ψ, and have its molecule; the draws are at two of its temperatures in K, of which
    the colder is the lower row.
    """
    samples = series_of(run, draws, reference)
    phi, psi = run.backbone()
    cold, hot = sorted(samples)
    lines = wrapped(caption)
    below = 0.92 + 0.118 * len(lines)  # inches: axis labels, colour bar, caption
    height = 0.24 + 2 * _PANEL + 0.26 + below
    figure = Figure(figsize=(_WIDTH, height))

    def panel(left: float, row: int, width: float = _PANEL) -> Axes:
        bottom = below + (1 - row) * (_PANEL + 0.26)
        return figure.add_axes((left / _WIDTH, bottom / height, width / _WIDTH, _PANEL / height))

    columns = (0.47, 0.47 + _PANEL + 0.12, 3.90, 5.76)
    truth = SAMPLER if reference is None else REFERENCE
    image = None
    for row, (kelvin, letters) in enumerate(((hot, "ABC"), (cold, "EFG"))):
        sources = samples[kelvin]
        highest = float(torus_histogram(sources[truth].phi, sources[truth].psi, _MAP_BINS).max())
        for column, source in enumerate((FLOW, truth)):
            axis = panel(columns[column], row)
            image = _draw_map(axis, sources[source], highest)
            _angle_axis(axis, "x", symbol(phi), row == 1)
            _angle_axis(axis, "y", symbol(psi), column == 0)
            name = "replica exchange" if source == SAMPLER else source
            _title(axis, letters[column], f"{name}, {kelvin:.0f} K")
        axis = panel(columns[2], row)
        _draw_histograms(
            axis, {k: np.degrees(s.phi) for k, s in sources.items()},
            np.linspace(-180, 180, _PHI_BINS + 1),
        )  # fmt: skip
        axis.set_yscale("log")
        _angle_axis(axis, "x", symbol(phi), row == 1)
        axis.set_ylabel(f"p({symbol(phi)})  (1/°)", fontsize=_FONT, labelpad=1)
        _title(axis, letters[2], f"{kelvin:.0f} K")
    assert image is not None
    _same_limits([axis for axis in figure.axes if axis.get_yscale() == "log"])
    axis = panel(columns[3] - 0.36, 0, _PANEL + 0.40)
    marked = {symbol(name)[0]: run.dihedral_atoms[name] for name in (phi, psi)}
    draw_molecule(axis, run.topology, run.structure.xyz[0], marked, _FONT)
    axis = panel(columns[3], 0)  # for its letter only
    axis.set_axis_off()
    _title(axis, "D", "")
    axis = panel(columns[3], 1)
    _draw_energies(axis, samples)
    _title(axis, "H", f"{cold:.0f} K and {hot:.0f} K")
    middle = columns[2] + 0.5 * (columns[3] + _PANEL - columns[2])
    _draw_keys(figure, image, list(samples[cold]), (columns[0], middle, below - 0.52))
    figure.text(
        0.06 / _WIDTH, (0.118 * len(lines) + 0.06) / height, "\n".join(lines), fontsize=6.2,
        va="top", linespacing=1.25,
    )  # fmt: skip
    save_figure(figure, path, DPI)


def _draw_keys(
    figure: Figure, image: AxesImage, sources: list[str], place: tuple[float, float, float]
) -> None:
    """Colour bar and legend at (left of the bar, middle of the legend, height) in inches."""
    left, middle, bottom = place[0] / _WIDTH, place[1] / _WIDTH, place[2]
    bottom, width = bottom / figure.get_figheight(), (2 * _PANEL + 0.12) / _WIDTH
    bar = figure.add_axes((left, bottom, width, 0.075 / figure.get_figheight()))
    colours = figure.colorbar(image, cax=bar, orientation="horizontal", extend="max")
    colours.ax.tick_params(labelsize=_SMALL, length=2, pad=1.5)
    colours.ax.set_xlabel(
        f"−ln p above the minimum of {'the reference' if REFERENCE in sources else 'B or F'} (kT)",
        fontsize=_SMALL, labelpad=1.5,
    )  # fmt: skip
    shown = [source for source in _STYLES if source in sources]
    handles = [Line2D([], [], **_STYLES[source]) for source in shown]  # type: ignore[arg-type]
    figure.legend(
        handles, shown, loc="center", ncols=len(shown), fontsize=_SMALL, frameon=False,
        bbox_to_anchor=(middle, bottom), handlelength=2.2, columnspacing=1.3, handletextpad=0.5,
    )  # fmt: skip


def wrapped(text: str) -> list[str]:
    """Lines that fit under the figure."""
    return [line for part in text.splitlines() for line in textwrap.wrap(part, _CAPTION_CHARACTERS)]


def _title(axis: Axes, letter: str, words: str) -> None:
    axis.set_title(words, fontsize=_FONT, pad=3)
    axis.annotate(
        letter, (0.0, 1.0), xytext=(-3, 3), xycoords="axes fraction", textcoords="offset points",
        fontsize=_FONT + 1.5, fontweight="bold", ha="right", va="bottom",
    )  # fmt: skip
    axis.tick_params(labelsize=_SMALL, length=2.5, width=0.6, pad=1.8)
    axis.tick_params(which="minor", length=1.3, width=0.4)
    for spine in axis.spines.values():
        spine.set_linewidth(0.6)


def _angle_axis(axis: Axes, which: str, label: str, labelled: bool) -> None:
    getattr(axis, f"set_{which}lim")(-180, 180)
    ticks = range(-180, 181, 90)
    # Not at the ends: those of two neighbouring panels would touch.
    names = [f"{t}".replace("-", "−") if abs(t) < 180 and labelled else "" for t in ticks]
    getattr(axis, f"set_{which}ticks")(ticks, names)
    if labelled:
        getattr(axis, f"set_{which}label")(
            f"{label} (°)", fontsize=_FONT, labelpad=1 if which == "x" else -3
        )


def _draw_map(axis: Axes, sample: Series, highest: float) -> AxesImage:
    with np.errstate(divide="ignore"):
        free_energy = -np.log(torus_histogram(sample.phi, sample.psi, _MAP_BINS) / highest)
    axis.axhline(0.0, color="0.75", lw=0.4, zorder=0)
    axis.axvline(0.0, color="0.75", lw=0.4, zorder=0)
    return axis.imshow(
        np.ma.masked_invalid(free_energy.T), origin="lower", extent=(-180, 180, -180, 180),
        aspect="equal", interpolation="nearest", cmap="viridis", norm=Normalize(0.0, _CUTOFF_KT),
        zorder=1,
    )  # fmt: skip


def histogram(values: Array, edges: Array) -> tuple[Array, Array]:
    """Density and its standard error [bins] of values [n, W]; NaN where it is not known."""
    width = np.diff(edges)
    bins = np.searchsorted(edges, values, side="right") - 1
    means = np.stack([group_means((bins == k).astype(float)) for k in range(len(width))], axis=1)
    density = np.array([(bins == k).mean() for k in range(len(width))]) / width
    if len(means) < 2:
        return density, np.full(len(width), np.nan)
    return density, means.std(axis=0, ddof=1) / np.sqrt(len(means)) / width


def _draw_histograms(axis: Axes, values: Mapping[str, Array], edges: Array) -> list[Array]:
    tops = []
    for order, source in enumerate(source for source in _STYLES if source in values):
        density, error = histogram(values[source], edges)
        style = _STYLES[source]
        band = np.nan_to_num(error)
        axis.fill_between(
            np.repeat(edges, 2)[1:-1], np.repeat(np.maximum(density - band, 1e-12), 2),
            np.repeat(density + band, 2), color=style["color"], alpha=0.28, lw=0, zorder=2 + order,
        )  # fmt: skip
        shown = np.where(density > 0, density, np.nan)
        axis.stairs(shown, edges, baseline=None, zorder=3 + order, **style)  # type: ignore[arg-type]
        tops.append(density + band)
    return tops


def _same_limits(axes: list[Axes]) -> None:
    """One scale for all the φ histograms: down to their smallest density above zero."""
    drawn = np.concatenate(
        [patch.get_data().values for axis in axes for patch in axis.patches]  # type: ignore[attr-defined]
    )
    low, high = np.nanmin(drawn), np.nanmax(drawn)
    for axis in axes:
        axis.set_ylim(0.5 * low, 2.5 * high)


def energy_edges(samples: Mapping[float, Mapping[str, Series]]) -> Array:
    """Bins over the range of the sampler and the reference; the flow's tail may lie above it."""
    known = [s for sources in samples.values() for source, s in sources.items() if source != FLOW]
    low = min(float(np.quantile(s.energy, 5e-4)) for s in known)
    high = max(float(np.quantile(s.energy, 0.9995)) for s in known)
    margin = 0.04 * (high - low) + 0.5
    return np.linspace(low - margin, high + margin, _ENERGY_BINS + 1)


def _draw_energies(axis: Axes, samples: Mapping[float, Mapping[str, Series]]) -> None:
    edges = energy_edges(samples)
    highest = 0.0
    for kelvin, sources in samples.items():
        tops = _draw_histograms(axis, {k: s.energy for k, s in sources.items()}, edges)
        top = max(float(t.max()) for t in tops)
        highest = max(highest, top)
        mean = float(next(s for k, s in sources.items() if k != FLOW).energy.mean())
        axis.text(mean, 1.04 * top, f"{kelvin:.0f} K", fontsize=_SMALL, ha="center")
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(0, 1.22 * highest)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    axis.set_xlabel("U (kJ/mol)", fontsize=_FONT, labelpad=1)
    axis.set_ylabel("p(U)  (10⁻² mol/kJ)", fontsize=_FONT, labelpad=2)
