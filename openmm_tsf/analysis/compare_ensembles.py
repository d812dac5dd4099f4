"""A run beside a reference: distances with their floors, populations, the flow, the costs."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.agreement import BASIN
from openmm_tsf.analysis.basins import Basins
from openmm_tsf.analysis.compare_distances import (
    MIN_WALKERS,
    Distance,
    DistanceMeter,
    backbone_pairs,
    measure_energies,
    measure_ramachandran,
    measure_tica,
    measure_torus,
)
from openmm_tsf.analysis.compare_export import check_export_folder, export_samples
from openmm_tsf.analysis.compare_flow import measure_flow
from openmm_tsf.analysis.compare_samples import Ensemble, Side, open_side
from openmm_tsf.analysis.compare_verdict import compare_means, compare_states, judge_comparison
from openmm_tsf.analysis.convergence import count_pieces
from openmm_tsf.analysis.run_data import nearest_rung
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.analysis.tica import NEEDS, has_tica
from openmm_tsf.flows.load import load_flow
from openmm_tsf.systems.molecule import MolecularSystem, is_stereoisomer
from openmm_tsf.utils.validation import check_bool, check_instance, check_int, check_seed

logger = logging.getLogger(__name__)

#: Samples of each set of points whose optimal assignment is found: seconds each; 10 000, as
#: published evaluations have, take a quarter of an hour.
N_SAMPLES = 1000
#: Divisions of the reference into halves.
N_SPLITS = 4


def compare(
    run: Any,
    reference: Any,
    *,
    molecule: MolecularSystem | None = None,
    walkers: int = 1,
    flow: str | PathLike[str] | None = None,
    n_samples: int = N_SAMPLES,
    n_splits: int = N_SPLITS,
    tica: bool | None = None,
    seed: int = 1,
    export: str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """Compare a run with a reference at every temperature that both have.

    Each distance is between `n_samples` samples of the run and as many of one half of the
    reference, and stands beside its floor: the same between the two halves, which are of different
    walkers (of different blocks in time, where there are fewer than eight walkers). A right run has
    distances like their floors if its samples are as independent as the reference's; where it has
    fewer independent ones than `n_samples`, they are larger. Basins are those of the reference's
    slow torsions, and those that only the run has.

    Parameters
    ----------
    run, reference
        A run directory or its :class:`~openmm_tsf.Run`; a file ``.npz`` of
        ``data/make_reference.py export``; or a mapping from temperatures (K) to their trajectories,
        as in :func:`openmm_tsf.certify`, whose energies are evaluated.
    molecule
        Of trajectories; by default that of the run directory on the other side, whose atoms must
        be the same.
    walkers
        The number of walkers that each trajectory file holds, frame by frame; not of directories.
    flow
        A flow file, or the directory that holds ``flow.pt``; by default that of the run directory,
        if it has one. Its density is compared at temperatures of which the reference has frames, in
        the System of both sides, which must be one; of a run directory it is else left out.
    n_samples
        Points of each Wasserstein distance. Time grows with its cube, memory with its square.
    n_splits
        Divisions of the reference into halves, over which distances are averaged.
    tica
        Whether to include the distance in the plane of the two slowest components, for which
        deeptime is needed (the extra ``tica``); by default, if it is installed.
    seed
        Of the samples that are drawn.
    export
        New or empty folder for the frames of both sides as ``.npy`` files, in the layout of
        `openmm_tsf.analysis.compare_export`.

    Returns
    -------
    comparison
        ``verdict`` (see :func:`openmm_tsf.certify`; ``"converged"`` is in agreement),
        ``temperatures_K``, ``not_compared_K``, ``torsions``, ``costs`` of both sides, ``notes``,
        and ``at`` by temperature: ``energy_w2_kJ_mol``, ``energy_w2_kT``, ``torus_w2_rad``,
        ``tica_w2`` (``distance``, ``features``, ``lag``), ``ramachandran`` by residue
        (``total_variation``, ``kl``), each with ``value``, ``floor``, ``floor_low``,
        ``floor_high``, ``ratio``, ``n_samples``; ``quantities`` (⟨U⟩, basins) with ``run``,
        ``reference`` and ``z``; ``flow`` (see `openmm_tsf.analysis.compare_flow`);
        ``n_independent`` samples of both sides by their slowest observable.

    Raises
    ------
    ValueError
        If files cannot be read; molecules, or the atoms of a torsion, differ; no temperature or
        torsion is common; or `flow` is given for two Systems.
    ImportError
        If `tica` is true and deeptime is not installed.

    Examples
    --------
    Frames of 600 K beside every other one of them, which hold the same:

    >>> import openmm_tsf as tsf
    >>> molecule = tsf.systems.alanine_dipeptide()
    >>> frames = tsf.MDDataset.shipped(molecule, stride=20).positions
    >>> result = tsf.compare({600: frames[::2]}, {600: frames}, molecule=molecule, n_samples=200)
    >>> torus = result["at"]["600.00"]["torus_w2_rad"]
    >>> torus["n_samples"], bool(torus["ratio"] < 1.5)
    (200, True)
    """
    check_instance(molecule, "molecule", MolecularSystem)
    sizes = check_int(n_samples, "n_samples", 2), check_int(n_splits, "n_splits")
    rng = np.random.default_rng(check_seed(seed))
    if tica is None:
        tica = has_tica()
    elif check_bool(tica, "tica") and not has_tica():
        raise ImportError(NEEDS)
    target = None if export is None else check_export_folder(export)
    first, second = _open_both(run, reference, molecule, walkers)
    kelvins = _common_temperatures(first, second)
    names = [name for name in second.torsions if name in first.torsions]
    _check_torsions(first, second, names)
    if not names:
        known, others = (", ".join(side.torsions) or "none" for side in (first, second))
        raise ValueError(f"reference: expected torsions of the run ({known}), got {others}")
    molecule = first.molecule or molecule or second.molecule
    same = _have_one_system(first, second)
    if flow is not None and not same:
        raise ValueError("flow: expected one System on both sides, the reference has another one")
    given = flow if flow is not None or not same else first.flow
    network = _open_flow(given, molecule, flow is not None)
    topology = first.topology or second.topology
    pairs = [(first.at(kelvin), second.at(kelvin)) for kelvin in kelvins]
    _check_atoms(pairs, topology)
    basins = Basins.find({n: _joined([b.angles[n] for _, b in pairs]) for n in names})
    basins = basins.completed({n: _joined([a.angles[n] for a, _ in pairs]) for n in names})
    at: dict[str, dict[str, Any]] = {}
    written: list[Path] = []
    with _potential(molecule if network is not None or target is not None else None) as potential:
        for one, its_reference in pairs:
            other = its_reference.evaluated(potential)
            key = f"{one.temperature:.2f}"
            logger.info("%s K: %d and %d samples", key, one.n_samples, other.n_samples)
            at[key] = _compare_distances(one, other, names, sizes, same, rng)
            if tica:
                at[key]["tica_w2"] = measure_tica(one, other, topology, names, *sizes[::-1], rng)
            at[key] |= _compare_quantities(one, other, basins, same)
            if network is not None and potential is not None and other.frames is not None:
                at[key]["flow"] = measure_flow(network, potential, other.frames, rng)
            if target is not None:
                written += export_samples(target, one, other, topology)
    notes = [*_notes(first, second, tica), *_notes_of_frames(pairs, same, network is not None)]
    if target is not None and not written:
        notes.append("nothing is exported: no temperature has frames")
    content = {
        "run": first.source,
        "reference": second.source,
        "temperatures_K": kelvins,
        "not_compared_K": [float(t) for t in first.temperatures if float(t) not in kelvins],
        "torsions": names,
        "costs": {"run": first.costs.to_dict(), "reference": second.costs.to_dict()},
        "at": at,
        "notes": notes,
    }
    ready: dict[str, Any] = json_ready(_plain(content))
    return {"verdict": judge_comparison(ready).to_dict()} | ready


def _plain(value: Any) -> Any:
    """Return distances as dictionaries."""
    if isinstance(value, Distance):
        return asdict(value) | {"ratio": value.ratio}
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _open_flow(path: Any, molecule: MolecularSystem | None, is_given: bool) -> Any:
    """Return the flow in a file or directory; None without one, or for what is no molecule."""
    if path is None or (molecule is None and not is_given):
        return None
    if molecule is None:
        raise ValueError("molecule: expected the MolecularSystem of the flow, got none")
    file = Path(path)
    return load_flow(file / "flow.pt" if file.is_dir() else file, molecule)


@contextmanager
def _potential(molecule: MolecularSystem | None) -> Iterator[Any]:
    if molecule is None:
        yield None
        return
    with molecule.potential() as potential:
        yield potential


def _open_both(
    run: Any, reference: Any, molecule: MolecularSystem | None, walkers: int
) -> tuple[Side, Side]:
    """Open both sides; trajectories of one are of the molecule of the other's run directory."""
    if walkers != 1 and not any(isinstance(side, Mapping) for side in (run, reference)):
        raise ValueError(f"walkers: those of trajectory files, expected none here, got {walkers}")
    if isinstance(reference, Mapping) and not isinstance(run, Mapping):
        first = open_side(run, "run", molecule, walkers)
        second = open_side(reference, "reference", molecule or first.molecule, walkers)
    else:
        second = open_side(reference, "reference", molecule, walkers)
        first = open_side(run, "run", molecule or second.molecule, walkers)
    known = None if molecule is None else molecule.mdtraj_topology
    _check_same_atoms(known, "molecule", first.topology, "run")
    _check_same_atoms(known, "molecule", second.topology, "reference")
    _check_same_atoms(first.topology, "run", second.topology, "reference")
    return first, second


