"""What all figures share: colours, fonts, axes, the file they are saved to."""

import re
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.statistics import Array, group_labels
from openmm_tsf.io.files import write_bytes

RUN_COLOUR, REFERENCE_COLOUR = "#0b5394", "#c0392b"
FONT = 11
_DPI = 150


def save_figure(figure: Figure, path: str | Path, dpi: float = _DPI) -> None:
    """Save a figure in the format of the path's suffix, without opening a window."""
    FigureCanvasAgg(figure)
    content = BytesIO()
    figure.savefig(content, dpi=dpi, format=Path(path).suffix[1:].lower() or "png")
    write_bytes(path, content.getbuffer())


def symbol(name: str) -> str:
    """Return a dihedral's name as figures show it: phi2 is φ2, chi1_2 is χ1_2."""
    return re.sub(r"\bchi(?=\d)", "χ", name.replace("phi", "φ").replace("psi", "ψ"))


def extent(run: RunEstimates) -> str:
    """Return the number of walkers and of iterations that are used in words."""
    walkers = "1 walker" if run.n_walkers == 1 else f"{run.n_walkers} walkers"
    words = f"{walkers} × {run.n_used:,} saved iterations"
    return f"{words} (without the first {run.start:,})" if run.start else words


def draw_band(
    axis: Axes, x: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike, colour: object
) -> None:
    """Shade the standard error around a line."""
    axis.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)


def colours_of_rungs(n_rungs: int) -> list[Any]:
    """Return a colour for each temperature, from cold to hot."""
    return list(matplotlib.colormaps["plasma"](np.linspace(0.05, 0.8, n_rungs)))


def density_of(values: Array, edges: Array) -> tuple[Array, Array]:
    """Return the density and its standard error [bins] from the spread of walkers (of blocks)."""
    bins = np.digitize(values, edges) - 1
    width = np.diff(edges)
    # Counts by group directly: one series per bin would be large.
    labels = group_labels(*values.shape)
    n_groups = int(labels.max()) + 1
    inside = (bins >= 0) & (bins < len(width)) & (labels >= 0)
    flat = labels[inside] * len(width) + bins[inside]
    counts = np.bincount(flat, minlength=n_groups * len(width)).reshape(n_groups, len(width))
    sizes = np.bincount(labels[labels >= 0], minlength=n_groups)
    densities = counts / sizes[:, None] / width
    error = np.full(len(width), np.nan)
    if n_groups > 1:
        error = densities.std(axis=0, ddof=1) / np.sqrt(n_groups)
    return densities.mean(axis=0), error


def draw_density(
    axis: Axes, edges: Array, density: Array, error: Array, colour: Any, label: str
) -> None:
    """Draw a histogram with its standard error."""
    axis.stairs(density, edges, color=colour, lw=1.4, label=label)
    band = np.nan_to_num(error)
    low, high = np.maximum(density - band, 0.0), density + band
    draw_band(axis, np.repeat(edges, 2)[1:-1], np.repeat(low, 2), np.repeat(high, 2), colour)


def label_degrees(axis: Axes, which: str, label: str) -> None:
    """Let an axis, ``"x"`` or ``"y"``, show an angle from -180 to 180 degrees."""
    getattr(axis, f"set_{which}lim")(-180, 180)
    getattr(axis, f"set_{which}ticks")(range(-180, 181, 90))
    getattr(axis, f"set_{which}label")(f"{label} (°)", fontsize=FONT)
