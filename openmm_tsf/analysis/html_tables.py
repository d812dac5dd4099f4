"""Tables of ``report.html``: estimates, basins, checks, moves and costs of a summary, as HTML.

What a summary lacks is left out; a function returns "" if nothing is left.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openmm_tsf.analysis.agreement import BASIN, MEAN, POSITIVE, quantity_label
from openmm_tsf.analysis.html_page import (
    decimals_of,
    escape,
    format_duration,
    format_interval,
    format_number,
    format_small,
    format_with_error,
    is_number,
    keep_together,
    render_list,
    render_table,
)

Table = Mapping[str, Any]

_FREE_ENERGY = "delta_F_phi_kT"
#: So many tests that cannot decide are shown.
_MOST_UNDECIDED = 10
#: So many columns of estimates fit on a printed page.
_PRINTED_COLUMNS = 5
_TITLES = {
    "energy_kJ_mol": "⟨U⟩ (kJ/mol)",
    "heat_capacity_kJ_mol_K": "C<sub>V</sub> (kJ/mol/K)",
    _FREE_ENERGY: "ΔF<sub>φ</sub> (kT)",
}
_CHECKS = {
    "energy_ratio_mol_kJ": "slope of ln[P(U)/P(U)] (mol/kJ)",
    "heat_capacity_kJ_mol_K": "change of ⟨U⟩ with T (kJ/mol/K)",
    "basin_ratio": "ln of the ratio of populations",
}
_BOUNDS = {"lower": "at least ", "upper": "at most "}
#: Words and style of a status.
_STATUS = {
    "converged": ("converged", "converged"),
    "not yet": ("not yet converged", "open"),
    "wrong": ("wrong", "wrong"),
    "bounded": ("rare: a bound is enough", "rare"),
}
_DETAILS = (("n_eff", "N<sub>eff</sub>", 0), ("r_hat", "R̂", 2), ("n_visits", "visits", 0))
_COSTS = {
    "md": "molecular dynamics",
    "training": "training",
    "sampling": "sampling",
    "compilation": "of which compiling",
    "expected": "expected at the start",
}


def subtable(content: Any, *keys: str) -> Table:
    """Return a dictionary within others; an empty one where a key is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def rung_names(summary: Table) -> list[str]:
    """Return the temperatures in K as they are written in the keys of a summary."""
    return [f"{kelvin:.2f}" for kelvin in summary.get("temperatures_K", ()) if is_number(kelvin)]


def render_status(status: Any) -> tuple[str, str]:
    """Return the words for a status, and their style."""
    return _STATUS.get(str(status), (str(status), "open"))


def render_estimates(summary: Table) -> str:
    """Return the table of U, C_V, and few other quantities: a row for each temperature."""
    keys = _columns(summary)
    rows = [
        [f"{rung}&nbsp;K", *(_estimate(summary, key, rung) for key in keys)]
        for rung in rung_names(summary)
    ]
    columns = ["T", *(_TITLES.get(key, escape(quantity_label(key))) for key in keys)]
    return render_table(columns, rows, is_large=len(columns) > _PRINTED_COLUMNS) if keys else ""


def _columns(summary: Table) -> list[str]:
    """Return the quantities of the first table: no more than a page is wide, none observed."""
    observed = {f"{name}{POSITIVE}" for name in subtable(summary, "observables")}
    keys = [
        key
        for key in subtable(summary, "quantities")
        if not key.startswith((BASIN, MEAN)) and key not in observed
    ]
    if len(keys) <= _PRINTED_COLUMNS:
        return keys
    return [key for key in keys if key in _TITLES]


def render_others(summary: Table) -> str:
    """Return the table of what was observed, and of torsions that the first table leaves out."""
    columns = _columns(summary)
    keys = [k for k in subtable(summary, "quantities") if k not in columns]
    keys = [key for key in keys if not key.startswith(BASIN)]
    return _by_quantity(summary, "Quantity", {key: _observed_title(summary, key) for key in keys})


def _observed_title(summary: Table, key: str) -> str:
    """Return the symbol of a quantity with its unit, and of an observable what it is."""
    name = key.removeprefix(MEAN).removesuffix(POSITIVE)
    observed = subtable(summary, "observables", name)
    unit = observed.get("unit") if key.startswith(MEAN) else None
    words = f"⟨{name}⟩" if key.startswith(MEAN) else quantity_label(key)
    title = escape(f"{words} ({unit})" if unit else words)
    return title + (_small([observed["definition"]]) if "definition" in observed else "")


