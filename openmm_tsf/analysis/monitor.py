"""Problems of a run that no average shows: counts, and warnings in words.

Mirror images and proposals outside the coordinates' domain are counted by the kernels. Lost basins,
branch cuts where samples are, cis peptide bonds and frames of the opposite handedness are detected
in the numbers and frames of the run directory.
"""

from collections.abc import Mapping
from typing import Any

import mdtraj
import numpy as np

from openmm_tsf.analysis.basin_checks import Basin, BasinCheck
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.frame_checks import (
    Branches,
    Leak,
    is_cis,
    is_mirrored,
    is_tertiary,
    measure_leak,
    peptide_bonds,
    read_branches,
    tetrahedral_centres,
)
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.training_checks import check_training_frames

#: A branch cut leaks above this density (of the maximum) and with this many frames next to it.
LEAK_DENSITY, MIN_FRAMES_AT_CUT = 1e-3, 20
#: The cut is misplaced where another angle has less than this fraction of the density at the cut;
#: walkers do not cross it where its sides differ by this factor and this many standard errors.
EMPTIER, SIDES_RATIO, SIDES_Z = 1 / 3, 3.0, 4.0
_MAX_FRAMES = 20_000


def monitor(
    run: RunEstimates,
    reference: Reference | None = None,
    basins: Mapping[str, Basin] | None = None,
    max_frames: int = _MAX_FRAMES,
) -> dict[str, Any]:
    """Check a run for mirror images, lost basins, leaking branch cuts and cis peptide bonds.

    Basins are names, and functions of the recorded torsions (name to array in rad) that return
    truth values of the same shape; by default those of ``run.basins``. See `BasinCheck` for where
    their expected populations come from. At most `max_frames` are checked per rung, evenly spaced.

    Returns
    -------
    result
        ``proposals`` (numbers of rejected ones), ``basins``, ``leaking_branches``,
        ``cis_peptide_bonds`` and ``wrong_handedness`` (both frames per rung; None without
        frames), ``frames_checked``, ``warnings`` and ``notes``. A note states a fact that no
        setting of the run can improve. Unknown numbers are NaN.
    """
    segments = run.segments
    result: dict[str, Any] = {
        "proposals": {
            "mirror_images": segments.mirror_images,
            "outside_domain": segments.outside_domain,
            "rejected_non_finite": segments.rejected_non_finite,
        },
        "basins": {},
        "leaking_branches": [],
        "cis_peptide_bonds": None,
        "wrong_handedness": None,
        "frames_checked": {},
        "warnings": [],
        "notes": [],
    }
    if run.shards is not None:
        result["warnings" if run.shards.left_out else "notes"].append(run.shards.describe())
    if run.n_iterations == 0:
        return result
    checks = BasinCheck(run, reference)
    chosen = dict.fromkeys(run.basins.names) if basins is None else basins
    for name, basin in chosen.items():
        result["basins"][name], warnings = checks.check(name, basin)
        result["warnings"] += warnings
    result["warnings"] += check_training_frames(run, result["basins"])
    if run.has_structure:
        _check_frames(run, max_frames, result)
    return result


