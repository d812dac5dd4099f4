"""The caption and the tables of figure 3: samples, settings and costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figure3_panels import FLOW, REFERENCE, SAMPLER, FlowDraws, energy_edges, series_of

from openmm_tsf.analysis.load import Run
from openmm_tsf.analysis.ramachandran import ramachandran_distance
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean
from openmm_tsf.io import files

Row = dict[str, Any]


def caption(run: Run, draws: Mapping[float, FlowDraws], reference: Reference | None = None) -> str:
    """What each panel shows, from how many samples, and how they were obtained."""
    samples = series_of(run, draws, reference)
    cold, hot = sorted(samples)
    choices = run.config.get("choices", {})
    trained = choices.get("flow", {}).get("reference_temperature_K")
    settings = choices.get("settings", {})
    training = [] if trained is None else [f"reference temperature {trained:.0f} K"]
    if settings.get("n_rounds"):
        rounds = "1 round" if settings["n_rounds"] == 1 else f"{settings['n_rounds']} rounds"
        training.append(f"{rounds} of retraining on samples of all rungs")
    flow = (
        f"{FLOW}, {draws[hot].n_drawn:,} and {draws[cold].n_drawn:,} independent draws at "
        f"{hot:.0f} and {cold:.0f} K from one network"
        + (f" ({', '.join(training)})" if training else "")
        + f", not reweighted; {_percent(_outside(draws[hot]))} and "
        f"{_percent(_outside(draws[cold]))} of them outside its coordinates' domain are left out"
    )
    rungs = ", ".join(f"{t:.0f}" for t in run.temperatures)
    moves = _moves(choices.get("kernels", []))
    n = run.n_used * run.n_walkers
    sampler = (
        f"{SAMPLER}, {run.n_walkers} walkers on rungs of {rungs} K{moves}, all "
        f"{run.n_used:,} saved iterations: {n:,} correlated frames per "
        "temperature"
    )
    highest = energy_edges(samples)[-1]
    above = {k: _percent(float((s[FLOW].energy > highest).mean())) for k, s in samples.items()}
    parts = ["Figure 3 of Dibak, Klein and Noé (arXiv:2012.00429), remade.", f"A, E: {flow}."]
    if reference is None:
        parts.append(f"B, F: {sampler}.")
    else:
        frames, ladder = len(reference.phi), reference.temperatures
        parts.append(
            f"B, F: {REFERENCE}, one molecular-dynamics replica exchange without any flow on "
            f"{len(ladder)} rungs of {ladder[0]:.0f} to {ladder[-1]:.0f} K, {frames:,} frames "
            f"{reference.interval_ps:g} ps apart at each. White: no sample in the bin."
        )
        parts.append(f"Blue in C, G, H: {sampler}.")
    parts.append(
        "C, G: φ in bins of 5°, logarithmic. H: potential energy; "
        f"{above[hot]} and {above[cold]} of the flow's draws lie above its range. Bands: one "
        f"standard error, from {_groups(run)}; of draws and reference, from 24 consecutive blocks."
    )
    parts.append("D: the molecule.")
    for kelvin in (hot, cold):
        populations = "; ".join(
            f"{source} {_plus_minus(_positive(series.phi))}"
            for source, series in samples[kelvin].items()
        )
        parts.append(f"P(φ > 0) at {kelvin:.0f} K: {populations}.")
    return " ".join(parts)


def temperature_table(
    run: Run, draws: Mapping[float, FlowDraws], reference: Reference | None = None
) -> list[Row]:
    """A row per temperature and source: sample size, P(φ > 0), ⟨U⟩, ESS, distance."""
    rows = []
    for kelvin, sources in series_of(run, draws, reference).items():
        for source, series in sources.items():
            p, energy = _positive(series.phi), estimate_mean(series.energy)
            row: Row = {
                "temperature_K": kelvin,
                "source": source,
                "n_samples": series.phi.size,
                "p_phi_positive": p.value,
                "p_phi_positive_stderr": p.stderr,
                "n_eff_phi_positive": p.n_eff,
                "mean_energy_kJ_mol": energy.value,
                "mean_energy_stderr": energy.stderr,
                "median_energy_kJ_mol": float(np.median(series.energy)),
            }
            # Where they are not known, their cells are empty.
            row |= dict.fromkeys(("ramachandran_tv", "ramachandran_tv_floor", "reverse_ess"))
            row |= dict.fromkeys(("reverse_ess_spread", "largest_weight", "outside_domain"))
            if reference is not None and source != REFERENCE:
                truth = sources[REFERENCE]
                distance = ramachandran_distance(series.phi, series.psi, truth.phi, truth.psi)
                row["ramachandran_tv"] = distance.total_variation
                row["ramachandran_tv_floor"] = distance.floor_total_variation
            if source == FLOW:
                flow_draws = draws[kelvin]
                row["reverse_ess"] = flow_draws.ess
                row["reverse_ess_spread"] = flow_draws.ess_spread
                row["largest_weight"] = flow_draws.largest_weight
                row["outside_domain"] = _outside(flow_draws)
            rows.append(row)
    return rows


def ladder_table(run: Run) -> list[Row]:
    """A row per rung: step size, acceptance of every move, exchange with the next rung."""
    acceptance = run.acceptance()
    sigma = run.config.get("choices", {}).get("sigma", {})
    rows = []
    for rung, kelvin in enumerate(run.temperatures):
        row: Row = {"temperature_K": float(kelvin)}
        for name, sizes in sigma.items():
            row[f"sigma {name}"] = float(np.atleast_1d(sizes)[rung])
        for name, rates in acceptance.items():
            if rates.shape == (run.n_rungs,):
                row[f"accepted {name}"] = float(rates[rung])
            elif rung + 1 < run.n_rungs:
                pair = rates[rung, rung + 1] if rates.ndim == 2 else rates[rung]
                row[f"accepted {name} with the next rung"] = float(pair)
        rows.append(row)
    return rows


def run_table(run: Run) -> list[Row]:
    """Quantities of the whole run, and what it cost."""
    segments, config = run.segments, run.config
    rows: list[tuple[str, Any]] = [
        ("walkers", run.n_walkers),
        ("rungs", run.n_rungs),
        ("saved iterations", run.n_iterations),
        ("frames per rung", run.n_used * run.n_walkers),
        ("round trips of the ladder", int(run.round_trips().sum())),
        ("proposals rejected as non-finite or outside", segments.rejected_non_finite),
        ("mirror images proposed", segments.mirror_images),
        ("energy evaluations, production", segments.n_evaluations),
        ("seconds, production", round(segments.wall_seconds, 1)),
    ]
    for key, unit in (("energy_evaluations", "energy evaluations"), ("wall_seconds", "seconds")):
        for stage, cost in config.get(key, {}).items():
            name = "tuning and earlier rounds" if stage == "sampling" else stage
            rows.append((f"{unit}, {name}", cost))
    return [{"quantity": name, "value": value} for name, value in rows]


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows under the union of their keys, in the order of appearance."""
    files.write_csv(path, _columns(rows), rows)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a markdown table; unknown numbers are left empty."""
    columns = _columns(rows)
    lines = ["| " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("|" + " --- |" * len(columns))
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _positive(phi: np.ndarray) -> MeanEstimate:
    return estimate_mean(phi > 0)


def _outside(draws: FlowDraws) -> float:
    return 1.0 - len(draws.phi) / draws.n_drawn


def _percent(fraction: float) -> str:
    return "none" if fraction == 0 else f"{100 * fraction:.2g} %"


def _moves(kernels: Sequence[Mapping[str, Any]]) -> str:
    words = []
    for kernel in kernels:
        steps = kernel.get("repeats", 1) * (kernel.get("n_steps", 1) if "flow" in kernel["name"]
                                            else 1)  # fmt: skip
        often = "" if kernel.get("interval", 1) == 1 else f" every {kernel['interval']} iterations"
        words.append(f"{steps} {kernel['name']}{often}")
    return f" (per iteration {', '.join(words)})" if words else ""


def _groups(run: Run) -> str:
    if run.n_walkers >= 24:
        return f"the spread between the sampler's {run.n_walkers} walkers"
    return f"blocks of the sampler's {run.n_walkers} walkers"


def _plus_minus(estimate: MeanEstimate) -> str:
    if not np.isfinite(estimate.stderr):
        return f"{estimate.value:.3g}"
    digits = max(0, 1 - int(np.floor(np.log10(estimate.stderr))))
    return f"{estimate.value:.{digits}f} ± {estimate.stderr:.{digits}f}"