def render_basins(summary: Table) -> str:
    """Return the table of populations: a row for each basin, a column for each temperature."""
    keys = [key for key in subtable(summary, "quantities") if key.startswith(BASIN)]
    return _by_quantity(summary, "Basin", {key: escape(key.removeprefix(BASIN)) for key in keys})


def _by_quantity(summary: Table, title: str, titles: Mapping[str, str]) -> str:
    """Return a table with a row for each quantity, a column for each temperature."""
    rungs = rung_names(summary)
    rows = [
        [words, *(_estimate(summary, key, rung) for rung in rungs)] for key, words in titles.items()
    ]
    columns = [title, *(f"{rung} K" for rung in rungs)]
    return render_table(columns, rows, is_large=len(columns) > _PRINTED_COLUMNS) if rows else ""


def _estimate(summary: Table, key: str, rung: str) -> str:
    """Return a cell: the value or its bound, interval, effective samples, status, reference."""
    entry = subtable(summary, "quantities", key, rung)
    if not entry:
        return ""
    main, *lines = _value(entry, is_state=key != _FREE_ENERGY and is_number(entry.get("n_visits")))
    details = [
        f"{words} {format_number(entry[name], decimals)}"
        for name, words, decimals in _DETAILS
        if is_number(entry.get(name))
    ]
    if details:
        lines.append(" · ".join(map(keep_together, details)))
    lines += _reference(summary, key, rung) or _expected(entry)
    cell = keep_together(main) + "".join(f"<small>{line}</small>" for line in lines)
    if "status" not in entry:
        return cell
    words, style = render_status(entry["status"])
    return f'{cell}<small class="{style}"><span class="word">{escape(words)}</span></small>'


def _value(entry: Table, *, is_state: bool) -> list[str]:
    """Return the value with its error and interval; of a state that is hardly seen its bound."""
    value, stderr, low, high = (entry.get(name) for name in ("value", "stderr", "low", "high"))
    with_error, interval = format_with_error(value, stderr), format_interval(low, high)
    if is_state and is_number(value) and is_number(low) and is_number(high):
        if value == 0:
            return [f"never seen: {interval}"]
        if value == 1:
            return [f"never left: {interval}"]
        if not is_number(stderr) or min(value, 1 - value) < 2 * stderr:
            return [interval, keep_together(f"estimate {with_error}")]
    return [with_error, *([keep_together(f"95 %: {interval}")] if interval else [])]


def _reference(summary: Table, key: str, rung: str) -> list[str]:
    """Return the value of the reference, and the difference in standard errors."""
    place = ("basins", key.removeprefix(BASIN)) if key.startswith(BASIN) else (key,)
    compared = subtable(summary, "comparison", *place)
    reference, z = subtable(compared, "reference", rung), subtable(compared, "z").get(rung)
    if not reference:
        return []
    words = format_with_error(reference.get("value"), reference.get("stderr"))
    difference = f"(z {format_number(z, 1, '+')})" if is_number(z) else "(cannot be compared)"
    return [keep_together(f"reference {words}", difference)]


def _expected(entry: Table) -> list[str]:
    """Return the expected population of a state."""
    if not is_number(expected := entry.get("expected_p")):
        return []
    words = format_with_error(expected, entry.get("expected_stderr"))
    origin = entry.get("expected_from")
    return [keep_together(f"expected {words}", *([f"from {escape(origin)}"] if origin else []))]


def render_checks(summary: Table) -> str:
    """Return the tests against Boltzmann distributions and the reference, and notes."""
    notes = subtable(summary, "monitor").get("notes")
    parts = {
        "Boltzmann distribution": _ensemble(summary),
        "Reference": _comparison(summary),
        "Notes": render_list(notes) if notes else "",
    }
    return "\n".join(f"<h3>{title}</h3>\n{text}" for title, text in parts.items() if text)


def _ensemble(summary: Table) -> str:
    rows, n_undecided = [], 0
    for (kind, *place), check in _leaves(subtable(summary, "ensemble_check")):
        *state, pair = place or ("",)
        n_undecided += not is_number(check["z"])
        if not is_number(check["z"]) and n_undecided > _MOST_UNDECIDED:
            continue
        value, stderr = check.get("value"), check.get("stderr")
        bound = _BOUNDS.get(str(check.get("bound")), "")
        cells = [
            f"{escape(pair)} K",
            f"{bound}{format_with_error(value, stderr)}",
            format_number(check.get("expected"), decimals_of(stderr)),
        ]
        title = _CHECKS.get(kind, escape(kind)) + _small(state)
        rows.append([title, *map(keep_together, cells), _decision(check)])
    columns = ["Neighbouring temperatures", "pair", "found", "Boltzmann", "z"]
    left_out = n_undecided - _MOST_UNDECIDED
    more = f"<p>{left_out} more cannot decide: see summary.json.</p>" if left_out > 0 else ""
    return render_table(columns, rows) + more if rows else ""