def _check_same_atoms(
    expected: mdtraj.Topology | None, name: str, topology: mdtraj.Topology | None, of: str
) -> None:
    """Refuse two Topologies whose atoms or their order differ."""
    if expected is None or topology is None:
        return
    labels = [[(a.name, a.residue.name) for a in each.atoms] for each in (expected, topology)]
    if labels[0] != labels[1]:
        raise ValueError(
            f"{of}: expected the atoms of the {name} ({len(labels[0])} of them), got other atoms, "
            f"or another order of them ({len(labels[1])})"
        )


def _check_torsions(run: Side, reference: Side, names: list[str]) -> None:
    """Refuse torsions of one name that are of different atoms (the other way round is the same)."""
    for name in names:
        atoms = [tuple(each.quartets.get(name, ())) for each in (run, reference)]
        if all(atoms) and atoms[0] not in (atoms[1], atoms[1][::-1]):
            raise ValueError(
                f"reference: expected {name} of the run's atoms {atoms[0]}, got {atoms[1]}"
            )


def _check_atoms(pairs: list[tuple[Ensemble, Ensemble]], topology: mdtraj.Topology | None) -> None:
    """Refuse frames of another number of atoms: reference data do not tell their molecule."""
    for pair in pairs:
        sizes = [each.positions.shape[2:] for each in pair if each.positions is not None]
        if topology is not None:
            sizes.append((topology.n_atoms, 3))
        if len(set(sizes)) > 1:
            raise ValueError(
                f"reference: expected positions of the run's molecule, [..., {sizes[-1][0]}, 3], "
                f"got {list(sizes[0])} at {pair[0].temperature:.2f} K"
            )


