"""Certificates: is a run, or are trajectories of any origin, of the Boltzmann ensemble?"""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from openmm_tsf.analysis.certify_basins import label_samples
from openmm_tsf.analysis.certify_checks import Check, check_energies, check_recorded, check_samples
from openmm_tsf.analysis.certify_convergence import (
    assess_observed,
    assess_samples,
    check_basin_ratios,
    check_convergence,
    check_start,
)
from openmm_tsf.analysis.certify_coverage import Coverage, check_coverage, measure_coverage
from openmm_tsf.analysis.certify_flow import weigh_samples
from openmm_tsf.analysis.certify_report import judge_checks
from openmm_tsf.analysis.certify_samples import Samples, read_run, read_trajectories
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.load import load_run
from openmm_tsf.analysis.observables import Definition, define_observables
from openmm_tsf.analysis.plots.certificate import plot_certificate
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.directory import check_results_directory
from openmm_tsf.io.files import remove_stale_temporaries, replace_together, write_json
from openmm_tsf.systems.files import holds_molecule, read_molecule
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import slow_torsions
from openmm_tsf.utils.validation import check_bool, check_instance

logger = logging.getLogger(__name__)

CERTIFICATE, PICTURE = "certificate.json", "certificate.png"


def certify(
    samples: Any,
    molecule: MolecularSystem | None = None,
    *,
    flow: str | PathLike[str] | None = None,
    walkers: int = 1,
    monte_carlo: bool = False,
    observe: Mapping[str, Definition] | None = None,
    output: str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """Check that samples are converged and of the Boltzmann ensemble, and return the certificate.

    Energies and forces are evaluated here; nothing but the frames is taken from trajectories. The
    checks: energies and forces of the right temperature (slopes of ln[P(U)/P(U)] between
    neighbouring temperatures, configurational temperature, mean torques); conformations that the
    force field and the stereochemistry allow; no copies; means and populations of basins that are
    converged, so that walkers and halves agree; and, given a flow, what the trajectories never
    visited and what the flow does not reach. None of them sees what neither trajectories nor flow
    ever visit.

    Parameters
    ----------
    samples
        A run directory or its :class:`~openmm_tsf.Run`; or a mapping from temperatures (K) to
        their trajectories: one or several files that mdtraj can read, each an independent walker,
        or positions [n, N, 3] or [n, W, N, 3] in nm.
    molecule
        Of the trajectories; by default that of the run directory.
    flow
        A flow file of this molecule, or the directory that holds ``flow.pt``; of a run, by default
        its own.
    walkers
        The number of walkers that each trajectory file holds, frame by frame; a run tells its own.
    monte_carlo
        Whether a walker may repeat a frame, as where moves are rejected; of a run it may.
    observe
        Observables by name that have to be converged as well, beside those that a run records; see
        :func:`openmm_tsf.analysis.observables.define_observables`.
    output
        Directory for ``certificate.json`` and ``certificate.png``, made if needed: by default the
        run directory, and none for trajectories. Another one is new, empty, or of earlier results.

    Returns
    -------
    certificate
        ``verdict`` (``status``: ``"converged"``, ``"not yet"`` or ``"wrong"``, ``sentence``, and
        the reasons ``wrong``, ``missing``, ``undecided``, ``warnings``), ``checks`` (``name``,
        ``where``, ``status``, ``words``, ``numbers``), ``quantities`` (assessments by temperature),
        ``coverage`` by temperature, empty without a flow, and ``samples``.

    Raises
    ------
    ValueError
        If files cannot be read as frames of the molecule, the flow is of another one, or an
        observable is not defined for it.
    FileExistsError, NotADirectoryError, PermissionError
        If `output` holds other files, is a file, or cannot be written to.

    Examples
    --------
    Frames of 600 K that are given as 700 K:

    >>> import openmm_tsf as tsf
    >>> molecule = tsf.systems.alanine_dipeptide()
    >>> frames = tsf.MDDataset.shipped(molecule, stride=40).positions
    >>> certificate = tsf.certify({700: frames}, molecule)
    >>> certificate["verdict"]["status"]
    'wrong'
    >>> certificate["verdict"]["wrong"][0].startswith("700.00 K: by the forces, the frames are of")
    True
    """
    monte_carlo = check_bool(monte_carlo, "monte_carlo")
    check_instance(molecule, "molecule", MolecularSystem)
    is_run = not isinstance(samples, Mapping)
    if is_run and walkers != 1:
        raise ValueError(f"walkers: a run directory tells its own, got {walkers}")
    checks: list[Check] = []
    basins = run_path = None
    if is_run:
        run = samples if isinstance(samples, RunEstimates) else load_run(Path(samples))
        molecule = molecule or _molecule_of(run)
        run_path, basins = run.path, run.basins
        frames = read_run(run)
        checks.append(check_start(run.burn_in))
        if flow is None and (run.path / "flow.pt").is_file():
            flow = run.path / "flow.pt"
        output = run.path if output is None else output
    if flow is not None and Path(flow).is_dir():
        flow = Path(flow) / "flow.pt"
    if molecule is None:
        raise ValueError("molecule: expected the MolecularSystem of the trajectories, got none")
    observables = run.observables if is_run else {}
    observables |= define_observables(
        observe or {}, molecule.mdtraj_topology, slow_torsions(molecule.topology)
    )
    target = None if output is None else check_results_directory(output, run_path)
    network = None if flow is None else load_flow(flow, molecule)
    with molecule.potential() as potential:
        if is_run:
            checks += [check_recorded(molecule, each, potential) for each in frames]
        else:
            frames = read_trajectories(samples, molecule, potential, walkers)
        are_finite = all(np.isfinite(each.positions).all() for each in frames)
        if are_finite:
            checks += check_samples(molecule, frames, repeats_allowed=monte_carlo or is_run)
        else:  # no other check has a meaning
            checks += [check_energies(each) for each in frames]
        weights = None
        if network is not None and are_finite:
            logger.info("weights of draws and frames by the flow")
            weights = [weigh_samples(network, potential, each) for each in frames]
    labelled = label_samples(molecule, frames, weights, basins) if are_finite else []
    coverage = [
        measure_coverage(
            each.samples.temperature,
            each.names,
            each.draws,
            each.frames,
            each.n_draws,
            each.n_pieces,
        )
        for each in labelled
        if each.draws is not None and each.frames is not None
    ]
    for low, high in pairwise(labelled):
        checks += check_basin_ratios(low, high)
    checks += check_coverage(coverage)
    quantities = assess_samples(labelled)
    observed = assess_observed(labelled, observables, molecule.mdtraj_topology)
    quantities = observed | quantities
    checks += check_convergence(quantities, coverage)
    certificate = _certificate(molecule, frames, checks, quantities, coverage)
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(target)
        with replace_together(target) as folder:
            write_json(folder / CERTIFICATE, certificate)
            plot_certificate(certificate, frames, folder / PICTURE)
    return certificate


def _molecule_of(run: RunEstimates) -> MolecularSystem:
    if not holds_molecule(run.path):
        raise ValueError(
            f"molecule: expected the MolecularSystem that was sampled, {run.path} has no "
            "system.xml (samples of other potentials cannot be certified)"
        )
    return read_molecule(run.path)


def _certificate(
    molecule: MolecularSystem,
    frames: Sequence[Samples],
    checks: Sequence[Check],
    quantities: dict[str, Any],
    coverage: Sequence[Coverage],
) -> dict[str, Any]:
    content = {
        "verdict": judge_checks(checks).to_dict(),
        "molecule": {"n_atoms": molecule.n_atoms, "fingerprint": molecule.fingerprint},
        "temperatures_K": [each.temperature for each in frames],
        "samples": {
            f"{each.temperature:.2f}": {
                "source": list(each.source),
                "n_iterations": len(each.energy),
                "n_walkers": each.n_walkers,
                "n_frames": each.n_frames,
                "n_left_out": each.n_left_out,
            }
            for each in frames
        },
        "checks": [check.to_dict() for check in checks],
        "quantities": {
            name: {key: each.to_dict() for key, each in table.items()}
            for name, table in quantities.items()
        },
        "coverage": {f"{each.temperature:.2f}": each.to_dict() for each in coverage},
    }
    ready: dict[str, Any] = json_ready(content)
    return ready