def _check_frames(run: RunEstimates, max_frames: int, result: dict[str, Any]) -> None:
    structure = run.structure
    centres = tetrahedral_centres(run.topology, structure.xyz[0])
    bonds, omegas = peptide_bonds(run.topology)
    cis_in_structure = is_cis(structure, omegas)[0]
    flow = run.path / "flow.pt"
    branches = read_branches(flow) if flow.exists() else None
    n_mirrored: dict[str, int] = {}
    mirrored_centres: set[str] = set()
    n_cis: dict[str, dict[str, int]] = {name: {} for name in bonds}
    for temperature in map(float, run.temperatures):
        key = f"{temperature:.2f}"
        result["frames_checked"][key] = 0
        if not run.has_frames(temperature):
            continue  # removed to save space: ``frames_checked`` says so
        frames = _thin(run, temperature, max_frames)
        if frames.n_frames == 0:
            continue
        result["frames_checked"][key] = frames.n_frames
        mirrored = is_mirrored(frames.xyz, centres)
        n_mirrored[key] = int(mirrored.any(axis=1).sum())
        mirrored_centres |= {centres.names[k] for k in np.flatnonzero(mirrored.any(axis=0))}
        counts = is_cis(frames, omegas).sum(axis=0)
        for name, cis_before, count in zip(bonds, cis_in_structure, map(int, counts), strict=True):
            n_cis[name][key] = count
            if count and not cis_before:
                result["warnings"].append(
                    f"{key} K: the peptide bond {name} is cis in {count:,} of "
                    f"{frames.n_frames:,} frames; it isomerises too rarely for this to be an "
                    "equilibrium population"
                )
        if n_mirrored[key]:
            result["warnings"].append(
                f"{key} K: {n_mirrored[key]:,} of {frames.n_frames:,} frames have a centre of the "
                "opposite handedness to topology.pdb"
            )
        if branches is not None:
            _check_branches(branches, frames, run.n_walkers, temperature, result)
    result["cis_peptide_bonds"] = n_cis
    for name, quartet, was_cis in zip(bonds, omegas, cis_in_structure, strict=True):
        counts_and_frames = [(n, result["frames_checked"][key]) for key, n in n_cis[name].items()]
        stayed = all(n == (total if was_cis else 0) for n, total in counts_and_frames)
        if counts_and_frames and stayed and is_tertiary(run.topology, int(quartet[2])):
            form, other = ("cis", "trans") if was_cis else ("trans", "cis")
            result["notes"].append(
                f"the peptide bond {name} is {form} in all frames; its nitrogen has no hydrogen, "
                f"so that {other} may be populated, too: all results are those of the {form} form"
            )
    result["wrong_handedness"] = {"frames": n_mirrored, "centres": sorted(mirrored_centres)}


def _thin(run: RunEstimates, temperature: float, max_frames: int) -> mdtraj.Trajectory:
    """Return evenly spaced iterations, walker by walker: each has equally many frames."""
    stride = max(1, -(-run.n_framed * run.n_walkers // max_frames))
    parts = [run.trajectory(temperature, w, stride).xyz for w in range(run.n_walkers)]
    return mdtraj.Trajectory(np.concatenate(parts), run.topology)


def _check_branches(
    branches: Branches,
    frames: mdtraj.Trajectory,
    n_walkers: int,
    temperature: float,
    result: dict[str, Any],
) -> None:
    angles = mdtraj.compute_dihedrals(frames, branches.atoms, periodic=False)
    by_walker = angles.reshape(n_walkers, -1, len(branches.cuts)).transpose(1, 0, 2)
    for k, (name, cut) in enumerate(zip(branches.names, map(float, branches.cuts), strict=True)):
        leak = measure_leak(by_walker[:, :, k], cut)
        if leak.density <= LEAK_DENSITY or leak.n_at_cut < MIN_FRAMES_AT_CUT:
            continue
        result["leaking_branches"].append(
            {
                "dihedral": name,
                "temperature_K": temperature,
                "cut_degrees": float(np.degrees(cut)),
                "density": leak.density,
                "emptiest_degrees": float(np.degrees(leak.emptiest)),
                "emptiest_density": leak.emptiest_density,
                "frames_below": leak.below,
                "frames_above": leak.above,
                "sides_z": leak.z,
            }
        )
        key, words = _describe_leak(f"{temperature:.2f} K: {name}", cut, leak)
        result[key].append(words)


def _describe_leak(where: str, cut: float, leak: Leak) -> tuple[str, str]:
    """Return ``"warnings"`` or ``"notes"``, and the words."""
    density = (
        f"{where}: its branch cut at {np.degrees(cut):.0f} degrees lies where the density is "
        f"{leak.density:.2g} of its maximum"
    )
    fewer, more = sorted((leak.below, leak.above))
    if abs(leak.z) > SIDES_Z and more > SIDES_RATIO * fewer:
        return "warnings", (
            f"{density}, on one side only ({leak.below:,} frames below, {leak.above:,} above): "
            "walkers accumulate there and do not cross the cut"
        )
    if leak.emptiest_density < EMPTIER * leak.density:
        return "warnings", (
            f"{density}; at {np.degrees(leak.emptiest):.0f} degrees it is "
            f"{leak.emptiest_density:.2g}: place the cut there"
        )
    return "notes", (
        f"{density}, and not much lower anywhere; flow moves cannot cross it, dynamics can"
    )
