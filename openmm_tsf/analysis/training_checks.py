"""What the training frames of a flow lack, by their basins and those of the run."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import mdtraj
import numpy as np

from openmm_tsf.analysis.basins import TrainingBasins
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.utils.wells import N_BINS

#: Basins of a smaller population than this, in the frames and at every rung, are passed over.
MIN_POPULATION = 1e-3
#: Frames should rest on this many independent visits to a basin that is not rare.
MIN_VISITS, NOT_RARE = 5, 0.01
_STUCK = 0.5
#: Sectors of the circle, 30 degrees each.
_N_SECTORS = 12


def check_training_frames(run: RunEstimates, populations: dict[str, Any]) -> list[str]:
    """Return warnings about the frames that the flow of a run was trained on.

    `populations` are those of the run by basin and rung (`BasinCheck.check`). Reported are basins
    of the frames that the run never visited and the reverse, wells and basins that the frames
    visited too rarely, torsions that never left one well, and amino acids on the rarer side of phi.
    """
    frames = run.training_basins
    warnings = list(_check_handed_phi(run))
    warnings += [f"training frames: {each}" for each in run.frame_warnings]
    if frames is None:
        return warnings
    unvisited = (name for name, at in populations.items() if not any(e["p"] for e in at.values()))
    warnings += check_lost(frames, unvisited)
    warnings += _check_missing(frames, run)
    warnings += _check_stuck(frames, run)
    for name, entry in frames.populations.items():
        p, n_visits = entry["p"] or 0.0, entry["n_visits"] or 0.0
        if p >= NOT_RARE and n_visits < MIN_VISITS and p < 1 - NOT_RARE:
            warnings.append(
                f"training frames: {p:.2g} of them are in the basin {name}, from "
                f"{n_visits:.0f} visit{'s' if n_visits != 1 else ''} only: longer dynamics, or "
                "frames of a higher temperature, would tell its population"
            )
    return warnings


def check_lost(frames: TrainingBasins, unvisited: Iterable[str]) -> Iterator[str]:
    """Yield warnings about basins of the frames among those that a run never visited."""
    for name in unvisited:
        p = frames.populations.get(name, {}).get("p") or 0.0
        if p >= MIN_POPULATION:
            yield (
                f"all rungs: the basin {name} was never visited; it has {p:.2g} of the training "
                f"frames at {frames.temperature:.2f} K: the basin is lost"
            )


def _check_missing(frames: TrainingBasins, run: RunEstimates) -> Iterator[str]:
    """Yield the wells of the run's torsions in which no training frame is."""
    centres = 2 * np.pi * (np.arange(N_BINS) + 0.5) / N_BINS - np.pi
    for torsion, wells in run.basins.wells.items():
        known = frames.basins.wells.get(torsion)
        if known is None or not wells.names:
            continue
        by_well = np.bincount(
            wells.labels(centres), weights=known.counts, minlength=len(wells.names)
        )
        labels = wells.labels(run.dihedral_at_all_rungs(torsion))
        for k in np.flatnonzero(by_well == 0):
            p = float((labels == k).mean(axis=(0, 1)).max())
            if p >= MIN_POPULATION:
                yield (
                    f"training frames: none has {wells.names[k]}, where up to {p:.2g} of the "
                    "run's samples at a temperature are: the flow does not propose it; train on "
                    "frames that visit it"
                )


def _check_stuck(frames: TrainingBasins, run: RunEstimates) -> Iterator[str]:
    """Yield the torsions that have a single well in frames and run, on half of the circle."""
    stuck = []
    for name, wells in frames.basins.wells.items():
        known = run.basins.wells.get(name)
        if known is None or known.names or _is_phi_of_a_ring(name, run):
            continue
        is_empty = np.reshape(wells.counts, (_N_SECTORS, -1)).sum(axis=1) == 0
        if is_empty.sum() >= _N_SECTORS / 2:
            stuck.append(name)
    if stuck:
        yield (
            f"training frames: {', '.join(stuck)} never left one well, nor did the run; frames of "
            "longer dynamics or of a higher temperature would show whether there are others"
        )


def _is_phi_of_a_ring(name: str, run: RunEstimates) -> bool:
    """Whether a torsion is the phi of a nitrogen without hydrogen, as that of proline."""
    if not re.fullmatch(r"phi\d*", name):
        return False
    n = run.dihedral_atoms[name][1]
    if not run.has_structure or n >= run.topology.n_atoms:
        return True  # not known
    return not any(
        atom.element is not None and atom.element.symbol in ("H", "D")
        for atom in _bonded(run.topology, n)
    )


def _bonded(topology: mdtraj.Topology, atom: int) -> list[mdtraj.core.topology.Atom]:
    return [(b if a.index == atom else a) for a, b in topology.bonds if atom in (a.index, b.index)]


def _check_handed_phi(run: RunEstimates) -> Iterator[str]:
    """Yield amino acids that are on the side of phi that is rare for their handedness."""
    phis = [name for name in run.dihedral_atoms if re.fullmatch(r"phi\d*", name)]
    if not phis or not run.has_structure:
        return
    frames = run.training_basins
    for name in phis:
        sign = _handedness(run.structure, run.dihedral_atoms[name])
        if sign == 0:
            continue
        rare = "> 0" if sign > 0 else "< 0"
        in_run = sign * run.dihedral_at_all_rungs(name) > 0
        shares = {"samples": float(in_run.mean())}
        if frames is not None and name in frames.basins.wells:
            counts = np.asarray(frames.basins.wells[name].counts)
            side = counts[N_BINS // 2 :] if sign > 0 else counts[: N_BINS // 2]
            shares = {"training frames": float(side.sum() / counts.sum())} | shares
        for what, share in shares.items():
            if share > _STUCK:
                yield (
                    f"{what}: {share:.2g} of them have {name} {rare}, which is rare for "
                    f"{'L' if sign > 0 else 'D'}-amino acids: they seem stuck there, from a start "
                    "in the wrong basin"
                )
                break


def _handedness(structure: mdtraj.Trajectory, phi: list[int]) -> int:
    """Return 1 for an L-amino acid, -1 for D, 0 where the alpha carbon has no side chain or ring.

    `phi` are the atoms C, N, CA, C of the dihedral.
    """
    topology = structure.topology
    _, n, alpha, carbon = phi
    if max(phi) >= topology.n_atoms:
        return 0
    side = [
        atom.index
        for atom in _bonded(topology, alpha)
        if atom.index not in (n, carbon) and atom.element is not None and atom.element.symbol == "C"
    ]
    if len(side) != 1:
        return 0
    x = structure.xyz[0]
    volume = np.dot(x[n] - x[alpha], np.cross(x[carbon] - x[alpha], x[side[0]] - x[alpha]))
    return int(np.sign(volume))