def _decision(check: Table) -> str:
    """Return z, or why the check cannot decide."""
    if is_number(check["z"]):
        return keep_together(format_number(check["z"], 1, "+"))
    reason = check.get("undecided")
    words = keep_together('<span class="open"><span class="word">cannot decide</span></span>')
    return words + _small([reason] if reason else [])


def _small(texts: Sequence[Any]) -> str:
    return "".join(f"<small>{escape(text)}</small>" for text in texts)


def _leaves(content: Table, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Table]]:
    """Yield the checks of nested dictionaries, each with the keys that lead to it."""
    for key, value in content.items():
        if isinstance(value, Mapping) and "z" in value:
            yield (*path, str(key)), value
        elif isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(key)))


def _comparison(summary: Table) -> str:
    comparison = subtable(summary, "comparison")
    compared = {key: subtable(comparison, key) for key in comparison}
    for name in compared.pop("basins", {}):
        compared[f"{BASIN}{name}"] = subtable(comparison, "basins", name)
    rows = [
        [
            _TITLES.get(key, escape(quantity_label(key))),
            format_number(table["chi2"], 1),
            format_small(table.get("p_value")),
        ]
        for key, table in compared.items()
        if is_number(table.get("chi2"))
    ]
    text = render_table(["All temperatures together", "χ²", "p"], rows) if rows else ""
    distances = [
        [
            f"{escape(rung)} K",
            format_number(subtable(table).get("total_variation"), 3),
            format_number(subtable(table).get("floor_total_variation"), 3),
        ]
        for rung, table in compared.get("ramachandran", {}).items()
    ]
    if distances:
        columns = ["Ramachandran distance", "to the reference", "within the reference"]
        text += render_table(columns, distances)
    return text


def render_moves(summary: Table) -> str:
    """Return the acceptance of moves and swaps, and how replicas were exchanged."""
    rungs, acceptance = rung_names(summary), subtable(summary, "acceptance")
    moves = [
        [escape(name), *(format_number(rates.get(rung), 3) for rung in rungs)]
        for name, rates in acceptance.items()
        if isinstance(rates, Mapping)
    ]
    swaps = [
        [escape(name), ", ".join(format_number(rate, 3) for rate in _neighbours(rates))]
        for name, rates in acceptance.items()
        if isinstance(rates, list) and rates
    ]
    text = render_table(["Accepted", *(f"{rung} K" for rung in rungs)], moves) if moves else ""
    text += render_table(["Accepted", "between neighbours"], swaps) if swaps else ""
    relaxation = subtable(summary, "replica_relaxation").get("iterations")
    facts = (
        ("round trips of the temperature ladder", summary.get("round_trips"), 0),
        ("relaxation time of replicas, in saved iterations", relaxation, 1),
        ("mirror images rejected", summary.get("mirror_images"), 0),
        ("proposals without a finite energy rejected", summary.get("rejected_non_finite"), 0),
    )
    known = [
        f"{words}: {format_number(value, decimals)}"
        for words, value, decimals in facts
        if is_number(value)
    ]
    return text + (render_list(known) if known else "")


def _neighbours(rates: Sequence[Any]) -> Sequence[Any]:
    """Return the rates of neighbouring rungs from a list of them or from a matrix."""
    if isinstance(rates[0], list):
        return [rates[k][k + 1] for k in range(len(rates) - 1)]
    return rates


def render_costs(summary: Table) -> str:
    """Return the energy evaluations and times of MD, training and sampling."""
    evaluations, seconds = (
        subtable(summary, key) for key in ("energy_evaluations", "wall_seconds")
    )
    rows = [
        [
            words,
            format_number(evaluations[key], 0) if key in evaluations else "",
            format_duration(seconds[key]) if key in seconds else "",
        ]
        for key, words in _COSTS.items()
        if key in evaluations or key in seconds
    ]
    return render_table(["", "energy evaluations", "time"], rows) if rows else ""
