"""φ⁴ on a torus: how the acceptance of a flow's draws falls with the size of the lattice.

    python examples/lecture/phi4_torus.py --output examples/results/lecture

Lattices of L = 4 to 10 in the symmetric phase, flows of one architecture on a coupled Gaussian base
measure, trained alike on local chains. The variance of ln(p/q) is extensive: Var = c L². Then the
effective sample size is exp(-c L²), and the acceptance erfc(√(c L²) / 2), both for normally
distributed ln(p/q). Writes phi4_torus.json and .png, in two minutes.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from phi4_training import gaussian_flow, likelihood_settings, local_chains, proposal_quality, train
from tasks import in_parallel

import openmm_tsf as tsf
from openmm_tsf.analysis.plots.style import FONT, REFERENCE_COLOUR, RUN_COLOUR, save_figure
from openmm_tsf.io.files import write_json
from openmm_tsf.potentials import PhiFourTorus

COUPLING, QUARTIC = 0.5, 0.5
SIZES = (4, 6, 8, 10)
WALKERS, ITERATIONS, TUNING = 200, 30, 20
STEPS, BLOCKS, HIDDEN = 200, 4, (64, 64)
TITLES = {"untrained": "coupled Gaussian", "trained": "flow on it"}


def best_base(torus, frames):
    """Return the coupled Gaussian base measure of highest likelihood, and its variance."""
    variances = np.geomspace(0.1, 10.0, 41)
    bases = [torus.coupled_gaussian(float(v)) for v in variances]
    best = int(np.argmax([float(base.log_prob(frames, 1.0).mean()) for base in bases]))
    return bases[best], float(variances[best])


def measure(options, size):
    """Return the numbers of one lattice: of the base measure, and of the flow while training."""
    torus, seed = PhiFourTorus(size, COUPLING, QUARTIC), options.seed
    first = torus.coupled_gaussian(1.0)
    start = first.sample(options.walkers, 1.0, torch.Generator().manual_seed(seed))
    lengths = options.tuning, options.iterations
    dataset = local_chains(first, torus, 1.0, start, *lengths, seed)
    base, variance = best_base(torus, dataset.positions[:: options.iterations // 3])
    flow = tsf.RealNVPFlow.from_dataset(
        dataset, base=base, n_blocks=BLOCKS, hidden=HIDDEN, seed=seed
    )
    settings = likelihood_settings(options.steps)
    held_out = dataset.split().test.positions[:2000]
    generator = torch.Generator().manual_seed(seed)
    before = proposal_quality(gaussian_flow(base, 1.0), torus, 1.0, held_out, generator)
    rows = train(flow, dataset, torus, settings, 2, seed)
    return {
        "size": size, "sites": size**2, "base_variance": variance,
        "n_parameters": flow.n_parameters, "untrained": before, "trained": rows[-1],
    }  # fmt: skip


def fit_growth(rows, which):
    """Return c of Var ln(p/q) = c L² by least squares, and the exponent p of Var ~ (L²)^p.

    Both by the variance over draws and held-out frames, whose mean is symmetric in p and q.
    """
    sites = np.array([row["sites"] for row in rows], dtype=float)
    both = [[row[which][k] for k in ("log_weight_variance", "forward_variance")] for row in rows]
    variance = np.mean(both, axis=1)
    exponent, _ = np.polyfit(np.log(sites), np.log(variance), 1)
    log_ess = np.log([row[which]["ess"][0] for row in rows])
    slope, offset = np.polyfit(sites, log_ess, 1)
    spread = log_ess - slope * sites - offset
    return {
        "variance_per_site": float((variance / sites).mean()),
        "exponent": float(exponent),
        "log_ess_per_site": float(slope), "log_ess_offset": float(offset),
        "log_ess_r_squared": float(1.0 - spread.var() / log_ess.var()),
    }  # fmt: skip


def plot(rows, fits, path):
    """Draw variance, effective sample size and acceptance against the number of sites."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    sites = np.array([row["sites"] for row in rows], dtype=float)
    fine = np.linspace(0.5 * sites[0], 1.04 * sites[-1], 200)
    for which, colour in (("untrained", REFERENCE_COLOUR), ("trained", RUN_COLOUR)):
        numbers, c = [row[which] for row in rows], fits[which]["variance_per_site"]
        variance = [(n["log_weight_variance"] + n["forward_variance"]) / 2 for n in numbers]
        options = {"color": colour, "fmt": "o", "ms": 5, "label": TITLES[which]}
        left.errorbar(sites, variance, **options)
        left.plot(fine, c * fine, color=colour, lw=1)
        for axes, name, curve in (
            (middle, "ess", np.exp(-c * fine)),
            (right, "acceptance", [math.erfc(math.sqrt(c * x) / 2) for x in fine]),
        ):
            values, errors = np.array([n[name] for n in numbers]).T
            axes.errorbar(sites, values, errors, **options)
            axes.plot(fine, curve, color=colour, lw=1)
            axes.set_yscale("log")
    left.set_ylabel("variance of ln(p/q)", fontsize=FONT)
    left.set_title("lines: c L²", fontsize=FONT)
    middle.set_ylabel("effective sample size / n", fontsize=FONT)
    middle.set_title("lines: exp(-c L²)", fontsize=FONT)
    right.set_ylabel("acceptance", fontsize=FONT)
    right.set_title("lines: erfc(√(c L²) / 2)", fontsize=FONT)
    for axes in (left, middle, right):
        axes.set_xlabel("number of sites L²", fontsize=FONT)
        axes.set_xticks(sites)
    left.legend()
    figure.suptitle(f"φ⁴ on a torus, β = {COUPLING:g}, λ = {QUARTIC:g}")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the JSON and the figure")
    parser.add_argument("--walkers", type=int, default=WALKERS, help="local chains to learn from")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="frames of each")
    parser.add_argument("--tuning", type=int, default=TUNING, help="iterations before them")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rows = in_parallel(partial(measure, options), SIZES, options.jobs)
    for row in rows:
        for which, title in TITLES.items():
            (ess, _), (rate, error) = (row[which][k] for k in ("ess", "acceptance"))
            words = f"ESS {ess:.4f}  acceptance {rate:.4f} ± {error:.4f}"
            print(f"L = {row['size']:2d}  {title:16s}  {words}")
    fits = {which: fit_growth(rows, which) for which in TITLES}
    for which, fit in fits.items():
        print(
            f"{TITLES[which]}: variance {fit['variance_per_site']:.4f} L², exponent "
            f"{fit['exponent']:.2f}; ln ESS {fit['log_ess_per_site']:.4f} L² "
            f"{fit['log_ess_offset']:+.2f}, R² {fit['log_ess_r_squared']:.4f}"
        )
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "jobs")}
    settings |= {"coupling": COUPLING, "quartic": QUARTIC, "blocks": BLOCKS, "hidden": HIDDEN}
    write_json(folder / "phi4_torus.json", {**settings, "lattices": rows, "fits": fits})
    plot(rows, fits, folder / "phi4_torus.png")


if __name__ == "__main__":
    main()