def _common_temperatures(run: Side, reference: Side) -> list[float]:
    kelvins = [
        float(t) for t in run.temperatures if nearest_rung(reference.temperatures, t) is not None
    ]
    if not kelvins:
        known, ladder = (
            ", ".join(f"{t:.2f}" for t in side.temperatures) for side in (reference, run)
        )
        raise ValueError(
            f"reference: expected a temperature of the run ({ladder} K), got {known} K"
        )
    return kelvins


def _have_one_system(run: Side, reference: Side) -> bool:
    known = [side.fingerprint for side in (run, reference)]
    if None in known or known[0] == known[1]:
        return True
    # Also with exchanged labels of hydrogens: the energies are those of one function.
    return is_stereoisomer(str(known[0]), str(known[1]))


def _notes(run: Side, reference: Side, tica: bool) -> Iterator[str]:
    if not _have_one_system(run, reference):
        yield (
            "the Systems of run and reference differ: their energies are not compared, and the "
            "flow is not weighed"
        )
    elif reference.fingerprint is None:
        yield "the reference does not tell its System: it is taken for that of the run"
    if not tica:
        yield f"TICA-W2 is left out; {NEEDS}" if not has_tica() else "TICA-W2 is left out"
    left_out = [name for name in run.torsions if name not in reference.torsions]
    if left_out:
        yield f"torsions that the reference lacks are left out: {', '.join(left_out)}"


