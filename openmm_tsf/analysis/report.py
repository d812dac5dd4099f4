"""The content of ``summary.json`` in words: the verdict and the tables."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openmm_tsf.analysis.agreement import BASIN, MEAN, POSITIVE, quantity_label
from openmm_tsf.analysis.statistics import SMALLEST_POPULATION
from openmm_tsf.analysis.verdict import CONVERGED

_MARK = "*"
_FOOTNOTE = f"  {_MARK} not converged, or hardly seen: 95 % intervals and bounds"
_UNITS = {
    "energy_kJ_mol": " (kJ/mol)",
    "heat_capacity_kJ_mol_K": " (kJ/mol/K)",
    "delta_F_phi_kT": " (kT)",
}
#: More columns than this would not fit on a line: rows then show what is not U, C_V or delta F.
_MOST_COLUMNS = 5
_MOST_REASONS = 15
_DIGITS = {"energy_kJ_mol": 2, "delta_F_phi_kT": 2}


def describe_verdict(summary: Mapping[str, Any]) -> str:
    """Return the reasons of a verdict, its prediction and what to do."""
    verdict = summary["verdict"]
    lines: list[str] = []
    for title, key in (
        ("wrong (reference, Boltzmann distribution)", "wrong"),
        ("not converged", "missing"),
        ("undecided", "undecided"),
        ("to be looked at", "warnings"),
    ):
        if verdict[key]:
            lines += [f"{title}:", *(f"  {line}" for line in shorten(verdict[key])), ""]
    if verdict["predicted"]:
        lines += [_prediction(verdict["predicted"])]
    if verdict["advice"]:
        lines += verdict["advice"]
    return "\n".join(lines)


def shorten(reasons: Sequence[str]) -> list[str]:
    """Return the first reasons, and how many more there are."""
    if len(reasons) <= _MOST_REASONS:
        return list(reasons)
    left = len(reasons) - _MOST_REASONS + 1
    return [*reasons[: _MOST_REASONS - 1], f"and {left} more, which summary.json has"]


def _prediction(predicted: Mapping[str, Any]) -> str:
    about = "at least" if predicted["at_least"] else "about"
    return (
        f"{about} {_count(predicted['n_iterations'])} iterations of production in all would be "
        f"enough: {_count(predicted['energy_evaluations'])} energy evaluations, "
        f"{_count(predicted['wall_seconds'])} seconds"
    )


def describe_thinning(summary: Mapping[str, Any]) -> str:
    """Say of what numbers and frames are, where frames were saved less often."""
    return (
        f"numbers (energies, torsions) of every {_nth(summary['numbers_interval'])} iteration; "
        f"frames of every {_nth(summary['save_interval'])}, "
        f"{summary['n_frames_per_rung']} at every temperature: observables of frames are of these"
    )


def _nth(n: int) -> str:
    suffix = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def describe(summary: Mapping[str, Any]) -> str:
    """Return the tables of a summary: estimates, acceptance, mixing, test of the ensemble, cost."""
    lines = [
        f"{summary['n_walkers']} walkers, {summary['n_iterations']} iterations, "
        f"{summary['n_samples_per_rung']} samples at every temperature"
    ]
    if "numbers_interval" in summary:
        lines.append(describe_thinning(summary))
    if summary["n_iterations"]:
        lines += [*_rungs(summary), *_others(summary), *_basins(summary)]
    lines += ["", "accepted moves"]
    for name, rates in summary["acceptance"].items():
        values = list(rates.values()) if isinstance(rates, dict) else _neighbours(rates)
        if values:
            lines.append(f"  {name:<18}" + "".join(f"{_number(rate, 3):>9}" for rate in values))
    lines.append(f"  round trips of the temperature ladder: {summary['round_trips']}")
    relaxation = summary["replica_relaxation"]["iterations"]
    if relaxation is not None:
        lines.append(f"  relaxation time of replicas: {relaxation:.1f} saved iterations")
    lines += _energy_ratios(summary)
    lines += ["", f"{'cost':<22}" + "".join(f"{k:>14}" for k in ("md", "training", "sampling"))]
    for label, key in (("energy evaluations", "energy_evaluations"), ("seconds", "wall_seconds")):
        costs = summary[key]
        row = "".join(f"{_count(costs[k]):>14}" for k in ("md", "training", "sampling"))
        lines.append(f"  {label:<20}{row}")
    for label, key in (
        ("of which compiling", "compilation"),
        ("expected at the start", "expected"),
    ):
        if (seconds := summary["wall_seconds"].get(key)) is not None:
            lines.append(f"  {label:<20}{_count(seconds):>14}")
    notes = [*summary["monitor"]["notes"], *_reweighted(summary)]
    if notes:
        lines += ["", "notes", *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def _reweighted(summary: Mapping[str, Any]) -> Iterator[str]:
    """Say at which temperatures the run was compared if these are not its own."""
    comparison = summary.get("comparison", {})
    if comparison.get("by_mbar"):
        kelvins = ", ".join(comparison["energy_kJ_mol"]["z"])
        yield (
            f"compared with the reference by MBAR at {kelvins} K: no temperature of the ladder is "
            "one of the reference"
        )


def _rungs(summary: Mapping[str, Any]) -> Iterator[str]:
    quantities = summary["quantities"]
    columns = _columns(summary)
    yield ""
    yield f"{'T (K)':>8}" + "".join(
        _cell(quantity_label(k) + _unit(k), "N_eff", k) for k in columns
    )
    for rung in (f"{kelvin:.2f}" for kelvin in summary["temperatures_K"]):
        cells = ((key, quantities[key][rung]) for key in columns)
        yield f"{rung:>8}" + "".join(
            _cell(_estimate(e, k), _number(e["n_eff"], 0), k) for k, e in cells
        )
    if any(_is_marked(entry) for key in columns for entry in quantities[key].values()):
        yield _FOOTNOTE


def _columns(summary: Mapping[str, Any]) -> list[str]:
    """Return the quantities of the first table: those of a line, and none observed."""
    observed = {f"{name}{POSITIVE}" for name in summary.get("observables", {})}
    keys = [
        key
        for key in summary["quantities"]
        if not key.startswith((BASIN, MEAN)) and key not in observed
    ]
    return keys if len(keys) <= _MOST_COLUMNS else [key for key in keys if key in _UNITS]


def _cell(text: str, n_eff: str, key: str) -> str:
    """A cell of the table with its effective samples, which those of delta F repeat."""
    return f"{text:>22}" + ("" if key == "delta_F_phi_kT" else f"{n_eff:>8}")


def _basins(summary: Mapping[str, Any]) -> Iterator[str]:
    basins = {k: k.removeprefix(BASIN) for k in summary["quantities"] if k.startswith(BASIN)}
    yield from _by_quantity(summary, "basins", "P at ", basins)


def _others(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was observed, and torsions that the first table leaves out."""
    columns, observed = _columns(summary), summary.get("observables", {})
    labels = {}
    for key in summary["quantities"]:
        if key not in columns and not key.startswith(BASIN):
            unit = observed.get(key.removeprefix(MEAN), {}).get("unit", "")
            labels[key] = quantity_label(key) + (f" ({unit})" if unit else "")
    yield from _by_quantity(summary, "", "", labels)


