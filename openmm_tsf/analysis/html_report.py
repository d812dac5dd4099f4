"""``report.html``: the content of ``summary.json`` as one page, with its pictures."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openmm_tsf.analysis.html_page import (
    escape,
    format_duration,
    format_number,
    is_number,
    render_contents,
    render_link,
    render_list,
    render_page,
    render_picture,
    render_section,
)
from openmm_tsf.analysis.html_tables import (
    render_basins,
    render_checks,
    render_costs,
    render_estimates,
    render_moves,
    render_others,
    render_status,
    rung_names,
    subtable,
)
from openmm_tsf.analysis.report import shorten
from openmm_tsf.analysis.verdict import NOT_YET
from openmm_tsf.io.files import write_text

_SUBJECT = "temperature-steerable flow"
_PICTURES = {
    "ramachandran.png": "Ramachandran plots, and histograms of φ and U, at every temperature",
    "thermodynamics.png": "⟨U⟩, heat capacity and free energies as functions of temperature",
    "observables.png": "U and what was observed: histograms, running estimates, means",
    "diagnostics.png": "acceptance, exchange of replicas, and running estimates",
}
_TORSIONS = "Maps, histograms at every temperature, and running populations of the wells."
_FILES = {
    "summary.json": "every number of this page, and more",
    "thermodynamics.csv": "⟨U⟩, heat capacity and ΔF as functions of temperature, by MBAR",
    "thermodynamics.json": "the same, with profiles of a dihedral",
    **_PICTURES,
    "config.json": "what was asked for and chosen",
    "training.csv": "the course of the training",
    "flow.pt": "the trained flow",
    "topology.pdb": "the molecule",
}
_REASONS = {
    "wrong": "Wrong beyond the errors",
    "missing": "Missing for convergence",
    "undecided": "Checks that cannot decide",
    "warnings": "Warnings",
}


def write_report(
    summary: Mapping[str, Any],
    folder: str | Path,
    name: str = "",
    files: Sequence[str] = (),
    torsions: Mapping[str, str] | None = None,
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
        Of the run directory, the title of the page.
    files
        More files to link to, as paths relative to the page.
    torsions
        The titles of the figures of torsions, a residue each, by their file names.

    Examples
    --------
    >>> from pathlib import Path
    >>> from openmm_tsf.analysis.html_report import write_report
    >>> energy = {"300.00": {"value": 59.4, "stderr": 0.2, "status": "converged"}}
    >>> summary = {"temperatures_K": [300.0], "quantities": {"energy_kJ_mol": energy}}
    >>> write_report(summary, ".", name="my run")
    >>> page = Path("report.html").read_text(encoding="utf-8")
    >>> "<title>my run" in page, "59.40 ± 0.20" in page
    (True, True)
    """
    folder = Path(folder)
    sections = [
        ("reasons", "Reasons", _reasons(summary)),
        ("estimates", "Estimates", render_estimates(summary)),
        ("observables", "Observables and torsions", render_others(summary)),
        ("basins", "Basins", render_basins(summary)),
        ("pictures", "Pictures", _pictures(folder)),
        ("torsions", "Torsions", _torsions(folder, torsions or {})),
        ("checks", "Checks", render_checks(summary)),
        ("moves", "Moves", render_moves(summary)),
        ("costs", "Costs", render_costs(summary)),
        ("next", "What to do next", _next(summary, name)),
        ("files", "Files", _files(folder, files)),
    ]
    body = [
        _head(summary, name),
        render_contents((key, title) for key, title, content in sections if content),
        *(render_section(*section) for section in sections),
        _versions(summary),
    ]
    title = f"{name}: {_SUBJECT}" if name else _SUBJECT.capitalize()
    write_text(folder / "report.html", render_page(title, "\n".join(filter(None, body))))


def _head(summary: Mapping[str, Any], name: str) -> str:
    facts = [
        f"{format_number(summary[key], 0)} {words}"
        for key, words in (
            ("n_walkers", "walkers"),
            ("n_iterations", "iterations"),
            ("n_samples_per_rung", "samples at every temperature"),
        )
        if is_number(summary.get(key))
    ]
    if is_number(summary.get("n_frames_per_rung")):
        facts.append(f"{format_number(summary['n_frames_per_rung'], 0)} of them with frames")
    if rungs := rung_names(summary):
        facts.append(f"{', '.join(rungs)} K")
    start = subtable(summary, "burn_in").get("start")
    if is_number(start) and start > 0:
        facts.append(f"burn-in of {format_number(start, 0)} iterations left out")
    lines = [
        f"<h1>{escape(name or _SUBJECT.capitalize())}</h1>",
        f'<p class="muted">{" · ".join(facts)}</p>',
    ]
    verdict = subtable(summary, "verdict")
    if verdict:
        words, style = render_status(verdict.get("status"))
        # The sentence begins with these words.
        rest = str(verdict.get("sentence", words)).removeprefix(words)
        sentence = f'<span class="word">{escape(words)}</span>{escape(rest)}'
        lines.append(f'<div class="verdict {style}"><p>{sentence}</p></div>')
    return "\n".join(["<header>", *lines, "</header>"])


def _reasons(summary: Mapping[str, Any]) -> str:
    verdict = subtable(summary, "verdict")
    return "\n".join(
        f"<h3>{words}</h3>\n{render_list(shorten(verdict[key]))}"
        for key, words in _REASONS.items()
        if verdict.get(key)
    )


def _pictures(folder: Path) -> str:
    return "\n".join(
        render_picture(folder / name, f"{caption[:1].upper()}{caption[1:]}.")
        for name, caption in _PICTURES.items()
        if (folder / name).is_file()
    )


def _torsions(folder: Path, titles: Mapping[str, str]) -> str:
    return "\n".join(
        f"<h3>{escape(title)}</h3>\n{render_picture(folder / name, _TORSIONS)}"
        for name, title in titles.items()
        if (folder / name).is_file()
    )


def _next(summary: Mapping[str, Any], name: str) -> str:
    verdict = subtable(summary, "verdict")
    text = render_list(verdict["advice"]) if verdict.get("advice") else ""
    predicted = subtable(verdict, "predicted")
    if not is_number(iterations := predicted.get("n_iterations")):
        return text
    about = "At least" if predicted.get("at_least") else "About"
    evaluations = format_number(predicted.get("energy_evaluations"), 0)
    text += (
        f"\n<p>{about} {format_number(iterations, 0)} iterations of production in all would be "
        f"enough: {evaluations} energy evaluations, "
        f"{format_duration(predicted.get('wall_seconds'))}.</p>"
    )
    if verdict.get("status") != NOT_YET:
        return text
    words = ("sample", "--output", name or "RUN", "--iterations", f"{iterations:.0f}", "--resume")
    return f"{text}\n<pre><code>openmm-tsf {escape(shlex.join(words))}</code></pre>"


def _files(folder: Path, more: Sequence[str]) -> str:
    names = [name for name in _FILES if (folder / name).is_file()]
    items = []
    for path in [*names, *(path for path in more if path not in names)]:
        name = path.rsplit("/", 1)[-1]
        words = "frames of one temperature" if name.endswith(".dcd") else _FILES.get(name, "")
        items.append(f"<li>{render_link(path, name)} {escape(words)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _versions(summary: Mapping[str, Any]) -> str:
    versions = subtable(summary, "versions")
    words = ", ".join(f"{escape(name)} {escape(value)}" for name, value in versions.items())
    return f'<footer><p class="muted">{words}</p></footer>' if words else ""
