"""What all figures share: colours, fonts, axes, the file they are saved to."""

from io import BytesIO
from pathlib import Path

import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from openmm_tsf.analysis.estimates import RunEstimates
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
    """Return a dihedral's name as figures show it: phi2 is φ2."""
    return name.replace("phi", "φ").replace("psi", "ψ")


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


def label_degrees(axis: Axes, which: str, label: str) -> None:
    """Let an axis, ``"x"`` or ``"y"``, show an angle from -180 to 180 degrees."""
    getattr(axis, f"set_{which}lim")(-180, 180)
    getattr(axis, f"set_{which}ticks")(range(-180, 181, 90))
    getattr(axis, f"set_{which}label")(f"{label} (°)", fontsize=FONT)