def _by_quantity(
    summary: Mapping[str, Any], title: str, what: str, labels: Mapping[str, str]
) -> Iterator[str]:
    """Yield a table with a row for each quantity, given with its label."""
    if not labels:
        return
    rungs = [f"{kelvin:.2f}" for kelvin in summary["temperatures_K"]]
    width = max(len(label) for label in labels.values()) + 2
    tables = {key: summary["quantities"][key] for key in labels}
    yield ""
    yield f"{title:<{width}}" + "".join(f"{f'{what}{rung} K':>24}" for rung in rungs)
    for key, entries in tables.items():
        values = "".join(f"{_estimate(entries[rung], key):>24}" for rung in rungs)
        yield f"{labels[key]:<{width}}{values}"
    if any(_is_marked(entry) for table in tables.values() for entry in table.values()):
        yield _FOOTNOTE


def describe_samples(record: Mapping[str, Any]) -> str:
    """Return the estimates of samples at one temperature beside those of the run, as a table."""
    kelvin, n = record["temperature_K"], record["n_frames"]
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in record["acceptance"].items())
    lines = [
        f"{n:,} frames at {kelvin:.2f} K, of {record['n_walkers']} walkers; accepted: {rates}",
        f"{'':<22}{'samples':>20}{'run, by MBAR':>20}{'z':>8}{'N_eff':>10}",
    ]
    named = [("<U> (kJ/mol)", 2, record["energy_kJ_mol"])]
    named += [(f"P({name} > 0)", 4, e) for name, e in record["dihedral_positive"].items()]
    named += [(f"<{name}>", 4, e) for name, e in record.get("observable_mean", {}).items()]
    for name, digits, entry in named:
        drawn = _with_error(entry["value"], entry["stderr"], digits)
        of_run = _with_error(entry["run_value"], entry["run_stderr"], digits)
        z = "unknown" if entry["z"] is None else f"{entry['z']:+.1f}"
        n_eff = "unknown" if entry["n_eff"] is None else f"{entry['n_eff']:.0f}"
        lines.append(f"{name:<22}{drawn:>20}{of_run:>20}{z:>8}{n_eff:>10}")
        lines += [f"  {name}: {reason}" for reason in entry["missing"]]
    return "\n".join(lines)


