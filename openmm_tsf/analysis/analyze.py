"""The analysis of a run directory: its tables and figures."""

import logging
from pathlib import Path
from typing import Any

from openmm_tsf.analysis.load import load_run
from openmm_tsf.analysis.plots.diagnostics import plot_diagnostics
from openmm_tsf.analysis.plots.thermodynamics import write_thermodynamics
from openmm_tsf.analysis.reference import has_reference, load_reference
from openmm_tsf.analysis.summary import write_summary
from openmm_tsf.io.files import PathLike, remove_stale_temporaries, replace_together

logger = logging.getLogger(__name__)


def analyze(path: PathLike) -> dict[str, Any]:
    """Tables and pictures of a run directory, written into it.

    ``summary.json``; ``ramachandran.png`` where the molecule has φ and ψ; ``diagnostics.png``; and
    ``thermodynamics.{csv,json,png}``, functions of the temperature over the whole ladder. The run
    may still be writing. The files replace earlier ones together, when all are made.

    Returns
    -------
    summary
        The content of ``summary.json``.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is no run directory, or has no samples yet.
    """
    result = load_run(Path(path))
    if result.n_iterations == 0:
        raise ValueError(f"{path}: there are no samples yet")
    # Runs started from Python do not name the reference; the molecule's fingerprint tells.
    reference = result.reference()
    known = result.config.get("choices", {}).get("molecule")
    if reference is None and has_reference(known):
        reference = load_reference()
    remove_stale_temporaries(result.path)
    with replace_together(result.path) as folder:
        summary = write_summary(result, folder / "summary.json", reference)
        try:
            result.backbone()
        except ValueError:
            logger.info("no residue with both phi and psi: no Ramachandran plot")
        else:
            result.plot(folder / "ramachandran.png", reference)
        plot_diagnostics(result, folder / "diagnostics.png")
        write_thermodynamics(result, folder, reference)
    return summary
