"""What all figures share: colours, fonts, the file they are saved to."""

from io import BytesIO
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.io.files import write_bytes

RUN_COLOUR, REFERENCE_COLOUR = "#0b5394", "#c0392b"


_DPI = 150


FONT = 11


def save_figure(figure: Figure, path: str | Path, dpi: float = _DPI) -> None:
    """Render without a window, in the format of the path's suffix."""
    FigureCanvasAgg(figure)
    content = BytesIO()
    figure.savefig(content, dpi=dpi, format=Path(path).suffix[1:].lower() or "png")
    write_bytes(path, content.getbuffer())


def symbol(name: str) -> str:
    """A dihedral's name as it is written in figures: phi2 is φ2."""
    return name.replace("phi", "φ").replace("psi", "ψ")


def extent(run: RunEstimates) -> str:
    """How much of it there is, in words."""
    walkers = "1 walker" if run.n_walkers == 1 else f"{run.n_walkers} walkers"
    return f"{walkers} × {run.n_iterations:,} saved iterations"
