"""``report.html``: the content of ``summary.json`` as one page, with its pictures."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openmm_tsf.analysis.html_page import (
    escape,
    format_duration,
    format_interval,
    format_number,
    format_with_error,
    is_number,
    render_link,
    render_list,
    render_page,
    render_picture,
    render_section,
    render_table,
)
from openmm_tsf.io.files import write_text

REPORT_NAME = "report.html"

_PICTURES = {
    "ramachandran.png": "Ramachandran plots, and histograms of φ and U, at every temperature",
    "thermodynamics.png": "⟨U⟩, C_V and free energies as functions of temperature",
    "diagnostics.png": "Acceptance, exchange of replicas, and running estimates",
}
_FILES = {
    "summary.json": "every number of this page, and more",
    "thermodynamics.csv": "⟨U⟩, C_V and ΔF as functions of temperature, by MBAR",
    "thermodynamics.json": "the same with profiles of φ",
    **_PICTURES,
    "config.json": "what was asked for and chosen",
    "training.csv": "course of the training",
    "flow.pt": "the trained flow",
    "topology.pdb": "the molecule",
    ".dcd": "frames of one temperature",
}
_QUANTITIES = {
    "energy_kJ_mol": "⟨U⟩ (kJ/mol)",
    "heat_capacity_kJ_mol_K": "C<sub>V</sub> (kJ/mol/K)",
    "phi_positive": "P(φ &gt; 0)",
    "delta_F_phi_kT": "ΔF<sub>φ</sub> (kT)",
}
_CHECKS = {
    "energy_ratio_mol_kJ": "slope of ln[P(U)/P(U)] (mol/kJ)",
    "heat_capacity_kJ_mol_K": "change of ⟨U⟩ with T (kJ/mol/K)",
    "basin_ratio": "ln[P(S)/P(S)] of a basin S",
}
#: Words and style classes of a status.
_STATUS = {
    "converged": ("converged", "converged"),
    "not yet": ("not yet converged", "open"),
    "wrong": ("wrong", "wrong"),
}
_LISTS = {
    "wrong": "Wrong beyond the errors",
    "missing": "Missing for convergence",
    "undecided": "Checks that cannot decide",
    "warnings": "Warnings",
}
_COSTS = {
    "md": "molecular dynamics",
    "training": "training",
    "sampling": "sampling",
    "compilation": "of which compiling",
    "expected": "expected at the start",
}


def write_report(
    summary: Mapping[str, Any], folder: str | Path, name: str = "", files: Sequence[str] = ()
) -> None:
    """Write ``report.html`` into a folder: verdict, estimates, pictures, checks and costs.

    Sections whose keys the summary lacks are left out, and so are pictures that are not there.
    Everything of the page is in its one file: it needs neither network nor scripts.

    Parameters
    ----------
    summary
        The content of ``summary.json``, see `openmm_tsf.analysis.summary`.
    folder
        Where the page goes, beside the files that it shows and links to.
    name
        What the page is about, for its title.
    files
        More files to link to, as paths relative to the page.

    Examples
    --------
    >>> from openmm_tsf.analysis.html_report import write_report
    >>> energy = {"300.00": {"mean": 59.4, "stderr": 0.2}}
    >>> write_report({"temperatures_K": [300.0], "energy_kJ_mol": energy}, ".", name="my run")
    >>> page = open("report.html", encoding="utf-8").read()
    >>> "<title>my run" in page, "59.40 ± 0.20" in page
    (True, True)
    """
    folder = Path(folder)
    title = f"{name}: temperature-steerable flow" if name else "Temperature-steerable flow"
    body = [
        _head(summary, name),
        render_section("quantities", "Temperatures", _quantities(summary)),
        render_section("basins", "Basins", _basins(summary)),
        render_section("pictures", "Pictures", _pictures(folder)),
        render_section("checks", "Checks", _checks(summary)),
        render_section("sampling", "Moves", _moves(summary)),
        render_section("costs", "Costs", _costs(summary)),
        render_section("next", "What to do next", _next(summary)),
        render_section("files", "Files", _files(folder, files)),
        _versions(summary),
    ]
    write_text(folder / REPORT_NAME, render_page(title, "\n".join(filter(None, body))))


def _table(content: Any, *keys: str) -> Mapping[str, Any]:
    """Return a dictionary within others; an empty one where a key is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _rungs(summary: Mapping[str, Any]) -> list[str]:
    return [f"{kelvin:.2f}" for kelvin in summary.get("temperatures_K", ()) if is_number(kelvin)]


def _head(summary: Mapping[str, Any], name: str) -> str:
    counts = (
        ("n_walkers", "walkers"),
        ("n_iterations", "iterations"),
        ("n_samples_per_rung", "samples at every temperature"),
    )
    facts = [
        f"{format_number(summary[key], 0)} {words}"
        for key, words in counts
        if is_number(summary.get(key))
    ]
    if rungs := _rungs(summary):
        facts.append(f"{', '.join(rungs)} K")
    verdict = _table(summary, "verdict")
    lines = [f"<header>\n<h1>{escape(name or 'Temperature-steerable flow')}</h1>"]
    lines.append(f'<p class="muted">{" · ".join(facts)}</p>')
    if verdict:
        lines.append(_verdict(summary, verdict))
    return "\n".join([*lines, "</header>"])