def _notes_of_frames(
    pairs: list[tuple[Ensemble, Ensemble]], same: bool, has_flow: bool
) -> Iterator[str]:
    for one, other in pairs:
        where = f"{one.temperature:.2f} K"
        if same and not _are_finite(one, other):
            counts = [int((~np.isfinite(each.energy)).sum()) for each in (one, other)]
            yield (
                f"{where}: energies are not compared: {counts[0]} of the run and {counts[1]} of "
                "the reference are not finite"
            )
        if has_flow and other.positions is None:
            yield f"{where}: the flow is not weighed, as the reference has no frames"


def _joined(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate([each.ravel() for each in arrays])


def _compare_distances(
    run: Ensemble,
    reference: Ensemble,
    names: list[str],
    sizes: tuple[int, int],
    same: bool,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return the distances of the energies (of one System) and torsions at one temperature."""
    n_samples, n_splits = sizes
    meter = DistanceMeter(run.energy.shape, reference.energy.shape, n_splits, rng)
    pairs = backbone_pairs(names)
    on_torus = [name for pair in pairs.values() for name in pair] or names
    energies: dict[str, Any] = {"energy_w2_kJ_mol": None, "energy_w2_kT": None}
    if same and _are_finite(run, reference):
        energies = measure_energies(meter, run, reference, n_samples)
    return {
        "halves": "walkers" if reference.energy.shape[1] >= MIN_WALKERS else "blocks in time",
        "n_frames": {"run": run.n_samples, "reference": reference.n_samples},
        **energies,
        "torus_w2_rad": measure_torus(meter, run, reference, on_torus, n_samples),
        "tica_w2": None,
        "ramachandran": {
            label: measure_ramachandran(meter, run, reference, pair)
            for label, pair in pairs.items()
        },
    }


def _compare_quantities(
    run: Ensemble, reference: Ensemble, basins: Basins, same: bool
) -> dict[str, Any]:
    """Return mean energy (of one System) and populations of the basins at one temperature."""
    with_energy = same and _are_finite(run, reference)
    inside = {
        name: [basins.inside(name, side.angles) for side in (run, reference)]
        for name in basins.names
    }
    pieces = [
        count_pieces(
            *([side.energy] if with_energy else []),
            *(states[k] for states in inside.values()),
            angles=side.angles.values(),
        )
        for k, side in enumerate((run, reference))
    ]
    quantities = {}
    if with_energy:
        quantities["energy_kJ_mol"] = compare_means(run.energy, reference.energy)
    for name, states in inside.items():
        quantities[f"{BASIN}{name}"] = compare_states(states[0], states[1], pieces)
    n_independent = dict(zip(("run", "reference"), pieces, strict=True))
    return {"n_independent": n_independent, "quantities": quantities, "flow": None}


def _are_finite(*sides: Ensemble) -> bool:
    return all(np.isfinite(side.energy).all() for side in sides)
