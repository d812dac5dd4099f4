"""Basins of dihedrals that a run has lost, is losing, or populates unlike the expectation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.ramachandran import backbone_names
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean

Basin = Callable[[Mapping[str, Array]], npt.ArrayLike]

#: A basin counts as missed where at least this many frames are expected in it but none occurs.
MIN_EXPECTED_FRAMES = 20.0
#: A population is too small below this fraction of the expected one, and this many standard errors.
LOW_RATIO, LOW_Z = 0.5, 4.0


@dataclass(frozen=True)
class _Expected:
    """The population that a basin should have; NaN if it is not known."""

    p: float = np.nan
    stderr: float = np.nan
    source: str | None = None


def default_basins(dihedrals: list[str]) -> dict[str, Basin]:
    """Return φ > 0 and φ < 0 of every φ, the latter as α and β where its ψ was recorded too.

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

    basins: dict[str, Basin] = {}
    for phi in (name for name in dihedrals if name.startswith("phi")):
        basins[f"{phi} > 0"] = positive(phi)
        number = phi.removeprefix("phi")
        try:
            _, psi = backbone_names(dihedrals, int(number) if number else None)
        except ValueError:  # a φ without its ψ
            basins[f"{phi} < 0"] = negative(phi)
        else:
            basins[f"{phi} < 0, {psi} in alpha"] = helix(phi, psi, True)
            basins[f"{phi} < 0, {psi} in beta"] = helix(phi, psi, False)
    return basins


def check_basin(
    run: RunEstimates, reference: Reference | None, name: str, basin: Basin
) -> tuple[dict[str, Any], list[str]]:
    """Return populations of a basin per rung beside those expected, and what is wrong in words.

    The reference gives the expected populations, where it has the rung. Without it a rung that
    never visits the basin is compared with the other rungs, by MBAR. `basin` maps the recorded
    dihedrals (name to array in rad) to truth values of the same shape.
    """
    names = list(run.dihedral_atoms)
    dihedrals = run.dihedrals
    inside = _evaluate(
        name, basin, {key: dihedrals[..., k].astype(np.float64) for k, key in enumerate(names)}
    )
    crossings = _count_crossings(inside, run.replica)
    table: dict[str, Any] = {}
    warnings: list[str] = []
    for rung, temperature in enumerate(map(float, run.temperatures)):
        estimate = estimate_mean(inside[:, :, rung])
        expected = _expected_from_reference(reference, temperature, name, basin, names)
        if expected.source is None and estimate.value == 0 and inside.any():
            by_mbar = run.mbar().reweight(float(run.betas[rung])).mean(inside)
            expected = _Expected(by_mbar.value, by_mbar.stderr, "the other rungs (MBAR)")
        visitors = int(inside[:, :, rung].any(axis=0).sum())
        table[f"{temperature:.2f}"] = {
            "p": estimate.value,
            "stderr": estimate.stderr,
            "expected_p": expected.p,
            "expected_stderr": expected.stderr,
            "expected_from": expected.source,
            "walkers": visitors,
            "crossings": int(crossings[rung]),
        }
        known = estimate.value if expected.source is None else expected.p
        if min(known, 1 - known) * estimate.n_samples < MIN_EXPECTED_FRAMES:
            continue  # too rare for a warning to mean anything
        where = f"{temperature:.2f} K: the basin {name}"
        warnings += _population_warnings(where, estimate, expected)
        if estimate.value > 0 and visitors == 1 and run.n_walkers > 1:
            warnings.append(f"{where} was visited by only 1 of {run.n_walkers} walkers")
        if estimate.value > 0 and crossings.any() and not crossings[rung]:
            warnings.append(
                f"{where}: no replica entered or left it at this temperature; it is populated by "
                "exchanges with other rungs only"
            )
    if inside.any() and not inside.all() and not crossings.any() and run.n_used > 1:
        warnings.append(
            f"all rungs: no replica ever entered or left the basin {name}; its populations are "
            "those of the start"
        )
    return table, warnings


def _evaluate(name: str, basin: Basin, angles: Mapping[str, Array]) -> npt.NDArray[np.bool_]:
    inside = np.asarray(basin(angles))
    shape = next(iter(angles.values())).shape if angles else ()
    if inside.dtype != np.bool_ or inside.shape != shape:
        got = f"{inside.dtype} of shape {inside.shape}"
        raise ValueError(f"basins: {name!r}: expected truth values of shape {shape}, got {got}")
    return inside


def _count_crossings(
    inside: npt.NDArray[np.bool_], replica: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return how often a replica crossed between two saved iterations at each rung [R].

    Replicas that arrive by an exchange crossed at another rung: they do not count.
    """
    stayed = replica[1:] == replica[:-1]
    return np.asarray((stayed & (inside[1:] != inside[:-1])).sum(axis=(0, 1)), dtype=np.int64)


def _expected_from_reference(
    reference: Reference | None, temperature: float, name: str, basin: Basin, names: list[str]
) -> _Expected:
    rung = None if reference is None else reference.rung(temperature)
    if reference is None or rung is None or not {"phi", "psi"} >= set(names):
        return _Expected()  # the reference has phi and psi only
    angles = {"phi": reference.phi[:, rung, None], "psi": reference.psi[:, rung, None]}
    estimate = estimate_mean(_evaluate(name, basin, angles))
    return _Expected(estimate.value, estimate.stderr, "reference")


def _population_warnings(where: str, estimate: MeanEstimate, expected: _Expected) -> list[str]:
    if expected.source is None:
        return []
    source = "the reference" if expected.source == "reference" else expected.source
    if estimate.value == 0:
        frames = expected.p * estimate.n_samples
        return [
            f"{where} was never visited; {frames:,.0f} of {estimate.n_samples:,} frames are "
            f"expected from {source}: the basin is lost"
        ]
    z = (estimate.value - expected.p) / np.hypot(estimate.stderr, expected.stderr)
    if estimate.value < LOW_RATIO * expected.p and z < -LOW_Z:
        return [
            f"{where} holds {estimate.value:.2g} of the frames; {expected.p:.2g} is expected from "
            f"{source} ({z:+.1f} standard errors): the basin is being lost"
        ]
    return []