def _verdict(summary: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    status = verdict.get("status")
    _, style = _STATUS.get(str(status), (status, "open"))
    parts = [f'<p><span class="word">{escape(_sentence(summary, verdict))}</span></p>']
    for key, words in _LISTS.items():
        if lines := verdict.get(key):
            parts.append(f"<h3>{words}</h3>{render_list(lines)}")
    if verdict.get("advice") or verdict.get("predicted"):
        parts.append('<p><a href="#next">What to do next</a></p>')
    return f'<div class="verdict {style}">{"".join(parts)}</div>'


def _sentence(summary: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    status = str(verdict.get("status"))
    words, _ = _STATUS.get(status, (status, ""))
    if status == "converged" and "comparison" in summary:
        return f"{words}, in agreement with the reference and with Boltzmann"
    return words


def _status_word(entry: Mapping[str, Any]) -> str:
    status = entry.get("status")
    if status is None:
        return ""
    words, style = _STATUS.get(str(status), (status, "open"))
    return f'<small class="{style}"><span class="word">{escape(words)}</span></small>'


def _estimate(entry: Mapping[str, Any]) -> str:
    """Return a cell: the value or its bound, then interval, effective samples and status."""
    value = next((entry[key] for key in ("value", "mean", "p") if key in entry), None)
    low, high = entry.get("low"), entry.get("high")
    if value == 0 and is_number(high) and high > 0:
        main, details = f"never seen: at most {high:.2g}", []
    else:
        main, details = format_with_error(value, entry.get("stderr")), []
        if is_number(low) and is_number(high):
            details.append(f"95 %: {format_interval(low, high)}")
    for key, words, decimals in (
        ("n_eff", "N_eff", 0),
        ("r_hat", "R̂", 2),
        ("n_visits", "visits", 0),
    ):
        if is_number(entry.get(key)):
            details.append(f"{words} {format_number(entry[key], decimals)}")
    small = f"<small>{' · '.join(details)}</small>" if details else ""
    return main + small + _status_word(entry)


def _quantities(summary: Mapping[str, Any]) -> str:
    quantities = {key: _table(summary, key) for key in _QUANTITIES} | _table(summary, "quantities")
    titles = {
        key: _QUANTITIES.get(key, escape(key))
        for key, table in quantities.items()
        if isinstance(table, Mapping) and any(_table(table, rung) for rung in _rungs(summary))
    }
    rows = []
    for rung in _rungs(summary):
        cells = [
            _estimate(entry) + _beside_reference(summary, key, rung) if entry else ""
            for key in titles
            for entry in [_table(quantities, key, rung)]
        ]
        rows.append([f"{rung} K", *cells])
    return render_table(["T", *titles.values()], rows) if titles else ""


def _beside_reference(summary: Mapping[str, Any], key: str, rung: str) -> str:
    compared = _table(summary, "comparison", key)
    reference, z = _table(compared, "reference", rung), _table(compared, "z").get(rung)
    if not reference:
        return ""
    words = format_with_error(reference.get("value"), reference.get("stderr"))
    return f"<small>reference {words}{_in_errors(z)}</small>"


def _in_errors(z: Any) -> str:
    return f" (z {z:+.1f})".replace("-", "\N{MINUS SIGN}") if is_number(z) else ""


def _basins(summary: Mapping[str, Any]) -> str:
    basins, rungs = _table(summary, "basins"), _rungs(summary)
    rows = []
    for name in basins:
        cells = []
        for rung in rungs:
            entry = _table(basins, name, rung)
            expected = entry.get("expected")
            small = f"<small>expected {expected:.2g}</small>" if is_number(expected) else ""
            cells.append(_estimate(entry) + small if entry else "")
        rows.append([escape(name), *cells])
    return render_table(["Basin", *(f"{rung} K" for rung in rungs)], rows) if rows else ""


def _pictures(folder: Path) -> str:
    paths = {folder / name: caption for name, caption in _PICTURES.items()}
    return "\n".join(
        render_picture(path, caption) for path, caption in paths.items() if path.is_file()
    )


def _leaves(content: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yield the checks of nested dictionaries, each with the keys that lead to it."""
    if "z" in content:
        yield path, content
        return
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(key)))


def _checks(summary: Mapping[str, Any]) -> str:
    parts = []
    rows = []
    for (kind, *place), check in _leaves(_table(summary, "ensemble_check")):
        z = check["z"]
        decided = f"{z:+.1f}".replace("-", "\N{MINUS SIGN}") if is_number(z) else "cannot decide"
        rows.append(
            [
                f"{_CHECKS.get(kind, escape(kind))}<small>{escape(', '.join(place))} K</small>",
                format_with_error(check.get("value"), check.get("stderr")),
                format_number(check.get("expected"), 4),
                decided,
            ]
        )
    if rows:
        columns = ["Between neighbouring temperatures", "found", "Boltzmann", "z"]
        parts.append(f"<h3>Boltzmann distribution</h3>{render_table(columns, rows)}")
    parts += [_reference(summary), _monitor(summary)]
    return "\n".join(filter(None, parts))


def _reference(summary: Mapping[str, Any]) -> str:
    comparison = _table(summary, "comparison")
    rows = []
    for key, compared in comparison.items():
        if isinstance(compared, Mapping) and is_number(compared.get("chi2")):
            p_value = format_number(compared.get("p_value"), 3)
            title = _QUANTITIES.get(key, escape(key))
            rows.append([title, format_number(compared["chi2"], 1), p_value])
    text = render_table(["Over all temperatures", "χ²", "p"], rows) if rows else ""
    distances = [
        [
            f"{escape(rung)} K",
            format_number(_table(table).get("total_variation"), 3),
            format_number(_table(table).get("floor_total_variation"), 3),
        ]
        for rung, table in _table(comparison, "ramachandran").items()
    ]
    if distances:
        columns = ["Ramachandran plots", "total variation", "two blocks of the reference"]
        text += render_table(columns, distances)
    return f"<h3>Reference</h3>{text}" if text else ""


def _monitor(summary: Mapping[str, Any]) -> str:
    monitor = _table(summary, "monitor")
    notes = [] if "verdict" in summary else list(monitor.get("warnings", ()))
    notes += monitor.get("notes", ())
    return f"<h3>Notes</h3>{render_list(notes)}" if notes else ""


def _moves(summary: Mapping[str, Any]) -> str:
    rungs, rows = _rungs(summary), []
    for name, rates in _table(summary, "acceptance").items():
        if isinstance(rates, Mapping):
            cells = [format_number(rates.get(rung), 3) for rung in rungs]
            rows.append([escape(name), *cells])
    text = ""
    if rows:
        text = render_table(["Accepted", *(f"{rung} K" for rung in rungs)], rows)
    swaps = [
        [escape(name), ", ".join(format_number(rate, 3) for rate in _neighbours(rates))]
        for name, rates in _table(summary, "acceptance").items()
        if isinstance(rates, list) and rates
    ]
    if swaps:
        text += render_table(["Swaps accepted", "between neighbouring temperatures"], swaps)
    facts = [
        f"{words}: {format_number(value, decimals)}"
        for words, value, decimals in (
            ("round trips of the temperature ladder", summary.get("round_trips"), 0),
            (
                "relaxation time of replicas, in saved iterations",
                _table(summary, "replica_relaxation").get("iterations"),
                1,
            ),
            ("mirror images rejected", summary.get("mirror_images"), 0),
            ("proposals without a finite energy rejected", summary.get("rejected_non_finite"), 0),
        )
        if is_number(value)
    ]
    return text + (render_list(facts) if facts else "")


def _neighbours(rates: Sequence[Any]) -> Sequence[Any]:
    """Return the rates of neighbouring rungs from a list of them or from a matrix."""
    if isinstance(rates[0], list):
        return [rates[k][k + 1] for k in range(len(rates) - 1)]
    return rates


def _costs(summary: Mapping[str, Any]) -> str:
    evaluations = _table(summary, "energy_evaluations")
    seconds = _table(summary, "wall_seconds")
    rows = []
    for key, words in _COSTS.items():
        if key in evaluations or key in seconds:
            count = format_number(evaluations[key], 0) if key in evaluations else ""
            time = format_duration(seconds[key]) if key in seconds else ""
            rows.append([words, count, time])
    return render_table(["", "energy evaluations", "time"], rows) if rows else ""


def _next(summary: Mapping[str, Any]) -> str:
    verdict = _table(summary, "verdict")
    text = render_list(verdict["advice"]) if verdict.get("advice") else ""
    predicted = _table(verdict, "predicted")
    names = {
        "iterations": "iterations in all",
        "energy_evaluations": "energy evaluations",
        "wall_seconds": "time",
    }
    facts = [
        f"{names.get(key, key)}: "
        + (format_duration(value) if key == "wall_seconds" else format_number(value, 0))
        for key, value in predicted.items()
        if is_number(value)
    ]
    if facts:
        text += f"<p>Predicted for convergence</p>{render_list(facts)}"
    return text


def _files(folder: Path, more: Sequence[str]) -> str:
    names = [name for name in _FILES if (folder / name).is_file()]
    items = []
    for name in [*names, *(path for path in more if path not in names)]:
        words = _FILES.get(Path(name).name, _FILES.get(Path(name).suffix, ""))
        items.append(f"<li>{render_link(name, name)} {escape(words)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _versions(summary: Mapping[str, Any]) -> str:
    versions = _table(summary, "versions")
    if not versions:
        return ""
    words = ", ".join(f"{escape(name)} {escape(value)}" for name, value in versions.items())
    return f'<footer><p class="muted">{words}</p></footer>'
