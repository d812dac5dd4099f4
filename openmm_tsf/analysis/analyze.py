"""The analysis of a run directory: its tables and figures."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openmm_tsf.analysis.comparison import compare_thermodynamics
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.html_report import write_report
from openmm_tsf.analysis.load import load_run
from openmm_tsf.analysis.observables import Definition
from openmm_tsf.analysis.plots.diagnostics import plot_diagnostics
from openmm_tsf.analysis.plots.style import symbol
from openmm_tsf.analysis.plots.thermodynamics import plot_thermodynamics
from openmm_tsf.analysis.plots.torsions import plot_observables, plot_torsions, torsions_by_residue
from openmm_tsf.analysis.reference import Reference, has_reference, load_reference
from openmm_tsf.analysis.summary import json_ready, write_summary
from openmm_tsf.analysis.thermodynamics import Profile
from openmm_tsf.io.directory import check_results_directory
from openmm_tsf.io.files import PathLike, remove_stale_temporaries, replace_together, write_json
from openmm_tsf.utils.activity import log_while
from openmm_tsf.utils.topology import residue_of

logger = logging.getLogger(__name__)


def analyze(
    path: PathLike, output: PathLike | None = None, observe: Mapping[str, Definition] | None = None
) -> dict[str, Any]:
    """Write the tables and figures of a run directory, and return the summary.

    The files are those that `openmm_tsf.analysis` lists, figures of what the run recorded. The run
    may still be writing. New files replace earlier ones together, once all are made.

    Parameters
    ----------
    path
        The run directory.
    output
        Where the files go, by default into the run directory. Another directory is new, empty, or
        of an earlier analysis or certificate; the run is then only read.
    observe
        Observables by name, beside those that the run records: definitions such as
        ``"distance:3,17"``, or functions of a trajectory; see
        :func:`openmm_tsf.analysis.observables.define_observables`.

    Raises
    ------
    FileExistsError, NotADirectoryError, PermissionError
        If `output` holds other files, is a file, or cannot be written to.
    ValueError
        If `path` is not a run directory, there are no samples yet, or an observable cannot be
        evaluated.
    """
    target = check_results_directory(output, path)
    run = load_run(Path(path))
    if run.n_iterations == 0:
        raise ValueError(f"{path}: there are no samples yet")
    if observe:
        run.observe(observe)
    # Runs of the Python sampler do not name the reference: the molecule's fingerprint decides.
    reference = run.reference()
    if reference is None and has_reference(run.config.get("choices", {}).get("molecule")):
        reference = load_reference()
    what = f"analysis: means, free energies by MBAR and figures of {run.energy.size} samples"
    target.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(target)
    with log_while(logger, what), replace_together(target) as folder:
        summary = write_summary(run, folder / "summary.json", reference)
        if run.has_backbone:
            run.plot(folder / "ramachandran.png", reference)
        else:
            logger.info("no residue with both phi and psi: no Ramachandran plot")
        if run.observables or not run.has_backbone:
            plot_observables(run, folder / "observables.png")
        torsions = torsions_by_residue(run)
        for name, of_residue in torsions.items():
            plot_torsions(run, folder / name, of_residue)
        plot_diagnostics(run, folder / "diagnostics.png")
        write_thermodynamics(run, folder, reference)
        names = _run_files(Path(path), target)
        titles = {name: _title(run, of) for name, of in torsions.items()}
        write_report(summary, folder, Path(path).resolve().name, names, titles)
    return summary


def _title(run: RunEstimates, torsions: Sequence[str]) -> str:
    """Return residue and torsions of a figure: ``ALA2: phi2, psi2``."""
    words = ", ".join(map(symbol, torsions))
    number = residue_of(torsions[0])
    if number is None or not run.has_structure or number > run.topology.n_residues:
        return words
    residue = run.topology.residue(number - 1)
    return f"{residue.name}{residue.resSeq}: {words}"


def _run_files(path: Path, target: Path) -> list[str]:
    """Return the paths, relative to the results, of a run's files that its report links to."""
    names = ["config.json", "training.csv", "flow.pt", "topology.pdb"]
    names += sorted(entry.name for entry in path.glob("T*K.dcd"))
    return [
        Path(os.path.relpath(path / name, target)).as_posix()
        for name in names
        if (path / name).is_file()
    ]


def write_thermodynamics(
    run: RunEstimates, folder: PathLike, reference: Reference | None = None
) -> dict[str, Any]:
    """Write ``thermodynamics.csv``, ``.json`` and ``.png`` into a folder.

    The run is compared with `reference`, by default with the one that its configuration names.

    Returns
    -------
    content
        Of the JSON file: ``functions`` (the rows of the CSV file), ``profiles`` of a dihedral
        (``profile_of``, see `RunEstimates.profile_dihedral`) at every rung, and, beside a
        reference, ``reference`` (its rows) and ``z``. Unknown numbers are None.
    """
    target, reference = Path(folder), reference or run.reference()
    table = plot_thermodynamics(run, target / "thermodynamics.png", reference)
    table.to_csv(target / "thermodynamics.csv")
    name = run.profile_dihedral()
    content: dict[str, Any] = {"functions": table.rows(), "profile_of": name, "profiles": {}}
    if name is not None:
        content["profiles"] = {
            f"{t:.2f}": _profile_columns(run.profile(name, t)) for t in map(float, run.temperatures)
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