def _unit(key: str) -> str:
    return _UNITS.get(key, "")


def _is_marked(entry: Mapping[str, Any]) -> bool:
    return bool(entry["status"] != CONVERGED)


def _estimate(entry: Mapping[str, Any], key: str) -> str:
    """Return a value with its error; of a state that is hardly seen its bound or interval."""
    value, stderr, low, high = (entry[name] for name in ("value", "stderr", "low", "high"))
    digits = _DIGITS.get(key, 4)
    is_state = key != "delta_F_phi_kT" and entry.get("n_visits") is not None
    if is_state and value == 0:
        text = f"< {high:.2g}"
    elif is_state and value == 1:
        text = f"> {low:.{digits}f}"
    elif is_state and (stderr is None or _is_marked(entry)):
        text = f"{low:.2g} to {high:.2g}" if low > SMALLEST_POPULATION else f"< {high:.2g}"
    else:
        text = _with_error(value, stderr, digits)
    return text + (f" {_MARK}" if _is_marked(entry) else "  ")


def _energy_ratios(summary: Mapping[str, Any]) -> Iterator[str]:
    pairs = summary.get("ensemble_check", {}).get("energy_ratio_mol_kJ", {})
    if not pairs:
        return
    yield ""
    yield f"{'ln[P(U)/P(U)], slope':<22}{'(mol/kJ)':>18}{'expected':>12}{'z':>11}"
    for pair, check in pairs.items():
        slope = _with_error(check["value"], check["stderr"], 4)
        expected, z = _number(check["expected"], 4), check["z"]
        deviation = "undecided" if z is None else f"{z:+.1f}"
        yield f"  {f'{pair} K':<20}{slope:>18}{expected:>12}{deviation:>11}"


def _neighbours(rates: list[Any]) -> list[Any]:
    """Return the swap acceptance of neighbouring rungs from a list of them or a matrix."""
    if rates and isinstance(rates[0], list):
        return [rates[k][k + 1] for k in range(len(rates) - 1)]
    return rates


def _number(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def _count(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _with_error(value: float | None, stderr: float | None, digits: int) -> str:
    return f"{_number(value, digits)} ± {_number(stderr, digits)}"


def describe_retarget(content: Mapping[str, Any]) -> str:
    """Return the table of ``retarget.json``: free-energy differences, and those of ⟨U⟩."""
    rows = ["      T (K)   F - F(run) in kT    overlap   <U> - <U>(run) in kJ/mol"]
    for kelvin, entry in content["by_temperature"].items():
        difference, energy = entry["delta_F_kT"], entry["energy_kJ_mol"]
        change = energy["here"]["value"] - energy["run"]["value"]
        here, there = (energy[side]["stderr"] or math.nan for side in ("here", "run"))
        value, stderr = (
            math.nan if difference[name] is None else difference[name]
            for name in ("value", "stderr")
        )
        rows.append(
            f"{kelvin:>11}   {value:9.3f} +- {stderr:5.3f}   {difference['overlap']:8.3f}"
            f"   {change:9.2f} +- {math.hypot(here, there):4.2f}"
        )
    return "\n".join(rows)
