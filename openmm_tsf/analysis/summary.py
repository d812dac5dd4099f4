"""``summary.json``: the figures of a run as plain numbers."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from openmm_tsf.analysis.ensemble_checks import Check
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.monitor import monitor
from openmm_tsf.analysis.reference import (
    Agreement,
    Comparison,
    Reference,
    compare,
    recorded_reference,
)
from openmm_tsf.analysis.uncertainty import MeanEstimate
from openmm_tsf.io.files import write_json


def summarize(
    run: RunEstimates,
    reference: Reference | None = None,
    costs: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Everything in ``summary.json``; numbers that are not known are None.

    ``energy_evaluations`` and ``wall_seconds`` of MD and training are taken from dictionaries of
    these names in ``config.json``; what stands there under ``sampling`` (tuning, earlier rounds) is
    added to production's. ``phi_positive`` and ``delta_F_phi_kT`` are there where the run recorded
    a φ; ``dihedral_positive`` has every named dihedral. ``seed`` is the one that the user chose
    (``choices.seed``) where the sampler's own was derived from it. ``monitor``: see
    `openmm_tsf.analysis.monitor`, with its warnings in words. ``comparison`` is there where a
    reference is, and the run recorded the dihedrals ``phi`` and ``psi`` that it has; a note of the
    monitor says so where it did not.
    """
    segments = run.segments
    before = run.config if costs is None else costs
    evaluations = _costs(before, "energy_evaluations", segments.n_evaluations)
    seconds = _costs(before, "wall_seconds", segments.wall_seconds)
    result: dict[str, Any] = {
        "temperatures_K": run.temperatures.tolist(),
        "seed": run.config.get("choices", {}).get("seed", run.config["seed"]),
        "n_walkers": run.n_walkers,
        "n_iterations": run.n_iterations,
        "n_samples_per_rung": run.n_iterations * run.n_walkers,
    }
    if run.n_iterations:
        result |= _estimates(run)
    trips = int(run.round_trips().sum())
    result |= {
        # Steered swaps are listed even where the run has none.
        "acceptance": {"swap_steered": []}
        | {name: _rates(run, table) for name, table in run.acceptance().items()},
        "round_trips": trips,
        "mixing_matrix": run.mixing_matrix().tolist(),
        "replica_relaxation": dataclasses.asdict(run.relaxation()),
        "energy_evaluations": evaluations,
        "wall_seconds": seconds,
        "production": {
            "energy_evaluations": segments.n_evaluations,
            "wall_seconds": segments.wall_seconds,
        },
        "rejected_non_finite": segments.rejected_non_finite,
        "mirror_images": segments.mirror_images,
        "versions": run.config.get("versions", {}),
    }
    if run.n_iterations:
        result["ensemble_check"] = _ensemble_check(run)
        result["efficiency"] = _efficiency(run, trips)
    result["monitor"] = monitor(run, reference)
    if run.n_iterations and reference is not None:
        if {"phi", "psi"} <= run.dihedral_atoms.keys():
            result["comparison"] = _comparison(compare(run, reference))
        else:
            # Which of several φ the reference is of, nobody knows.
            result["monitor"]["notes"].append(
                "not compared with the reference, which is of the dihedrals phi and psi: this run "
                f"recorded {', '.join(run.dihedral_atoms) or 'none'}"
            )
    numbers: dict[str, Any] = plain(result)
    return numbers


