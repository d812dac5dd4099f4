"""``summary.json``: the results of a run as plain numbers; those that are not known are null.

Keys, with "per rung" for a dictionary by temperature in K (``"300.00"``) and "per pair" for one by
neighbouring rungs (``"300.00-424.26"``):

``temperatures_K``, ``seed``, ``n_walkers``, ``n_iterations``, ``n_samples_per_rung``
    The run; ``seed`` is the one that the user chose (``choices.seed`` in ``config.json``).
    ``n_iterations`` are all that were saved; the samples are those from the start on.
``burn_in``
    The start of equilibrated sampling; see `openmm_tsf.analysis.burn_in`. ``start``: the number of
    saved iterations that every estimate leaves out; ``n_used``: the others; ``is_equilibrated``:
    false if the second half of the run still drifts; ``chosen``: ``"found"`` or ``"given"``;
    ``drift``: the largest difference between start and second half, with its ``series``.
``dihedral_positive``
    P(dihedral > 0) of every recorded φ and ψ, per rung: ``p``, ``stderr``, ``n_eff``, ``g`` and
    ``r_hat``. ``phi_positive`` is that of ``phi``.
``energy_kJ_mol``, ``heat_capacity_kJ_mol_K``
    ⟨U⟩ and the configurational C_V, per rung.
``delta_F_phi_kT``
    -ln[P(φ > 0)/P(φ < 0)] per rung, from its samples and (``mbar_``) from those of all rungs.
``quantities``
    ⟨U⟩ (``energy_kJ_mol``), C_V (``heat_capacity_kJ_mol_K``), P(dihedral > 0) (``phi_positive``),
    ΔF_φ (``delta_F_phi_kT``) and the population of each basin (``basin phi > 0, psi beta``), with
    those of what is observed: of a dihedral P(chi > 0) (``chi_positive``) and the population of
    each of its wells (``basin chi g+``), of others the mean (``mean d``). Per rung: the fields of
    `openmm_tsf.analysis.convergence.Assessment`, ``converged``, ``expected_p`` where one is known,
    and ``status``: ``"converged"``, ``"not yet"``, ``"wrong"``, or ``"bounded"`` for a state that
    is never or hardly seen and need not be.
``observables``
    By name, where there are any: ``definition``, ``kind`` and ``unit`` (rad, nm, or none).
``verdict``
    See `openmm_tsf.analysis.verdict`. ``status``, ``sentence``; in words ``wrong``, ``missing``,
    ``undecided``, ``warnings``, ``advice``; ``agrees_with``; ``predicted``: ``n_iterations``,
    ``energy_evaluations`` and ``wall_seconds`` of a production that would be long enough, in all,
    a lower bound if ``at_least``.
``save_interval``
    The iterations of the sampler for each saved one. If frames were saved less often than numbers,
    those for each saved frame; ``numbers_interval`` is then that of ``n_iterations`` and all
    samples, and ``n_iterations_with_frames`` and (from the start on) ``n_frames_per_rung`` count
    what observables of frames are averaged over.
``shards``
    Of a run in shards: how many, those ``used``, why others are ``left_out``, the iterations of
    each. Times are sums over shards.
``acceptance``
    Accepted over proposed moves of each kernel, per rung; of swaps a list over neighbours, or a
    matrix over pairs of rungs.
``round_trips``, ``mixing_matrix``, ``replica_relaxation``
    Exchange of replicas; see `openmm_tsf.analysis.mixing`.
``energy_evaluations``, ``wall_seconds``
    Cost of MD, training and sampling; ``sampling`` includes tuning and earlier rounds, which
    ``production`` does not. ``expected`` seconds of training and sampling were measured before.
``rejected_non_finite``, ``mirror_images``
    Proposals that were rejected for these reasons.
``versions``
    Of the packages.
``ensemble_check``
    Tests of neighbouring rungs, per pair, of their energies and (``basin_ratio``) of each basin:
    ``value``, ``stderr``, ``expected``, ``n_eff``, ``undecided``, ``z``; see
    `openmm_tsf.analysis.ensemble_checks`.
``efficiency``
    Of production: round trips, and effective samples of 1[φ > 0] at the lowest rung (without
    ``phi``: of the slowest torsion or basin, or of U), per million evaluations and per second.
``basins``
    The population of each basin of the slow torsions, per rung: ``p``, the fields of
    `openmm_tsf.analysis.convergence.Assessment`, and ``expected_p`` with its error and source; see
    `openmm_tsf.analysis.basin_checks`.
``monitor``
    See `openmm_tsf.analysis.monitor`.
``comparison``
    z and χ² against the reference of ``phi_positive``, ``energy_kJ_mol``,
    ``heat_capacity_kJ_mol_K`` and each of ``basins``, and the Ramachandran distance; where there is
    a reference, a common temperature, and the run recorded ``phi`` and ``psi``. ``by_mbar``: the
    run has no rung of the reference, its means were reweighted to those within its ladder. Below
    100 effective samples of the run only z from 5 on is given.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from openmm_tsf.analysis.agreement import BASIN, MEAN, quantity_label
from openmm_tsf.analysis.basin_checks import Basin, BasinCheck
from openmm_tsf.analysis.comparison import (
    MeanComparison,
    ReferenceComparison,
    comparable_temperatures,
    compare_with_reference,
)
from openmm_tsf.analysis.convergence import assess_mean, assess_probability, assess_variance
from openmm_tsf.analysis.ensemble_checks import EnsembleCheck, basin_ratio
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.monitor import monitor
from openmm_tsf.analysis.observed import assess_observable, find_observed_wells, observed_states
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.uncertainty import MeanEstimate
from openmm_tsf.analysis.verdict import judge
from openmm_tsf.io.files import write_json
from openmm_tsf.utils.topology import is_backbone


def summarize(run: RunEstimates, reference: Reference | None = None) -> dict[str, Any]:
    """Return the content of ``summary.json``; numbers that are not known are None."""
    segments, choices = run.segments, run.config.get("choices", {})
    result: dict[str, Any] = {
        "temperatures_K": run.temperatures.tolist(),
        "seed": choices.get("seed", run.config["seed"]),
        "n_walkers": run.n_walkers,
        "n_iterations": run.n_iterations,
        "n_samples_per_rung": run.n_used * run.n_walkers,
        "save_interval": choices.get("save_interval", 1),
    }
    if run.shards is not None:
        result["shards"] = run.shards.to_dict()
    if run.n_framed < run.n_used:
        result["numbers_interval"] = choices.get("numbers_interval", 1)
        result["n_iterations_with_frames"] = len(segments.frame_iteration)
        result["n_frames_per_rung"] = run.n_framed * run.n_walkers
    if run.n_iterations:
        result["burn_in"] = _burn_in(run)
        result |= _estimates(run)
    trips = int(run.round_trips().sum())
    result |= {
        # Steered swaps are listed even if the run has none.
        "acceptance": {"swap_steered": []}
        | {name: _rates(run, table) for name, table in run.acceptance().items()},
        "round_trips": trips,
        "mixing_matrix": run.mixing_matrix().tolist(),
        "replica_relaxation": dataclasses.asdict(run.relaxation()),
        "energy_evaluations": recorded_costs(run, "energy_evaluations", segments.n_evaluations),
        "wall_seconds": recorded_costs(run, "wall_seconds", segments.wall_seconds),
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
    result["basins"] = result["monitor"]["basins"]
    if run.n_iterations:
        result["quantities"] = _quantities(run, reference, result["basins"])
        if run.observables:
            result["observables"] = {
                name: {"definition": each.definition, "kind": each.kind, "unit": each.unit}
                for name, each in run.observables.items()
            }
        result["monitor"]["notes"] += [
            f"the observable {name} is left out: {reason}"
            for name, reason in run.missing_observables.items()
        ]
    if run.n_iterations and reference is not None:
        reason = _why_not_compared(run, reference)
        if reason is None:
            result["comparison"] = _comparison(compare_with_reference(run, reference))
        else:
            result["monitor"]["notes"].append(f"not compared with the reference, which {reason}")
    numbers: dict[str, Any] = json_ready(result)
    verdict = judge(numbers)
    for key, statuses in verdict.quantities.items():
        for rung, status in statuses.items():
            numbers["quantities"][key][rung]["status"] = status
    return numbers | {"verdict": verdict.to_dict()}


def write_summary(
    run: RunEstimates, path: str | Path, reference: Reference | None = None
) -> dict[str, Any]:
    """Write the summary of a run, finished or growing, as JSON and return it.

    It is compared with `reference`, by default with the one that the configuration names.
    """
    summary = summarize(run, reference or run.reference())
    write_json(path, summary)
    return summary


def _burn_in(run: RunEstimates) -> dict[str, Any]:
    found = run.burn_in
    drift = None
    if found.drift is not None:
        drift = dataclasses.asdict(found.drift) | {"series": run.drifting_series}
    return {
        "start": run.start,
        "n_used": run.n_used,
        "is_equilibrated": found.is_equilibrated,
        "chosen": "given" if run.start_was_given else "found",
        "drift": drift,
    }


def _estimates(run: RunEstimates) -> dict[str, Any]:
    def per_rung(function: Callable[[float], dict[str, Any]]) -> dict[str, Any]:
        return {f"{t:.2f}": function(float(t)) for t in run.temperatures}

    def probability(name: str) -> dict[str, Any]:
        def at(t: float) -> dict[str, float]:
            p = run.positive(name, t)
            table = {"p": p.value, "stderr": p.stderr, "n_eff": p.n_eff, "g": p.g}
            return table | {"r_hat": run.r_hat(name, t)}

        return per_rung(at)

    def mean(label: str, estimate: MeanEstimate) -> dict[str, Any]:
        return {label: estimate.value, "stderr": estimate.stderr, "n_eff": estimate.n_independent}

    result: dict[str, Any] = {
        "dihedral_positive": {
            name: probability(name) for name in run.dihedral_atoms if is_backbone(name)
        },
        "energy_kJ_mol": per_rung(
            lambda t: mean("mean", run.mean_energy(t)) | {"r_hat": run.r_hat("energy", t)}
        ),
        "heat_capacity_kJ_mol_K": per_rung(lambda t: mean("value", run.heat_capacity(t))),
    }
    if "phi" in run.dihedral_atoms:
        result["phi_positive"] = result["dihedral_positive"]["phi"]
        result["delta_F_phi_kT"] = per_rung(lambda t: _delta_f_phi(run, t))
    return result


def _quantities(
    run: RunEstimates, reference: Reference | None, basins: dict[str, Any]
) -> dict[str, Any]:
    """Assess every quantity that the verdict is about, at every rung; basins as they were."""
    result: dict[str, dict[str, Any]] = {"energy_kJ_mol": {}, "heat_capacity_kJ_mol_K": {}}
    for kelvin in map(float, run.temperatures):
        energies, scale = run.energies(kelvin), 1.0 / (run.boltzmann_constant * kelvin**2)
        result["energy_kJ_mol"][f"{kelvin:.2f}"] = assess_mean(energies).to_dict()
        capacity = assess_variance(energies, scale)
        result["heat_capacity_kJ_mol_K"][f"{kelvin:.2f}"] = capacity.to_dict()
    checks = BasinCheck(run, reference)
    for name in filter(is_backbone, run.dihedral_atoms):
        result[f"{name}_positive"], _ = checks.check(f"{name} > 0", _is_positive(name))
    if "phi" in run.dihedral_atoms:
        result["delta_F_phi_kT"] = {
            f"{t:.2f}": assess_probability(run.dihedral("phi", t) > 0).free_energy().to_dict()
            for t in map(float, run.temperatures)
        }
    result |= {f"{BASIN}{name}": dict(table) for name, table in basins.items()}
    for key, table in _observed(run, checks):
        result.setdefault(key, table)
    return result


def _observed(run: RunEstimates, checks: BasinCheck) -> Iterator[tuple[str, dict[str, Any]]]:
    """Assess the observables, at every rung, by the keys of ``quantities``."""
    for name, observable in run.observables.items():
        values = run.observable(name)
        wells = find_observed_wells(observable, [values])
        states = observed_states(observable, values, wells)
        for key, inside in states.items():
            yield key, checks.check(quantity_label(key), inside)[0]
        if not states:
            assessed = {
                f"{t:.2f}": assess_observable(observable, values[:, :, k], None, run.n_pieces)
                for k, t in enumerate(map(float, run.temperatures))
            }
            key, n = f"{MEAN}{name}", len(values)
            found = {rung: run.in_saved_iterations(e[key], n) for rung, e in assessed.items()}
            yield key, {rung: each.to_dict() for rung, each in found.items()}


def _is_positive(name: str) -> Basin:
    return lambda angles: np.asarray(angles[name]) > 0


def _delta_f_phi(run: RunEstimates, temperature: float) -> dict[str, float]:
    value, stderr = run.positive("phi", temperature).free_energy
    mbar_value, mbar_stderr = run.free_energy_positive("phi", temperature)
    return {"value": value, "stderr": stderr, "mbar_value": mbar_value, "mbar_stderr": mbar_stderr}


def _ensemble_check(run: RunEstimates) -> dict[str, Any]:
    pairs = [f"{a:.2f}-{b:.2f}" for a, b in pairwise(run.temperatures)]

    def table(checks: Sequence[EnsembleCheck | None]) -> dict[str, dict[str, Any]]:
        return {
            pair: dataclasses.asdict(check) | {"z": check.z}
            for pair, check in zip(pairs, checks, strict=True)
            if check is not None
        }

    return {
        "energy_ratio_mol_kJ": table(run.energy_ratios()),
        "heat_capacity_kJ_mol_K": table(run.heat_capacity_differences()),
        "basin_ratio": {name: table(_basin_ratios(run, name)) for name in run.basins.names},
    }


def _basin_ratios(run: RunEstimates, name: str) -> list[EnsembleCheck | None]:
    """Test the populations of a basin at neighbouring rungs, where it was visited and left."""
    inside = run.in_basin(name)
    checks: list[EnsembleCheck | None] = []
    for k, (a, b) in enumerate(pairwise(map(float, run.temperatures))):
        low, high = inside[..., k], inside[..., k + 1]
        known = (low.any() or high.any()) and not (low.all() and high.all())
        energies, betas = (run.energies(a), run.energies(b)), (run.beta(a), run.beta(b))
        checks.append(basin_ratio(*energies, low, high, betas, run.n_pieces) if known else None)
    return checks


def _rates(run: RunEstimates, table: np.ndarray) -> Any:
    if table.shape == (run.n_rungs,):
        return {f"{t:.2f}": rate for t, rate in zip(run.temperatures, table, strict=True)}
    return table.tolist()  # swaps: per pair of neighbours, or per any pair


def recorded_costs(run: RunEstimates, key: str, production: float) -> dict[str, Any]:
    """Return what ``config.json`` says of the costs, with those of production added."""
    recorded: Mapping[str, Any] = run.config.get(key, {})
    costs = {
        "md": recorded.get("md"),
        "training": recorded.get("training"),
        "sampling": recorded.get("sampling", 0) + production,
    }
    # Compilation is included in the others; expected is what was measured at the start.
    return costs | {key: recorded[key] for key in ("compilation", "expected") if key in recorded}


def _efficiency(run: RunEstimates, trips: int) -> dict[str, Any]:
    millions, seconds = run.segments.n_evaluations / 1e6, run.segments.wall_seconds
    result: dict[str, Any] = {
        "round_trips_per_million_evaluations": trips / millions if millions else None
    }
    name, count = "slowest", run.n_pieces
    if "phi" in run.dihedral_atoms:
        name, count = "phi", run.positive("phi", run.temperatures[0]).n_eff
    result[f"n_eff_{name}_per_million_evaluations"] = count / millions if millions else None
    result[f"n_eff_{name}_per_second"] = count / seconds if seconds else None
    return result


def _why_not_compared(run: RunEstimates, reference: Reference) -> str | None:
    """Return what the reference is and the run is not, in words; None where they compare."""
    if not {"phi", "psi"} <= run.dihedral_atoms.keys():
        # The reference does not say to which of several φ its φ corresponds.
        recorded = ", ".join(run.dihedral_atoms) or "none"
        return f"is of the dihedrals phi and psi: this run recorded {recorded}"
    if not comparable_temperatures(run, reference):
        known, ladder = (
            ", ".join(f"{t:.2f}" for t in each)
            for each in (reference.temperatures, run.temperatures)
        )
        return f"is of {known} K: the ladder {ladder} K has none of them, nor one between its rungs"
    return None


def _comparison(comparison: ReferenceComparison) -> dict[str, Any]:
    keys = [f"{t:.2f}" for t in comparison.temperatures]

    def means(compared: MeanComparison) -> dict[str, Any]:
        return {
            "z": dict(zip(keys, compared.z, strict=True)),
            "reference": {
                key: {"value": estimate.value, "stderr": estimate.stderr}
                for key, estimate in zip(keys, compared.reference, strict=True)
            },
            "chi2": compared.chi2,
            "p_value": compared.p_value,
        }

    return {
        "by_mbar": comparison.by_mbar,
        "not_compared_K": list(comparison.not_compared),
        "phi_positive": means(comparison.phi_positive),
        "energy_kJ_mol": means(comparison.energy),
        "heat_capacity_kJ_mol_K": means(comparison.heat_capacity),
        "basins": {name: means(compared) for name, compared in comparison.basins.items()},
        "ramachandran": {
            key: dataclasses.asdict(distance)  # none by MBAR
            for key, distance in zip(keys, comparison.ramachandran, strict=not comparison.by_mbar)
        },
    }


def json_ready(value: Any) -> Any:
    """Return a value with numpy scalars as Python's, tuples as lists, NaN and infinity as None."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
