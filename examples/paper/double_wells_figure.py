"""The picture of examples/paper/double_wells.py."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from openmm_tsf.analysis.plots.style import save_figure

# Distinct for the colour-blind (Okabe and Ito), and by marks and dashes without colours.
STYLES = {
    "exact": {"color": "#000000", "lw": 1.5},
    "TSF": {"color": "#0072B2", "lw": 1.1},
    "RealNVP": {"color": "#D55E00", "lw": 1.1, "ls": (0, (3.0, 1.2))},
}
SAMPLER = {"color": "#009E73", "ls": "", "marker": "o", "ms": 1.8, "mew": 0}
_FONT, _SMALL, _DPI = 7.5, 6.5, 300


def plot_double_wells(path, summary):
    """Draw the figure from what ``double_wells.py`` writes to its JSON file."""
    rows, marginals = summary["rows"], summary["marginals"]
    temperatures = sorted(marginals, key=float, reverse=True)
    figure = Figure(figsize=(7.2, 8.1))
    outer = figure.add_gridspec(
        2, 1, height_ratios=(2.5, 5.2), hspace=0.17, left=0.075, right=0.985, top=0.955, bottom=0.05
    )
    n_shown = len(marginals[temperatures[0]]["exact"])
    top = outer[0].subgridspec(len(temperatures), n_shown, hspace=0.16, wspace=0.1)
    for row, temperature in enumerate(temperatures):
        for j in range(n_shown):
            axis = figure.add_subplot(top[row, j])
            _draw_marginal(axis, {kind: f[j] for kind, f in marginals[temperature].items()})
            _style(axis)
            axis.set_yticks([])
            if row == len(temperatures) - 1:
                axis.set_xlabel(f"$x_{j + 1}$", fontsize=_FONT, labelpad=1)
            else:
                axis.set_xticklabels([])
            if j == 0:
                axis.set_ylabel(f"density, T = {temperature}", fontsize=_FONT, labelpad=3)
            if j == row == 0:
                _letter(axis, "A")
    _draw_key(figure)
    bottom = outer[1].subgridspec(3, 2, hspace=0.12, wspace=0.2)
    dimensions = sorted({row["dimension"] for row in rows})
    letters = iter("BCDEFG")
    for row, draw in enumerate((_draw_nll, _draw_distance, _draw_ess)):
        for column, d in enumerate(dimensions):
            axis = figure.add_subplot(bottom[row, column])
            draw(axis, [r for r in rows if r["dimension"] == d])
            axis.axvline(1.0, color="0.6", lw=0.8, ls=(0, (2, 2)), zorder=0)
            axis.set_xscale("log")
            _style(axis)
            _letter(axis, next(letters))
            if row == 0:
                axis.set_title(f"d = {d}", fontsize=_FONT, pad=3)
                axis.annotate(
                    "trained here", (1.0, 0.97), xytext=(2, 0), xycoords=("data", "axes fraction"),
                    textcoords="offset points", fontsize=_SMALL, color="0.4", va="top",
                )  # fmt: skip
            if row == 2:
                axis.set_xlabel("T", fontsize=_FONT, labelpad=1)
            else:
                axis.set_xticklabels([])
    save_figure(figure, path, _DPI)


def _style(axis):
    axis.tick_params(labelsize=_SMALL, length=2.5, width=0.6, pad=1.8)
    axis.tick_params(which="minor", length=1.3, width=0.4)
    for spine in axis.spines.values():
        spine.set_linewidth(0.6)


def _letter(axis, letter):
    axis.annotate(
        letter, (0.0, 1.0), xytext=(-3, 3), xycoords="axes fraction", textcoords="offset points",
        fontsize=_FONT + 1.5, fontweight="bold", ha="right", va="bottom",
    )  # fmt: skip


def _draw_key(figure):
    handles = [Line2D([], [], **style) for style in (*STYLES.values(), SAMPLER)]
    names = (
        "exact (in the lower panels: entropy)",
        "TSF",
        "RealNVP",
        "parallel tempering, 100 rungs",
    )
    figure.legend(
        handles, names, loc="upper center", ncols=4, fontsize=_SMALL, frameon=False,
        bbox_to_anchor=(0.53, 0.999), handlelength=2.2, columnspacing=1.6, handletextpad=0.5,
    )  # fmt: skip


def _draw_marginal(axis, densities):
    exact = densities["exact"]
    edges, top = np.array(exact["edges"]), max(exact["density"])
    axis.plot(exact["x"], exact["density"], zorder=2, **STYLES["exact"])
    for kind in ("RealNVP", "TSF"):
        axis.stairs(densities[kind], edges, baseline=None, zorder=3, **STYLES[kind])
        top = max(top, *densities[kind])
    middles = 0.5 * (edges[1:] + edges[:-1])
    axis.plot(middles[::2], densities["sampler"][::2], zorder=4, **SAMPLER)
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(0.0, 1.08 * top)


def by_seed(rows, kind, key):
    """Temperatures [K] and values [seeds, K] of one kind of flow."""
    rows = [row for row in rows if row["flow"] == kind]
    temperatures = sorted({row["temperature"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    values = {(row["seed"], row["temperature"]): row[key] for row in rows}
    return np.array(temperatures), np.array([[values[s, t] for t in temperatures] for s in seeds])


def _draw_flows(axis, rows, key):
    """Median over seeds, each seed, and the range between them."""
    for kind in ("RealNVP", "TSF"):
        temperatures, values = by_seed(rows, kind, key)
        style = STYLES[kind]
        low, high = values.min(axis=0), values.max(axis=0)
        axis.fill_between(temperatures, low, high, color=style["color"], alpha=0.22, lw=0)
        axis.plot(
            temperatures, np.median(values, axis=0), marker="o" if kind == "TSF" else "s", ms=2.4,
            zorder=3, **style,
        )  # fmt: skip


def _draw_nll(axis, rows):
    _draw_flows(axis, rows, "nll")
    temperatures, entropy = by_seed(rows, "TSF", "entropy")
    axis.plot(temperatures, entropy[0], zorder=4, **STYLES["exact"])
    nll = np.concatenate(
        [np.median(by_seed(rows, k, "nll")[1], axis=0) for k in STYLES if k != "exact"]
    )
    low, high = entropy.min(), max(np.quantile(nll, 0.8), entropy.max())
    axis.set_ylim(low - 0.08 * (high - low), high + 0.35 * (high - low))
    axis.set_ylabel("NLL (nats)", fontsize=_FONT, labelpad=2)


def _draw_distance(axis, rows):
    _draw_flows(axis, rows, "distance")
    temperatures, tighter = by_seed(rows, "TSF", "distance_tighter")
    axis.plot(
        temperatures, np.median(tighter, axis=0), color=STYLES["TSF"]["color"], lw=0.9, ls=":"
    )
    axis.set_yscale("log")
    axis.set_ylabel("NLL − entropy (nats)", fontsize=_FONT, labelpad=2)


def _draw_ess(axis, rows):
    _draw_flows(axis, rows, "reverse_ess")
    axis.set_yscale("log")
    axis.set_ylabel("ESS / draws, joint", fontsize=_FONT, labelpad=2)