def write_summary(
    run: RunEstimates,
    path: str | Path,
    reference: Reference | None = None,
    costs: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Write a run's summary as JSON (numbers that are not known are null) and return it.

    Parameters
    ----------
    run, path
        What to write where.
    reference
        To compare with; the one that the configuration names when left out.
    costs
        What was spent before production, as ``energy_evaluations`` and ``wall_seconds`` in
        ``config.json`` (see `summarize`), which these replace.
    """
    summary = summarize(run, reference or recorded_reference(run), costs)
    write_json(path, summary)
    return summary


def _estimates(run: RunEstimates) -> dict[str, Any]:
    def per_rung(function: Callable[[float], dict[str, Any]]) -> dict[str, Any]:
        return {f"{t:.2f}": function(float(t)) for t in run.temperatures}

    def probability(name: str) -> dict[str, Any]:
        return per_rung(
            lambda t: {
                "p": run.positive(name, t).value,
                "stderr": run.positive(name, t).stderr,
                "n_eff": run.positive(name, t).n_eff,
                "g": run.positive(name, t).g,
                "r_hat": run.r_hat(name, t),
            }
        )

    result: dict[str, Any] = {
        "dihedral_positive": {name: probability(name) for name in run.dihedral_atoms},
        "energy_kJ_mol": per_rung(
            lambda t: {
                "mean": run.mean_energy(t).value,
                "stderr": run.mean_energy(t).stderr,
                "n_eff": run.mean_energy(t).n_independent,
                "r_hat": run.r_hat("energy", t),
            }
        ),
        "heat_capacity_kJ_mol_K": per_rung(
            lambda t: {
                "value": run.heat_capacity(t).value,
                "stderr": run.heat_capacity(t).stderr,
                "n_eff": run.heat_capacity(t).n_independent,
            }
        ),
    }
    if "phi" in run.dihedral_atoms:
        result["phi_positive"] = result["dihedral_positive"]["phi"]
        result["delta_F_phi_kT"] = per_rung(lambda t: _delta_f_phi(run, t))
    return result


def _delta_f_phi(run: RunEstimates, temperature: float) -> dict[str, float]:
    """From the rung's own samples, and by MBAR from those of all rungs."""
    value, stderr = run.positive("phi", temperature).free_energy
    mbar_value, mbar_stderr = run.free_energy_positive("phi", temperature)
    return {
        "value": value,
        "stderr": stderr,
        "mbar_value": mbar_value,
        "mbar_stderr": mbar_stderr,
    }


def _ensemble_check(run: RunEstimates) -> dict[str, Any]:
    """Per pair of neighbouring rungs, what energies alone say about their temperatures.

    ``energy_ratio_mol_kJ``: slope of ln[P(U)/P(U)] beside the difference of 1/kT;
    ``heat_capacity_kJ_mol_K``: Δ⟨U⟩/ΔT beside C_V from fluctuations. ``z`` is not known with fewer
    than 100 effective samples of ⟨U⟩ at either rung (``n_eff``).
    """
    pairs = [f"{a:.2f}-{b:.2f}" for a, b in pairwise(run.temperatures)]

    def table(checks: list[Check]) -> dict[str, dict[str, float]]:
        return {
            pair: dataclasses.asdict(check) | {"z": check.z}
            for pair, check in zip(pairs, checks, strict=True)
        }

    return {
        "energy_ratio_mol_kJ": table(run.energy_ratios()),
        "heat_capacity_kJ_mol_K": table(run.heat_capacity_differences()),
    }


def _rates(run: RunEstimates, table: np.ndarray) -> Any:
    if table.shape == (run.n_rungs,):
        return {f"{t:.2f}": rate for t, rate in zip(run.temperatures, table, strict=True)}
    return table.tolist()  # swaps: per pair of neighbours, or per any pair


def _costs(costs: Mapping[str, Any], key: str, sampling: float) -> dict[str, Any]:
    before = costs.get(key, {})
    found = {
        "md": before.get("md"),
        "training": before.get("training"),
        "sampling": before.get("sampling", 0) + sampling,
    }
    if "compilation" in before:  # a part of the others
        found["compilation"] = before["compilation"]
    return found


def _efficiency(run: RunEstimates, trips: int) -> dict[str, Any]:
    """Of production only: N_eff of 1[φ > 0] at the lowest rung and round trips."""
    millions, seconds = run.segments.n_evaluations / 1e6, run.segments.wall_seconds
    result: dict[str, Any] = {
        "round_trips_per_million_evaluations": trips / millions if millions else None
    }
    if "phi" in run.dihedral_atoms:
        count = run.positive("phi", run.temperatures[0]).n_eff
        result["n_eff_phi_per_million_evaluations"] = count / millions if millions else None
        result["n_eff_phi_per_second"] = count / seconds if seconds else None
    return result


def _comparison(comparison: Comparison) -> dict[str, Any]:
    keys = [f"{t:.2f}" for t in comparison.temperatures]

    def estimate(value: MeanEstimate) -> dict[str, float]:
        return {"value": value.value, "stderr": value.stderr}

    def agreement(value: Agreement) -> dict[str, Any]:
        return {
            "z": dict(zip(keys, value.z, strict=True)),
            "reference": dict(zip(keys, map(estimate, value.reference), strict=True)),
            "chi2": value.chi2,
            "p_value": value.p_value,
        }

    return {
        "not_compared_K": list(comparison.not_compared),
        "phi_positive": agreement(comparison.phi_positive),
        "energy_kJ_mol": agreement(comparison.energy),
        "ramachandran": {
            key: {
                "total_variation": d.total_variation,
                "floor_total_variation": d.floor_total_variation,
                "expected_total_variation": d.expected_total_variation,
                "kl": d.kl,
                "floor_kl": d.floor_kl,
                "n_decorrelated": d.n_decorrelated,
                "n_decorrelated_reference": d.n_decorrelated_reference,
                "n_slowest": d.n_slowest,
            }
            for key, d in zip(keys, comparison.ramachandran, strict=True)
        },
    }


def plain(value: Any) -> Any:
    """Numpy scalars to Python's, NaN and infinities to None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
