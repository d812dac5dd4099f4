"""The analysis of a run directory: its tables and figures."""

import logging
import os
import re
from pathlib import Path
from typing import Any

from openmm_tsf.analysis.comparison import compare_thermodynamics
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.load import load_run
from openmm_tsf.analysis.plots.diagnostics import plot_diagnostics
from openmm_tsf.analysis.plots.thermodynamics import plot_thermodynamics
from openmm_tsf.analysis.reference import Reference, has_reference, load_reference
from openmm_tsf.analysis.summary import json_ready, write_summary
from openmm_tsf.analysis.thermodynamics import Profile
from openmm_tsf.io.directory import list_contents
from openmm_tsf.io.files import PathLike, remove_stale_temporaries, replace_together, write_json

logger = logging.getLogger(__name__)


#: Names of what is written here.
_RESULTS = re.compile(
    r"summary\.json|thermodynamics\.(csv|json|png)|(ramachandran|diagnostics)\.png"
)


def analyze(path: PathLike, output: PathLike | None = None) -> dict[str, Any]:
    """Write the tables and figures of a run directory, and return the summary.

    The files are those that `openmm_tsf.analysis` lists; ``ramachandran.png`` only if the run
    recorded φ and ψ. The run may still be writing. New files replace earlier ones together, once
    all are made.

    Parameters
    ----------
    path
        The run directory.
    output
        Where the files go, by default into the run directory. Another directory is new, empty, or
        of an earlier analysis; the run is then only read.

    Raises
    ------
    FileExistsError, NotADirectoryError, PermissionError
        If `output` holds other files, is a file, or cannot be written to.
    ValueError
        If `path` is not a run directory, or there are no samples yet.
    """
    target = _check_output(Path(path), output)
    run = load_run(Path(path))
    if run.n_iterations == 0:
        raise ValueError(f"{path}: there are no samples yet")
    # Runs of the Python sampler do not name the reference: the molecule's fingerprint decides.
    reference = run.reference()
    if reference is None and has_reference(run.config.get("choices", {}).get("molecule")):
        reference = load_reference()
    logger.info("analysis: means, free energies by MBAR and figures of %d samples", run.energy.size)
    target.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(target)
    with replace_together(target) as folder:
        summary = write_summary(run, folder / "summary.json", reference)
        try:
            run.backbone()
        except ValueError:
            logger.info("no residue with both phi and psi: no Ramachandran plot")
        else:
            run.plot(folder / "ramachandran.png", reference)
        plot_diagnostics(run, folder / "diagnostics.png")
        write_thermodynamics(run, folder, reference)
    return summary


def _check_output(path: Path, output: PathLike | None) -> Path:
    """Return the directory of the results; refuse one that cannot be theirs before the work."""
    target = path if output is None else Path(output)
    if target.exists() and not target.is_dir():
        if output is None:
            return target  # it is no run directory
        raise NotADirectoryError(f"output: {target} is a file, expected a directory")
    if target.is_dir() and target.resolve() != path.resolve():
        others = [name for name in list_contents(target) if not _RESULTS.fullmatch(name)]
        if others:
            raise FileExistsError(
                f"output: expected a directory that is new, empty or of an earlier analysis, "
                f"{target} holds {others[0]}"
            )
    folder = next((f for f in (target, *target.absolute().parents) if f.is_dir()), target)
    if not os.access(folder, os.W_OK | os.X_OK) and (output is not None or target.is_dir()):
        raise PermissionError(
            f"output: {folder} cannot be written to; name another directory for the tables and "
            "figures (--output)"
        )
    return target


def write_thermodynamics(
    run: RunEstimates, folder: PathLike, reference: Reference | None = None
) -> dict[str, Any]:
    """Write ``thermodynamics.csv``, ``.json`` and ``.png`` into a folder.

    The run is compared with `reference`, by default with the one that its configuration names.

    Returns
    -------
    content
        Of the JSON file: ``functions`` (the rows of the CSV file), ``profiles`` of φ at every rung,
        and, beside a reference, ``reference`` (its rows) and ``z``. Unknown numbers are None.
    """
    target, reference = Path(folder), reference or run.reference()
    table = plot_thermodynamics(run, target / "thermodynamics.png", reference)
    table.to_csv(target / "thermodynamics.csv")
    content: dict[str, Any] = {"functions": table.rows(), "profiles": {}}
    if run.first_phi() is not None:
        content["profiles"] = {
            f"{t:.2f}": _profile_columns(run.phi_profile(t)) for t in map(float, run.temperatures)
        }
    if reference is not None:
        content["reference"] = reference.thermodynamics(run.boltzmann_constant).rows()
        content["z"] = compare_thermodynamics(run, reference)
    content = json_ready(content)
    write_json(target / "thermodynamics.json", content)
    return content


def _profile_columns(profile: Profile) -> dict[str, Any]:
    return {
        "edges_rad": profile.edges.tolist(),
        "free_energy_kT": profile.free_energy.tolist(),
        "stderr_kT": profile.stderr.tolist(),
        "probability": profile.probability.tolist(),
        "probability_stderr": profile.probability_stderr.tolist(),
        "kish": profile.kish.tolist(),
    }
