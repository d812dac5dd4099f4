"""What can go wrong without any average showing it: one dictionary per run, with warnings in words.

Mirror images and proposals outside the coordinates' domain are counted by the kernels. Basins that
are lost, torsions that are cut where samples are, cis peptide bonds and frames of the other
handedness are found here, in the numbers and frames of the run directory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.frame_checks import (
    Branches,
    Leak,
    cis,
    leak,
    mirrored,
    peptide_bonds,
    read_branches,
    tetrahedral_centres,
)
from openmm_tsf.analysis.ramachandran import backbone_names
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean

Array = npt.NDArray[np.float64]
Basin = Callable[[Mapping[str, Array]], npt.ArrayLike]

#: A basin is missed where this many frames would be in it, and none is.
MIN_EXPECTED_FRAMES = 20.0
#: A population is too small below this part of the expected one, and this many standard errors.
LOW_RATIO, LOW_Z = 0.5, 4.0
#: A branch cut leaks above this density (of the peak); this many frames make that certain.
LEAK_DENSITY, MIN_FRAMES_AT_CUT = 1e-3, 20
#: The cut is misplaced where another angle has this part of its density, and the sides differ where
#: they do by this factor and this many standard errors.
EMPTIER, SIDES_RATIO, SIDES_Z = 1 / 3, 3.0, 4.0
_MAX_FRAMES = 20_000


def monitor(
    run: RunEstimates,
    reference: Reference | None = None,
    basins: Mapping[str, Basin] | None = None,
    max_frames: int = _MAX_FRAMES,
) -> dict[str, Any]:
    """Count mirror images, lost basins, leaking branches, cis bonds and frames turned over.

    Parameters
    ----------
    run
        Finished or growing.
    reference
        Populations of the basins to expect, where it has the rung. Without it a basin is missed
        where this run's other rungs, by MBAR, say that it should have been seen.
    basins
        Names, and functions of the recorded dihedrals (name to array in rad) that return truth
        values of the same shape; by default :func:`default_basins`.
    max_frames
        Frames per rung that are looked at, evenly spaced.

    Returns
    -------
    result
        ``proposals`` (counts that were rejected), ``basins``, ``leaking_branches``,
        ``cis_peptide_bonds`` and ``wrong_handedness`` (both frames per rung; None without
        frames), ``frames_checked``, ``warnings`` and ``notes``. A note is a fact that no setting
        of the run can better. Unknown numbers are NaN.
    """
    segments = run.segments
    # Kernels of earlier versions count proposals outside the domain as non-finite only.
    outside = getattr(segments, "outside_domain", None)
    result: dict[str, Any] = {
        "proposals": {
            "mirror_images": segments.mirror_images,
            "outside_domain": outside,
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
    if run.n_iterations == 0:
        return result
    chosen = default_basins(list(run.dihedral_atoms)) if basins is None else basins
    for name, basin in chosen.items():
        _watch_basin(run, reference, name, basin, result)
    if (run.path / "topology.pdb").exists():
        _watch_frames(run, max_frames, result)
    return result


def default_basins(dihedrals: list[str]) -> dict[str, Basin]:
    """φ < 0 and φ > 0 of every φ; where its ψ is recorded, φ < 0 in two: α and β.

    α is -120° < ψ < 60°, β the rest: for alanine dipeptide both borders lie on barriers.
    """

    def positive(phi: str) -> Basin:
        return lambda angles: angles[phi] > 0

    def negative(phi: str) -> Basin:
        return lambda angles: angles[phi] <= 0

    def helix(phi: str, psi: str, inside: bool) -> Basin:
        low, high = np.radians([-120.0, 60.0])
        return lambda angles: (
            (angles[phi] <= 0) & (((angles[psi] > low) & (angles[psi] < high)) == inside)
        )

    found: dict[str, Basin] = {}
    for phi in (name for name in dihedrals if name.startswith("phi")):
        found[f"{phi} > 0"] = positive(phi)
        number = phi.removeprefix("phi")
        try:
            _, psi = backbone_names(dihedrals, int(number) if number else None)
        except ValueError:  # a φ without its ψ
            found[f"{phi} < 0"] = negative(phi)
        else:
            found[f"{phi} < 0, {psi} in alpha"] = helix(phi, psi, True)
            found[f"{phi} < 0, {psi} in beta"] = helix(phi, psi, False)
    return found


# ----------------------------------------------------------------------------- basins


def _watch_basin(
    run: RunEstimates, reference: Reference | None, name: str, basin: Basin, result: dict[str, Any]
) -> None:
    names = list(run.dihedral_atoms)
    dihedrals = run.segments.dihedrals
    inside = _inside(
        name, basin, {key: dihedrals[..., k].astype(np.float64) for k, key in enumerate(names)}
    )
    crossings = _crossings(inside, run.segments.replica)
    estimates = [estimate_mean(inside[:, :, rung]) for rung in range(run.n_rungs)]
    table: dict[str, Any] = {}
    n_samples = run.n_iterations * run.n_walkers
    for rung, temperature in enumerate(run.temperatures):
        ours, source = estimates[rung], "reference"
        expected, error = _expected(reference, float(temperature), name, basin, names)
        if np.isnan(expected) and ours.value == 0 and inside.any():
            expected, error = _by_mbar(run, inside, rung)
            source = "the other rungs (MBAR)"
        visitors = int(inside[:, :, rung].any(axis=0).sum())
        table[f"{temperature:.2f}"] = {
            "p": ours.value,
            "stderr": ours.stderr,
            "expected_p": expected,
            "expected_stderr": error,
            "expected_from": None if np.isnan(expected) else source,
            "walkers": visitors,
            "crossings": int(crossings[rung]),
        }
        known = ours.value if np.isnan(expected) else expected
        if min(known, 1 - known) * n_samples >= MIN_EXPECTED_FRAMES:
            where = f"{temperature:.2f} K: the basin {name}"
            result["warnings"] += _lost(where, ours, expected, error, source)
            if ours.value > 0:
                result["warnings"] += _few_visits(where, visitors, run.n_walkers, crossings, rung)
    result["basins"][name] = table
    if inside.any() and not inside.all() and not crossings.any() and run.n_iterations > 1:
        result["warnings"].append(
            f"all rungs: no replica ever entered or left the basin {name}; its populations are "
            "those of the start"
        )


def _inside(name: str, basin: Basin, angles: Mapping[str, Array]) -> npt.NDArray[np.bool_]:
    answer = np.asarray(basin(angles))
    shape = next(iter(angles.values())).shape if angles else ()
    if answer.dtype != np.bool_ or answer.shape != shape:
        raise ValueError(
            f"basins: {name!r}: expected truth values of shape {shape}, got {answer.dtype} of "
            f"shape {answer.shape}"
        )
    return answer


def _crossings(
    inside: npt.NDArray[np.bool_], replica: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """How often a replica that stayed at a rung [R] was on the other side one saved iteration on.

    Exchanges with other rungs bring replicas that crossed elsewhere: they do not count.
    """
    stayed = replica[1:] == replica[:-1]
    return np.asarray((stayed & (inside[1:] != inside[:-1])).sum(axis=(0, 1)), dtype=np.int64)


def _expected(
    reference: Reference | None, temperature: float, name: str, basin: Basin, names: list[str]
) -> tuple[float, float]:
    rung = None if reference is None else reference.rung(temperature)
    if reference is None or rung is None or not {"phi", "psi"} >= set(names):
        return np.nan, np.nan  # the reference has phi and psi only
    angles = {"phi": reference.phi[:, rung, None], "psi": reference.psi[:, rung, None]}
    estimate = estimate_mean(_inside(name, basin, angles))
    return estimate.value, estimate.stderr


def _by_mbar(run: RunEstimates, inside: npt.NDArray[np.bool_], rung: int) -> tuple[float, float]:
    found = run.mbar().at(float(run.betas[rung])).mean(inside)
    return found.value, found.stderr


def _lost(where: str, ours: MeanEstimate, expected: float, error: float, source: str) -> list[str]:
    if np.isnan(expected):
        return []
    if ours.value == 0:
        frames = expected * ours.n_samples
        return [
            f"{where} was never visited, where {frames:,.0f} of {ours.n_samples:,} frames are "
            f"expected from {source}: lost"
        ]
    z = (ours.value - expected) / np.hypot(ours.stderr, error)
    if ours.value < LOW_RATIO * expected and z < -LOW_Z:
        return [
            f"{where} has {ours.value:.2g} of the frames, where {expected:.2g} are expected from "
            f"{source} ({z:+.1f} standard errors): being lost"
        ]
    return []


def _few_visits(
    where: str, visitors: int, n_walkers: int, crossings: npt.NDArray[np.int64], rung: int
) -> list[str]:
    words = []
    if visitors == 1 and n_walkers > 1:
        words.append(f"{where} was visited by 1 of {n_walkers} walkers only")
    if crossings.any() and not crossings[rung]:
        words.append(
            f"{where}: no replica entered or left it here; it is filled by exchanges with other "
            "rungs alone"
        )
    return words


# ----------------------------------------------------------------------------- frames


def _watch_frames(run: RunEstimates, max_frames: int, result: dict[str, Any]) -> None:
    reference = run.structure
    centres = tetrahedral_centres(run.topology, reference.xyz[0])
    bonds, omegas = peptide_bonds(run.topology)
    natural = cis(reference, omegas)[0]
    flow = run.path / "flow.pt"
    branches = read_branches(flow) if flow.exists() else None
    turned: dict[str, int] = {}
    turned_at: set[str] = set()
    isomers: dict[str, dict[str, int]] = {name: {} for name in bonds}
    for temperature in map(float, run.temperatures):
        key = f"{temperature:.2f}"
        result["frames_checked"][key] = 0
        if not (run.path / f"T{key}K.dcd").exists():
            continue  # taken away, to save space: the counts of frames say so
        frames = _thinned(run, temperature, max_frames)
        if frames.n_frames == 0:
            continue
        result["frames_checked"][key] = frames.n_frames
        wrong = mirrored(frames.xyz, centres)
        turned[key] = int(wrong.any(axis=1).sum())
        turned_at |= {centres.names[k] for k in np.flatnonzero(wrong.any(axis=0))}
        counts = cis(frames, omegas).sum(axis=0)
        for name, usual, count in zip(bonds, natural, map(int, counts), strict=True):
            isomers[name][key] = count
            if count and not usual:
                result["warnings"].append(
                    f"{key} K: the peptide bond {name} is cis in {count:,} of "
                    f"{frames.n_frames:,} frames; it turns too rarely for this to be a population"
                )
        if turned[key]:
            result["warnings"].append(
                f"{key} K: {turned[key]:,} of {frames.n_frames:,} frames have another handedness "
                "than topology.pdb"
            )
        if branches is not None:
            _watch_branches(branches, frames, run.n_walkers, temperature, result)
    result["cis_peptide_bonds"] = isomers
    result["wrong_handedness"] = {"frames": turned, "centres": sorted(turned_at)}


def _thinned(run: RunEstimates, temperature: float, max_frames: int) -> mdtraj.Trajectory:
    """Evenly spaced iterations of all walkers, walker by walker: each has equally many frames."""
    stride = max(1, -(-run.n_iterations * run.n_walkers // max_frames))
    parts = [run.trajectory(temperature, walker).xyz[::stride] for walker in range(run.n_walkers)]
    return mdtraj.Trajectory(np.concatenate(parts), run.topology)


def _watch_branches(
    branches: Branches,
    frames: mdtraj.Trajectory,
    n_walkers: int,
    temperature: float,
    result: dict[str, Any],
) -> None:
    angles = mdtraj.compute_dihedrals(frames, branches.atoms, periodic=False)
    by_walker = angles.reshape(n_walkers, -1, len(branches.cuts)).transpose(1, 0, 2)
    for k, (name, cut) in enumerate(zip(branches.names, branches.cuts, strict=True)):
        found = leak(by_walker[:, :, k], float(cut))
        if found.density <= LEAK_DENSITY or found.n_at_cut < MIN_FRAMES_AT_CUT:
            continue
        result["leaking_branches"].append(
            {
                "dihedral": name,
                "temperature_K": temperature,
                "cut_degrees": float(np.degrees(cut)),
                "density": found.density,
                "emptiest_degrees": float(np.degrees(found.emptiest)),
                "emptiest_density": found.emptiest_density,
                "frames_below": found.below,
                "frames_above": found.above,
                "sides_z": found.z,
            }
        )
        kind, words = _leak_in_words(f"{temperature:.2f} K: {name}", float(cut), found)
        result[kind].append(words)


def _leak_in_words(where: str, cut: float, found: Leak) -> tuple[str, str]:
    place = f"{where} is cut at {np.degrees(cut):.0f} degrees, where its density is"
    sides = sorted((found.below, found.above))
    if abs(found.z) > SIDES_Z and sides[1] > SIDES_RATIO * sides[0]:
        return "warnings", (
            f"{place} {found.density:.2g} of its peak on one side only ({found.below:,} frames "
            f"below, {found.above:,} above): walkers pile up at the cut and do not pass it"
        )
    if found.emptiest_density < EMPTIER * found.density:
        return "warnings", (
            f"{place} {found.density:.2g} of its peak; at {np.degrees(found.emptiest):.0f} degrees "
            f"it is {found.emptiest_density:.2g}: cut there"
        )
    return "notes", (
        f"{place} {found.density:.2g} of its peak, nowhere much lower; flow moves do not pass it, "
        "dynamics do"
    )
