"""The tables and the figure of cost.py."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from openmm_tsf.io.files import write_text

METADYNAMICS = "metadynamics"
BLUE, RED, GREY = "#0b5394", "#c0392b", "#7f8c8d"


def name_of(method):
    """How a method of OpenMM is called in tables."""
    return "Metadynamics on φ, ψ" if method == METADYNAMICS else f"replica exchange, {method} rungs"


def short(value):
    """Three digits of a number, thousands in full."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 100 else f"{value:.3g}"


def signed(value):
    """A z score."""
    return "–" if value is None else f"{value:+.1f}"


def free_energy(row):
    """Delta F with its error; where phi > 0 was never visited it has none."""
    if row["delta_F_stderr"] is None:
        return "–"
    return f"{row['delta_F_kT']:.2f} ± {row['delta_F_stderr']:.2f}"


def table(head, rows):
    """Lines of a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def write_tables(report, path):
    """Write what was measured of each method, each run, and over the runs."""
    reference, rates = report["reference"], report["rates"]
    lines = [
        f"Reference: P(φ>0) = {reference['p']:.4f} ± {reference['stderr']:.4f} at 300 K, P(φ>0, "
        f"|ψ|>120°) = {reference['p_hidden']:.4f} ± {reference['p_hidden_stderr']:.4f}. 0.1 kT "
        f"takes {short(report['n_eff_for_0.1_kT'])} effective samples. {report['cores']} cores.",
        "",
    ]
    rows = [
        [
            name_of(method),
            f"{row['runs']} × {row['n_evaluations'] / row['runs'] / 1e6:.1f}",
            free_energy(row),
            signed(row["z"]),
            short(row["n_eff_per_million"]),
            short(rates[method]["per_second"]),
            short(row["seconds_until_error"]),
        ]
        for method, row in report["samplers"].items()
    ]
    head = [
        "OpenMM",
        "runs × 10⁶ evaluations",
        "ΔF_φ (kT)",
        "z",
        "N_eff per 10⁶",
        "steps per core and s",
    ]
    lines += table([*head, "seconds until 0.1 kT"], rows)
    rows = []
    for flow in report["flows"]:
        ratios, hidden = flow["ratios"], flow["hidden"]
        nothing, frames = ratios["nothing"], ratios["frames"]
        rows.append(
            [
                flow["run"],
                free_energy(flow),
                signed(flow["z"]),
                f"{hidden['p']:.4f} ({hidden['visits']} visits, z {signed(hidden['z'])})",
                short(flow["n_eff_per_million"]),
                short(flow["weighted_draws"]["n_eff_per_million"]),
                short(ratios["sampling_only"]),
                pair(nothing, frames, "all_in"),
                pair(nothing, frames, "break_even_evaluations", 1e-6),
                pair(nothing, frames, "per_second_5_minutes"),
                pair(nothing, frames, "per_second_20_minutes"),
                pair(nothing, frames, "seconds_until_error"),
            ]
        )
    head = [
        "run",
        "ΔF_φ (kT)",
        "z",
        "P(φ>0, ψ>120°)",
        "N_eff per 10⁶",
        "weighted draws",
        "sampling only ×",
    ]
    head += [
        "all in at 10⁷ ×",
        "break-even, 10⁶",
        "5 minutes ×",
        "20 minutes ×",
        "seconds until 0.1 kT",
    ]
    lines += ["Two figures: from nothing / from frames that are there already.", ""]
    lines += table(head, rows)
    hidden = report["over_the_runs"]["hidden_basin"]
    lines += [
        f"The basin φ>0, |ψ|>120° is visited, |z| < 3, in {hidden['right']} of {hidden['of']}.",
        "",
    ]
    rows = [
        [key.replace("_", " "), short(entry["worst"]), short(entry["median"])]
        for key, entry in report["over_the_runs"].items()
        if key != "hidden_basin"
    ]
    lines += table([f"of {len(report['flows'])} runs", "worst", "median"], rows)
    lines += ["For the front page:", ""]
    lines += table(["", "this package", "compared with"], closing_rows(report))
    write_text(path, "\n".join(lines))
    print("\n".join(lines))


def closing_rows(report):
    """The rows for the table of README."""
    over, n = report["over_the_runs"], len(report["flows"])
    samplers = report["samplers"]
    exchange = {m: row for m, row in samplers.items() if m != METADYNAMICS}

    def others(key, best):
        """The best ladder, and metadynamics."""
        method = best(exchange, key=lambda m: exchange[m][key])
        names = [f"{short(samplers[method][key])}, OpenMM's replica exchange on {method} rungs"]
        if METADYNAMICS in samplers:
            names.append(f"{short(samplers[METADYNAMICS][key])}, its metadynamics on φ, ψ")
        return "; ".join(names)

    def spread(key):
        return f"{short(over[key]['worst'])} (median {short(over[key]['median'])})"

    rates = [flow["n_eff_per_million"] for flow in report["flows"]]
    until = "seconds_until_error_from_"
    all_in = f"{spread('all_in_from_nothing')} times as many"
    return [
        [
            "Effective samples of 1[φ>0] at 300 K per 10⁶ energy evaluations, sampling only, worst "
            f"of {n} trainings",
            f"{short(min(rates))} (median {short(float(np.median(rates)))})",
            others("n_eff_per_million", max),
        ],
        [
            "the same with MD and training paid, 10⁷ evaluations in all",
            all_in,
            "replica exchange, best ladder; as many from "
            f"{short(over['break_even_evaluations_from_nothing']['worst'])} evaluations on",
        ],
        [
            f"Seconds on {report['cores']} cores until ΔF_φ at 300 K is known to 0.1 kT, worst of "
            f"{n}",
            f"{spread(until + 'frames')} from the shipped frames, {spread(until + 'nothing')} from "
            "nothing",
            others("seconds_until_error", min),
        ],
    ]


def pair(nothing, frames, key, factor=1.0):
    """The two figures of a run."""
    return " / ".join(short(None if e[key] is None else factor * e[key]) for e in (nothing, frames))


def draw(report, path: Path):
    """Draw effective samples against evaluations, and the error of delta F against seconds."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    evaluations, seconds = np.geomspace(1e5, 1e8, 200), np.geomspace(1, 1e5, 200)
    needed, p = report["n_eff_for_0.1_kT"], report["reference"]["p"]
    for style, (method, row) in zip(
        ("-", "--", "-.", ":"), report["samplers"].items(), strict=False
    ):
        rate = row["n_eff_per_million"] / 1e6
        color = RED if method == METADYNAMICS else GREY
        label = name_of(method)
        paid = row["equilibration_evaluations"]
        left.plot(
            evaluations,
            rate * np.where(evaluations > paid, evaluations - paid, np.nan),
            style,
            c=color,
            label=label,
        )
        until = row["seconds_until_error"]
        right.plot(seconds, 0.1 * np.sqrt(until / seconds), style, c=color, label=label)
    if (row := report["samplers"].get(METADYNAMICS)) is not None:
        speed = report["cores"] * report["rates"][METADYNAMICS]["per_second"]
        curve = row["curve"]
        # Runs side by side on the cores are averaged.
        t = report["cores"] * np.array(curve["evaluations"]) / speed
        error = np.array(curve["error_kT"]) / math.sqrt(report["cores"])
        right.plot(t, error, c=RED, lw=0.7, alpha=0.6, label="its error, measured")
    for begin, color in (("nothing", BLUE), ("frames", "#6fa8dc")):
        label = f"flow, from {begin}"
        for flow in report["flows"]:
            entry, rate = flow["ratios"][begin], flow["n_eff_per_million"] / 1e6
            n = rate * (evaluations - entry["paid_evaluations"])
            left.plot(evaluations, np.where(n > 1, n, np.nan), c=color, lw=0.9, label=label)
            speed = report["cores"] * flow["n_eff_per_core_second"]
            n = speed * (seconds - entry["paid_seconds"])
            error = 1 / np.sqrt(np.where(n > 100, n, np.nan) * p * (1 - p))
            right.plot(seconds, error, c=color, lw=0.9, label=label)
            label = None
    right.axhline(0.1, c="k", lw=0.6)
    left.axhline(needed, c="k", lw=0.6)
    left.set_xlabel("energy evaluations, MD and training included")
    left.set_ylabel("effective samples of 1[φ>0] at 300 K")
    right.set_xlabel(f"seconds on {report['cores']} cores")
    right.set_ylabel("standard error of ΔF(φ) at 300 K (kT)")
    right.set_ylim(0.005, 3)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)
