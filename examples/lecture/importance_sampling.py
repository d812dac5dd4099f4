"""Importance sampling on the Müller-Brown potential: too narrow, too wide, and what the ESS says.

    python examples/lecture/importance_sampling.py --output examples/results/lecture

Proposals are Gaussians about the deepest minimum, of widths from 0.05 to 10. The effective sample
size of a proposal's own draws, which cannot see what they miss, is shown beside the exact one by
quadrature; so are the estimates of ln Z and of the population of the deepest well. Writes
importance_sampling.json and .png, in seconds.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from openmm_tsf.analysis.plots.style import save_figure
from openmm_tsf.analysis.statistics import log_mean_weight, reverse_ess, weighted_mean
from openmm_tsf.io.files import write_json
from openmm_tsf.potentials import GaussianMixture, MullerBrown
from openmm_tsf.sampling import importance_sampling

TEMPERATURE = 15.0
#: The deepest minimum, and the line y = 0.55 between its well and the other two.
CENTRE, BORDER = (-0.558, 1.442), 0.55
WIDTHS = tuple(np.geomspace(0.05, 10.0, 24).round(4).tolist())


def is_upper(x):
    """Return whether x [n, 2] is in the deepest well, as numbers."""
    return (x[:, 1] > BORDER).double()


def exact_ess(potential, proposal):
    """Return E_q[w]² / E_q[w²] = Z / E_p[w], w = exp(-U/T) / q, by quadrature.

    Too large where p²/q has most of its mass beyond the grid, as for narrow proposals: they have
    less than what underflows.
    """

    highest = 0.0

    def weights(x):
        nonlocal highest
        logs = -potential.formula(x) / TEMPERATURE - proposal.log_prob(x, TEMPERATURE)
        highest = float(logs.max())
        return (logs - highest).exp()

    mean = float(potential.expectation(weights, TEMPERATURE))
    return math.exp(potential.log_partition_function(TEMPERATURE) - math.log(mean) - highest)


def measure(potential, width, n, seed):
    """Return the estimates of a proposal of one width, and its effective sample sizes."""
    centre = torch.tensor([CENTRE], dtype=torch.float64)
    proposal = GaussianMixture(centre, width**2, temperature=TEMPERATURE)
    generator = torch.Generator().manual_seed(seed)
    draws = importance_sampling(proposal, potential, TEMPERATURE, n, generator)
    log_weights = draws.log_weights.flatten()
    of_draws = reverse_ess(log_weights)
    return {
        "width": width,
        "ess": of_draws.fraction,
        "largest_weight": of_draws.largest_weight,
        "exact_ess": exact_ess(potential, proposal),
        "log_z": log_mean_weight(log_weights),
        "p_deepest": weighted_mean(is_upper(draws.x[0]), log_weights),
    }


def plot(rows, exact, path):
    """Draw ESS, the error of ln Z and the population of the deepest well against the width."""
    widths = [row["width"] for row in rows]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.loglog(widths, [row["ess"] for row in rows], "o-", label="of the draws")
    left.loglog(widths, [row["exact_ess"] for row in rows], "--", label="exact")
    left.set_ylim(1e-5, 1.5)
    left.set_ylabel("effective sample size / n")
    left.legend()
    for axes, name, label in ((middle, "log_z", "ln Z"), (right, "p_deepest", "P(deepest well)")):
        values, errors = np.array([row[name] for row in rows]).T
        axes.errorbar(widths, values, errors, fmt="o", label="importance sampling")
        axes.axhline(exact[name], color="black", lw=1, label="quadrature")
        axes.set_xscale("log")
        axes.set_ylabel(label)
        axes.legend()
    for axes in (left, middle, right):
        axes.set_xlabel("width of the proposal")
    figure.suptitle(f"Müller-Brown at T = {TEMPERATURE:g}: Gaussians about the deepest minimum")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the JSON and the figure")
    parser.add_argument("--draws", type=int, default=20_000, help="draws of each proposal")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    potential, folder = MullerBrown(), Path(options.output)
    exact = {
        "log_z": potential.log_partition_function(TEMPERATURE),
        "p_deepest": float(potential.expectation(is_upper, TEMPERATURE)),
    }
    rows = [measure(potential, w, options.draws, options.seed) for w in WIDTHS]
    for row in rows:
        z = {k: (row[k][0] - exact[k]) / row[k][1] if row[k][1] else math.inf for k in exact}
        row["z"] = {k: v if math.isfinite(v) else None for k, v in z.items()}
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "temperature": TEMPERATURE, "centre": CENTRE, "border": BORDER, "draws": options.draws,
        "seed": options.seed, "exact": exact, "proposals": rows,
    }  # fmt: skip
    write_json(folder / "importance_sampling.json", content)
    plot(rows, exact, folder / "importance_sampling.png")
    print("width  ESS     exact    ln Z - exact        P(deepest) - exact")
    for row in rows:
        shifts = [f"{row[k][0] - exact[k]:+.4f} ± {row[k][1]:.4f}" for k in exact]
        print(f"{row['width']:5.2f}  {row['ess']:.4f}  {row['exact_ess']:.1e}", *shifts, sep="  ")


if __name__ == "__main__":
    main()
