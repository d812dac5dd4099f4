"""The tables and the figure of cost.py."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from openmm_tsf.io.files import write_text

METADYNAMICS = "metadynamics"
#: How the flow of a run is used (lean_sampling.py), and how it is called in tables.
WAYS = {"chain": "Markov chain", "draws": "weighted draws", "chosen draws": "draws chosen by φ"}
BEGINS = ("nothing", "frames")
FIGURES = {
    "n_eff_per_million": "N_eff per 10⁶ evaluations, sampling only",
    "sampling_only": "over replica exchange",
    "over_metadynamics": "over metadynamics",
    "n_eff_per_cpu_second": "N_eff per CPU second, sampling only",
    "per_second_sampling": "over replica exchange",
}
FIGURES_ALL_IN = {
    "all_in": "over replica exchange, 10⁷ evaluations all in",
    "break_even_evaluations": "as many as replica exchange from … evaluations on",
    "per_second_5_minutes": "over replica exchange, 5 minutes all in",
    "per_second_20_minutes": "over replica exchange, 20 minutes all in",
    "seconds_until_error": "seconds until 0.1 kT",
}
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
    reference, flows = report["reference"], report["flows"]
    lines = [
        f"Reference: P(φ>0) = {reference['p']:.4f} ± {reference['stderr']:.4f} at 300 K, P(φ>0, "
        f"|ψ|>120°) = {reference['p_hidden']:.4f} ± {reference['p_hidden_stderr']:.4f}. 0.1 kT "
        f"takes {short(report['n_eff_for_0.1_kT'])} effective samples. {report['cores']} cores.",
        "",
    ]
    head = ["OpenMM", "runs × 10⁶ evaluations", "ΔF_φ (kT)", "z", "N_eff per 10⁶"]
    head += ["by correlation alone", "steps per CPU second", "seconds until 0.1 kT"]
    rows = [
        [
            name_of(method),
            f"{row['runs']} × {row['n_evaluations'] / row['runs'] / 1e6:.1f}",
            free_energy(row),
            signed(row["z"]),
            short(row["n_eff_per_million"]),
            short(row.get("n_eff_per_million_correlation")),
            short(report["rates"][method]),
            short(row["seconds_until_error"]),
        ]
        for method, row in report["samplers"].items()
    ]
    lines += table(head, rows)
    head = ["run", "paid: 10⁶ evaluations; seconds"]
    for name in WAYS.values():
        head += [f"{name}: ΔF_φ (kT), z", "P(φ>0, ψ>120°), z", "N_eff per 10⁶, per CPU second"]
    rows = []
    for flow in flows:
        ratios = flow["estimates"]["chain"]["ratios"]
        row = [
            flow["run"],
            pair(ratios, "paid_evaluations", 1e-6) + "; " + pair(ratios, "paid_seconds"),
        ]
        for way in WAYS:
            estimate = flow["estimates"][way]
            hidden = estimate["hidden"]
            row += [
                f"{free_energy(estimate)}, {signed(estimate['z'])}",
                f"{hidden['p']:.4f}, {signed(hidden['z'])}",
                f"{short(estimate['n_eff_per_million'])}, "
                f"{short(estimate['n_eff_per_cpu_second'])}",
            ]
        rows.append(row)
    lines += table(head, rows)
    lines += ["Two figures: from nothing / from frames that are there already.", ""]
    over = report["over_the_runs"]
    rows = [
        [name, *(both(over[way], key) for way in WAYS)] for key, name in FIGURES.items()
        if key in over["chain"]
    ]  # fmt: skip
    rows += [
        [
            f"{name}, from nothing / from frames",
            *(
                " / ".join(both(over[way], f"{key}_from_{begin}") for begin in BEGINS)
                for way in WAYS
            ),
        ]
        for key, name in FIGURES_ALL_IN.items()
    ]
    rows.append(
        [
            "φ>0, ψ>120° seen, abs(z) < 3",
            *(f"{over[way]['hidden_basin_right']} of {len(flows)}" for way in WAYS),
        ]
    )
    if "mean" in over["chain"]:
        rows.append(["mean ΔF_φ (kT) and z", *(mean_with_z(over[way]) for way in WAYS)])
        rows.append(
            [
                "p of the runs' spread against their errors",
                *(short(over[way]["p_spread"]) for way in WAYS),
            ]
        )
    lines += table([f"worst of {len(flows)} runs (median)", *WAYS.values()], rows)
    lines += ["For the front page:", ""]
    lines += table(["", "this package", "compared with"], closing_rows(report))
    write_text(path, "\n".join(lines))
    print("\n".join(lines))


def both(figures, key):
    """The worst of the runs, and their median."""
    return f"{short(figures[key]['worst'])} ({short(figures[key]['median'])})"


def mean_with_z(figures):
    """The mean over the runs."""
    return f"{free_energy(figures['mean'])}, {signed(figures['mean']['z'])}"


def closing_rows(report):
    """The row for the table of README."""
    over, n, samplers = report["over_the_runs"], len(report["flows"]), report["samplers"]
    exchange = {m: row for m, row in samplers.items() if m != METADYNAMICS}

    def others(key, best):
        """The best ladder, and metadynamics."""
        method = best(exchange, key=lambda m: exchange[m][key])
        names = [f"{short(samplers[method][key])} by OpenMM's replica exchange ({method} rungs)"]
        if METADYNAMICS in samplers:
            names.append(f"{short(samplers[METADYNAMICS][key])} by its metadynamics on φ, ψ")
        return ", ".join(names)

    chain, draws = over["chain"], over["draws"]
    until, even = "seconds_until_error_from_nothing", "break_even_evaluations_from_nothing"
    return [
        [
            f"[{n} trainings](examples/results/README.md#costs-of-several-trainings) with MD of "
            "their own: effective samples of 1[φ>0] at 300 K per 10⁶ evaluations of sampling; "
            "seconds until ΔF_φ is known to 0.1 kT, all included; worst (median)",
            f"{both(chain, 'n_eff_per_million')} by a Markov chain, "
            f"{both(draws, 'n_eff_per_million')} by weighted draws; {both(chain, until)} s",
            f"{others('n_eff_per_million', max)}; {others('seconds_until_error', min)}; the flow "
            f"pays off from {short(chain[even]['worst'])} evaluations on",
        ]
    ]


def pair(ratios, key, factor=1.0):
    """The two figures of a run."""
    return " / ".join(short(factor * ratios[begin][key]) for begin in BEGINS)


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
        speed = report["cores"] * report["rates"][METADYNAMICS]
        curve = row["curve"]
        # Runs side by side on the cores are averaged.
        t = report["cores"] * np.array(curve["evaluations"]) / speed
        error = np.array(curve["error_kT"]) / math.sqrt(report["cores"])
        right.plot(t, error, c=RED, lw=0.7, alpha=0.6, label="its error, measured")
    for begin, color in (("nothing", BLUE), ("frames", "#6fa8dc")):
        label = f"flow and chain, from {begin}"
        for flow in report["flows"]:
            estimate = flow["estimates"]["chain"]
            entry, rate = estimate["ratios"][begin], estimate["n_eff_per_million"] / 1e6
            n = rate * (evaluations - entry["paid_evaluations"])
            left.plot(evaluations, np.where(n > 1, n, np.nan), c=color, lw=0.9, label=label)
            speed = report["cores"] * estimate["n_eff_per_cpu_second"]
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
